"""A room made through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.desk import Desk, desk_in, write_model


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
