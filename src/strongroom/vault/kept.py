"""What a custodian keeps opened, so that not every release reads it anew, and how it lets go of that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class Kept(Generic[K, T]):
    """What is kept opened of versions, secret all of it: at most `most`. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most, self._kept, self._lock = most, dict[K, T](), threading.Lock()
        self._forgotten = 0  # how many times

    def get(self, key: K) -> T | None:
        return self._kept.get(key)

    def opening(self) -> Callable[[K, T], None]:
        """A function that keeps what is opened, or got, after this call. It keeps nothing once all was forgotten in
        between: what was opened may be of a version that was shredded."""
        begun = self._forgotten

        def keep(key: K, value: T) -> None:
            with self._lock:
                if begun != self._forgotten:
                    return
                if len(self._kept) >= self._most and key not in self._kept:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = value

        return keep

    def drop(self, key: K) -> T | None:
        """Let go of one; what was kept."""
        with self._lock:
            return self._kept.pop(key, None)

    def forget(self) -> None:
        """Let go of all, and keep nothing of what is being opened."""
        with self._lock:
            self._forgotten += 1
            self._kept.clear()
