"""Both ends of the gateway's bench: an inference server that answers at once, and clients that ask as fast as they are
answered. Each is a process of its own, so that its CPU is not taken for the gateway's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from typing import Any, cast

import httptools
import orjson
import uvloop

from strongroom.errors import StrongroomError
from strongroom.gateway.upstream import Timeouts, Upstream

MODEL = "acme/tiny@1"
TEXT = "The strongroom keeps its weights, and tells what it may. " * 5
CHUNKS = 100


def _whole() -> bytes:
    return orjson.dumps(
        {
            "id": "chatcmpl-0123456789abcdef",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": TEXT},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 12, "completion_tokens": 60, "total_tokens": 72},
        }
    )


def _event(choices: list[Any], usage: Any = None) -> bytes:
    value = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": choices,
        "usage": usage,
    }
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_WHOLE = _whole()
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(_WHOLE), _WHOLE)
_MODELS = orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
_LISTED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(_MODELS), _MODELS)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = _chunk(_event([{"index": 0, "delta": {"role": "assistant", "content": " token"}, "finish_reason": None}]))
LAST = (
    _chunk(_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    + _chunk(_event([], {"prompt_tokens": 12, "completion_tokens": CHUNKS, "total_tokens": 12 + CHUNKS}))
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


class Server(asyncio.Protocol):
    """Answers as a large inference server does that has nothing to compute. `delay`: seconds between two chunks."""

    delay = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpRequestParser(self)
        self._writable = asyncio.Event()
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body, self._url = bytearray(), b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._transport.write(_LISTED)
        elif b'"stream":true' in self._body or b'"stream": true' in self._body:
            asyncio.get_running_loop().create_task(self._stream())
        else:
            self._transport.write(PLAIN)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def _stream(self) -> None:
        self._transport.write(HEAD)
        for _ in range(CHUNKS):
            await self._writable.wait()
            if self._transport.is_closing():
                return
            self._transport.write(PIECE)
            await asyncio.sleep(self.delay)
        self._transport.write(LAST)


async def serve(port: int, delay: float) -> None:
    Server.delay = delay
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def load(url: str, key: str, model: str, kind: str, concurrency: int, seconds: float, most: int) -> None:
    """Ask for `seconds`, or `most` times if that is not 0, and print what came of it as JSON."""
    upstream = Upstream(
        url, headers=(("authorization", f"Bearer {key}"),), timeouts=Timeouts(first=60, between=60, whole=600)
    )
    body = orjson.dumps(
        {
            "model": model,
            "messages": [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Who are you?"}],
            "max_tokens": 256,
            "temperature": 0.7,
            "stream": kind == "stream",
        }
    )
    begun = time.perf_counter()
    until, left = begun + seconds, [most or 1 << 60]
    times: list[float] = []
    failed: dict[str, int] = {}
    pieces = 0

    async def client() -> None:
        nonlocal pieces
        while time.perf_counter() < until and left[0] > 0:
            left[0] -= 1
            asked = time.perf_counter()
            try:
                reply = await upstream.post("/v1/chat/completions", body)
                data = await reply.read()
            except StrongroomError as error:
                failed[error.code] = failed.get(error.code, 0) + 1
                continue
            good = reply.status == 200 and (kind == "whole" or data.endswith(b"data: [DONE]\n\n"))
            if good:
                times.append(time.perf_counter() - asked)
                pieces += data.count(b'" token"')
            else:
                name = f"{reply.status} {data[-160:].decode(errors='replace')}"
                failed[name] = failed.get(name, 0) + 1

    await asyncio.gather(*[client() for _ in range(concurrency)])
    spent = time.perf_counter() - begun
    times.sort()
    print(
        json.dumps(
            {
                "requests": len(times),
                "seconds": spent,
                "pieces": pieces,
                "failed": failed,
                "p50": times[len(times) // 2] if times else None,
                "p99": times[min(len(times) - 1, int(len(times) * 0.99))] if times else None,
            }
        )
    )


def main() -> None:
    """``serve PORT DELAY``, or ``load URL KEY MODEL whole|stream CONCURRENCY SECONDS MOST``."""
    uvloop.install()
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1] == "serve":
            asyncio.run(serve(int(sys.argv[2]), float(sys.argv[3])))
        else:
            url, key, model, kind, concurrency, seconds, most = sys.argv[2:9]
            asyncio.run(load(url, key, model, kind, int(concurrency), float(seconds), int(most)))


if __name__ == "__main__":
    main()
