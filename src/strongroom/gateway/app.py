"""The gateway as an ASGI application: one request from its first byte to its record (spec/gateway.md).

Raw ASGI: routing is one dictionary, and each check is a call. A request to one of the routes of inference goes through

1. `answer`: whether anything may be answered now, and who calls. From here on it is a `Flight`, which the log may end.
2. `_infer`: what is asked, and whether policy allows it; limits, content and budget are taken (`Tolls`); upstream gets
   the request written anew.
3. `_whole` or `_stream`: the answer is made anew; bits are settled and the record is made before its end goes out.
4. `_refuse`: in place of 3, or in its middle, whatever was raised on the way, a fault of ours too. It is charged and
   recorded as well.

Whatever became of it, `_infer` and `answer` give back its places and limits at their ends. Other routes are `_other`.
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
from strongroom.gateway.door import Door, digest_of
from strongroom.gateway.exchange import Exchange, Head
from strongroom.gateway.flight import Flight, Flights
from strongroom.gateway.metrics import Counts
from strongroom.gateway.records import Records
from strongroom.gateway.refusals import Refusals
from strongroom.gateway.request import BODY_MOST, Forms
from strongroom.gateway.routes import PATHS, Routes
from strongroom.gateway.tolls import Tolls
from strongroom.gateway.upstream import Reply, unexpected

_ROUTES = {path: route for route, path in PATHS.items()}
_ALWAYS = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"strict-transport-security", b"max-age=31536000"),
]
_ALWAYS_JSON = b"".join(b"%s: %s\r\n" % each for each in [(b"content-type", b"application/json"), *_ALWAYS])
_NO_TOKEN = b"certificate"  # from clients that can't leave the header out
_AROUND = 256 << 10  # bytes of an answer that are neither text nor tokens
_EMBEDDING_MOST = 1 << 20  # bytes of one embedding
_BODY_TIME = 20.0  # seconds in which a body has to come
_TELL_EVERY = 10.0  # seconds between two lines of the log about one thing of ours that fails
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
        # What has to be in order for anything to be answered.
        checked = (door, records, tolls.debts, self.verified, self.capture)
        self._checks = [each.check for each in checked if each is not None]
        self.counts: Counts = before.counts if before else Counts()
        self._requests = 0  # under way in this one
        self._idle: Callable[[], object] | None = None
        # Those that the log was told of.
        self._problems: frozenset[str] = before._problems if before else frozenset()  # noqa: SLF001
        self._told: dict[str, float] = {}  # by code: when the log was told of it

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

    def when_idle(self, idle: Callable[[], object]) -> None:
        """Requests go to another one from now on; `idle` is called once none is under way here."""
        self._idle = idle
        if not self._requests:
            idle()

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

    async def answer(self, exchange: Exchange) -> None:
        """One request, over a connection of ours."""
        head, door = exchange.head, self._door
        flight: Flight | None = None
        self._requests += 1
        try:
            route = _ROUTES.get(head.path)
            if route is None:
                await self._other(head.path, exchange)
                return
            if head.method != "POST":
                raise UsageError("route.method", f"{head.path} takes POST")
            for check in self._checks:
                check()
            shown = head.read
            if shown is None:  # else it is what the same connection has said before
                shown = head.read = _Shown(exchange)
            known = door.epoch
            caller = door.known(shown.digest) or await door.caller(shown.token, shown.peer)
            self._refusals.check(caller.principal)
            identifier = f"{self._prefix}{next(self._numbers):x}"
            flight = Flight(route, caller, shown, identifier, exchange.task, known)
            if self.tracing is not None:
                flight.trace = self.tracing.begin(flight, exchange.head.headers)
            self._flights.begin(flight)
            await self._infer(flight, exchange)
        except StrongroomError as error:
            await self._refuse(error, flight, exchange)
            _let_go(error)
        except Exception:  # noqa: BLE001 - a fault of ours is answered, charged and recorded, too
            _log.exception("a request failed")
            await self._refuse(BackendError("gateway.fault", "the gateway failed"), flight, exchange)
        except asyncio.CancelledError:  # the server ends: what was given out is recorded all the same
            if flight is not None and not flight.recorded:
                with contextlib.suppress(BackendError):
                    self._record(flight, 500, "internal")
            raise
        finally:
            if flight is not None:
                self._flights.end(flight)
            self._requests -= 1
            if self._idle is not None and not self._requests:
                self._idle()

    async def _infer(self, flight: Flight, exchange: Exchange) -> None:
        _check_head(exchange.head)
        if (body := exchange.take()) is None:
            body = await _body(exchange.receive)
        asked = flight.asked = self._forms.read(flight.route, body)
        flight.ref = self._door.resolved(asked.model) or await self._door.resolve(asked.model)
        if not self._flights.allowed(flight):
            await self._flights.allow(flight)
        if flight.trace is not None:
            flight.trace.part("limits")
        try:
            exchange.when_gone(flight.leave)
            if not self._tolls.take(flight):
                await self._tolls.wait(flight)
            flight.body = self._upstream_body(flight)
            if flight.trace is not None:
                flight.trace.upstream(flight)
            reply = await self._routes.begin(flight, flight.body)
            if reply.status != 200:
                raise unexpected(reply.status)
            if flight.trace is not None:
                flight.trace.part("answer")
            if asked.stream:
                await self._stream(flight, reply, exchange)
            else:
                body = reply.at_once()
                if body is None:
                    body = await reply.read(_body_most(flight))
                answer = self._whole(flight, body)
                await self._durable(flight)
                exchange.answer(200, _ALWAYS_JSON, flight.headers, answer)
        finally:
            if self.verified is not None:  # what was cut, too: else whoever hides something would cut it
                self.verified.look(flight)
            exchange.when_gone(None)
            self._routes.end(flight)
            if (given := self._tolls.give(flight)) is not None:  # over Redis
                await given

    def _upstream_body(self, flight: Flight) -> dict[str, object]:
        asked = flight.asked
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

    def _whole(self, flight: Flight, body: bytes) -> bytes:
        """An answer that came whole, made anew, charged and recorded."""
        asked = flight.asked
        if flight.route == "embeddings":
            value, flight.numbers = embeddings(asked, body, flight.ref, self._tolls.dimensions)
            flight.meter.prompt = value["usage"]["prompt_tokens"]
        else:
            shape = Shape(asked, flight.identifier, flight.ref, int(time.time()), flight.meter)
            self._metered(flight)
            try:
                value = shape.whole(body)
                _check_size(shape.meter, flight)
            except BackendError:
                flight.meter = Meter()  # nobody gets any of it
                raise
        flight.check()
        self._tolls.settle(flight)
        self._record(flight, 200, "")
        return orjson.dumps(value)

    async def _stream(self, flight: Flight, reply: Reply, exchange: Exchange) -> None:
        if not reply.content_type.startswith(b"text/event-stream"):
            raise malformed("is no stream of events")
        asked, send, connection = flight.asked, exchange.send, exchange.connection
        shape, events = Shape(asked, flight.identifier, flight.ref, int(time.time()), flight.meter), Events()
        self._metered(flight)
        self._tolls.metered(flight)
        meter = flight.meter
        if self._tolls.durable_before:
            self._record(flight, 100, "reserved")
            await self._durable(flight)
        made = shape.piece
        while (piece := reply.now()) != b"":  # as `pieces`, without a generator between
            if piece is None:
                await reply.more()
                continue
            out = b"".join([made(event) for event in events.feed(piece)])
            _check_size(shape.meter, flight)
            if not out:
                continue
            if meter.text_bytes > flight.covered:
                await self._tolls.cover(flight)
                flight.check()
            while connection.full:  # the log may end this while its reader takes its time
                await connection.writable()
                flight.check()
            if not flight.begun:
                flight.begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _stream_headers(flight)})
            exchange.give(out, more=True)
        reply.finish()
        if not events.ended:
            raise malformed("has no end")
        out = shape.end()
        if not flight.begun:
            flight.begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _stream_headers(flight)})
        self._tolls.settle(flight)
        self._record(flight, 200, "")
        await self._durable(flight)
        await send({"type": "http.response.body", "body": out, "more_body": False})

    def _metered(self, flight: Flight) -> None:
        meter = flight.meter
        meter.most, meter.text_most = flight.most * flight.asked.n, flight.text_most
        if (
            self.verified is not None
            or flight.spelling is not None
            or (self.capture is not None and self.capture.wants(flight))
        ):
            meter.text = {}

    async def _refuse(self, error: StrongroomError, flight: Flight | None, exchange: Exchange) -> None:
        if flight is not None and flight.why is not None:
            error = flight.why
        status, code = refusal.wire(error)
        if refusal.withheld(error):
            self._tell(error)
        if flight is None:
            self.counts.answered("", code, 0, 0, 0.0)
            exchange.answer(status, _ALWAYS_JSON, refusal.headers_of(error), refusal.body_of(error))
            return
        gone = error.code == "upstream.aborted"
        self._tolls.settle(flight)
        if not flight.recorded:
            with contextlib.suppress(BackendError):  # then this error says so
                self._record(flight, 499 if gone else status, "disconnected" if gone else code)
                await self._durable(flight)
        if gone:
            return
        body = refusal.body_of(error)
        if flight.begun:  # its status has been sent: an error is an event of the stream, and the last
            await exchange.send({"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": False})
        else:
            # What was not read of a request can't be told from the next one.
            closing = [(b"connection", b"close")] if error.code.startswith("body.") else []
            exchange.answer(status, _ALWAYS_JSON, [*refusal.headers_of(error), *flight.headers, *closing], body)

    def _tell(self, error: StrongroomError) -> None:
        """What callers are not told, for who runs this; not each time: who is refused can ask again at once."""
        if any(error.message in why for why in self.problems().values()):  # which are told once
            return
        now = time.monotonic()
        if now - self._told.get(error.code, -math.inf) >= _TELL_EVERY:
            self._told[error.code] = now
            _log.error("%s", error)

    async def _durable(self, flight: Flight) -> None:
        """Back when the answer, its first byte, or its end, may go out: at once where none of that waits for a disk.
        BackendError ``records.unwritable``."""
        if flight.owes:
            await self._tolls.noted(flight)
        if self._tolls.durable_before:
            await self._records.durable()
            if self.capture is not None:
                await self.capture.durable()

    def _record(self, flight: Flight, status: int, code: str) -> None:
        tokens, asked, seconds = flight.tokens, flight.asked, time.monotonic() - flight.started
        caller = flight.caller
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
            {  # in the order of their names: they are sorted faster
                "at": None,  # and `before`, `n`, `stream` are put in there
                "before": None,
                "bits": flight.bits,
                "by": caller.principal,
                **({} if captured is None else {"capture": captured.commitment}),
                "code": code,
                "destination": flight.destination,
                "estimate": math.ceil(flight.meter.estimate) if status != 100 else 0,
                "features": asked.actions[1:],
                "key": caller.key,
                "ms": int(seconds * 1000),
                "n": None,
                "prompt_tokens": flight.meter.prompt,
                "ref": flight.ref,
                "reserved": flight.reserved,
                "route": flight.route,
                "status": status,
                "stream": None,
                "tokens": tokens,  # none before the answer
                "unrecorded": self._refusals.unrecorded(caller.principal),
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
        found = {} if self._door.awake else {"log": f"the room's log can't be seen: {self._door.trouble or 'not yet'}"}
        if not self._routes.available or (self._probe is not None and not self._probe.answering):
            found["upstream"] = "no inference server answers"
        for word, each in (
            ("records", self._records),
            ("records", self._tolls.debts),
            ("capture", self.capture),
            ("verify", self.verified),
        ):
            try:
                if each is not None:
                    each.check()
            except StrongroomError as error:
                found[word] = error.message
        for word in found.keys() - self._problems:
            _log.error("not ready, %s: %s", word, found[word])
        for word in self._problems - found.keys():
            _log.warning("%s: no problem any more", word)
        self._problems = frozenset(found)
        return found

    # -- the rest ------------------------------------------------------------------------------------------------

    async def _other(self, path: str, exchange: Exchange) -> None:
        """What is not inference: whether this is well, what there is. NotFound ``route.missing``."""
        if path == "/healthz":
            exchange.answer(200, _ALWAYS_JSON, [], b'{"ok":true}')
        elif path == "/readyz":
            self._ready(exchange)
        elif path == "/openapi.json":
            exchange.answer(200, _ALWAYS_JSON, [], openapi.encoded())
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            await self._models(path, exchange)
        else:
            raise NotFound("route.missing", f"there is no {path!r:.80} here: /v1/models, {', '.join(_ROUTES)}")

    def _ready(self, exchange: Exchange) -> None:
        problems = self.problems()
        # Anybody may ask: what an alarm says would tell a thief how much of it is known.
        told = {"ready": not problems, "problems": list(problems)}
        if self.capture is not None:
            told["capture"] = self.capture.key_id
        exchange.answer(503 if problems else 200, _ALWAYS_JSON, [], orjson.dumps(told))

    async def _models(self, path: str, exchange: Exchange) -> None:
        """Those that the caller may use, and of which there is an inference server; or one of them."""
        if exchange.head.method != "GET":
            raise UsageError("route.method", f"{path} takes GET")
        self._door.check()
        caller = await self._door.caller(*_shown(exchange))
        found = [
            {"id": each.ref, "object": "model", "created": each.created, "owned_by": "strongroom"}
            for each in await self._door.models(caller)
            if self._routes.serves(each.ref)
        ]
        told: object = {"object": "list", "data": found}
        if wanted := path.removeprefix("/v1/models").removeprefix("/"):
            told = next((each for each in found if each["id"] == wanted), None)
            if told is None:
                raise NotFound("model.not_found", f"there is no model {wanted!r:.80} that you may use")
        exchange.answer(200, _ALWAYS_JSON, [], orjson.dumps(told))


def _check_size(meter: Meter, flight: Flight) -> None:
    """An upstream that never ends is ended: what was reserved is all that may come."""
    most = meter.most  # see `_metered`
    if meter.channel > most or meter.chunks > most or meter.listed > most or (meter.reported or 0) > most:
        raise malformed("has more tokens than were asked for")
    if meter.text_bytes > flight.text_most:
        raise malformed("has more text than the tokens asked for can be")
    if flight.seed is not None and meter.text_bytes and not meter.channel:
        raise malformed("has a text without its tokens on the private channel")


def _body_most(flight: Flight) -> int:
    """Bytes of JSON that an answer may have: what is made of them takes far more memory, and time."""
    asked = flight.asked
    if flight.route == "embeddings":
        return asked.inputs * _EMBEDDING_MOST
    beside = 0 if asked.logprobs is None else asked.logprobs + 1
    return _AROUND + 12 * flight.text_most + flight.most * asked.n * (64 + beside * 1024)


def _check_head(head: Head) -> None:
    """UsageError ``body.*`` for a body that is not to be read."""
    if head.named.get(b"content-encoding", b"identity") != b"identity":
        raise UsageError("body.malformed", "the body is compressed: send it as it is")
    if head.length > BODY_MOST:
        raise UsageError("body.too_large", f"the body is longer than {BODY_MOST >> 10} KiB")


async def _body(receive: Callable[[], Awaitable[dict[str, Any]]]) -> bytes:
    """The body whole, as it comes; UsageError ``body.*``."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_TIME):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise BackendError("upstream.aborted", "the client has gone")
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > BODY_MOST:
                    raise UsageError("body.too_large", f"the body is longer than {BODY_MOST >> 10} KiB")
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        raise UsageError("body.malformed", f"the body did not come within {_BODY_TIME:g} s") from None


class _Shown:
    """Who a request says that it is of, and where it comes from: the same for the next of the connection that has the
    same head. `digest` stands for the token, and is empty where there is more to it than a token."""

    __slots__ = ("destination", "digest", "peer", "token")

    def __init__(self, exchange: Exchange) -> None:
        self.token, self.peer = _shown(exchange)
        self.digest = digest_of(self.token) if self.peer is None else ""
        self.destination = _network(exchange.connection.client[0])


def _shown(exchange: Exchange) -> tuple[str, Peer | None]:
    """The bearer token of a request, empty where a certificate stands for it, and that. Of headers that one alone: what
    a proxy says of a certificate anybody could say."""
    found = exchange.head.named.get(b"authorization")
    peer = exchange.connection.peer
    if peer is not None and found is None:
        return "", peer
    if found is not None and found[:7].lower() == b"bearer " and exchange.once(b"authorization"):
        token = found[7:].strip()
        if peer is not None and token == _NO_TOKEN:
            return "", peer
        if 0 < len(token) <= 8192 and token.isascii():
            return str(token, "ascii"), peer
    raise AuthRequired(
        "apikey.missing", "say who you are: Authorization: Bearer sr-…, or a certificate where one is asked for"
    )


def _let_go(error: BaseException | None) -> None:
    """An error keeps the frames that it came through, with all that was asked, and there is always something in them
    that keeps the error: until the collector looks, which is seldom."""
    while error is not None:
        before, error.__context__, error.__traceback__ = error.__context__, None, None
        error = before


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
