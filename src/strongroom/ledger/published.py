"""What is published of the log: tiles, entry bundles and the checkpoint in C2SP tlog-tiles layout, in a folder.

All of it can be made anew from the database; anybody may serve it, and `strongroom log verify` reads it. The checkpoint
is replaced last, so whoever reads it finds the tiles that it stands for.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from strongroom.core.files import locked, write_whole
from strongroom.errors import BackendError, LimitExceeded, NotFound, StrongroomError, Tampered
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.note import Note
from strongroom.formats.tiles import WIDTH, Tile, encode_bundle, new_tiles
from strongroom.ledger.key import LogKey

_LOCK = ".lock"
_CHECKPOINT = "checkpoint"
_MOST = WIDTH * 65_537  # a bundle of 256 entries of the largest size, with their lengths


class Source(Protocol):
    """The log to publish: `strongroom.ledger.log.Ledger` is one."""

    def checkpoint(self) -> tuple[Checkpoint, bytes]: ...

    def entries(self, begin: int, end: int) -> list[bytes]: ...

    def hashes(self, level: int, begin: int, end: int) -> list[bytes]: ...


class Published:
    """The folder `folder`, of the log of `key`."""

    def __init__(self, folder: Path, key: LogKey) -> None:
        self.folder, self._key = folder, key

    def newest(self) -> Checkpoint | None:
        """The published checkpoint; None if there is none. One that is damaged is not passed over: with it would go
        what shows that the database was set back. Tampered ``log.published``, BackendError."""
        found = self._newest()
        return found[0] if found is not None else None

    def _newest(self) -> tuple[Checkpoint, bytes] | None:
        """The published checkpoint and its note, of one reading: others publish meanwhile."""
        path = self.folder / _CHECKPOINT
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BackendError("log.unreadable", f"can't read {path}: {error.strerror}") from None
        try:
            return self._key.open(data), data
        except StrongroomError as error:
            raise Tampered(
                "log.published",
                f"the published checkpoint {path} is not one that the log key has signed: {error.message}",
                hint="restore it from a copy of the log; if there is none, move it away: it is written anew",
            ) from None

    def publish(self, log: Source, *, wait: bool = False) -> None:
        """Bring the folder up to date. What can't be written is left for the next time: the log itself is durable.
        While another process is at it, what that publishes may be older than the log is now: `wait` until it is not."""
        with contextlib.suppress(OSError), self._locked(wait=wait) as mine:
            if mine:  # else another process is at it
                self._publish(log)

    def _publish(self, log: Source) -> None:
        checkpoint, note = log.checkpoint()
        newest = self.newest()
        size = newest.size if newest is not None else 0
        if checkpoint.size <= size:
            return
        for tile in new_tiles(size, checkpoint.size):
            self._write(tile.path, tile_bytes(tile, log))
        self._write(_CHECKPOINT, note)

    def cosigned(self, note: bytes) -> Checkpoint | None:
        """Publish `note`, the newest checkpoint with cosignatures of witnesses, and which it is; None if others have
        published a newer one meanwhile. Those that others have published since `note` was read stay. Errors as
        `newest`; BackendError ``log.unwritable``."""
        with self._held():
            return self._join(note)

    def cosigned_alone(self, log: Source, ask: Callable[[bytes], bytes]) -> Checkpoint | None:
        """As `cosigned`, what `ask` makes of the newest checkpoint of `log`. Nobody publishes a newer one while it is
        asked: whoever appends leaves that for later, and waits for nothing."""
        with self._held():
            self._publish(log)
            return self._join(ask(self.note()))

    def _join(self, note: bytes) -> Checkpoint | None:
        found, checkpoint = self._newest(), self._key.open(note)
        if found is None or found[0] != checkpoint:
            return None
        self._write(_CHECKPOINT, _joined(found[1], note))
        return checkpoint

    def with_cosignatures(self, note: bytes) -> bytes:
        """What is published of the same checkpoint, which may have cosignatures of witnesses; else `note`. Errors as
        `newest`."""
        found = self._newest()
        return found[1] if found is not None and found[0] == self._key.open(note) else note

    def note(self) -> bytes:
        """The published checkpoint as it is, cosignatures included; NotFound ``log.missing_file``."""
        return read_from(self.folder)(_CHECKPOINT)

    def _write(self, name: str, data: bytes) -> None:
        """Durable when it is there, so that a checkpoint never outlives the tiles that it stands for."""
        path = self.folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, data, mode=0o644)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        try:
            with self._locked(wait=True):
                yield
        except OSError as error:
            raise BackendError(
                "log.unwritable",
                f"can't publish the log in {self.folder}: {error.strerror}",
                hint="free space, and make the folder writable for this user",
            ) from None

    @contextlib.contextmanager
    def _locked(self, *, wait: bool = False) -> Iterator[bool]:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with locked(self.folder / _LOCK, wait=wait) as mine:
            yield mine


def _joined(published: bytes, note: bytes) -> bytes:
    """`note`, and the signatures by other keys that `published` has of the same text."""
    given, before = Note.decode(note), Note.decode(published)
    mine = {(each.name, each.key_id) for each in given.signatures}
    others = [each for each in before.signatures if (each.name, each.key_id) not in mine]
    return Note(given.text, (*given.signatures, *others)).encode()


def tile_bytes(tile: Tile, log: Source) -> bytes:
    """What a tile or an entry bundle of `log` holds."""
    begin = tile.index * WIDTH
    if tile.level is None:
        return encode_bundle(log.entries(begin, begin + tile.width))
    return b"".join(log.hashes(tile.level * 8, begin, begin + tile.width))


_FOLDER = "strongroom log verify FOLDER, with the room's folder log or a whole copy of it"


def read_from(folder: Path) -> Callable[[str], bytes]:
    """How a verifier reads a published or exported log in a folder: by name; NotFound ``log.missing_file``."""

    def read(name: str) -> bytes:
        path = folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise NotFound("log.missing_file", f"{path} is missing", hint=_FOLDER) from None
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Tampered("log.not_a_file", f"{path} is not a plain file")
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise LimitExceeded("log.file_too_large", f"{path} is larger than any file of a log")
        return data

    return read
