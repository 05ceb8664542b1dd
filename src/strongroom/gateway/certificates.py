"""Callers that show a certificate in the TLS handshake instead of a key (spec/gateway.md, section 1).

OpenSSL proves the key, and that the chain leads to an authority that it was told of. Whether the certificate counts is
for the room to say, from its log, for each connection anew: a context can be told of authorities, and forgets none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import time
from asyncio import BaseTransport
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger("strongroom.gateway")
_FRESH = 300.0  # seconds after which a connection has to prove its key again, on a new one


@dataclass(frozen=True)
class Peer:
    """Whoever is at the other end of a connection, by the PEM `chain` that its handshake has proved, at the time `at`
    (seconds). `digest` names this one handshake."""

    chain: str
    at: int
    digest: str
    begun: float = field(default_factory=time.monotonic)

    @property
    def old(self) -> bool:
        """Whether the next request has to come on a new connection."""
        return time.monotonic() - self.begun > _FRESH


def peer(transport: BaseTransport) -> Peer | None:
    """Who has shown a certificate on a connection whose handshake is over; None for most."""
    tls = transport.get_extra_info("ssl_object")
    own = tls.getpeercert(binary_form=True) if tls is not None else None
    if own is None:
        return None
    chain = "".join(map(ssl.DER_cert_to_PEM_cert, _sent(tls) or [own]))
    return Peer(chain, int(time.time()), hashlib.sha256(os.urandom(16) + chain.encode()).hexdigest())


def _sent(tls: Any) -> list[bytes]:
    """The whole chain that the other side has sent, DER, its own certificate first."""
    # Public from Python 3.13 on, and there in the object below before.
    ask = getattr(tls, "get_unverified_chain", None) or tls._sslobj.get_unverified_chain  # noqa: SLF001
    return [each if isinstance(each, bytes) else _der(each) for each in ask() or ()]


def _der(certificate: Any) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.public_bytes())


class Certificates:
    """Which authorities the handshakes of one worker take: those of the room, whose `bundles` (PEM) are asked for with
    each change of the log."""

    def __init__(self, bundles: Callable[[], Sequence[str]]) -> None:
        self._bundles = bundles
        self._context: ssl.SSLContext | None = None
        self._told: set[str] = set()
        self.crl_end: Callable[[], int | None] = lambda: None  # when the first list of revoked ones ends, in seconds

    def ask_with(self, context: ssl.SSLContext) -> None:
        """Ask for certificates in handshakes of `context`."""
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a bundle may begin below its root
        # A session of TLS 1.2 may be resumed by its number, and then the key is not proved again.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        self._context = context

    def learn(self) -> None:
        """Tell OpenSSL of those that are new. In a thread of its own: it asks the room."""
        if self._context is None:
            return
        for bundle in self._bundles():
            if bundle in self._told:
                continue
            self._told.add(bundle)
            try:
                self._context.load_verify_locations(cadata=bundle)
            except ssl.SSLError as error:  # all others still call
                _log.warning("a trust domain's certificates can't be used: %s", error)
