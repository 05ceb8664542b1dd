"""A real room, a real gateway on a real socket, and an inference server that does what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.client import Room
from strongroom.gateway.generations import Generations
from strongroom.gateway.handshakes import Server
from strongroom.gateway.listen import configure
from strongroom.gateway.rooms import InFolder
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application
from strongroom.vault.vault import Vault
from vault.rooms import write_model

if TYPE_CHECKING:
    import uvicorn

REF = "acme/tiny@1"
OWNER, ANA, PIA, BEN = "user/olga", "user/ana", "user/pia", "user/ben"
ROLES = {ANA: ("researcher",), PIA: ("partner",), BEN: ("auditor",)}
Script = Callable[[dict[str, Any]], Iterable[bytes | float | threading.Event]]


def whole(text: str = "Hello.", tokens: int = 3, **more: Any) -> bytes:
    """An answer of an inference server, with its head."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return framed(json.dumps({"choices": [{**choice, **more}], "usage": usage}).encode())


def framed(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (
        status.encode(),
        kind.encode(),
        len(body),
        body,
    )


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


def token(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def ended(tokens: int) -> bytes:
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}}
    return event(last) + event(usage) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Inference:
    """An inference server in a thread. `script` gets a request's body and says what to send: bytes, and what to wait
    for between them, seconds or an event. `asked`: the bodies that came, `heads` theirs in small letters; `gone`: how
    many connections were closed by the other side in an answer."""

    def __init__(self) -> None:
        self.script: Script = lambda _: [whole()]
        self.asked: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.sent = 0  # tokens that `counted` scripts have sent
        self.gone = 0
        self._test = 0  # whose answers count
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    def forget(self) -> None:
        """What comes from now on is another test's: an answer that is cut when its gateway ends may be noticed only
        then."""
        self._test += 1
        self.asked.clear()
        self.heads.clear()
        self.gone = 0

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in (left := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # their connections are closed in the next turn
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        test = self._test
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get"):
                    listed = {"data": [{"id": REF}, {"id": "not a version"}]}
                    writer.write(framed(json.dumps(listed).encode()))
                    continue
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                test = self._test
                self.heads.append(head)
                self.asked.append(body)
                for each in self.script(body):
                    if isinstance(each, float):
                        await asyncio.sleep(each)
                        continue
                    if isinstance(each, threading.Event):
                        while not each.is_set():  # noqa: ASYNC110 - another thread sets it
                            await asyncio.sleep(0.005)
                        continue
                    if writer.is_closing():
                        raise ConnectionResetError
                    writer.write(each)
                    await writer.drain()
        except ConnectionError:
            self.gone += test == self._test
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def listening(
    app: Generations, certificate: tuple[Path, Path] | None = None, *, servers: list[uvicorn.Server] | None = None
) -> Iterator[int]:
    """The gateway on a socket of its own, until the block ends; its port. The server is added to `servers`."""
    config = configure(app, certificate)
    if config.ssl is not None:
        app.certificates.ask_with(config.ssl)
    server = Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), app.failure
            assert time.monotonic() < end
            time.sleep(0.01)
        if servers is not None:
            servers.append(server)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(120)  # what is under way has 30 seconds
        listener.close()
        assert not thread.is_alive()


class Place:
    """A team's room with a version, people with keys, and gateways before one inference server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "room"
        self.inference = Inference()
        room, _ = Room.init(self.folder, owner=OWNER)
        with room:
            room.put(write_model(folder / "model"), "acme/tiny")
            for path, roles in ROLES.items():
                room.principal_add(path, roles=list(roles))
        self.keys: dict[str, str] = {}
        for path in ROLES:
            with self.room(path) as room:
                self.keys[path] = room.apikeys.new()["key"]
        self._gateways: list[contextlib.ExitStack] = []
        self._servers: list[uvicorn.Server] = []

    def room(self, as_: str = OWNER) -> Room:
        return Room(self.folder, as_)

    def gateway(
        self, settings: str = "", *, channel: Path | None = None, certificate: tuple[Path, Path] | None = None
    ) -> Gateway:
        """One more gateway, with these settings (TOML) before the inference server; with a certificate it asks callers
        for theirs."""
        upstream = f'\n[[upstream]]\nurl = "http://127.0.0.1:{self.inference.port}"\n'
        if channel is not None:
            upstream += f'channel = "{channel}"\n'
        vault = Vault(self.folder)
        app = application(InFolder(vault), Settings.parse(settings + upstream), self.folder / "inference")
        stack = contextlib.ExitStack()
        stack.callback(vault.close)
        self._gateways.append(stack)
        return Gateway(self, stack.enter_context(listening(app, certificate, servers=self._servers)))

    def records(self) -> list[dict[str, Any]]:
        """Those on disk, by time; of a gateway that has ended, all."""
        found = []
        for path in (self.folder / "inference").glob("*.jsonl"):
            lines = path.read_bytes().rpartition(b"\n")[0]  # of a gateway that runs, the last may be there in part
            found += map(json.loads, lines.splitlines())
        return sorted(found, key=lambda each: each["at"])

    def stop_gateways(self) -> None:
        while self._gateways:
            self._gateways.pop().close()
        self._servers.clear()

    @property
    def newest(self) -> Generations:
        """The application of the gateway that was started last."""
        return self._servers[-1].config.loaded_app

    @property
    def server(self) -> uvicorn.Server:
        """What serves it."""
        return self._servers[-1]

    def stop(self) -> None:
        self.stop_gateways()
        self.inference.stop()


class Gateway:
    """A client's view of one gateway."""

    def __init__(self, place: Place, port: int) -> None:
        self.place, self.port = place, port

    def raw(self, data: bytes, *, seconds: float = 60, until: Callable[[bytes], Any] = lambda _: False) -> bytes:
        """Bytes on a connection of their own, and what comes within so many seconds, or `until` it is what is waited
        for, or it is closed."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as connection:
            connection.sendall(data)
            found, end = b"", time.monotonic() + seconds
            try:
                while (left := end - time.monotonic()) > 0 and not until(found):
                    connection.settimeout(left)
                    if not (piece := connection.recv(65536)):
                        break
                    found += piece
            except (TimeoutError, ConnectionError):
                pass
            return found

    def status(self, data: bytes) -> bytes:
        """The first line of what is answered to these bytes; nothing where the connection is closed without."""
        found = self.raw(data, seconds=60, until=lambda found: b"\r\n" in found)
        return found.partition(b"\r\n")[0]

    def hung_up(self, data: bytes) -> bytes:
        """What is answered to these bytes until the gateway closes the connection; TimeoutError if it does not."""
        with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
            found = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                while piece := connection.recv(65536):
                    found += piece
            return found

    def post(
        self,
        body: Any,
        as_: str = ANA,
        *,
        path: str = "/v1/chat/completions",
        key: str | None = None,
        heard: threading.Event | None = None,
        **headers: str,
    ) -> tuple[int, Any, Any]:
        """Status, headers, and the JSON or text of the answer. `heard` is set once the first of it has been given
        out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        token = key if key is not None else self.place.keys[as_]
        sent = {"authorization": f"Bearer {token}", "content-type": "application/json", **headers}
        try:
            connection.request("POST", path, data, sent)
            answer = connection.getresponse()
            if heard is not None:
                heard.set()
            found = answer.read()
            return answer.status, answer.headers, json.loads(found) if found.startswith(b"{") else found.decode()
        finally:
            connection.close()

    def metrics(self, port: int) -> dict[str, float]:
        """What a worker shows there, summed over labels."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
                found[name] = found.get(name, 0.0) + value
        return found

    def get(self, path: str, as_: str = ANA) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {self.place.keys[as_]}"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


def chat(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {"model": REF, "messages": [{"role": "user", "content": text}], "max_tokens": 20, **more}


def eventually(what: Callable[[], Any], seconds: float = 60) -> Any:
    """What it gives once that is something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
    return found
