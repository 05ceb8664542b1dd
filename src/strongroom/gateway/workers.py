"""New settings in a gateway of several processes: the first one reads them, and has each worker prepare, and then take
or drop them (gateway/reload.py), over a pipe to each: a commit in two phases. `coordinate` is the first process's end,
`Participant` a worker's."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.gateway.reload import Reload, unexpected
from strongroom.gateway.settings import Settings

_log = logging.getLogger("strongroom.gateway")


@dataclass(frozen=True)
class _Answer:
    """What a worker says when it has done as it was told: what `changed`, or why it could not."""

    changed: tuple[str, ...] = ()
    why: str = ""
    hint: str = ""


class Participant:
    """A worker: from `listen` on it does what the first process says at the other end of `line`."""

    def __init__(self, reload: Reload, line: Any) -> None:
        self._reload, self._line = reload, line
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._line.fileno(), self._heard)

    def _heard(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            word, settings = self._line.recv()
        except (EOFError, OSError):
            # The first process was killed: nobody would hear of settings, nor could anybody end this one but by its own
            # number, while it answers at an address that the next gateway wants.
            loop.remove_reader(self._line.fileno())
            _log.error("the first process of the gateway has ended, and this worker with it: start the gateway again")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        task = loop.create_task(self._answer(word, settings))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, word: str, settings: Settings | None) -> None:
        try:
            said = _Answer(await self._do(word, settings))
        except Exception as error:  # noqa: BLE001 - whatever it is, the first process waits for an answer
            told = error if isinstance(error, StrongroomError) else unexpected(error)
            said = _Answer(why=told.message, hint=told.hint)
        self._line.send(said)

    async def _do(self, word: str, settings: Settings | None) -> tuple[str, ...]:
        if word == "prepare" and settings is not None:
            await self._reload.prepare(settings)
        elif word == "take":
            return await self._reload.take()
        else:
            await self._reload.drop()
        return ()


def coordinate(settings: Settings, workers: list[tuple[Any, Any]]) -> tuple[str, ...]:
    """Have all `workers` (connection and process) take `settings`; what that changes. UsageError ``gateway.settings``:
    one could not, and none has. BackendError ``gateway.worker``: one has ended."""
    ends = [process.sentinel for _, process in workers]
    failure = _prepared(settings, workers, ends)
    word = "take" if failure is None else "drop"
    changed: list[tuple[str, ...]] = []
    for line, _ in workers:
        try:
            changed.append(_ask(line, ends, (word, None)))
        except UsageError as error:  # the others are told all the same: no worker is left with settings of its own
            failure = failure or error
    if failure is not None:
        raise failure
    return changed[0]  # they have read the same files


def _prepared(settings: Settings, workers: list[tuple[Any, Any]], ends: list[int]) -> StrongroomError | None:
    """Why one of them could not prepare; the others are not asked then."""
    for line, _ in workers:
        try:
            _ask(line, ends, ("prepare", settings))
        except UsageError as error:
            return error
    return None


def _ask(line: Any, ends: list[int], what: tuple[str, Settings | None]) -> tuple[str, ...]:
    try:
        line.send(what)
        # For as long as it takes: an inference server may have to be asked what it has.
        ready = connection.wait([line, *ends])
        said: _Answer | None = line.recv() if line in ready else None
    except (EOFError, OSError):
        said = None
    if said is None:
        raise BackendError("gateway.worker", "a worker of the gateway has ended", hint="start the gateway again")
    if said.why:
        raise UsageError("gateway.settings", said.why, hint=said.hint)
    return said.changed
