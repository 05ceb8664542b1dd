"""Pieces that are fetched while those before them are used: two at a time, by threads of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Self, TypeVar

Piece = TypeVar("Piece", bound="bytes | memoryview")
_AHEAD = 2  # pieces on their way, and threads that fetch them
_PATIENCE = 5.0  # seconds for what is under way when it is no longer wanted


class Ahead(Generic[Piece]):
    """The pieces 0 to `count` of something, in memory of three of them at most. For one thread, which goes forward as a
    rule, and leaves the context when it wants no more.

    What `fetch` raises is raised by the `take` of that very piece: one that nobody takes fails nobody.
    """

    def __init__(self, fetch: Callable[[int], Piece], count: int) -> None:
        self._fetch, self._count = fetch, count
        self._coming: dict[int, Future[Piece]] = {}
        self._jobs: queue.SimpleQueue[tuple[int, Future[Piece]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for _ in range(min(_AHEAD, self._count)):
            # A daemon: a server that has gone silent does not keep the process when somebody interrupts it.
            thread = threading.Thread(target=self._work, name="strongroom-ahead", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the limit of threads is reached: `take` fetches by itself if there is none
                break
            self._threads.append(thread)
        return self

    def __exit__(self, *raised: object) -> None:
        self._keep(range(0))
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._threads.clear()

    def take(self, number: int) -> Piece:
        """Piece `number`; those after it are on their way from now on."""
        if not self._threads:
            return self._fetch(number)
        wanted = range(number, min(number + 1 + _AHEAD, max(self._count, number + 1)))
        self._keep(wanted)
        for each in wanted:
            if each not in self._coming and (each == number or len(self._coming) < _AHEAD):
                self._begin(each)
        piece = self._coming.pop(number).result()
        # Room for one more has come free.
        following = next((each for each in wanted if each > number and each not in self._coming), None)
        if following is not None:
            self._begin(following)
        return piece

    def _begin(self, number: int) -> None:
        self._coming[number] = Future()
        self._jobs.put((number, self._coming[number]))

    def _keep(self, wanted: range) -> None:
        for each in [each for each in self._coming if each not in wanted]:
            self._coming.pop(each).cancel()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            number, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetch(number))
            except BaseException as error:  # noqa: BLE001 - raised where the piece is taken
                future.set_exception(error)
            del job, future  # so that the piece is gone as soon as it was used
