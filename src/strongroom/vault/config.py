"""``room.json``: where a room's database and store are. It holds no secret, and nothing in it is trusted with one."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strongroom.core import canonical
from strongroom.core.files import write_whole
from strongroom.core.limits import KIB
from strongroom.errors import BackendError, CannotVerify, NotFound, Tampered
from strongroom.formats.suites import FORMAT, check_format

NAME = "room.json"


_MAX_BYTES = 64 * KIB


@dataclass(frozen=True)
class RoomConfig:
    """`room`: 16 bytes. `store` and `db` are URLs; relative paths start at the room's folder.

    `keystores` are the URIs of the key stores that the database may name: the one in use, and while the room moves to
    another, both. They are here, not only there, because whoever can write to the database must not choose the server
    that is asked, and given the key store's token. `log_key`: the 32-byte public key of the log, for the same reason:
    what the database says was decided is believed only where that key has signed it.
    """

    room: bytes
    store: str
    db: str
    keystores: tuple[str, ...]
    log_key: bytes

    @classmethod
    def read(cls, folder: Path, *, older: bool = False) -> RoomConfig:
        """NotFound ``room.missing``; Tampered ``room.malformed``; CannotVerify ``format.unknown``, ``room.older``. With
        `older` that of a room without a log is read, too, and has an empty `log_key`."""
        path = folder / NAME
        try:
            # Neither a link to another file nor a pipe that never answers.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            hint = (
                "name the room with --room or STRONGROOM_ROOM; to make one here: "
                f"strongroom --room {folder} init; a program that reads weights: strongroom run REF -- COMMAND"
            )
            raise NotFound(
                "room.missing", f"there is no room at {folder.absolute()}: it has no {NAME}", hint=hint
            ) from None
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Tampered("room.malformed", f"{path} is not a plain file")
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise Tampered("room.malformed", f"{path} is larger than a room's configuration")
        value = canonical.decode(data, what=str(path))
        try:
            return cls._of(value, older=older)
        except (KeyError, TypeError, ValueError) as error:
            raise Tampered("room.malformed", f"{path} does not hold together: {error}") from None

    @classmethod
    def _of(cls, value: Any, *, older: bool) -> RoomConfig:
        check_format(value["format"], f"this room ({NAME})")
        keystores = value["keystores"]
        if not isinstance(keystores, list) or not keystores:
            raise TypeError("no key store is named")
        texts = [value["store"], value["db"], *keystores]
        if not all(isinstance(text, str) and text for text in texts):
            raise TypeError("a URL is not a text")
        if not isinstance(value["room"], str) or len(value["room"]) != 32:
            raise ValueError("the room's identifier does not have 16 bytes")
        if "log" not in value:
            if not older:
                raise CannotVerify(
                    "room.older",
                    "the room names no log key: it was made by a release that had no log",
                    hint="strongroom upgrade --owner PRINCIPAL, on the room's host; it copies the database first",
                )
            return cls(bytes.fromhex(value["room"]), value["store"], value["db"], tuple(keystores), b"")
        if not isinstance(value["log"], str) or len(value["log"]) != 64:
            raise ValueError("the log's public key does not have 32 bytes")
        room, log_key = bytes.fromhex(value["room"]), bytes.fromhex(value["log"])
        return cls(room, value["store"], value["db"], tuple(keystores), log_key)

    def pin(self, folder: Path, keystores: Sequence[str]) -> None:
        """Write this configuration with other key stores."""
        replace(self, keystores=tuple(dict.fromkeys(keystores))).write(folder)

    def write(self, folder: Path) -> None:
        """Durable and atomic: the old configuration or the new one. BackendError ``room.unwritable``."""
        value = {
            "format": FORMAT,
            "room": self.room.hex(),
            "store": self.store,
            "db": self.db,
            "keystores": list(self.keystores),
            "log": self.log_key.hex(),
        }
        try:
            write_whole(folder / NAME, canonical.encode(value))
        except OSError as error:
            raise BackendError(
                "room.unwritable",
                f"can't write {folder / NAME}: {error.strerror}",
                hint="free space, and make the room's folder writable for this user",
            ) from None

    def store_url(self, folder: Path) -> str:
        return self.store if "://" in self.store or self.store.startswith("/") else str(folder.resolve() / self.store)

    def db_url(self, folder: Path) -> str:
        path = self.db.removeprefix("sqlite:")
        if path == self.db or path.startswith("/"):
            return self.db
        return f"sqlite:///{folder.resolve() / path}"
