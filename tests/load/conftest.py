"""Rooms with small models in them, and a store that writes down what is read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from strongroom.storage.blobs import Blobs
from strongroom.storage.reader import ImageReader
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault


class RecordingBlobs:
    """A store, and the list of (name, offset, bytes) that were read from it."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self.reads: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blobs, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.reads.append((name, offset, len(buffer)))
        self._blobs.read_into(name, offset, buffer)


class Room:
    """A room on disk with one principal, user/ana; `blobs` has what a recorded reader read from its store."""

    def __init__(self, folder: Path) -> None:
        self.vault, _ = Vault.init(folder, owner="user/ana", custody="solo")
        self.blobs = RecordingBlobs(self.vault.blobs)

    def put(self, source: Path, name: str = "acme/tiny", **options: Any) -> str:
        return self.vault.put(ModelSource.scan(source), name, by="user/ana", **options).ref

    def reader(self, ref: str = "acme/tiny", *, recorded: bool = False) -> ImageReader:
        blobs: Any = self.blobs if recorded else self.vault.blobs
        return ImageReader(blobs, self.vault.bundle(ref, "user/ana"), workers=2)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path / "room")
    yield room
    room.vault.close()


@pytest.fixture
def make_reader(room: Room, tmp_path: Path) -> Callable[..., ImageReader]:
    """Put a folder or file, and read it back."""

    def make(source: Path, **options: Any) -> ImageReader:
        return room.reader(room.put(source, **options))

    return make
