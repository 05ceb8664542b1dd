"""Whether inference servers are there, looked at each few seconds: a gateway that learns it from its callers says that
it is ready until several of them have failed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from strongroom.errors import BackendError
from strongroom.gateway.upstream import Upstream

_PATIENCE = 5.0  # seconds for one look
_MISSED = 3  # looks in a row without an answer, after which a server is not there
_MOST = 1 << 20  # bytes of a list of models


class Probe:
    """Looks at each of `upstreams`, every so many seconds, with what costs a server least: the list of its models."""

    def __init__(
        self, upstreams: Sequence[Upstream], every: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every, self._clock = every, clock
        self._answered: dict[Upstream, float | None] = dict.fromkeys(upstreams)
        self._task: asyncio.Task[None] | None = None

    @property
    def answering(self) -> bool:
        """Whether any has answered of late."""
        oldest = self._clock() - _MISSED * self._every - _PATIENCE
        return any(at is not None and at >= oldest for at in self._answered.values())

    async def look(self) -> None:
        """One look at each, together; it takes no longer than one may."""
        await asyncio.gather(*map(self._look, self._answered))

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            await self.look()

    async def _look(self, upstream: Upstream) -> None:
        """One that answers with an error of its own would answer requests with one, too; one that has no such list is
        there all the same."""
        with contextlib.suppress(BackendError, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                reply = await upstream.get("/v1/models")
                await reply.read(_MOST)
            if reply.status < 500 and reply.status not in (401, 403):
                self._answered[upstream] = self._clock()
