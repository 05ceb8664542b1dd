"""The gateway as its callers meet it: a real room, a real socket, and an inference server that a test directs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from uvicorn.server import ServerState

from gateway.places import (
    ANA,
    BEN,
    OWNER,
    PIA,
    REF,
    STREAM,
    Gateway,
    Inference,
    chat,
    chunk,
    ended,
    event,
    eventually,
    framed,
    token,
    whole,
)
from loopback import free_port
from strongroom.errors import Denied, Sealed
from strongroom.gateway import app, connection, door
from strongroom.gateway.connection import Connection
from strongroom.gateway.exchange import EXCHANGE
from strongroom.gateway.listen import configure
from strongroom.gateway.records import verify
from strongroom.gateway.refusals import Refusals
from strongroom.vault.callers import Callers
from strongroom.watch import meter

VOCABULARY = 200  # of the model in the room, by its tensors


def streamed(count: int, pause: float = 0.0, sent: list[int] | None = None):
    """A script: so many tokens, one an event; those that were sent are counted in `sent`."""

    def script(_):
        yield STREAM
        for number in range(count):
            yield token(" word")
            if sent is not None:
                sent.append(number)
            if pause:
                yield pause
        yield ended(count)

    return script


def test_a_key_that_ends_while_its_request_comes_is_good_for_nothing(place):
    """Whoever keeps requests half sent until a leaked key is taken back gets no answer to any, though another key of
    the same identity still is good, and what it may is known."""
    gateway = place.gateway()
    with place.room(ANA) as room:
        leaked = room.apikeys.new("leaked")
        body = json.dumps(chat()).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\n"
        head += b"content-length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", gateway.port), 60) as connection:
            connection.sendall(head % (leaked["key"].encode(), len(body)) + body[:5])
            eventually(lambda: place.newest.under_way == 1)
            room.apikeys.end(leaked["id"])
            eventually(lambda: gateway.post(chat(), key=leaked["key"])[0] == 401)
            assert gateway.post(chat())[0] == 200
            place.inference.asked.clear()
            connection.sendall(body[5:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
    assert not place.inference.asked


# -- what clients see ------------------------------------------------------------------------------------------------


def test_openais_own_client_works_unchanged(place):
    gateway = place.gateway()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=place.keys[ANA], max_retries=0)
    assert [each.id for each in client.models.list()] == [REF]
    assert client.models.retrieve(REF).owned_by == "strongroom"
    messages = [{"role": "user", "content": "Hi"}]
    found = client.chat.completions.create(model=REF, messages=messages, max_tokens=20)
    assert (found.choices[0].message.content, found.usage.completion_tokens, found.model) == ("Hello.", 3, REF)
    place.inference.script = streamed(5)
    parts = list(client.chat.completions.create(model="acme/tiny", messages=messages, stream=True, max_tokens=20))
    assert "".join(each.choices[0].delta.content or "" for each in parts) == " word" * 5
    assert parts[-1].choices[0].finish_reason == "stop"
    for more, error in (
        ({"logprobs": True}, openai.PermissionDeniedError),
        ({"n": 2}, openai.PermissionDeniedError),
        ({"temperature": 3}, openai.BadRequestError),
        ({"extra_body": {"prompt_logprobs": 1}}, openai.BadRequestError),
        ({"model": "acme/other"}, openai.NotFoundError),
    ):
        with pytest.raises(error):
            client.chat.completions.create(**{"model": REF, "messages": messages, "max_tokens": 20, **more})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sr-" + "A" * 43).models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.embeddings.create(model=REF, input="x")


def test_completions_of_text(place):
    gateway = place.gateway()
    answer = {"choices": [{"index": 0, "text": " there", "finish_reason": "length"}], "usage": None}
    place.inference.script = lambda _: [framed(json.dumps(answer).encode())]
    status, _, found = gateway.post({"model": REF, "prompt": "Hi", "max_tokens": 9}, path="/v1/completions")
    assert (status, found["choices"][0]["text"], found["object"]) == (200, " there", "text_completion")
    assert place.inference.asked == [{"prompt": "Hi", "model": REF, "max_tokens": 9}]


def test_upstream_gets_what_was_validated_and_no_byte_of_the_callers(place):
    gateway = place.gateway()
    body = chat(temperature=0.5, user="somebody", metadata={"a": "b"}, seed=7, store=False, stop=["x"])
    assert gateway.post(body, **{"x-secret": "1", "cookie": "a=b"})[0] == 200
    assert place.inference.asked == [
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "temperature": 0.5,
            "stop": ["x"],
            "max_tokens": 20,
            "model": REF,
        }
    ]
    # Of two members of one name, two readers could read different ones: it goes no further.
    twice = json.dumps(chat()).encode()[:-1] + b',"max_tokens":4000}'
    assert gateway.post(twice)[2]["error"]["code"] == "body_malformed"
    assert len(place.inference.asked) == 1


def test_a_stream_that_is_ended_while_its_reader_is_slow_gives_out_no_more(place):
    gateway, slow = place.gateway(), threading.Event()
    place.inference.script = lambda _: [STREAM, token("first"), slow, token("second"), 3600.0]
    body = json.dumps(chat(stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer {place.keys[ANA]}\r\n"
    loop = place.server.servers[0].get_loop()
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        found = b""
        while b"first" not in found:
            found += client.recv(1 << 16)
        (connection,) = place.server.server_state.connections
        loop.call_soon_threadsafe(connection.pause_writing)  # as when it takes nothing
        loop.call_soon_threadsafe(slow.set)
        (flight,) = place.newest._newest._flights._under_way
        eventually(lambda: flight.meter.text_bytes == len("firstsecond"))
        loop.call_soon_threadsafe(flight.cut, Denied("version.frozen", "it is frozen"))
        loop.call_soon_threadsafe(connection.resume_writing)
        while b"it is frozen" not in found:
            piece = client.recv(1 << 16)
            assert piece
            found += piece
    assert b"second" not in found


def test_no_word_of_an_inference_server_keeps_an_answer_out_of_the_records(place, tmp_path):
    """Log-probabilities whose sum is no number: what can't be written would have been given out, and nobody told."""
    (tmp_path / "channel").write_text("ab" * 32)
    gateway = place.gateway(channel=tmp_path / "channel")
    said = {"tokens": [1] * 3, "logprobs": [-1e308] * 3}
    place.inference.script = lambda _: [whole(strongroom=said)]
    assert gateway.post(chat())[0] == 200
    choice = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop", "strongroom": said}
    place.inference.script = lambda _: [STREAM, event({"choices": [choice]}), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    assert "data: [DONE]" in gateway.post(chat(stream=True))[2]
    place.stop_gateways()
    found = [each for each in place.records() if each["estimate"] > 1000]
    assert [(each["status"], each["tokens"]) for each in found] == [(200, 3), (200, 3)]


def test_a_server_that_says_more_than_was_asked_uses_up_nobodys_budgets(place):
    """Of what is more than may be nobody gets anything: one such answer must not be the last of a year."""
    gateway = place.gateway("[limits.identity]\ntokens = 6000\n")
    for told in (
        whole(tokens=1 << 40),
        whole("x" * 4000, 1),
        whole(strongroom={"tokens": [1] * 99, "logprobs": [0] * 99}),
    ):
        place.inference.script = lambda _, told=told: [told]
        assert gateway.post(chat())[2]["error"]["code"] == "upstream_malformed"
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1 << 40, "total_tokens": 5}}
    heard = threading.Event()
    place.inference.script = lambda _: [STREAM, token("Hi"), heard, event(usage)]
    assert "Hi" in gateway.post(chat(stream=True), heard=heard)[2]
    heard.clear()
    place.inference.script = lambda _: [STREAM, token("Hi"), heard, token("x" * 100_000), ended(1)]
    assert "xxx" not in gateway.post(chat(stream=True), heard=heard)[2]
    place.inference.script = lambda _: [whole()]
    assert gateway.post(chat())[0] == 200
    place.stop_gateways()
    found = [each for each in place.records() if each["code"] == "upstream_malformed"][-5:]
    assert [(each["tokens"], each["bits"]) for each in found[:3]] == [(0, 0)] * 3
    assert (found[3]["tokens"], found[3]["bits"]) == (20, meter.bound(20, VOCABULARY)) == (20, found[3]["reserved"])
    assert found[4]["bits"] == 8 * (20 * 16 + 256)  # all that could have been given out


def test_the_private_channel_is_between_gateway_and_upstream(place, tmp_path):
    (tmp_path / "channel").write_text("ab" * 32)
    gateway = place.gateway(channel=tmp_path / "channel")
    said = {"tokens": [1, 2, 3, 4], "logprobs": [-1.0] * 4}
    place.inference.script = lambda _: [whole(strongroom=said)]
    status, _, found = gateway.post(chat())
    assert status == 200
    assert "strongroom" not in json.dumps(found)
    assert found["usage"]["completion_tokens"] == 4  # what the channel counted, and not the 3 that were reported
    seeds = [place.inference.asked[-1]["strongroom"]["seed"] for _ in range(3) if gateway.post(chat())]
    assert len(set(seeds)) == 3
    assert gateway.post(chat(strongroom={"seed": 1}))[2]["error"]["code"] == "parameter_forbidden"


# -- who -------------------------------------------------------------------------------------------------------------


def test_nobody_learns_why_a_key_is_not_good(place):
    gateway = place.gateway()
    answers = {
        json.dumps(gateway.post(chat(), key=key)[::2])
        for key in ("sr-" + "A" * 43, "sr-short", "x", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", "sr-" + "A" * 5000)
    }
    assert len(answers) == 1
    assert "invalid_api_key" in answers.pop()
    assert gateway.status(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n").startswith(b"HTTP/1.1 401")
    good = f"authorization: Bearer {place.keys[ANA]}\r\n".encode()
    twice = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + good + good + b"\r\n"
    assert gateway.status(twice).startswith(b"HTTP/1.1 401")


def test_a_key_that_ends_ends_everywhere(place):
    with place.room(PIA) as room:
        made = room.apikeys.new("short")
        gateway = place.gateway()
        assert gateway.post(chat(), key=made["key"])[0] == 200
        room.apikeys.end(made["id"])
    eventually(lambda: gateway.post(chat(), key=made["key"])[0] == 401)


def test_whoever_may_not_infer_is_told_of_no_model(place):
    gateway = place.gateway()
    status, _, found = gateway.post(chat(), as_=BEN)
    assert (status, found["error"]["code"]) == (404, "model_not_found")
    other = gateway.post({**chat(), "model": "acme/none@7"}, as_=BEN)
    assert other[0] == 404
    assert other[2]["error"]["message"] == found["error"]["message"].replace(REF, "acme/none@7")
    assert gateway.get("/v1/models", as_=BEN)[1]["data"] == []


def test_what_policy_does_not_permit_says_what_would_change_that(place):
    status, _, found = place.gateway().post(chat(logprobs=True))
    assert (status, found["error"]["code"]) == (403, "permission_denied")
    assert "permit infer_logprobs by its name: strongroom policy propose" in found["error"]["hint"]


def test_a_frozen_version_gives_out_nothing_more(place):
    gateway = place.gateway()
    found, sent = [], []
    place.inference.script = streamed(1000, 0.05, sent)
    asking = threading.Thread(target=lambda: found.append(gateway.post(chat(stream=True, max_tokens=1000))))
    asking.start()
    eventually(lambda: len(sent) > 4)
    with place.room(OWNER) as room:
        room.revoke(REF, reason="it may have leaked")
        try:
            asking.join(60)
            assert not asking.is_alive()
            status, _, text = found[0]
            assert status == 200  # it had begun
            assert '"code":"frozen"' in text
            assert "[DONE]" not in text
            assert text.count("word") < 1000
            place.inference.script = lambda _: [whole()]
            assert gateway.post(chat())[2]["error"]["code"] == "frozen"
            eventually(lambda: place.inference.gone)
        finally:
            room.thaw(REF, reason="it has not")
    eventually(lambda: gateway.post(chat())[0] == 200)


def test_a_gateway_that_cannot_see_the_log_ends_what_is_under_way(place, monkeypatch):
    """Else whoever holds up the database would have answers of a frozen version for as long as they last."""
    gateway = place.gateway()
    found, sent = [], []
    place.inference.script = streamed(1000, 0.05, sent)
    asking = threading.Thread(target=lambda: found.append(gateway.post(chat(stream=True, max_tokens=1000))))
    asking.start()
    eventually(lambda: len(sent) > 4)
    locked = threading.Event()
    monkeypatch.setattr(door, "_BLIND", 1.0)
    monkeypatch.setattr(Callers, "version", lambda _: locked.wait(120))  # as a database that does not answer
    try:
        asking.join(60)  # the look at the log that hangs would do so for longer
        assert not asking.is_alive()
        assert '"code":"sealed"' in found[0][2]
        assert gateway.post(chat())[2]["error"]["code"] == "sealed"
    finally:
        monkeypatch.undo()
        locked.set()
    place.inference.script = lambda _: [whole()]
    eventually(lambda: gateway.post(chat())[0] == 200)


# -- what it costs ---------------------------------------------------------------------------------------------------


def test_every_request_is_recorded_and_the_log_has_the_chain(place):
    gateway = place.gateway()
    newest = place.newest._records.path
    gateway.post(chat(), as_=PIA)
    gateway.post(chat(n=2), as_=PIA)
    gateway.post(b"{", as_=PIA)
    gateway.post(chat(), key="x")  # nobody: there is nothing to record
    place.stop_gateways()
    with place.room() as room:
        bodies = [each["body"] for each in room.log.tail(50) if each["type"] == "inference"]
    streams = {body["gateway"] for body in bodies}
    assert newest.stem in streams
    lines = newest.read_bytes().splitlines()
    assert verify(lines, [body for body in bodies if body["gateway"] == newest.stem]) == 3
    records = [json.loads(line) for line in lines]
    assert [(each["by"], each["status"], each["code"]) for each in records] == [
        (PIA, 200, ""),
        (PIA, 403, "permission_denied"),
        (PIA, 400, "body_malformed"),
    ]
    assert records[0]["bits"] == meter.TEXT_BYTE * len("Hello.") == meter.bound(3, VOCABULARY) + 1
    assert records[0]["reserved"] == meter.bound(20, VOCABULARY)
    assert "Hi" not in newest.read_text()
    assert "Hello" not in newest.read_text()


def test_a_record_before_the_answer(place):
    gateway = place.gateway('[records]\ndurable = "before"\n')
    before = len(place.records())
    assert gateway.post(chat())[0] == 200
    assert len(place.records()) == before + 1  # at once
    place.inference.script = streamed(3)
    gateway.post(chat(stream=True))
    assert [each["code"] for each in place.records()[before + 1 :]] == ["reserved", ""]


def test_a_stream_that_the_gateways_end_cuts_is_recorded(place, monkeypatch):
    """What it has given out was charged: without a record nobody could say to whom it went."""

    def hasty(*args):
        config = configure(*args)
        config.timeout_graceful_shutdown = 1
        return config

    monkeypatch.setattr("gateway.places.configure", hasty)
    gateway = place.gateway()
    sent = []
    place.inference.script = streamed(100_000, 0.02, sent)
    before = len(place.records())
    asking = threading.Thread(
        target=lambda: gateway.raw(requested(place, f"content-length: {len(body)}", body=body), seconds=120)
    )
    body = json.dumps(chat(stream=True, max_tokens=1000)).encode()
    asking.start()
    eventually(lambda: len(sent) > 40)
    place.stop_gateways()
    asking.join(60)
    (record,) = place.records()[before:]
    assert (record["status"], record["code"], record["tokens"] > 3) == (500, "internal", True)


def test_two_hundred_streams_are_charged_for_what_was_sent(place):
    gateway = place.gateway(
        """
[limits]
key = {requests = 0, tokens = 0, concurrency = 0}
identity = {requests = 0, tokens = 0, concurrency = 0}
[queue]
length = 1000
each = 1000
"""
    )
    sent = 0
    lock = threading.Lock()

    def script(body):
        nonlocal sent
        count = 1 + int(body["messages"][0]["content"]) % 17
        yield STREAM
        for _ in range(count):
            with lock:
                sent += 1
            yield token("x") if count % 2 else token("x") + token("")
        yield ended(count)

    place.inference.script = script
    before = sum(each["tokens"] for each in place.records())
    with ThreadPoolExecutor(200) as pool:
        done = list(pool.map(lambda k: gateway.post(chat(str(k), stream=True, max_tokens=40)), range(200)))
    assert {status for status, _, _ in done} == {200}
    place.stop_gateways()
    records = place.records()
    assert sum(each["tokens"] for each in records) - before == sent
    assert sum(text.count('"content":"x"') for _, _, text in done) == sent


def test_of_a_stream_no_more_text_goes_out_than_is_charged_already(place):
    """Whoever can kill the gateway would else have what it gave out beyond what was drawn for nothing."""

    def used():
        with place.room() as room:
            found = {(each["scope"], each["who"]): each["used"] for each in room.budget(REF)["budgets"]}
        return found.get(("identity", PIA), 0)

    before, go = used(), threading.Event()
    gateway = place.gateway(
        f'[[budgets.rule]]\nscope = "identity"\nwindow = "day"\nshare = 0.0\nfloor = {before + 20_000}\nhard = true\n'
    )

    def script(_):
        yield STREAM
        yield token("x" * 300)
        yield token("x" * 270)
        while not go.is_set():
            yield 0.02
        yield ended(20)

    place.inference.script = script
    records = len(place.records())
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(gateway.post, chat(stream=True), PIA)
        eventually(lambda: used() - before >= meter.TEXT_BYTE * 570)  # of which a tranche was less
        assert not asking.done()
        go.set()
        assert asking.result()[0] == 200
    place.stop_gateways()
    (record,) = place.records()[records:]
    assert used() - before == record["bits"] == meter.ANY_BYTE * 570  # that it is 20 tokens nobody believes


def test_a_client_that_goes_away_is_charged_for_what_came(place):
    gateway = place.gateway()
    place.inference.script = streamed(300, 0.1)  # of which about 190 could cost as much as all that was reserved
    before = len(place.records())
    body = json.dumps(chat(stream=True, max_tokens=1000)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {place.keys[ANA]}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    assert gateway.raw(head + body, seconds=60, until=lambda found: found.count(b"word") > 3)
    eventually(lambda: place.inference.gone == 1)  # upstream stops generating, too
    record = eventually(lambda: place.records()[before:])[0]
    assert (record["status"], record["code"]) == (499, "disconnected")
    assert 3 < record["tokens"] < 300
    # Upstream never came to say how many tokens it were: 8 bits for each byte of UTF-8.
    assert record["bits"] % (8 * len(" word")) == 0
    assert 8 * 3 * len(" word") < record["bits"] < record["reserved"]


def test_a_client_that_goes_away_before_the_answer_begins_keeps_no_place(place):
    """An inference server sends the head of an answer that comes whole when it has made all of it."""
    gateway = place.gateway()
    place.inference.script = lambda _: [3600.0, whole()]
    before = len(place.records())
    body = json.dumps(chat()).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as client:
        client.sendall(requested(place, f"content-length: {len(body)}", body=body))
        eventually(lambda: place.inference.asked)
    record = eventually(lambda: place.records()[before:])[0]
    assert (record["status"], record["code"], record["bits"]) == (499, "disconnected", 0)
    assert gateway.get("/readyz")[1]["ready"]


def test_a_version_that_is_frozen_ends_what_has_not_begun(place):
    gateway = place.gateway()
    place.inference.script = lambda _: [3600.0, whole()]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(gateway.post, chat())
        eventually(lambda: place.inference.asked)
        with place.room(OWNER) as room:
            room.revoke(REF, reason="it may have leaked")
            try:
                status, _, found = asked.result(60)
            finally:
                room.thaw(REF, reason="it has not")
    assert (status, found["error"]["code"]) == (403, "frozen")


def test_whoever_has_gone_before_it_is_watched_for_is_told_of_at_once():
    """While a request is admitted nobody looks whether its client is there still."""

    async def run():
        told = []
        begun, gone, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def app(scope, *_):
            begun.set()
            scope[EXCHANGE].when_gone(gone.set)
            await gone.wait()
            scope[EXCHANGE].when_gone(lambda: told.append("gone"))
            scope[EXCHANGE].when_gone(None)
            ended.set()

        made = Connection(configure(app), ServerState(), {})
        server = await asyncio.get_running_loop().create_server(lambda: made, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await begun.wait()
        writer.close()
        await ended.wait()
        server.close()
        return told

    assert asyncio.run(run()) == ["gone"]


def test_a_budget_holds_however_many_ask_at_once(place):
    each = meter.bound(20, VOCABULARY)
    gateway = place.gateway(
        f"""
[limits]
key = {{requests = 0, tokens = 0, concurrency = 0}}
identity = {{requests = 0, tokens = 0, concurrency = 0}}
[[budgets.rule]]
scope = "identity"
window = "month"
share = 0.0
floor = {10 * each + 5}
hard = true
"""
    )
    place.inference.script = lambda _: [0.2, whole("x" * 38, 20)]
    before = sum(r["bits"] for r in place.records() if r["by"] == PIA)
    with ThreadPoolExecutor(40) as pool:
        done = list(pool.map(lambda _: gateway.post(chat(), as_=PIA), range(40)))
    good = [found for status, _, found in done if status == 200]
    assert 1 <= len(good) <= 10
    refused = [(status, headers, found) for status, headers, found in done if status != 200]
    for status, headers, found in refused:
        assert (status, found["error"]["code"]) == (429, "budget_exceeded")
        assert headers["x-should-retry"] == "false"
        assert int(headers["retry-after"]) > 0
    place.stop_gateways()
    spent = sum(r["bits"] for r in place.records() if r["by"] == PIA) - before
    assert spent == len(good) * each <= 10 * each + 5


def test_an_answer_that_costs_more_keeps_nobody_waiting_for_the_database(place):
    """A server decides what an answer costs: each of its lies must not stop the gateway while somebody writes."""
    gateway = place.gateway(
        """
[[budgets.rule]]
scope = "identity"
window = "lifetime"
share = 0.0
floor = 200
hard = true
"""
    )
    go = threading.Event()

    def script(_):
        while not go.is_set():
            yield 0.05
        yield whole("x" * 300, 1)  # 2,400 bits, of 153 that were reserved

    place.inference.script = script
    found = []
    asking = threading.Thread(target=lambda: found.append(gateway.post(chat(), as_=PIA)))
    asking.start()
    eventually(lambda: place.inference.asked)
    with contextlib.closing(sqlite3.connect(place.folder / "room.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        go.set()
        asking.join(25)  # less than the database would be waited for
        assert [status for status, _, _ in found] == [200]
        assert gateway.raw(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", seconds=25)
        other.execute("ROLLBACK")
    asking.join(30)
    refused = eventually(lambda: [each for each in [gateway.post(chat(), as_=PIA)] if each[0] == 429])
    assert refused[0][2]["error"]["code"] == "budget_exceeded"


def test_limits_say_when_to_ask_again(place):
    gateway = place.gateway("[limits]\nkey = {requests = 1, burst = 2, tokens = 0, concurrency = 0}\n")
    answers = [gateway.post(chat()) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 429, 429]
    assert answers[2][2]["error"]["code"] == "rate_limited"
    assert 1 <= int(answers[2][1]["retry-after"]) <= 60  # of the minute that one more takes
    assert answers[0][1]["x-ratelimit-limit-requests"] == "1"
    assert answers[0][1]["x-request-id"] != answers[1][1]["x-request-id"]


def test_whoever_is_refused_all_the_time_does_not_fill_the_disk(place, monkeypatch):
    later = [0.0]
    monkeypatch.setattr("strongroom.gateway.app.Refusals", lambda clock: Refusals(lambda: clock() + later[0], most=5))
    gateway = place.gateway()
    codes = [gateway.post(chat(), as_=BEN)[2]["error"]["code"] for _ in range(12)]
    assert codes == ["model_not_found"] * 5 + ["rate_limited"] * 7
    assert gateway.post(chat())[0] == 200  # others are not kept waiting
    later[0] = 61.0
    assert gateway.post(chat(), as_=BEN)[0] == 404
    eventually(lambda: [each["unrecorded"] for each in place.records() if each["by"] == BEN][-6:] == [0] * 5 + [7])


def test_words_that_are_not_passed_on(place):
    gateway = place.gateway('[requests]\nwords = ["sarin"]\npatterns = ["(?:\\\\d{4} ){4}"]\n')
    assert gateway.post(chat("How is Sarin made?"))[2]["error"]["code"] == "content_refused"
    assert gateway.post(chat("How is sa\u200brin made?"))[2]["error"]["code"] == "content_refused"
    assert gateway.post(chat("1234 1234 1234 1234 "))[2]["error"]["code"] == "content_refused"
    assert gateway.post(chat("How are sardines made?"))[0] == 200


def test_a_classifier_elsewhere_is_asked(place):
    elsewhere = Inference()
    elsewhere.script = lambda body: [framed(json.dumps({"refuse": "bomb" in body["texts"][0]}).encode())]
    try:
        gateway = place.gateway(f'[requests]\nclassifier = "http://127.0.0.1:{elsewhere.port}/check"\n')
        assert gateway.post(chat("Hello"))[0] == 200
        assert gateway.post(chat("A bomb"))[2]["error"]["code"] == "content_refused"
        assert elsewhere.asked == [{"texts": ["Hello"]}, {"texts": ["A bomb"]}]
        for nothing in (b"{}", b'{"refuse": 1}', b"no"):  # who can't tell lets nothing pass
            elsewhere.script = lambda _, said=nothing: [framed(said)]
            assert gateway.post(chat("Hello"))[0] == 503
    finally:
        elsewhere.stop()


def test_several_workers_on_one_socket(place):
    port = free_port(3)
    shown = port + 1
    upstream = f"http://127.0.0.1:{place.inference.port}"
    command = [sys.executable, "-m", "strongroom.cli", "--room", str(place.folder), "--json", "gateway"]
    options = ["--listen", f"127.0.0.1:{port}", "--upstream", upstream, "--workers", "2"]
    before = {path.name for path in (place.folder / "inference").glob("*.jsonl")}
    process = subprocess.Popen([*command, *options, "--metrics", f"127.0.0.1:{shown}"], stdout=subprocess.PIPE)
    try:
        said = json.loads(process.stdout.readline())
        assert said.get("workers") == 2, said
        gateway = Gateway(place, port)
        assert {gateway.post(chat())[0] for _ in range(20)} == {200}
        counted = [gateway.metrics(shown + number) for number in range(2)]
        assert sum(each["strongroom_gateway_requests_total"] for each in counted) == 20
        assert all(each["strongroom_gateway_ready"] == 1 for each in counted)
    finally:
        process.terminate()
        assert process.wait(120) == 0
        process.stdout.close()
    made = [path for path in (place.folder / "inference").glob("*.jsonl") if path.name not in before]
    assert len(made) == 2
    assert sum(len(path.read_text().splitlines()) for path in made) == 20


# -- upstreams that are not what they should be ------------------------------------------------------------------------

GIGABYTE = b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n"
FAST = "[timeouts]\nfirst_byte = 0.5\nbetween = 0.5\nwhole = 3.0\n"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (lambda: [b"garbage\r\n\r\n"], "upstream_malformed"),
        (lambda: [framed(b"<html>")], "upstream_malformed"),
        (lambda: [framed(b"{}", "500 Oops")], "upstream_malformed"),
        (lambda: [framed(b"{}", "302 Found")], "upstream_malformed"),
        (lambda: [framed(b"{}", "503 Busy")], "upstream_unavailable"),
        (lambda: [2.0], "upstream_timeout"),
        (lambda: [framed(b"{}")[:-1], 2.0], "upstream_timeout"),
        (lambda: [whole("x" * 10_000, 3)], "upstream_malformed"),
        (lambda: [whole("x", 21)], "upstream_malformed"),
        (
            lambda: [b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n", *[bytes(1 << 20)] * 80],
            "upstream_malformed",
        ),
        (lambda: [whole(index=1)], "upstream_malformed"),
        (lambda: [framed(b'{"choices":[' + b"[]," * (1 << 20) + b"[]]}")], "upstream_malformed"),
    ],
)
def test_an_answer_that_is_none(place, script, code):
    gateway = place.gateway(FAST if code == "upstream_timeout" else "")
    place.inference.script = lambda _: script()
    status, _, found = gateway.post(chat())
    assert status in (502, 504)
    assert found["error"]["code"] == code
    place.inference.script = lambda _: [whole()]
    eventually(lambda: gateway.post(chat())[0] == 200)  # and the next one is answered, if it comes in time


def test_an_answer_that_is_no_stream_may_take_as_long_as_the_whole(place):
    gateway = place.gateway(FAST.replace("whole = 3.0", "whole = 60.0"))
    place.inference.script = lambda _: [1.0, whole()]  # its first byte comes when all of it has been generated
    assert gateway.post(chat())[0] == 200
    place.inference.script = lambda _: [3600.0]
    assert gateway.post(chat(stream=True))[2]["error"]["code"] == "upstream_timeout"


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Too Large", "422 Unprocessable"])
def test_what_upstream_finds_too_long_is_the_callers_to_shorten(place, status):
    gateway = place.gateway()
    place.inference.script = lambda _: [framed(b'{"error": "secret of theirs"}', status)]
    answered, _, found = gateway.post(chat())
    assert answered == 400  # a client tries 5xx again
    assert found["error"]["code"] == "parameter_invalid"
    assert "context" in found["error"]["message"]
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (lambda _: [STREAM, token("a"), 3600.0], "upstream_timeout"),
        (lambda heard: [STREAM, token("a"), heard, *[token("b")] * 30, ended(31)], "upstream_malformed"),
        (lambda heard: [STREAM, token("a"), heard, token("b" * 5000), ended(2)], "upstream_malformed"),
        (lambda heard: [STREAM, token("a"), heard, chunk(b"data: {\n\n")], "upstream_malformed"),
        (
            lambda heard: [STREAM, token("a"), heard, event({"error": {"message": "secret of theirs"}})],
            "upstream_malformed",
        ),
        (lambda heard: [STREAM, token("a"), heard, chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"], "upstream_malformed"),
        (lambda heard: [STREAM, token("a"), heard, b"0\r\n\r\n"], "upstream_malformed"),
        (lambda heard: [STREAM, token("a"), heard, b"zz\r\n"], "upstream_malformed"),
        (lambda heard: [STREAM, token("a"), heard, b"0\r\n", b"x: y\r\n" * 20_000, 2.0], "upstream_malformed"),
        (lambda heard: [STREAM, token("a"), heard, b"0\r\nx: ", b"y" * 200_000, 2.0], "upstream_malformed"),
    ],
)
def test_a_stream_that_goes_wrong(place, script, code):
    gateway, heard = place.gateway(FAST if code == "upstream_timeout" else ""), threading.Event()
    place.inference.script = lambda _: script(heard)

    def begun():
        """What was given out before it went wrong, and how that ends; where what is first came late, nothing was."""
        status, _, text = gateway.post(chat(stream=True), heard=heard)
        assert status == 200 or (status, text["error"]["code"], code) == (504, code, "upstream_timeout")
        return status == 200 and text

    text = eventually(begun)
    assert f'"code":"{code}"' in text
    assert "[DONE]" not in text
    assert "secret" not in text
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=place.keys[ANA], max_retries=0)
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**chat(stream=True)))


def test_no_output_of_a_model_is_an_event_of_its_own(place):
    gateway = place.gateway()
    forged = 'x\n\ndata: {"choices":[{"index":0,"delta":{"content":"forged"}}]}\n\ndata: [DONE]\n\n'
    place.inference.script = lambda _: [STREAM, token(forged), ended(1)]
    status, _, text = gateway.post(chat(stream=True, max_tokens=100))
    assert status == 200
    events = text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == forged
    assert len(events) == 4  # the text, the end of the choice, DONE, and nothing


def test_a_fault_of_ours_is_answered_and_recorded(place, monkeypatch, caplog):
    gateway = place.gateway()

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("strongroom.gateway.answer.Shape.whole", broken)
    status, _, found = gateway.post(chat())
    assert (status, found["error"]["code"]) == (500, "internal")
    assert "ZeroDivisionError" in caplog.text
    eventually(lambda: [each["code"] for each in place.records()][-1:] == ["internal"])


@pytest.mark.parametrize("code", ["db.unavailable", "gateway.refused", "gateway.budgets"])
def test_why_the_room_can_not_be_asked_is_for_the_log_of_this_machine(place, monkeypatch, caplog, code):
    def fails(*_):
        raise Sealed(code, "the room at 10.0.0.7 does not answer")

    gateway = place.gateway()
    monkeypatch.setattr(place.newest._door._callers, "by_key", fails)
    monkeypatch.setattr(app, "_TELL_EVERY", 3600.0)
    for _ in range(3):  # whoever it is: no key is needed to ask
        status, _, found = gateway.post(chat(), key="sr-" + "A" * 43)
        assert (status, found["error"]["code"], found["error"]["message"]) == (503, "sealed", "try again later")
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == [
        f"the room at 10.0.0.7 does not answer [{code}]"
    ]


# -- bytes that are no requests ----------------------------------------------------------------------------------------


def requested(place, *lines: str, body: bytes = b"") -> bytes:
    head = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"authorization: Bearer {place.keys[ANA]}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def test_requests_with_two_lengths_are_none(place):
    gateway = place.gateway()
    body = json.dumps(chat()).encode()
    hidden = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
    for lines in (
        ("content-length: 5", "transfer-encoding: chunked"),
        ("content-length: 5", "content-length: 6"),
        ("transfer-encoding: chunked, identity",),
        ("content-length: -5",),
        ("content-length: 5x",),
    ):
        found = gateway.hung_up(requested(place, *lines, body=hidden + body))
        assert found.startswith(b"HTTP/1.1 400") or not found, (lines, found)
        assert found.count(b"HTTP/1.1") <= 1
    assert not place.inference.asked


def test_bombs(place):
    gateway = place.gateway()
    many = requested(place, *[f"x-{k}: {'y' * 1000}" for k in range(200)], "content-length: 0")
    assert gateway.hung_up(many) == b""
    assert gateway.hung_up(b"POST /" + b"a" * 200_000) == b""
    large = requested(place, "content-length: 99999999", body=b"{")
    assert gateway.status(large).startswith(b"HTTP/1.1 413")
    endless = requested(place, "transfer-encoding: chunked", body=b"10000\r\n" + b" " * 65536 + b"\r\n")
    endless += (b"10000\r\n" + b" " * 65536 + b"\r\n") * 20
    assert gateway.status(endless).startswith(b"HTTP/1.1 413")
    zipped = requested(place, "content-length: 5", "content-encoding: gzip", body=b"12345")
    assert gateway.status(zipped).startswith(b"HTTP/1.1 400")
    assert gateway.post(chat())[0] == 200


def flooded(gateway, begin: bytes, piece: bytes, most: int = 64 << 20) -> int:
    """How many bytes of `piece`, again and again, were taken after `begin` until the gateway closed the connection."""
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as connection:
        connection.sendall(begin)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < most:
                connection.sendall(piece)
                sent += len(piece)
        return sent


def test_nobody_sends_trailers_or_chunks_without_end(place):
    """Trailers were kept, as headers are, for as long as they came, of people without a key as well."""
    gateway = place.gateway()
    begin = b"GET /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    line = b"x: " + b"y" * 1000 + b"\r\n"
    assert flooded(gateway, begin + b"0\r\n", line * 100) < 32 << 20
    assert flooded(gateway, begin + b"0\r\nx: ", b"y" * 100_000) < 32 << 20
    assert flooded(gateway, begin + b"1;x=", b"y" * 100_000) < 32 << 20
    # What trailers say is not what the head says, and a body in the smallest chunks is one.
    body = json.dumps(chat("Hello " * 20_000)).encode()
    small = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\nauthorization: Bearer x\r\n\r\n"
    found = gateway.raw(requested(place, "transfer-encoding: chunked", "connection: close", body=small))
    assert found.startswith(b"HTTP/1.1 200")


def test_what_follows_an_upgrade_is_not_listened_to(place, caplog):
    gateway = place.gateway()
    begin = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    found = gateway.hung_up(begin + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert found.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in found
    assert "pgrade" not in caplog.text


def test_whoever_is_slow_is_cut_off(place, monkeypatch):
    gateway = place.gateway()
    # Each time alone: where all is slow, two that are short could be over together.
    monkeypatch.setattr(connection, "_HEAD_TIME", 0.5)
    assert gateway.hung_up(b"") == b""
    assert gateway.hung_up(b"POST /v1/chat/comp") == b""
    monkeypatch.setattr(connection, "_HEAD_TIME", 120.0)
    monkeypatch.setattr(connection, "_BODY_TIME", 120.0)
    monkeypatch.setattr(app, "_BODY_TIME", 0.5)
    slow = gateway.hung_up(requested(place, "content-length: 500", body=b"{"))
    assert b"400" in slow.split(b"\r\n")[0]
    # Nor does a body have for ever that nobody waits for.
    monkeypatch.setattr(connection, "_BODY_TIME", 1.0)
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as client:
        client.sendall(b"POST /v1/none HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000:
                client.sendall(b"x")
                sent += 1
                time.sleep(0.05)
        assert sent < 1000


def test_other_routes(place):
    gateway = place.gateway()
    assert gateway.get("/healthz")[0] == 200
    assert gateway.get("/readyz") == (200, {"ready": True, "problems": []})
    assert gateway.get("/v1/nothing")[0] == 404
    assert gateway.get("/v1/chat/completions")[0] == 405
    assert gateway.post({}, path="/v1/models")[0] == 405
    assert gateway.get("/v1/models/acme/other@1")[0] == 404
