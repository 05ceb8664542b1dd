"""Names of files that mean one file on every system that a copy may be written to."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import NoReturn

from strongroom.core.limits import LIMITS
from strongroom.errors import UsageError
from strongroom.formats.layout import check_path


def shown(path: str) -> str:
    """`path` as it may appear in a message: printable, ASCII where it is not, and short."""
    return path[:300] if path.isprintable() else ascii(path[:300])[1:-1]


def check_name(path: str) -> None:
    """UsageError ``source.name`` unless the relative POSIX `path` may be written below a folder on any system."""
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError:
        _refuse(path, "is not UTF-8")
    if size > LIMITS.path_bytes:
        _refuse(path, f"is longer than {LIMITS.path_bytes} bytes")
    # A backslash separates folders on Windows, where ..\..\x climbs out of the folder that a copy is written to.
    if "\\" in path:
        _refuse(path, "holds a backslash")
    # Control characters and invisible ones (bidirectional overrides) make a terminal show another name than is written.
    if not path.isprintable():
        _refuse(path, "holds a control character or an invisible one")
    try:
        check_path(path)
    except ValueError:
        _refuse(path, "is not a plain relative path")


def check_collisions(paths: Iterable[str]) -> None:
    """UsageError ``source.collision`` where two of `paths` are one on a file system that ignores case or normalises.

    A copy that is written there holds one of the two only, and whoever made the directory chose which.
    """
    spelled: dict[str, str] = {}
    for path in paths:
        _collide(path, spelled.get("/" + _folded(path)))
        spelled["/" + _folded(path)] = path
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            prefix = "/".join(parts[:depth])
            other = spelled.setdefault(_folded(prefix), prefix)
            _collide(prefix, other if other != prefix else None)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _collide(path: str, other: str | None) -> None:
    if other is not None:
        raise UsageError(
            "source.collision",
            f"{other!r} and {path!r} are one file on systems that ignore case or normalise names",
            hint="rename one of them",
            paths=[other, path],
        )


def _refuse(path: str, what: str) -> NoReturn:
    raise UsageError("source.name", f"the name {shown(path)!r} {what}", hint="rename the file", path=shown(path))
