"""A room made through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.desk import Call, Desk, Ended, desk_in, environment, write_model
from strongroom.cli.main import execute


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A room with one version, shared by a file's tests: they leave acme/tiny@1 as it is."""
    desk = desk_in(tmp_path_factory.mktemp("desk"))
    write_model(desk.model)
    assert (
        desk.run(
            "init", "--custody", "solo", "--recovery", "2of3", "--shares-dir", "shares", "--owner", "user/ana"
        ).code
        == 0
    )
    assert desk.run("put", "model", "acme/tiny").code == 0
    return desk


@pytest.fixture
def empty(tmp_path: Path) -> Desk:
    """A folder without a room, with a model in it."""
    desk = desk_in(tmp_path)
    write_model(desk.model)
    return desk


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """For tables of cases: without the half second that a process takes to start."""

    def run(desk: Desk, *arguments: str) -> Ended:
        monkeypatch.chdir(desk.folder)
        for name, value in environment().items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = execute(arguments)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run
