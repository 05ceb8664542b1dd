"""`strongroom.open` and `strongroom.safe_open`: what names a room, and what a reader keeps of it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import strongroom
from strongroom.client import Room, room_folder
from strongroom.errors import UsageError
from strongroom.load.grant import VARIABLE, Grant, hold, variable


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A room in a folder with a space in its name, with acme/tiny@1 in it."""
    for name in [name for name in os.environ if name.startswith("STRONGROOM_")]:
        monkeypatch.delenv(name)
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, model / "model.safetensors")
    room, _ = Room.init(tmp_path / "a room", custody="solo")
    with room:
        room.put(model, "acme/tiny", share="0")
    return tmp_path / "a room"


def url_of(folder: Path) -> str:
    return f"file://{str(folder).replace(' ', '%20')}"


def test_a_room_by_its_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (folder, str(folder), url_of(folder), url_of(folder).replace("//", "//localhost")):
        with strongroom.open(room) as opened:
            assert [info.ref for info in opened.ls()] == ["acme/tiny@1"]
    monkeypatch.setenv("STRONGROOM_ROOM", url_of(folder))
    with strongroom.open() as opened:
        assert [info.ref for info in opened.ls()] == ["acme/tiny@1"]
    with strongroom.safe_open("acme/tiny", framework="numpy") as file:
        assert file.get_tensor("w").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "url",
    [
        *("https://custodian.example", "http://127.0.0.1:8080/room", "s3://bucket/room", "file://host/room"),
        *("file://", "file:///a%00b", "file:///room?x", "file:///room#x", "http://[", "://"),
    ],
)
def test_other_urls_are_no_folders(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        room_folder(url)
    assert caught.value.code == "room.not_a_folder"
    assert ("a served room" in caught.value.message) == url.startswith(("http://1", "https"))


def test_a_child_with_a_grant_opens_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with strongroom.open(folder) as room:
        held = hold([Grant(*room.grant("acme/tiny@1"))])
    try:
        monkeypatch.setenv(VARIABLE, variable(held))
        with pytest.raises(UsageError) as caught:
            strongroom.safe_open("acme/tiny", framework="numpy", room=folder)
        assert caught.value.code == "grant.room"
        with strongroom.safe_open("acme/tiny", framework="numpy") as file:
            assert file.get_tensor("w").tolist() == [0, 1, 2, 3, 4, 5]
    finally:
        os.close(held)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_reader_keeps_no_database_open(folder: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool) -> None:
    monkeypatch.setenv("STRONGROOM_ROOM", str(folder))
    gc.disable()  # what nobody closed is open until it is collected
    try:
        file = strongroom.safe_open("acme/tiny", framework="numpy", **({"room": folder} if by_name else {}))
        descriptors = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
        assert [target for target in descriptors if str(folder / "room.db") in target] == []
        assert file.get_tensor("w").tolist() == [0, 1, 2, 3, 4, 5]
    finally:
        gc.enable()
