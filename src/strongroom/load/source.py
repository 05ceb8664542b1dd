"""From the name of weights to a reader of them. Light to import: what it needs is imported when it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from strongroom.core.settings import Settings
from strongroom.errors import UsageError

if TYPE_CHECKING:
    from strongroom.load.weights import Weights
    from strongroom.storage.reader import ImageReader

    Source: TypeAlias = str | ImageReader | Weights

_openers: list[Callable[[str], ImageReader]] = []


def register_opener(opener: Callable[[str], ImageReader]) -> None:
    """Say how a reference becomes a reader where there is no grant. The package does, when it is imported."""
    _openers[:] = [opener]


def resolve(source: Source) -> ImageReader:
    """A reader for a reference such as ``acme/tiny@1``; readers, and the reader of weights, are returned as they are.

    Under ``strongroom run`` it is the one that the process was given, and no other: a child that is denied something
    does not get round that by asking the room itself. Elsewhere it comes from the room that the settings name.
    """
    from strongroom.load.grant import reader_from_grant
    from strongroom.load.weights import Weights

    if isinstance(source, Weights):
        return source.reader
    if not isinstance(source, str):
        return source
    grant = Settings.from_environment().grant
    if grant is not None:
        return reader_from_grant(source, grant)
    if not _openers:
        raise UsageError(
            "weights.no_room",
            f"nothing here knows how to open {source!r}",
            hint="pass strongroom.open(room).reader(ref)",
        )
    return _openers[0](source)
