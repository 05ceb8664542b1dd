"""Rooms with a small model in them, made once and copied for each test that harms one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import strongroom
from strongroom.vault import packing
from vault.rooms import House, clone, write_model
from vault.team import Team


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="session")
def other_source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=2)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, source):
    """A room that holds acme/tiny@1 in one pack a kind. Not to be harmed: `house` is a copy."""
    house = House.build(tmp_path_factory.mktemp("rooms") / "one")
    house.put(source, known=True)
    yield house
    house.close()


@pytest.fixture(scope="session")
def pristine_packs(tmp_path_factory, source):
    """The same in many small packs."""
    house = House.build(tmp_path_factory.mktemp("rooms") / "many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACK_BODY", 40_000)
        house.put(source, known=True)
    yield house
    house.close()


@pytest.fixture
def house(pristine, tmp_path):
    house = clone(pristine, tmp_path / "room")
    yield house
    house.close()


@pytest.fixture
def packs_house(pristine_packs, tmp_path):
    house = clone(pristine_packs, tmp_path / "packs-room")
    yield house
    house.close()


@pytest.fixture(scope="session")
def furnished(tmp_path_factory):
    """What a `Team` works in. Not to be harmed: `team_folder` is a copy."""
    folder = tmp_path_factory.mktemp("team")
    Team.furnish(folder)
    return folder


@pytest.fixture
def team_folder(furnished, tmp_path, monkeypatch):
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    return tmp_path


class Doom:
    """The program doomed.py, running: each job is done by a process that it forks."""

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(strongroom.__file__).parents[1])}
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("doomed.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def __call__(self, **job: object) -> dict[str, object]:
        """Do one job, given as keywords."""
        (outcome,) = self.all(job)
        return outcome

    def all(self, *jobs: dict[str, object]) -> list[dict[str, object]]:
        """Do these jobs at the same time."""
        self._process.stdin.write(json.dumps(jobs, default=str) + "\n")
        self._process.stdin.flush()
        outcomes = json.loads(self._process.stdout.readline())
        for outcome in outcomes:
            assert "crash" not in outcome, outcome
        return outcomes

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def doom():
    doom = Doom()
    yield doom
    doom.end()
