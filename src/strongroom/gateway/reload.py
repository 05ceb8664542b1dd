"""New settings for a gateway that runs, in all of its workers or in none (docs/reference/gateway-settings.md).

The first process reads them, and tells each worker twice: to prepare, and, once all of them could, to take them.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from collections.abc import Callable, Collection
from multiprocessing import connection
from pathlib import Path
from typing import Any

from strongroom.crypto.revocation import RevocationLists
from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.gateway.app import GatewayApp
from strongroom.gateway.generations import Generations
from strongroom.gateway.settings import Settings
from strongroom.vault.revocations import Revocations

_log = logging.getLogger("strongroom.gateway")

Read = Callable[[], Settings]
Tell = Callable[["Settings | StrongroomError"], None]


class Reload:
    """New settings in one worker: prepared, and then taken or dropped. `tls` is the context whose `certificate` (chain
    and key) is read again with them, and so are lists of revoked certificates (`revocations`): whoever is on one loses
    those of the `connections` that were made before."""

    def __init__(
        self,
        app: Generations,
        tls: ssl.SSLContext | None,
        certificate: tuple[Path, Path] | None,
        revocations: Revocations | None = None,
        connections: Collection[Any] = (),
    ) -> None:
        self._app, self._tls, self._certificate = app, tls, certificate
        self._revocations, self._connections = revocations, connections
        self._waiting: tuple[Settings, GatewayApp, RevocationLists | None] | None = None

    async def prepare(self, settings: Settings) -> None:
        """All that can go wrong. StrongroomError: nothing is prepared."""
        await self.drop()
        if self._certificate is not None:
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._certificate)
        lists = await asyncio.to_thread(self._revocations.read) if self._revocations is not None else None
        self._waiting = settings, await self._app.prepare(settings), lists

    async def take(self) -> None:
        """What was prepared is in force."""
        if self._waiting is None:
            return
        (settings, app, lists), self._waiting = self._waiting, None
        self._app.take(settings, app)
        if lists is not None and self._revocations is not None:
            self._revocations.take(lists)
            await self._app.certificates_changed(self._connections)
        if self._tls is not None and self._certificate is not None:
            try:
                _load(self._tls, self._certificate)
            except BackendError as error:  # written to in this moment; the next SIGHUP reads it
                _log.error("%s", error)

    async def drop(self) -> None:
        """Another worker could not."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await self._app.drop(waiting[1])

    # -- one worker alone ------------------------------------------------------------------------------------------

    def on_hangup(self, read: Read, tell: Tell) -> None:
        """From now on SIGHUP has this process `read` settings and take them, and `tell` what came of it."""
        lock, tasks, waiting = asyncio.Lock(), set[asyncio.Task[None]](), False

        async def again() -> None:
            nonlocal waiting
            async with lock:
                waiting = False  # whoever hangs up from now on may have written to a file that was read already
                try:
                    settings = await asyncio.to_thread(read)
                    await self.prepare(settings)
                    await self.take()
                    tell(settings)
                except StrongroomError as error:
                    tell(error)
                except Exception as error:  # noqa: BLE001 - whatever it is, the old ones stay, and somebody is told
                    tell(unexpected(error))

        def rung() -> None:
            nonlocal waiting
            if waiting:
                return
            waiting = True
            task = asyncio.get_running_loop().create_task(again())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, rung)

    # -- one of several --------------------------------------------------------------------------------------------

    def listen_to(self, first: Any) -> None:
        """From now on do what the first process says at the other end of `first`, a connection."""
        tasks = set[asyncio.Task[None]]()

        async def do(word: str, settings: Settings | None) -> None:
            said: StrongroomError | None = None
            try:
                if word == "prepare" and settings is not None:
                    await self.prepare(settings)
                else:
                    await (self.take() if word == "take" else self.drop())
            except StrongroomError as error:
                said = error
            except Exception as error:  # noqa: BLE001 - whatever it is, the first process waits for an answer
                said = unexpected(error)
            first.send((said.message, said.hint) if said is not None else None)

        def heard() -> None:
            loop = asyncio.get_running_loop()
            try:
                word, settings = first.recv()
            except (EOFError, OSError):  # the first process has ended, and ends this one
                loop.remove_reader(first.fileno())
                return
            task = loop.create_task(do(word, settings))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        asyncio.get_running_loop().add_reader(first.fileno(), heard)


def everywhere(settings: Settings, workers: list[tuple[Any, Any]]) -> None:
    """Have all `workers` (connection and process) take `settings`. UsageError ``gateway.settings``: one could not, and
    none has. BackendError ``gateway.worker``: one has ended."""
    failure: StrongroomError | None = None
    ends = [process.sentinel for _, process in workers]
    for line, _ in workers:
        try:
            _ask(line, ends, ("prepare", settings))
        except UsageError as error:
            failure = error
            break
    for line, _ in workers:
        _ask(line, ends, ("take" if failure is None else "drop", None))
    if failure is not None:
        raise failure


def _ask(line: Any, ends: list[int], what: tuple[str, Settings | None]) -> None:
    try:
        line.send(what)
        # For as long as it takes: an inference server may have to be asked what it has.
        ready = connection.wait([line, *ends])
        said = line.recv() if line in ready else None
    except (EOFError, OSError):
        ready, said = [], None
    if line not in ready:
        raise BackendError("gateway.worker", "a worker of the gateway has ended", hint="start the gateway again")
    if said is not None:
        message, hint = said
        raise UsageError("gateway.settings", message, hint=hint)


def unexpected(error: Exception) -> UsageError:
    """What somebody is told of an error that nobody expected: the old settings stay."""
    return UsageError("gateway.settings", f"the settings can't be used: {type(error).__name__}: {error}")


def _load(context: ssl.SSLContext, certificate: tuple[Path, Path]) -> None:
    def ask() -> str:
        # OpenSSL would at the terminal, where nobody may be, and everything here would wait for an answer.
        raise BackendError(
            "gateway.certificate",
            f"the key {certificate[1]} is encrypted, and nobody is asked for a passphrase while the gateway runs",
            hint=f"openssl pkey -in {certificate[1]} -out KEY, into memory or a secret of the platform; then --key KEY",
        )

    try:
        context.load_cert_chain(*certificate, password=ask)
    except (OSError, ssl.SSLError) as error:
        raise BackendError("gateway.certificate", f"can't use the certificate: {error}") from None
