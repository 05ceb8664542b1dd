"""A gateway knows that its inference server is gone before a caller does."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gateway.callers import Clock
from gateway.places import framed
from strongroom.gateway.probe import Probe
from strongroom.gateway.upstream import Upstream

LISTED = framed(b'{"data": []}')


class Server:
    """Answers every look in one way, or not at all; `looks` counts them."""

    def __init__(self) -> None:
        self.answer: bytes | None = LISTED
        self.looks = 0
        self.serving: set[asyncio.Task[None] | None] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.add(asyncio.current_task())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"GET /v1/models ")
                self.looks += 1
                if self.answer is not None:
                    writer.write(self.answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def until(what) -> None:
    async with asyncio.timeout(60):
        while not what():  # noqa: ASYNC110 - other threads, and clocks, are waited for
            await asyncio.sleep(0.01)


def probed(work):
    """Run `work` with a server, and a probe of it by a clock that tests set."""

    async def run() -> None:
        server, clock = Server(), Clock()
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        probe = Probe([upstream], 0.02, clock=clock)
        assert not probe.answering
        await probe.look()
        assert probe.answering
        probe.start()
        await work(server, clock, probe)
        probe.close()
        upstream.close()
        listening.close()
        await asyncio.gather(*server.serving)

    asyncio.run(run())


@pytest.mark.parametrize("answer", [None, framed(b"{}", "503 Busy"), framed(b"{}", "401 No"), b"no HTTP"])
def test_one_that_answers_no_more_is_not_there(answer):
    async def work(server, clock, probe):
        server.answer = answer
        looks = server.looks
        await until(lambda: server.looks > looks)
        clock.now += 4.9
        assert probe.answering  # one look that is missed may be chance
        clock.now += 0.2
        await until(lambda: not probe.answering)
        if answer is not None:
            server.answer = LISTED
            await until(lambda: probe.answering)

    probed(work)


def test_one_without_a_list_of_models_is_there():
    async def work(server, clock, probe):
        server.answer = framed(b"{}", "404 Not Found")
        looks = server.looks
        await until(lambda: server.looks > looks + 1)
        clock.now += 60
        await until(lambda: probe.answering)

    probed(work)


def test_the_gateway_says_that_it_is_not_ready(place):
    gateway = place.gateway("[probe]\nevery = 0.05\n")
    app = place.newest._newest
    end = asyncio.new_event_loop()
    try:
        assert gateway.get("/readyz")[0] == 200
        for upstream in app._routes.upstreams:
            upstream.port = 1  # nobody listens there
            upstream.close()
        app._probe._answered = dict.fromkeys(app._routes.upstreams)
        end.run_until_complete(until(lambda: gateway.get("/readyz")[0] == 503))
        assert gateway.get("/readyz")[1]["problems"] == ["upstream"]
    finally:
        end.close()
