"""The applications of one worker, one for each settings that it was told: requests go to the newest, and those under
way end in theirs (docs/reference/gateway-settings.md).

What a worker remembers of the room, and its records, are the same for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from strongroom.errors import AuthRequired, StrongroomError, UsageError
from strongroom.gateway.exchange import EXCHANGE

if TYPE_CHECKING:
    from strongroom.gateway.app import GatewayApp
    from strongroom.gateway.capture import Capture
    from strongroom.gateway.certificates import Certificates
    from strongroom.gateway.connection import Connection
    from strongroom.gateway.door import Door
    from strongroom.gateway.exchange import Exchange
    from strongroom.gateway.metrics import Counts
    from strongroom.gateway.records import Records
    from strongroom.gateway.settings import Settings
    from strongroom.gateway.verified import Verified
    from strongroom.watch.debts import Debts

Make = Callable[["Settings", "GatewayApp | None"], "GatewayApp"]
Check = Callable[["Settings"], None]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Generations:
    """One worker as an ASGI application. `make` makes the application of some settings, after the one before; `check`
    asks the room about them before, which may take a while."""

    def __init__(
        self,
        door: Door,
        records: Records,
        debts: Debts,
        make: Make,
        settings: Settings,
        *,
        check: Check = lambda _: None,
    ) -> None:
        self._door, self._records, self._debts, self._make, self._check = door, records, debts, make, check
        self._settings = settings
        self._newest = make(settings, None)
        self._retiring: set[asyncio.Task[None]] = set()
        self.failure: StrongroomError | None = None  # why it did not start

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        return self._live(receive, send) if scope["type"] == "lifespan" else self.exchange(scope[EXCHANGE])

    def exchange(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """As with `__call__`, over a connection of ours, without what ASGI puts between."""
        return self._newest.answer(exchange)

    # -- new settings --------------------------------------------------------------------------------------------

    async def prepare(self, settings: Settings) -> GatewayApp:
        """The application of new settings, which nothing is asked of yet: to be given to `take`, or to `drop`. Errors
        as at the start; UsageError ``settings.restart`` for what can't change."""
        if settings.redis.url != self._settings.redis.url:
            raise UsageError(
                "settings.restart",
                "redis.url can't change while the gateway runs: limits would be kept in two places",
                hint="start the gateway again with these settings",
            )
        await asyncio.to_thread(self._check, settings)
        app = self._make(settings, self._newest)
        try:
            await app.find()
        except BaseException:
            await app.retire()
            raise
        return app

    def take(self, settings: Settings, app: GatewayApp) -> None:
        """What is asked from now on is answered by `app`, which was prepared for `settings`."""
        before, self._newest, self._settings = self._newest, app, settings
        if app.verified is not None and before.verified is not None:
            before.verified.rest()
            app.verified.inherit(before.verified)  # an alarm is not over because a limit was changed
        app.start()
        before.when_idle(lambda: self._retire(before))

    async def certificates_changed(self, connections: Iterable[Connection]) -> None:
        """Certificates are judged by other lists from now on: what was remembered of any is forgotten, and those of the
        `connections` end whose certificate is nobody's."""
        try:
            await self._door.look()
        except StrongroomError:  # it can't be asked now: what is remembered is forgotten with the next look
            return
        for each in [each for each in connections if each.peer is not None]:
            try:
                await self._door.caller("", each.peer)
            except AuthRequired:
                each.shutdown()
            except StrongroomError:  # it can't be asked now, and is with its next request
                continue

    async def drop(self, app: GatewayApp) -> None:
        """What was prepared is not wanted."""
        await app.retire()
        await self._say_what_is_captured()

    def _retire(self, app: GatewayApp) -> None:
        task = asyncio.get_running_loop().create_task(self._retired(app))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retired(self, app: GatewayApp) -> None:
        await app.retire()
        await self._say_what_is_captured()

    async def _say_what_is_captured(self) -> None:
        """The log was told of more before it began; that it is over is said when it is."""
        capture = self._newest.capture
        with contextlib.suppress(Exception):  # the next entries say it
            key = "" if capture is None else capture.key_id
            await asyncio.to_thread(self._records.announce, key, self._settings.digest)

    # -- from start to end ---------------------------------------------------------------------------------------

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._door.look()
            await self._newest.find()
        except StrongroomError as error:
            self.failure = error
            await self._close()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        watching = asyncio.create_task(self._door.watch())
        self._newest.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _close(self) -> None:
        await self._newest.retire()
        while self._retiring:
            await asyncio.wait(self._retiring)
        await asyncio.to_thread(self._records.close)
        await asyncio.to_thread(self._debts.close)
        self._door.close()

    # -- what is shown -------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self._settings

    @property
    def certificates(self) -> Certificates:
        """What callers may show instead of a key."""
        return self._door.certificates

    @property
    def counts(self) -> Counts:
        return self._newest.counts

    @property
    def under_way(self) -> int:
        return self._newest.under_way

    @property
    def verified(self) -> Verified | None:
        return self._newest.verified

    @property
    def capture(self) -> Capture | None:
        return self._newest.capture

    def problems(self) -> dict[str, str]:
        """Why nothing is answered now, if that is so, by the word that everybody is told."""
        return self._newest.problems()
