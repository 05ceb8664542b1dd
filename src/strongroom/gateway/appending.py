"""Lines that a thread appends to a file, and whoever waits on an event loop until theirs are on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading


class Appending:
    """`wake` is what the thread sleeps on. Thread-safe."""

    def __init__(self, file: int, wake: threading.Event) -> None:
        self._file, self._wake = file, wake
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Future[None]] = []

    async def durable(self) -> None:
        """Back when the thread has gone once through all that was there before."""
        waiter = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiting.append(waiter)
        self._wake.set()
        await waiter

    def waiting(self) -> list[asyncio.Future[None]]:
        """Those who wait now, for `tell`: to be taken before what they wait for is."""
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken

    @staticmethod
    def tell(waiting: list[asyncio.Future[None]]) -> None:
        """It is written, or will not be."""
        for waiter in waiting:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                waiter.get_loop().call_soon_threadsafe(_set, waiter)

    def write(self, data: bytes) -> None:
        """All of it, on disk. OSError: a part may be there."""
        left = memoryview(data)
        while left:
            left = left[os.write(self._file, left) :]
        os.fdatasync(self._file)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
