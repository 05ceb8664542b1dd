"""SIGHUP in a gateway of one process: it reads new settings, prepares and takes them itself (gateway/reload.py)."""

from __future__ import annotations

import asyncio
import signal

from strongroom.errors import StrongroomError
from strongroom.gateway.changes import Taken
from strongroom.gateway.reload import Read, Reload, Tell, unexpected


class Hangup:
    """From `listen` on, SIGHUP has this process `read` settings and take them, and `tell` what came of it."""

    def __init__(self, reload: Reload, read: Read, tell: Tell) -> None:
        self._reload, self._read, self._tell = reload, read, tell
        self._one = asyncio.Lock()
        self._waiting = False  # one that has not begun to read: it reads for all that were heard before
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._rung)

    def _rung(self) -> None:
        if self._waiting:
            return
        self._waiting = True
        task = asyncio.get_running_loop().create_task(self._again())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _again(self) -> None:
        async with self._one:
            self._waiting = False  # whoever hangs up from now on may have written to a file that was read already
            try:
                settings = await asyncio.to_thread(self._read)
                await self._reload.prepare(settings)
                self._tell(Taken(settings, await self._reload.take()))
            except StrongroomError as error:
                self._tell(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, the old ones stay, and somebody is told
                self._tell(unexpected(error))
