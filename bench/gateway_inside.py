"""What a request costs inside the gateway: `python -m bench.gateway_inside` prints CPU, `--steps` the bytecodes of each
function, which are the same whatever else the machine does; `--stream` asks for streams, of `CHUNKS` chunks each.

The whole application with a room, as a worker has it, and connections of its own on both sides; but between them are no
sockets: what a client sends is handed over as if it had come, and the inference server's answer, too.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import uvloop
from uvicorn.server import ServerState

from bench import gateway_ends
from bench.gateway import SETTINGS, room
from strongroom.gateway import upstream
from strongroom.gateway.connection import Connection
from strongroom.gateway.listen import configure
from strongroom.gateway.rooms import InFolder
from strongroom.gateway.serving import remember
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application

CLIENTS = 16
AT_ONCE = 20  # chunks of a piece of a stream, about as many as a busy gateway reads at a time
MODELS = f'models = {{ "{gateway_ends.MODEL}" = "{gateway_ends.MODEL}" }}\n'


class Wire(asyncio.Transport):
    """The other end of a connection: `taken` is called with what is written."""

    def __init__(self, taken: Callable[[bytes], object]) -> None:
        super().__init__()
        self._taken = taken

    def write(self, data: Any) -> None:
        self._taken(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 5000) if name == "peername" else default

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...
    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def _connect(_: upstream.Upstream) -> Any:
    """Instead of to a server: each request is answered at once, and whole."""
    loop, made = asyncio.get_running_loop(), upstream._Connection()  # noqa: SLF001 - but for the socket
    answer = gateway_ends.PLAIN
    streamed = [
        gateway_ends.HEAD,
        *[gateway_ends.PIECE * AT_ONCE] * (gateway_ends.CHUNKS // AT_ONCE),
        gateway_ends.LAST,
    ]

    def give(pieces: list[bytes]) -> None:
        made.data_received(pieces[0])
        if len(pieces) > 1:
            loop.call_soon(give, pieces[1:])

    def taken(data: bytes) -> None:
        if b'"stream":true' in data:
            loop.call_soon(give, streamed)
        else:
            loop.call_soon(made.data_received, answer)

    made.connection_made(Wire(taken))
    return made


class Clients:
    """Ask `count` times in all, each after its answer; what is not answered with 200 ends it."""

    def __init__(self, app: Any, key: str, *, stream: bool = False) -> None:
        self._config, self._state = configure(app), ServerState()
        messages = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Who are you?"}]
        asked = {"model": gateway_ends.MODEL, "messages": messages, "max_tokens": 256, "temperature": 0.7}
        body = orjson.dumps({**asked, "stream": stream})
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        head += f"accept-encoding: identity\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._left, self._stream = 0, stream

    async def ask(self, count: int) -> None:
        self._left = count
        await asyncio.gather(*[self._client() for _ in range(CLIENTS)])

    async def _client(self) -> None:
        loop, answered = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        begun: list[bytes] = []

        def taken(data: bytes) -> None:
            if not begun and not data.startswith(b"HTTP/1.1 200"):
                raise SystemExit(data.decode())
            begun.append(data[:1])
            if not self._stream or data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                begun.clear()
                answered.set_result(None)

        connection = Connection(self._config, self._state, {})
        connection.connection_made(Wire(taken))
        while self._left > 0:
            self._left -= 1
            connection.data_received(self._request)
            await answered
            answered = loop.create_future()
        connection.connection_lost(None)


async def measure(app: Any, key: str, *, steps: bool, rounds: int, count: int, stream: bool = False) -> None:
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan"}, told.get, said.put))
    told.put_nowait({"type": "lifespan.startup"})
    if (await said.get())["type"] != "lifespan.startup.complete":
        raise SystemExit(str(app.failure))
    remember()
    clients = Clients(app, key, stream=stream)
    # The first of everything, and what budgets draw until their alarms have sounded.
    await clients.ask(100 if stream else 2000)
    if steps:
        await _count(clients)
    else:
        spent = []
        for _ in range(rounds):
            begin = time.process_time()
            await clients.ask(count)
            spent.append((time.process_time() - begin) / count * 1e6)
        print(f"{statistics.median(spent):.1f} µs of CPU a request, best {min(spent):.1f}, of {rounds} x {count}")
    told.put_nowait({"type": "lifespan.shutdown"})
    await life


async def _count(clients: Clients, count: int = 200) -> None:
    done: Counter[Any] = Counter()
    calls: Counter[Any] = Counter()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            calls[frame.f_code] += 1
        elif event == "opcode":
            done[frame.f_code] += 1
        return trace

    sys.settrace(trace)
    await clients.ask(count)
    sys.settrace(None)
    print(f"{done.total() / count:.0f} bytecodes in {calls.total() / count:.0f} calls a request")
    for code, number in done.most_common(60):
        print(f"{number / count:8.1f} {calls[code] / count:6.1f}  {Path(code.co_filename).name}:{code.co_qualname}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", action="store_true", help="count bytecodes instead of time")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=2000, help="requests of a round")
    asked = parser.parse_args()
    upstream.Upstream._connect = _connect  # noqa: SLF001
    uvloop.install()
    with tempfile.TemporaryDirectory() as work:
        folder, key = room(Path(work))
        settings = Settings.parse(SETTINGS.replace("URL", "http://127.0.0.1:9") + MODELS)
        opened = InFolder.opened(folder)
        app = application(opened, settings, Path(work) / "records")
        asyncio.run(measure(app, key, steps=asked.steps, rounds=asked.rounds, count=asked.count, stream=asked.stream))
        opened.close()


if __name__ == "__main__":
    main()
