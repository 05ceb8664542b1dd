"""The gateway as an ASGI application: one request from its first byte to its record (spec/gateway.md).

Raw ASGI: routing is one dictionary, and each check is a call. In order: who calls, what is asked, whether policy allows
it, limits, content, budget; then upstream, and an answer that is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

import orjson

from strongroom.errors import (
    AuthRequired,
    BackendError,
    NotFound,
    StrongroomError,
    UsageError,
)
from strongroom.gateway import openapi, refusal
from strongroom.gateway.answer import Events, Meter, Shape, embeddings, malformed
from strongroom.gateway.beside import Beside
from strongroom.gateway.certificates import Peer
from strongroom.gateway.connection import CONNECTION, Connection
from strongroom.gateway.door import Door
from strongroom.gateway.flight import Flight, Flights
from strongroom.gateway.metrics import Counts
from strongroom.gateway.records import Records
from strongroom.gateway.refusals import Refusals
from strongroom.gateway.request import BODY_MOST, Forms
from strongroom.gateway.routes import PATHS, Routes
from strongroom.gateway.tolls import Tolls
from strongroom.gateway.upstream import Reply, unexpected

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
_ROUTES = {path: route for route, path in PATHS.items()}
_ALWAYS = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"strict-transport-security", b"max-age=31536000"),
]
_NO_TOKEN = b"certificate"  # from clients that can't leave the header out
_AROUND = 256 << 10  # bytes of an answer that are neither text nor tokens
_EMBEDDING_MOST = 1 << 20  # bytes of one embedding
_BODY_TIME = 20.0  # seconds in which a body has to come
_log = logging.getLogger("strongroom.gateway")


class GatewayApp:
    """The parts that one worker has under some settings: `door` (who may), `routes` (upstreams), `tolls` (limits,
    budgets), `records`. `before`: that of the settings before, whose requests under way are this one's, too, as far as
    the log may end them."""

    def __init__(
        self,
        door: Door,
        forms: Forms,
        routes: Routes,
        tolls: Tolls,
        records: Records,
        beside: Beside | None = None,
        *,
        before: GatewayApp | None = None,
    ) -> None:
        self._door, self._forms, self._routes, self._tolls, self._records = door, forms, routes, tolls, records
        # Of its own class, and the same requests.
        self._flights: Flights = before._flights if before else Flights(door)  # noqa: SLF001
        self._refusals: Refusals = before._refusals if before else Refusals(time.monotonic)  # noqa: SLF001
        self._prefix, self._numbers = secrets.token_hex(8), itertools.count(1 << 20)
        beside = beside or Beside()
        self.verified, self._probe = beside.verified, beside.probe
        self.tracing, self.capture = beside.tracing, beside.capture
        self.limits = tolls.limits
        self.counts: Counts = before.counts if before else Counts()
        # That the log was told of.
        self._problems: frozenset[str] = before._problems if before else frozenset()  # noqa: SLF001

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def find(self) -> None:
        """What the inference servers have is asked for, and the log told of what is captured: nobody's prompts are kept
        that it does not say of. Errors as `Routes.find`, and of the log."""
        await self._routes.find()
        if self._probe is not None:  # so that it is known from the first moment whether requests can be answered
            await self._probe.look()
        if self.capture is not None:
            await asyncio.to_thread(self._records.announce, self.capture.key_id, self._tolls.digest)

    def start(self) -> None:
        """Requests come from now on."""
        self._tolls.start()
        for each in (self.verified, self._probe):
            if each is not None:
                each.start()

    async def retire(self) -> None:
        """No more requests come, and none is under way. Door and records are others', too."""
        for each in (self._probe, self._routes, self.verified):
            if each is not None:
                each.close()
        await self._tolls.close()
        for last in (self.capture, self.tracing):
            if last is not None:
                await asyncio.to_thread(last.close)

    # -- one request ---------------------------------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        flight: Flight | None = None
        try:
            route = _ROUTES.get(path)
            if route is None:
                await self._other(path, scope, send)
                return
            if scope["method"] != "POST":
                raise UsageError("route.method", f"{path} takes POST")
            self._door.check()
            self._records.check()
            if self.verified is not None:
                self.verified.check()
            if self.capture is not None:
                self.capture.check()
            token, peer = _shown(scope)
            caller = self._door.known(token, peer) or await self._door.caller(token, peer)
            self._refusals.check(caller.principal)
            flight = Flight(
                route,
                caller,
                token,
                f"{self._prefix}{next(self._numbers):x}",
                _network(scope["client"][0]),
                peer,
            )
            if self.tracing is not None:
                flight.trace = self.tracing.begin(flight, scope["headers"])
            self._flights.begin(flight)
            await self._infer(flight, scope, receive, send)
        except StrongroomError as error:
            await self._refuse(error, flight, send)
        except Exception:  # noqa: BLE001 - a fault of ours is answered, charged and recorded, too
            _log.exception("a request failed")
            await self._refuse(BackendError("gateway.fault", "the gateway failed"), flight, send)
        except asyncio.CancelledError:  # the server ends: what was given out is recorded all the same
            if flight is not None and not flight.recorded:
                with contextlib.suppress(BackendError):
                    self._record(flight, 500, "internal")
            raise
        finally:
            if flight is not None:
                self._flights.end(flight)

    async def _infer(self, flight: Flight, scope: Scope, receive: Receive, send: Send) -> None:
        asked = flight.asked = self._forms.read(flight.route, await _body(scope, receive))
        flight.ref = self._door.resolved(asked.model) or await self._door.resolve(asked.model)
        if not self._flights.allowed(flight):
            await self._flights.allow(flight)
        if flight.trace is not None:
            flight.trace.part("limits")
        await self._tolls.take(flight)
        forget = scope[CONNECTION].when_gone(flight.leave)
        try:
            flight.body = self._upstream_body(flight)
            if flight.trace is not None:
                flight.trace.upstream(flight)
            reply = await self._routes.begin(flight, flight.body)
            if reply.status != 200:
                raise unexpected(reply.status)
            if flight.trace is not None:
                flight.trace.part("answer")
            if asked.stream:
                await self._stream(flight, reply, send, scope[CONNECTION])
            else:
                await self._whole(flight, reply, send)
        finally:
            if self.verified is not None:  # what was cut, too: else whoever hides something would cut it
                self.verified.look(flight)
            forget()
            self._routes.end(flight)
            await self._tolls.give(flight)

    def _upstream_body(self, flight: Flight) -> dict[str, object]:
        asked = flight.asked
        assert asked is not None  # noqa: S101 - read before
        value: dict[str, object] = {**asked.upstream}
        if flight.route == "embeddings":
            return value
        value["max_tokens"] = flight.most
        if asked.logprobs is not None:
            value |= (
                {"logprobs": True, "top_logprobs": asked.logprobs}
                if flight.route == "chat"
                else {"logprobs": asked.logprobs}
            )
        if asked.stream:
            value |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._routes.channelled:
            # Seeds are the gateway's: a server that draws them itself could hide bits in what it samples.
            flight.seed = secrets.randbits(63)
            value["strongroom"] = {"seed": flight.seed, "record": True}
        return value

    async def _whole(self, flight: Flight, reply: Reply, send: Send) -> None:
        asked = flight.asked
        assert asked is not None  # noqa: S101 - read before
        body = await reply.read(_body_most(flight))
        if flight.route == "embeddings":
            value, flight.numbers = embeddings(asked, body, flight.ref, self._tolls.dimensions)
            flight.meter.prompt = value["usage"]["prompt_tokens"]
        else:
            shape = Shape(asked, flight.identifier, flight.ref, int(time.time()))
            flight.meter = self._metered(shape, flight)
            try:
                value = shape.whole(body)
                _check_size(shape.meter, flight)
            except BackendError:
                flight.meter = Meter()  # nobody gets any of it
                raise
        flight.check()
        self._tolls.settle(flight)
        await self._recorded(flight, 200, "")
        await _send(send, 200, orjson.dumps(value), flight.headers)

    async def _stream(self, flight: Flight, reply: Reply, send: Send, connection: Connection) -> None:
        if not reply.content_type.startswith(b"text/event-stream"):
            raise malformed("is no stream of events")
        asked = flight.asked
        assert asked is not None  # noqa: S101 - read before
        shape, events = Shape(asked, flight.identifier, flight.ref, int(time.time())), Events()
        flight.meter = self._metered(shape, flight)
        if self._tolls.durable_before:
            await self._recorded(flight, 100, "reserved")
        async for piece in reply.pieces():
            out = b"".join([shape.piece(event) for event in events.feed(piece)])
            _check_size(shape.meter, flight)
            if not out:
                continue
            if connection.full:  # the log may end this while its reader takes its time
                await connection.writable()
                flight.check()
            if not flight.begun:
                flight.begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _stream_headers(flight)})
            await send({"type": "http.response.body", "body": out, "more_body": True})
        if not events.ended:
            raise malformed("has no end")
        out = shape.end()
        if not flight.begun:
            flight.begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _stream_headers(flight)})
        self._tolls.settle(flight)
        await self._recorded(flight, 200, "")
        await send({"type": "http.response.body", "body": out, "more_body": False})

    def _metered(self, shape: Shape, flight: Flight) -> Meter:
        assert flight.asked is not None  # noqa: S101 - read before
        shape.meter.most, shape.meter.text_most = flight.most * flight.asked.n, flight.text_most
        kept = self.verified is not None or flight.spelling is not None
        shape.meter.text = {} if kept or (self.capture is not None and self.capture.wants(flight)) else None
        return shape.meter

    async def _refuse(self, error: StrongroomError, flight: Flight | None, send: Send) -> None:
        if flight is not None and flight.why is not None:
            error = flight.why
        status, code = refusal.wire(error)
        if flight is None:
            self.counts.answered("", code, 0, 0, 0.0)
            await _send(send, status, refusal.body_of(error), refusal.headers_of(error))
            return
        gone = error.code == "upstream.aborted"
        self._tolls.settle(flight)
        if not flight.recorded:
            with contextlib.suppress(BackendError):  # then this error says so
                await self._recorded(flight, 499 if gone else status, "disconnected" if gone else code)
        if gone:
            return
        body = refusal.body_of(error)
        if flight.begun:  # its status has been sent: an error is an event of the stream, and the last
            await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": False})
        else:
            # What was not read of a request can't be told from the next one.
            closing = [(b"connection", b"close")] if error.code.startswith("body.") else []
            await _send(send, status, body, [*refusal.headers_of(error), *flight.headers, *closing])

    async def _recorded(self, flight: Flight, status: int, code: str) -> None:
        """Record it; back when the answer, or its first byte, may go out. BackendError ``records.unwritable``."""
        self._record(flight, status, code)
        if self._tolls.durable_before:
            await self._records.durable()
            if self.capture is not None:
                await self.capture.durable()

    def _record(self, flight: Flight, status: int, code: str) -> None:
        tokens, _ = flight.meter.tokens()
        asked, seconds = flight.asked, time.monotonic() - flight.started
        flight.recorded = status != 100
        if status >= 400:
            self._refusals.add(flight.caller.principal)
        if flight.recorded:
            self.counts.answered(flight.route, code or "ok", tokens, flight.bits, seconds)
            self.counts.misspelled += flight.misspelled
            if flight.trace is not None:
                flight.trace.end(flight, status, code, tokens)
        captured = self.capture.take(flight) if self.capture is not None and flight.recorded else None
        number, head = self._records.add(
            {
                "by": flight.caller.principal,
                "key": flight.caller.key,
                "ref": flight.ref,
                "route": flight.route,
                "features": asked.actions[1:] if asked is not None else [],
                "status": status,
                "code": code,
                "prompt_tokens": flight.meter.prompt,
                "tokens": tokens if status != 100 else 0,
                "bits": flight.bits if status != 100 else 0,
                "estimate": math.ceil(flight.meter.estimate) if status != 100 else 0,
                "reserved": flight.reserved,
                "ms": int(seconds * 1000),
                "destination": flight.destination,
                "unrecorded": self._refusals.unrecorded(flight.caller.principal),
                **({} if captured is None else {"capture": captured.commitment}),
            },
            self._tolls.digest,
        )
        if captured is not None and self.capture is not None:
            self.capture.add(captured, number, head)
            self.counts.captured += 1

    @property
    def under_way(self) -> int:
        return len(self._flights)

    def problems(self) -> dict[str, str]:
        """Why nothing is answered now, if that is so: a word for everybody, and what it is for who runs this."""
        found = {} if self._door.awake else {"log": "the room's log can't be seen"}
        if not self._routes.available or (self._probe is not None and not self._probe.answering):
            found["upstream"] = "no inference server answers"
        for word, each in (("records", self._records), ("capture", self.capture), ("verify", self.verified)):
            try:
                if each is not None:
                    each.check()
            except StrongroomError as error:
                found[word] = error.message
        for word in found.keys() - self._problems:
            _log.error("not ready, %s: %s", word, found[word])
        self._problems = frozenset(found)
        return found

    # -- the rest ------------------------------------------------------------------------------------------------

    async def _other(self, path: str, scope: Scope, send: Send) -> None:
        if path == "/healthz":
            await _send(send, 200, b'{"ok":true}', [])
            return
        if path == "/readyz":
            problems = self.problems()
            # Anybody may ask: what an alarm says would tell a thief how much of it is known.
            told = {"ready": not problems, "problems": list(problems)}
            if self.capture is not None:
                told["capture"] = self.capture.key_id
            body = orjson.dumps(told)
            await _send(send, 503 if problems else 200, body, [])
            return
        if path == "/openapi.json":
            await _send(send, 200, openapi.encoded(), [])
            return
        if path == "/v1/models" or path.startswith("/v1/models/"):
            if scope["method"] != "GET":
                raise UsageError("route.method", f"{path} takes GET")
            self._door.check()
            caller = await self._door.caller(*_shown(scope))
            found = [
                {"id": each.ref, "object": "model", "created": each.created, "owned_by": "strongroom"}
                for each in await self._door.models(caller)
                if self._routes.serves(each.ref)
            ]
            wanted = path.removeprefix("/v1/models").removeprefix("/")
            if wanted:
                one = [each for each in found if each["id"] == wanted]
                if not one:
                    raise NotFound("model.not_found", f"there is no model {wanted!r:.80} that you may use")
                await _send(send, 200, orjson.dumps(one[0]), [])
                return
            await _send(send, 200, orjson.dumps({"object": "list", "data": found}), [])
            return
        raise NotFound("route.missing", f"there is no {path!r:.80} here: /v1/models, {', '.join(_ROUTES)}")


def _check_size(meter: Meter, flight: Flight) -> None:
    """An upstream that never ends is ended: what was reserved is all that may come."""
    asked = flight.asked
    if asked is not None:
        most = flight.most * asked.n
        if meter.channel > most or meter.chunks > most or meter.listed > most or (meter.reported or 0) > most:
            raise malformed("has more tokens than were asked for")
    if meter.text_bytes > flight.text_most:
        raise malformed("has more text than the tokens asked for can be")
    if flight.seed is not None and meter.text_bytes and not meter.channel:
        raise malformed("has a text without its tokens on the private channel")


def _body_most(flight: Flight) -> int:
    """Bytes of JSON that an answer may have: what is made of them takes far more memory, and time."""
    asked = flight.asked
    assert asked is not None  # noqa: S101 - read before
    if flight.route == "embeddings":
        return asked.inputs * _EMBEDDING_MOST
    beside = 0 if asked.logprobs is None else asked.logprobs + 1
    return _AROUND + 12 * flight.text_most + flight.most * asked.n * (64 + beside * 1024)


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The body whole; UsageError ``body.*``."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value != b"identity":
            raise UsageError("body.malformed", "the body is compressed: send it as it is")
        if name == b"content-length" and len(value) <= 20 and value.isdigit() and int(value) > BODY_MOST:
            raise UsageError("body.too_large", f"the body is longer than {BODY_MOST >> 10} KiB")
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        return bytes(message.get("body", b""))
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_TIME):
            while True:
                if message["type"] != "http.request":
                    raise BackendError("upstream.aborted", "the client has gone")
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > BODY_MOST:
                    raise UsageError("body.too_large", f"the body is longer than {BODY_MOST >> 10} KiB")
                if not message.get("more_body"):
                    return b"".join(pieces)
                message = await receive()
    except TimeoutError:
        raise UsageError("body.malformed", f"the body did not come within {_BODY_TIME:g} s") from None


def _shown(scope: Scope) -> tuple[str, Peer | None]:
    """The bearer token of a request, empty where a certificate stands for it, and that. Of headers that one alone: what
    a proxy says of a certificate anybody could say."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    peer: Peer | None = scope[CONNECTION].peer
    if peer is not None and not found:
        return "", peer
    if len(found) == 1 and found[0][:7].lower() == b"bearer ":
        token = found[0][7:].strip()
        if peer is not None and token == _NO_TOKEN:
            return "", peer
        if 0 < len(token) <= 8192 and token.isascii():
            return str(token, "ascii"), peer
    raise AuthRequired(
        "apikey.missing", "say who you are: Authorization: Bearer sr-…, or a certificate where one is asked for"
    )


@lru_cache(65_536)
def _network(host: str) -> str:
    """Where an answer goes: the /24 or /48 that the caller is in."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))


def _stream_headers(flight: Flight) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"x-accel-buffering", b"no"),
        *_ALWAYS,
        *flight.headers,
    ]


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *_ALWAYS, *headers]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
