"""The server's HTTP side: raw ASGI, OpenAI's routes, no checks that a gateway makes. Never let strangers reach it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from strongroom.errors import AuthRequired, BackendError, LimitExceeded, NotFound, StrongroomError, UsageError
from strongroom.infer.answers import Answer, Choice, spelled
from strongroom.infer.embed import Embedder
from strongroom.infer.engine import Engine, Event, Job, PromptLogprobs, Token
from strongroom.infer.fields import Fields, Reader, Wanted
from strongroom.infer.text import Spelling
from strongroom.infer.verify import Checked, Run, Verifier
from strongroom.watch.verdict import Tally

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_BODY = 16 << 20
_INPUTS = 4096
_SEEDS = 1 << 64
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


@dataclass(frozen=True)
class Model:
    """What is served: `names` are those that requests may use, the first is said."""

    names: tuple[str, ...]
    engine: Engine
    reader: Reader
    spelling: Spelling
    embedder: Embedder | None
    verifier: Verifier | None
    created: int


@dataclass(frozen=True)
class _Call:
    """A request; `private`: it came over the channel."""

    body: dict[str, Any]
    private: bool
    receive: Receive
    send: Send


class InferApp:
    """The ASGI application. `channel`: the secret without which nobody is answered (None: everybody is)."""

    def __init__(self, model: Model, channel: str | None, *, together: int = 1024) -> None:
        self._model, self._together = model, together
        self._channel = channel.encode() if channel is not None else None
        self._under_way = 0
        self._tally = Tally()
        self._routes: dict[tuple[str, str], Callable[[_Call], Awaitable[None]]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("POST", "/v1/verify"): self._verify,
            ("GET", "/v1/models"): self._models,
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("this server speaks HTTP only")
        try:
            await self._answer(scope, receive, send)
        except StrongroomError as error:
            await _whole(send, error.http_status, _error(error))

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if path in ("/healthz", "/readyz"):
            well = self._model.engine.alive
            await _whole(send, 200 if well else 503, orjson.dumps({"ok": well}))
            return
        private = self._private(scope)
        handler = self._routes.get((method, path))
        if handler is None:
            raise NotFound("infer.route", f"there is no {method} {path} here", hint="GET /v1/models")
        body: dict[str, Any] = {}
        if method == "POST":
            body = _object(await _body(receive))
            if body.get("model") not in self._model.names:
                raise NotFound("infer.model", f"this server has {self._model.names[0]}")
            if "strongroom" in body and not private:
                raise UsageError(
                    "infer.field", "the member strongroom is for whoever has the channel's secret", param="strongroom"
                )
        if self._under_way >= self._together:
            raise LimitExceeded("infer.busy", f"{self._together} requests are under way already", hint="try later")
        self._under_way += 1
        try:
            await handler(_Call(body, private, receive, send))
        finally:
            self._under_way -= 1

    def _private(self, scope: MutableMapping[str, Any]) -> bool:
        """Whether the channel's secret was said; AuthRequired if there is one and it was not."""
        if self._channel is None:
            return False
        said = [value for name, value in scope["headers"] if name == b"strongroom-channel"]
        # In constant time: how long it takes must not tell how much of a guess is right.
        if len(said) != 1 or not hmac.compare_digest(said[0], self._channel):
            raise AuthRequired("infer.channel", "this server answers on its private channel only")
        return True

    async def _models(self, call: _Call) -> None:
        model = {"object": "model", "created": self._model.created, "owned_by": "strongroom"}
        data = [{"id": name, **model} for name in self._model.names]
        await _whole(call.send, 200, orjson.dumps({"object": "list", "data": data}))

    async def _chat(self, call: _Call) -> None:
        wanted = await asyncio.to_thread(self._model.reader.chat, call.body, private=call.private)
        await self._generate(wanted, call.receive, call.send)

    async def _completions(self, call: _Call) -> None:
        wanted = await asyncio.to_thread(self._model.reader.completion, call.body, private=call.private)
        await self._generate(wanted, call.receive, call.send)

    async def _verify(self, call: _Call) -> None:
        """An answer that another server gave is run again; what is said is of all that have been sent here."""
        verifier = self._model.verifier
        if verifier is None or not call.private:
            raise NotFound("infer.route", "answers are verified over the private channel only")
        request, read = call.body.get("request"), self._model.reader
        if not isinstance(request, dict) or call.body.get("route") not in ("chat", "completions"):
            raise UsageError("infer.field", "a run has a route and a request", param="request")
        reads = read.chat if call.body["route"] == "chat" else read.completion
        fields = Fields(call.body)
        output, (text,) = fields.tokens("tokens"), fields.texts("text") or ("",)
        if output is None or not (output or text):
            raise UsageError("infer.field", "a run has tokens, and a text", param="tokens")
        try:
            wanted = await asyncio.to_thread(reads, request, private=True)
            self._model.reader.check_output(wanted, output)
            if not spelled(wanted, self._model.spelling, output).startswith(text):
                raise UsageError("infer.run", "the text is another than that of the tokens")
        except UsageError:
            # Whoever was asked this has answered all the same: it is not what it says.
            await self._judged(call, verifier, Tally(others=1))
            return
        ask = wanted.asks[0]
        choice = fields.whole("choice", 0, 0, ask.choices - 1)
        run = Run(ask.prompt, output, replace(ask.sampling, seed=(ask.sampling.seed + choice) % _SEEDS))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Checked] = loop.create_future()

        def work(why: StrongroomError | None) -> None:
            try:
                if why is not None:
                    raise why
                found = verifier.check(run)
            except StrongroomError as error:
                loop.call_soon_threadsafe(_settle, done, error)
            else:
                loop.call_soon_threadsafe(_settle, done, found)

        self._model.engine.call(work)
        await self._judged(call, verifier, verifier.tallied(await done))

    async def _judged(self, call: _Call, verifier: Verifier, run: Tally) -> None:
        """What all runs since this server began come to, and this one alone."""
        self._tally += run
        said = {**asdict(verifier.verdict(self._tally)), "run": asdict(run), "arithmetic": verifier.arithmetic}
        await _whole(call.send, 200, orjson.dumps(said))

    async def _generate(self, wanted: Wanted, receive: Receive, send: Send) -> None:
        events: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        loop, jobs = asyncio.get_running_loop(), list[Job]()
        answer = Answer(self._model.names[0], wanted, self._model.spelling)

        def telling(prompt: int) -> Callable[[list[Event]], None]:
            def tell(news: list[Event]) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (prompt, news))

            return tell

        gone = asyncio.ensure_future(_disconnected(receive))
        stream = _Stream(send) if wanted.stream else None
        try:
            for number, ask in enumerate(wanted.asks):
                jobs.append(self._model.engine.submit(ask, telling(number)))
            heard = _Heard(answer, wanted)
            while not answer.complete:
                news = asyncio.ensure_future(events.get())
                await asyncio.wait({news, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():  # nobody reads it: the rows are for others
                    news.cancel()
                    return
                grown = heard.take(*news.result())
                while not events.empty():
                    grown |= heard.take(*events.get_nowait())
                if stream is not None:
                    await stream.say(answer.event(choice) for choice in grown.values())
            if stream is not None:
                await stream.say(answer.ending())
            else:
                await _whole(send, 200, await asyncio.to_thread(answer.whole))
        except StrongroomError as error:
            if stream is None or not stream.begun:
                raise
            await stream.say([b"data: " + _error(error) + b"\n\n"])
        finally:
            gone.cancel()
            for job in jobs:
                self._model.engine.abandon(job)
        if stream is not None:
            await stream.end()

    async def _embeddings(self, call: _Call) -> None:
        embedder = self._model.embedder
        if embedder is None:
            raise UsageError("infer.no_embeddings", "this model makes no embeddings")
        fields = Fields(call.body)
        size = fields.whole("dimensions", embedder.width, 1, embedder.width)
        encoding = fields["encoding_format"] or "float"
        prompts = await asyncio.to_thread(self._model.reader.inputs, call.body)
        if encoding not in ("float", "base64") or len(prompts) > _INPUTS:
            raise UsageError("infer.field", f"float or base64, of at most {_INPUTS} inputs", param="encoding_format")
        self._model.reader.check_inputs(prompts)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[NDArray[np.float32]] = loop.create_future()

        def work(why: StrongroomError | None) -> None:
            found = None
            try:
                found = embedder.vectors(prompts) if why is None else None
            except Exception as error:
                # The engine ends of it, and tells the jobs that it has: this is none.
                why = BackendError("infer.failed", f"the model could not be run: {type(error).__name__}: {error}")
                raise
            finally:
                loop.call_soon_threadsafe(settle, found, why)

        def settle(found: NDArray[np.float32] | None, why: StrongroomError | None) -> None:
            if done.done():
                return  # whoever asked has gone
            if found is None:
                done.set_exception(why or LimitExceeded("infer.busy", "no embeddings were made"))
            else:
                done.set_result(found)

        self._model.engine.call(work)
        vectors = (await done)[:, :size]
        data = [
            {
                "object": "embedding",
                "index": number,
                "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()
                if encoding == "base64"
                else row.tolist(),
            }
            for number, row in enumerate(vectors)
        ]
        count = sum(map(len, prompts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        answer = {"object": "list", "data": data, "model": self._model.names[0], "usage": usage}
        await _whole(call.send, 200, orjson.dumps(answer))


class _Stream:
    """Server-sent events: the head goes out with the first, so that what fails before is an error of its own."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun = send, False

    async def say(self, events: Iterable[bytes]) -> None:
        for event in events:
            if not self.begun:
                await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                self.begun = True
            if event:
                await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class _Heard:
    """What the engine says, put into the answer; of prompts first what comes of them."""

    def __init__(self, answer: Answer, wanted: Wanted) -> None:
        self._answer, self._wanted = answer, wanted
        self._begun: set[int] = set()

    def take(self, prompt: int, news: list[Event]) -> dict[int, Choice]:
        """The choices that have grown, by their index."""
        grown: dict[int, Choice] = {}
        for event in news:
            if isinstance(event, StrongroomError):
                raise event
            if prompt not in self._begun:
                self._begun.add(prompt)
                heard = event if isinstance(event, PromptLogprobs) else None
                for number in range(self._wanted.asks[prompt].choices):
                    self._answer.of(prompt, number).begin(heard)
            if isinstance(event, Token):
                choice = self._answer.of(prompt, event.choice)
                choice.add(event)
                grown[choice.index] = choice
        return grown


def _settle(done: asyncio.Future[Any], found: object) -> None:
    if done.done():  # whoever asked has gone
        return
    if isinstance(found, StrongroomError):
        done.set_exception(found)
    else:
        done.set_result(found)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes:
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise UsageError("infer.body", "the body did not come")
        part = message.get("body", b"")
        size += len(part)
        if size > _BODY:
            raise LimitExceeded("infer.body", f"a body has at most {_BODY} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError("infer.body", "the body is to be a JSON object")
    return found


def _error(error: StrongroomError) -> bytes:
    kind = _TYPES.get(error.http_status, "rate_limit_error" if error.http_status == 429 else "server_error")
    told = {"message": error.message, "type": kind, "param": error.evidence.get("param"), "code": error.code}
    return orjson.dumps({"error": told})


async def _whole(send: Send, status: int, body: bytes) -> None:
    headers = [*_JSON, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def now() -> int:
    """The time that a model is said to be from: when it was loaded."""
    return int(time.time())
