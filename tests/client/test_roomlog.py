"""The log of a room as its client checks it, while others write to it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import strongroom
from strongroom.client import Room
from strongroom.core.files import locked
from strongroom.ledger import published

REF = "acme/tiny@1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    (tmp_path / "model").mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, tmp_path / "model" / "model.safetensors")
    room, _ = Room.init(tmp_path / "room", custody="solo")
    with room:
        room.put(tmp_path / "model", "acme/tiny", share="0")
    return tmp_path / "room"


class TestNotSetBack:
    def test_when_another_process_is_publishing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """This user has seen a newer checkpoint than is published, and somebody else is at that."""
        with strongroom.open(folder) as room:
            room.log.verify()
            tried, found = threading.Event(), []

            @contextmanager
            def trying(path: Path, *, wait: bool):
                if wait:
                    tried.set()
                with locked(path, wait=wait) as mine:
                    tried.set()
                    yield mine

            with locked(folder / "log" / ".lock"):
                room.reader(REF)
                monkeypatch.setattr(published, "locked", trying)
                thread = threading.Thread(target=lambda: found.append(room.log.verify()))
                thread.start()
                assert tried.wait(60)
            thread.join(60)
            assert found[0]["size"] == room._vault.custodian.ledger.checkpoint()[0].size

    def test_when_another_process_of_this_user_sees_a_newer_one(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with strongroom.open(folder) as room, strongroom.open(folder) as other:
            other._vault.custodian.ledger._published_at = float("inf")  # it has published a moment ago
            published_as_of_now = room._vault.read_log

            def late():
                found = published_as_of_now()
                other.reader(REF)
                return found

            monkeypatch.setattr(room._vault, "read_log", late)
            size = room.log.verify()["size"]
            assert size < room._vault.custodian.ledger.checkpoint()[0].size
            monkeypatch.undo()
            assert room.log.verify()["size"] > size
