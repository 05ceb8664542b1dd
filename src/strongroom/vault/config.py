"""``room.json``: where a room's database and store are. It holds no secret, and nothing in it is trusted with one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from strongroom.core import canonical
from strongroom.errors import NotFound, Tampered

FORMAT = 1
NAME = "room.json"


@dataclass(frozen=True)
class RoomConfig:
    """`room`: 16 bytes. `store` and `db` are URLs; relative paths start at the room's folder."""

    room: bytes
    store: str
    db: str

    @classmethod
    def read(cls, folder: Path) -> RoomConfig:
        path = folder / NAME
        try:
            data = path.read_bytes()
        except OSError:
            hint = f"strongroom --room {folder} init, or name another room with --room or STRONGROOM_ROOM"
            raise NotFound("room.missing", f"{folder} is not a room: it has no {NAME}", hint=hint) from None
        value = canonical.decode(data, what=str(path))
        try:
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']!r}")
            config = cls(bytes.fromhex(value["room"]), str(value["store"]), str(value["db"]))
            if len(config.room) != 16:
                raise ValueError("the room's identifier does not have 16 bytes")
        except (KeyError, TypeError, ValueError) as error:
            raise Tampered("room.malformed", f"{path} does not hold together: {error}") from None
        return config

    def write(self, folder: Path) -> None:
        """Durable and atomic; FileExistsError never, the caller has made sure that the folder is new."""
        temporary = folder / f".{NAME}.new"
        with temporary.open("xb") as file:
            file.write(
                canonical.encode({"format": FORMAT, "room": self.room.hex(), "store": self.store, "db": self.db})
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / NAME)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def store_url(self, folder: Path) -> str:
        return self.store if "://" in self.store or self.store.startswith("/") else str(folder.resolve() / self.store)

    def db_url(self, folder: Path) -> str:
        path = self.db.removeprefix("sqlite:")
        if path == self.db or path.startswith("/"):
            return self.db
        return f"sqlite:///{folder.resolve() / path}"
