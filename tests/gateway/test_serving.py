"""A gateway that does not start says why, once, and what to do."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import pytest

from gateway.places import framed
from loopback import free_port
from strongroom.errors import StrongroomError
from strongroom.gateway import serving
from strongroom.gateway.rooms import InFolder
from strongroom.gateway.settings import Settings

REFUSED = framed(json.dumps({"error": "channel"}).encode(), "401 Unauthorized")


def failing(place, port: int, workers: int = 1) -> StrongroomError:
    settings = Settings.parse(f'[[upstream]]\nurl = "http://127.0.0.1:{port}"\n')
    plan = serving.Plan(lambda: InFolder.opened(place.folder), settings, place.folder / "inference", workers)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(StrongroomError) as caught:
        serving.run(plan, listener, ready=pytest.fail)
    return caught.value


def test_an_inference_server_that_is_not_there_is_to_be_started(place, caplog):
    port = free_port()
    error = failing(place, port)
    assert error.code == "upstream.unavailable"
    assert f"http://127.0.0.1:{port}" in error.message
    assert "strongroom infer" in error.hint
    assert "--model" in error.hint
    assert not caplog.records  # said once, by whoever catches it


@pytest.mark.parametrize("ref", ["acme/tiny@99", "acme/other", "Acme Tiny"])
def test_a_version_that_there_is_not(place, ref):
    """Everybody would be told, for ever, that there is no such model."""
    settings = Settings.parse(f'[[upstream]]\nurl = "http://127.0.0.1:1"\nmodels = {{ "{ref}" = "tiny" }}\n')
    plan = serving.Plan(lambda: InFolder.opened(place.folder), settings, place.folder / "inference", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(StrongroomError) as caught:
        serving.run(plan, listener, ready=pytest.fail)
    assert caught.value.code == "gateway.model"
    assert ref in caught.value.message
    assert "strongroom ls" in caught.value.hint


def test_of_several_workers_one_says_why(place, capfd):
    port = free_port()
    error = failing(place, port, workers=2)
    assert error.code == "gateway.start"
    assert f"http://127.0.0.1:{port}" in error.message
    assert "strongroom infer" in error.hint
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [(REFUSED, "upstream.refused", "--channel"), (framed(b"<html>"), "upstream.malformed", "--model")],
)
def test_one_that_does_not_say_what_it_serves(place, answer, code, word):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read()  # the connection is kept until the gateway closes it
        writer.close()
        await writer.wait_closed()

    async def over() -> None:
        server.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    tasks: list[asyncio.Task[None] | None] = []
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        error = failing(place, server.sockets[0].getsockname()[1])
    finally:
        asyncio.run_coroutine_threadsafe(over(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()
    assert error.code == code
    assert word in error.hint
