"""Requests to a served room, by the standard library: one kept connection for each thread, TLS to the one authority
that the room's card names, and every error that the server tells raised as the class that it is."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from http.client import HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from strongroom import errors
from strongroom.core.files import write_whole
from strongroom.core.limits import KIB, MIB
from strongroom.core.settings import Settings
from strongroom.errors import BackendError, Conflict, NotFound, StrongroomError, Tampered, UsageError
from strongroom.formats.card import Card, Witnesses
from strongroom.formats.statement import Voice

_TIMEOUT = 60.0  # seconds without a byte
_SLOWEST = 16 * KIB  # bytes a second of an answer, after that time
_MOST = 128 * MIB
_PIECE = MIB
_TEXT = 4096  # characters of what is shown of an error of the server's
_CLASSES: dict[str, type[StrongroomError]] = {
    name: found
    for name, found in vars(errors).items()
    if isinstance(found, type) and issubclass(found, StrongroomError) and found is not StrongroomError
}


class _Dripping(io.RawIOBase):
    """What comes from a server, until a time by which the head of its answer is to be there."""

    def __init__(self, raw: io.RawIOBase, until: float) -> None:
        self._raw, self.until = raw, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self.until:
            raise TimeoutError
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    """The patience of a socket begins anew with each byte: with a byte now and then a head would never end, and whoever
    waits for it may hold what others need."""

    def __init__(self, sock: socket.socket, *more: Any, **named: Any) -> None:
        super().__init__(sock, *more, **named)
        self._patience = sock.gettimeout() or _TIMEOUT

    def begin(self) -> None:
        dripping = _Dripping(self.fp.detach(), time.monotonic() + 2 * self._patience)  # once until it begins
        self.fp = io.BufferedReader(dripping)
        super().begin()
        dripping.until = math.inf


class _Connection(HTTPSConnection):
    response_class = _Response


class Session:
    """A served room, by its card. `patience`: seconds without a byte."""

    def __init__(self, card: Card, *, patience: float = _TIMEOUT, clock: Callable[[], float] = time.monotonic) -> None:
        self.card, self._patience, self._clock = card, patience, clock
        parts = urlsplit(card.url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        try:
            self._tls = ssl.create_default_context(cadata=card.authority)
        except (ssl.SSLError, ValueError, TypeError):
            raise Tampered("card.malformed", "the authority on the card is not a certificate") from None
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._own = threading.local()
        self._all: set[HTTPSConnection] = set()

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        again: bool = True,
    ) -> bytes:
        """The body of the answer; an error of ours for every other status than 200 and 206. BackendError
        ``server.unreachable``, ``server.certificate``.

        When a kept connection turns out to have ended, the very same bytes are sent once more, which the custodian
        answers as it did, or would have, the first time. Without `again`: BackendError ``server.interrupted``.
        """
        response, data = self._exchange(method, path, body, headers or {}, again=again)
        if response.status in (200, 206):
            return data
        raise _error(response.status, data)

    def send(self, path: str, size: int, pieces: Iterable[memoryview], headers: dict[str, str]) -> bytes:
        """POST `size` bytes that come in `pieces`, on a new connection; answer and errors as `request`. What was sent
        once can't be sent again here: BackendError ``server.unreachable`` when the connection ends. What is answered
        202 goes on in that very server: this thread goes on with that connection."""
        connection = _Connection(self._host, self._port, timeout=self._patience, context=self._tls)
        about = {**headers, "Content-Type": "application/octet-stream", "Content-Length": str(size)}
        response = None
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before it hung up
                connection.request("POST", path, iter(pieces), about)
            response = connection.getresponse()
            data = response.read(_MOST + 1)
        except ssl.SSLCertVerificationError as error:
            raise self._other_certificate(error) from None
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            if response is not None and response.status == 202 and response.isclosed() and not response.will_close:
                self._keep(connection)
            else:
                connection.close()
        if response.status in (200, 202):
            return data
        raise _error(response.status, data)

    def _keep(self, connection: HTTPSConnection) -> None:
        if getattr(self._own, "connection", None) is not None:
            self._drop()
        self._own.connection = connection
        self._all.add(connection)

    def size(self, path: str) -> int:
        """The size of an object, asked for by its first byte."""
        response, data = self._exchange("GET", path, b"", {"Range": "bytes=0-0"})
        total = (response.headers.get("Content-Range") or "").rpartition("/")[2]
        if response.status != 206 or not total.isdigit():
            raise _error(response.status, data)
        return int(total)

    def close(self) -> None:
        """Close the connections of all threads; they come back when they are used again."""
        for connection in list(self._all):
            connection.close()
        self._all.clear()
        self._own = threading.local()

    def _drop(self) -> None:
        connection: HTTPSConnection = self._own.connection
        connection.close()
        self._all.discard(connection)
        self._own.connection = None

    def _exchange(
        self, method: str, path: str, body: bytes, headers: dict[str, str], *, again: bool = True
    ) -> tuple[HTTPResponse, bytes]:
        if body:
            headers = {**headers, "Content-Type": "application/json"}
        for first in (True, False):
            kept = getattr(self._own, "connection", None) is not None
            if not kept:
                self._own.connection = _Connection(self._host, self._port, timeout=self._patience, context=self._tls)
                self._all.add(self._own.connection)
            try:
                self._own.connection.request(method, path, body or None, headers)
                response = self._own.connection.getresponse()
                data = self._read(response)
            except ssl.SSLCertVerificationError as error:
                self._drop()
                raise self._other_certificate(error) from None
            except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is not one
                self._drop()
                # A connection that was kept may have been closed meanwhile.
                if kept and first and again:
                    continue
                if kept and not again:
                    raise BackendError(
                        "server.interrupted",
                        f"the connection to {self.card.url} ended before the answer had come",
                        hint="strongroom log tail shows what was recorded; then try again",
                    ) from None
                raise self._unreachable(error) from None
            if len(data) > _MOST:
                raise BackendError("server.answer", f"{self.card.url} answers with more than {_MOST} bytes")
            return response, data
        raise AssertionError  # the loop returns or raises

    def _read(self, response: HTTPResponse) -> bytes:
        """At most one byte more than an answer may have. A server that sends a byte a minute is not waited for."""
        parts, size, begun = [], 0, self._clock()
        while size <= _MOST and (part := response.read1(min(_PIECE, _MOST + 1 - size))):
            parts.append(part)
            size += len(part)
            if self._clock() - begun > self._patience + size / _SLOWEST:
                self._drop()
                raise BackendError(
                    "server.too_slow",
                    f"{self.card.url} sent {size} bytes in {self._clock() - begun:.0f} seconds",
                    hint="try again; whoever runs the custodian: strongroom doctor",
                )
        if response.length and size <= _MOST:  # it said that there would be more
            raise IncompleteRead(b"".join(parts), response.length)
        response.close()  # of the answer, not of the connection: `read1` leaves it open at the end
        return b"".join(parts)

    def _other_certificate(self, error: ssl.SSLCertVerificationError) -> BackendError:
        return BackendError(
            "server.certificate",
            f"{self.card.url} does not show a certificate of the room's authority: {error.verify_message}",
            hint="if the room has a new card, ask for it: strongroom trust CARD",
        )

    def _unreachable(self, error: Exception) -> BackendError:
        return BackendError(
            "server.unreachable",
            f"can't reach {self.card.url}: {getattr(error, 'strerror', None) or type(error).__name__}",
            hint="see that strongroom serve runs there, then try again",
        )


def authorization(voice: Voice, method: str, path: str, body: bytes) -> dict[str, str]:
    """The header by which a request is signed: a `call` about it (spec/http.md)."""
    said = {"method": method, "path": path, "body": hashlib.sha256(body).hexdigest()}
    envelope = voice.say("call", said).envelope
    return {"Authorization": f"Strongroom {base64.urlsafe_b64encode(envelope.encode()).rstrip(b'=').decode()}"}


def _error(status: int, data: bytes) -> StrongroomError:
    """The error that the server tells of; what is no problem document is a fault of the server's."""
    try:
        return error_of(json.loads(data))
    except (ValueError, RecursionError):
        return _fault(status)


def _fault(status: object) -> BackendError:
    return BackendError("server.fault", f"the server answers {status!s:.40}", hint="look into its log, then try again")


def error_of(value: Any) -> StrongroomError:
    """The error that a problem document tells of; BackendError ``server.fault`` where it is none."""
    try:
        kind = _CLASSES[value["title"]]
        evidence = {
            str(name): item for name, item in value["evidence"].items() if name not in ("code", "message", "hint")
        }
        code, detail, hint = (str(value[name])[:_TEXT] for name in ("code", "detail", "hint"))
        return kind(code, detail, hint=hint, **evidence)
    except (KeyError, TypeError, AttributeError):
        return _fault(value.get("status") if isinstance(value, dict) else "with no problem")


def cards() -> Iterator[Card]:
    """The cards that this user trusts."""
    folder = Settings.from_environment().state_folder / "rooms"
    for path in sorted(folder.glob("*.json")):
        try:
            yield Card.decode(path.read_bytes())
        except OSError as error:
            raise BackendError("card.unreadable", f"can't read the card {path}: {error.strerror}") from None
        except Tampered as error:
            raise Tampered(error.code, f"{path}: {error.message}", hint=f"remove {path}; ask for the card") from None


def trust(card: Card, witnesses: Witnesses | None = None) -> tuple[Card, Path]:
    """Keep `card` among those that are trusted; as it is kept, and where. A room may move, and get another authority,
    but its keys stay; and at one address there is one room. `witnesses` in place of the card's; those that were pinned
    before stay unless others are given here. Conflict ``card.other_keys``, ``card.other_room``."""
    folder = Settings.from_environment().state_folder / "rooms"
    path = folder / f"{card.room.hex()}.json"
    if witnesses is not None:
        card = replace(card, witnesses=witnesses)
    for known in cards():
        if known.room == card.room and known.witnesses is not None and witnesses is None:
            card = replace(card, witnesses=known.witnesses)
        if known.room == card.room and (known.log_key, known.signer) != (card.log_key, card.signer):
            raise Conflict(
                "card.other_keys",
                f"this card has other keys of the room {card.room.hex()} than the card that is trusted; a room keeps "
                "its keys, so one of the two cards is not the room's",
                hint=f"ask whoever runs the room; to forget the card that is trusted: rm {path}",
            )
        if known.room != card.room and _address(known.url) == _address(card.url):
            raise Conflict(
                "card.other_room",
                f"the room {known.room.hex()} is trusted at {known.url}, and this card is another room's",
                hint=f"if that room is gone: rm {folder / known.room.hex()}.json",
            )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, card.encode())
    except OSError as error:
        raise BackendError("card.unwritable", f"can't keep the card in {folder}: {error.strerror}") from None
    return card, path


def card_of(url: str) -> Card:
    """The trusted card of the room at `url`; NotFound ``card.missing``, UsageError ``room.address``."""
    wanted = _address(url)
    for card in cards():
        if _address(card.url) == wanted:
            return card
    raise NotFound(
        "card.missing",
        f"no card of a room at {url} is trusted here",
        hint="ask whoever serves it for card.json, then: strongroom trust card.json",
    )


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").lower(), parts.port or 443
    except ValueError:
        raise UsageError("room.address", f"{url!r:.200} is not https://HOST:PORT") from None
