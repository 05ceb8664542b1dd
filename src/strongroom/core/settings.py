"""What the environment says: asked for where a room or a reader is opened; everything else takes arguments."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from strongroom.errors import UsageError

_MOST_THREADS = 1024


@dataclass(frozen=True)
class Settings:
    """``STRONGROOM_*`` variables. `grant` is set by ``strongroom run`` for its child and by nobody else."""

    room: str = "./room"
    principal: str | None = None
    grant: str | None = None
    threads: int = 0  # 0: as many as there are cores
    state: str = ""  # where newest checkpoints are remembered; empty: the user's own folder for such things
    identities: str = ""  # where keys of principals are looked for; empty: the user's own folder for such things

    @classmethod
    def from_environment(cls) -> Settings:
        """The variables as they are now; an empty one counts as unset. UsageError ``settings.threads``."""
        env = os.environ
        return cls(
            room=env.get("STRONGROOM_ROOM") or cls.room,
            principal=env.get("STRONGROOM_AS") or None,
            grant=env.get("STRONGROOM_GRANT") or None,
            threads=_threads(env.get("STRONGROOM_THREADS") or None),
            state=env.get("STRONGROOM_STATE") or "",
            identities=env.get("STRONGROOM_IDENTITIES") or "",
        )

    @property
    def identities_folder(self) -> Path:
        """``STRONGROOM_IDENTITIES``, else ``$XDG_CONFIG_HOME/strongroom/identities``, else that in ``~/.config``: the
        keys of principals that act in served rooms."""
        if self.identities:
            return Path(self.identities)
        base = os.environ.get("XDG_CONFIG_HOME") or ""
        return (Path(base) if base.startswith("/") else Path.home() / ".config") / "strongroom" / "identities"

    @property
    def state_folder(self) -> Path:
        """``STRONGROOM_STATE``, else ``$XDG_STATE_HOME/strongroom``, else ``~/.local/state/strongroom``."""
        if self.state:
            return Path(self.state)
        base = os.environ.get("XDG_STATE_HOME") or ""
        return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "strongroom"

    @property
    def workers(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


def _threads(text: str | None) -> int:
    if text is None:
        return 0
    if not re.fullmatch("[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= _MOST_THREADS:
        raise UsageError(
            "settings.threads",
            f"STRONGROOM_THREADS is {text[:40]!r}, not a number from 1 to {_MOST_THREADS}",
            hint="unset STRONGROOM_THREADS: then there are as many threads as cores",
        )
    return int(text)


def room_folder(room: str | Path) -> Path:
    """The folder that a path or a ``file:`` URL names; UsageError ``room.not_a_folder`` for every other URL."""
    if isinstance(room, Path) or "://" not in room:
        return Path(room)
    try:
        parts = urlsplit(room)
        path = unquote(parts.path) if parts.scheme == "file" and parts.netloc in ("", "localhost") else ""
    except ValueError:  # brackets that hold no IPv6 address
        raise _no_folder(room, "it is malformed") from None
    if parts.scheme in ("http", "https"):
        raise _no_folder(room, "a served room has no folder here, and is always https://")
    if not path or "\0" in path or parts.query or parts.fragment:
        raise _no_folder(room, "a room is a folder, or file:///its/path")
    return Path(path)


def _no_folder(room: str, why: str) -> UsageError:
    return UsageError(
        "room.not_a_folder", f"{room} is not a room that can be opened from here: {why}", hint="--room FOLDER"
    )
