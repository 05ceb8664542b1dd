"""New settings for a gateway that runs, in all of its workers or in none (docs/reference/gateway-settings.md).

SIGHUP comes to one process, which reads the file. Each worker *prepares*: it makes all that the new settings need,
while the old ones go on to answer, and whatever can go wrong goes wrong here. Where all could, each *takes* what it has
prepared, and that can't fail: the next request is answered under the new settings, those under way end under the old
ones (gateway/generations.py). Where one could not, all *drop* it, and nothing has changed.

`Reload` is these three in one worker. Who says when: gateway/hangup.py in a gateway of one process, gateway/workers.py
in one of several.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strongroom.crypto.revocation import RevocationLists
from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.gateway.app import GatewayApp
from strongroom.gateway.changes import Taken, of_lists, of_settings
from strongroom.gateway.generations import Generations
from strongroom.gateway.listen import unusable
from strongroom.gateway.settings import Settings
from strongroom.vault.revocations import Revocations

Read = Callable[[], Settings]
Tell = Callable[["Taken | StrongroomError"], None]
_log = logging.getLogger("strongroom.gateway")


@dataclass(frozen=True)
class _Prepared:
    """All that is needed to answer under `settings`; `lists`: of revoked certificates, where there are any."""

    settings: Settings
    app: GatewayApp
    lists: RevocationLists | None


class Reload:
    """New settings in one worker. Read again with them: the `certificate` (chain and key) of the context `tls`, and
    lists of revoked certificates (`revocations`): whoever is on one loses those of the `connections` that were made
    before."""

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
        self._prepared: _Prepared | None = None
        self._shown = _content(certificate)

    async def prepare(self, settings: Settings) -> None:
        """All that can go wrong. StrongroomError: nothing is prepared."""
        await self.drop()
        if self._certificate is not None:  # into a context that nobody uses
            _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._certificate)
        lists = await asyncio.to_thread(self._revocations.read) if self._revocations is not None else None
        self._prepared = _Prepared(settings, await self._app.prepare(settings), lists)

    async def take(self) -> tuple[str, ...]:
        """What was prepared is in force; what it changes, as `Taken` has it."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return ()
        changed = of_settings(self._app.settings, prepared.settings)
        self._app.take(prepared.settings, prepared.app)
        return (*changed, *await self._take_lists(prepared.lists), *self._take_certificate())

    async def drop(self) -> None:
        """What was prepared is not wanted: another worker could not."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await self._app.drop(prepared.app)

    async def _take_lists(self, lists: RevocationLists | None) -> tuple[str, ...]:
        if lists is None or self._revocations is None:
            return ()
        changed = of_lists(self._revocations.taken, lists)
        self._revocations.take(lists)
        await self._app.certificates_changed(self._connections)
        return changed

    def _take_certificate(self) -> tuple[str, ...]:
        if self._tls is None or self._certificate is None:
            return ()
        try:
            _load(self._tls, self._certificate)
        except BackendError as error:  # written to in this moment; the next SIGHUP reads it
            _log.error("%s", error)
            return ()
        before, self._shown = self._shown, _content(self._certificate)
        return () if before == self._shown else ("the gateway's certificate",)


def unexpected(error: Exception) -> UsageError:
    """What somebody is told of an error that nobody expected: the old settings stay."""
    return UsageError("gateway.settings", f"the settings can't be used: {type(error).__name__}: {error}")


def _content(certificate: tuple[Path, Path] | None) -> bytes:
    """Another one for another chain; empty where there is none, or none that can be read now."""
    try:
        return hashlib.sha256(certificate[0].read_bytes()).digest() if certificate is not None else b""
    except OSError:
        return b""


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
        raise unusable(error) from None
