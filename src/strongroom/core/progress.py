"""How far a long job is, as it is told to whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and what there is, in bytes unless said otherwise."""


def silent(done: int, total: int) -> None:
    """A progress callback that says nothing."""
