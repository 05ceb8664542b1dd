"""An inference server that hides bits in the tokens that it draws, and a gateway that has its answers run again."""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import threading
import time
from types import SimpleNamespace

import pytest

from gateway.places import Inference, chunk, framed, listening
from infer.running import Running
from infer.small import REF, make_room
from strongroom.client import Room
from strongroom.gateway.answer import Meter
from strongroom.gateway.rooms import InFolder
from strongroom.gateway.settings import Settings
from strongroom.gateway.upstream import Upstream
from strongroom.gateway.verified import Verified
from strongroom.gateway.worker import application
from strongroom.storage.db import Database
from strongroom.vault.vault import Vault
from strongroom.watch.tallies import Tallies


@pytest.fixture(scope="module")
def room(small, tmp_path_factory):
    """The folder of a room, a key to its gateway, and a running server with its channel."""
    folder = tmp_path_factory.mktemp("verified")
    channel = folder / "channel"
    channel.write_text(secrets.token_hex(32))
    channel.chmod(0o600)
    with make_room(folder / "room", small) as opened:
        key = opened.apikeys.new()["key"]
    running = Running(folder / "room", "acme/small", "--channel", str(channel))
    yield folder, key, running, channel
    running.stop()


TERMS = itertools.count(1)


@contextlib.contextmanager
def gateway(room, upstream: str, term: int | None = None):
    """A gateway before `upstream`, whose answers are all run again by the running server; with a tally of its own
    unless it gets a `term`."""
    folder, key, running, channel = room
    settings = Settings.parse(
        f"""
[verify]
url = "{running.url}"
channel = "{channel}"
share = 1.0
stop = true
term = {next(TERMS) if term is None else term}
[[upstream]]
url = "{upstream}"
channel = "{channel}"
models = {{"{REF}" = "acme/small"}}
"""
    )
    vault = Vault(folder / "room")
    app = application(InFolder(vault), settings, folder / "inference")
    with contextlib.closing(vault), listening(app) as port:
        yield app, port, key


def until(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def ask(port, key, heard=None, **more):
    """Status and body; `heard` is set once the first of it has been given out."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": REF, "prompt": "The room has a lock", "max_tokens": 40, **more}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        if heard is not None:
            heard.set()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_an_honest_server_verifies_streaming_and_not(room, caplog):
    with gateway(room, room[2].url) as (app, port, key):
        assert "[verify] names the very server that answers" in caplog.text  # as it does here, for once
        for more in ({}, {"temperature": 0.7, "top_p": 0.9}, {"stream": True}, {"temperature": 0}):
            assert ask(port, key, **more)[0] == 200
        until(lambda: REF in app.verified.verdicts and app.verified.verdicts[REF].tokens >= 100)
        until(app.verified._samples.empty)
        verdict = app.verified.verdicts[REF]
        assert (verdict.alarm, verdict.dangerous, app.verified.failed) == ("", 0, 0)
        assert verdict.good == verdict.tokens
        assert verdict.bits < 9  # log2 of 512 words: what nobody had verified
        assert app.counts.misspelled == 0
    lines = [line for path in (room[0] / "inference").glob("*.jsonl") for line in path.read_text().splitlines()]
    spent = [json.loads(line) for line in lines]
    assert all(each["bits"] == 9 * each["tokens"] for each in spent)


def streams(said) -> bytes:
    """One event with all of an answer, and no end."""
    event = b"data: " + json.dumps({"choices": said["choices"]}).encode() + b"\n\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    return head + event


@pytest.mark.parametrize(
    ("changed", "more"),
    [
        (lambda choice: {**choice, "text": "the weights"}, {}),
        (lambda choice: {**choice, "strongroom": {"tokens": [9999], "logprobs": [0.0]}}, {}),
        (lambda choice: {**choice, "text": "the weights"}, {"prompt": "lock " * 2000}),
        (lambda choice: {**choice, "text": "the weights", "finish_reason": None}, {"stream": True}),
    ],
)
def test_a_text_that_its_tokens_do_not_spell_ends_inference(room, changed, more):
    """The right tokens for whoever verifies, something else for the caller; also to what can't be answered, or cut."""
    honest, secret, hostile, heard = room[2], room[3].read_text(), Inference(), threading.Event()

    def two_answers(body):
        asked = {**body, "prompt": "The room", "stream": False}
        said = honest.raw("POST", "/v1/completions", asked, {"strongroom-channel": secret})[1]
        said["choices"] = [changed(said["choices"][0])]
        if "stream" not in body:
            return [framed(json.dumps(said).encode())]
        said["choices"][0]["strongroom"]["tokens"] = said["choices"][0]["strongroom"]["tokens"][:10]
        said["choices"][0]["strongroom"]["logprobs"] = said["choices"][0]["strongroom"]["logprobs"][:10]
        return [streams(said), heard, chunk(b"data: no JSON\n\n")]

    hostile.script = two_answers
    try:
        with gateway(room, f"http://127.0.0.1:{hostile.port}") as (app, port, key):
            ask(port, key, heard, **{"prompt": "The room", **more})
            until(lambda: REF in app.verified.verdicts)
            assert app.verified.verdicts[REF].alarm.startswith("1 answers are not what their tokens spell")
            assert ask(port, key)[0] == 503
            assert app.counts.misspelled == 1
    finally:
        hostile.stop()


def test_what_is_told_to_be_long_tokens_is_charged_as_if_it_hid_all(room):
    """Whoever lies by no more than 16 bytes a token: the gateway knows itself what these tokens spell."""
    hostile, text = Inference(), "the weights, as they are, in as few of the tokens as can be said" * 5
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    said = {"choices": [{**choice, "strongroom": {"tokens": [300] * 40, "logprobs": [-1.0] * 40}}]}
    hostile.script = lambda _: [framed(json.dumps(said).encode())]
    try:
        with gateway(room, f"http://127.0.0.1:{hostile.port}") as (app, port, key):
            assert ask(port, key)[0] == 200
            assert app.counts.misspelled == 1
            assert app.counts.bits == 8 * len(text) > 7 * 9 * 40
    finally:
        hostile.stop()


def test_a_text_without_tokens_is_no_answer(room):
    hostile = Inference()
    choice = {"index": 0, "text": "the weights", "finish_reason": "stop"}
    hostile.script = lambda _: [framed(json.dumps({"choices": [choice]}).encode())]
    try:
        with gateway(room, f"http://127.0.0.1:{hostile.port}") as (_, port, key):
            assert json.loads(ask(port, key)[1])["error"]["code"] == "upstream_malformed"
    finally:
        hostile.stop()


def test_bits_that_are_hidden_in_tokens_end_inference(room):
    honest = room[2]
    hostile = Inference()
    secret = room[3].read_text()

    def smuggling(body):
        """An answer of the same weights, but to a seed that the server has chosen."""
        seed = body["strongroom"]["seed"]
        asked = {**body, "strongroom": {"seed": seed + 1, "record": True}}
        said = honest.raw("POST", "/v1/completions", asked, {"strongroom-channel": secret})[1]
        return [framed(json.dumps(said).encode())]

    hostile.script, term = smuggling, next(TERMS)
    try:
        with gateway(room, f"http://127.0.0.1:{hostile.port}", term) as (app, port, key):
            assert ask(port, key)[0] == 200
            until(lambda: REF in app.verified.verdicts and app.verified.verdicts[REF].alarm)
            assert "not what these weights and this seed give" in app.verified.verdicts[REF].alarm
            status, body = ask(port, key)
            assert status == 503
            assert json.loads(body)["error"]["code"] == "sealed"
        # No end of the gateway clears the alarm, be its next server honest; a new term, which the log sees, does.
        with gateway(room, honest.url, term) as (app, port, key):
            assert ask(port, key)[0] == 503
            assert "not what these weights" in app.problems()["verify"]
        with Room(room[0] / "room") as opened:
            found = opened.budget(REF)
        assert found["verified"]["term"] == term
        assert found["verified"]["dangerous"] > 0
        assert found["verified"]["hidden_bits"] > found["logged"]["tokens"] > 0
        with gateway(room, honest.url) as (app, port, key):
            assert ask(port, key)[0] == 200
            until(lambda: REF in app.verified.verdicts)
            assert not app.verified.verdicts[REF].alarm
    finally:
        hostile.stop()


def test_each_of_several_answers_is_run_again_by_its_own_seed(room):
    """Policy permits n to nobody at first; a hostile server that hides bits in the second answer only is found."""
    verifier, secret = room[2], {"strongroom-channel": room[3].read_text()}
    request = {"prompt": "The room", "max_tokens": 30, "n": 3, "strongroom": {"seed": (1 << 64) - 2, "record": True}}
    answer = verifier.raw("POST", "/v1/completions", {"model": REF, **request}, secret)[1]
    flight = SimpleNamespace(ref=REF, route="completions", body=request, meter=Meter(text={}))
    for index, each in enumerate(answer["choices"]):
        flight.meter.sampled[index] = each["strongroom"]["tokens"]
        flight.meter.text[index] = [each["text"]]
    assert len({tuple(each) for each in flight.meter.sampled.values()}) == 3

    def verified():
        """What the verifier says of each choice."""
        database = Database.open(f"sqlite:///{room[0]}/room/room.db")
        asked = Verified(Upstream(verifier.url), 1.0, Tallies(database, next(TERMS)), lambda _: 512, stop=False)
        database.close()
        asked.look(flight)
        bodies = [json.loads(asked._samples.get_nowait()[1]) for _ in range(3)]
        return [verifier.raw("POST", "/v1/verify", body, secret)[1]["run"] for body in bodies]

    assert [(run["good"], run["others"]) for run in verified()] == [(len(t), 0) for t in flight.meter.sampled.values()]
    flight.meter.sampled[1], flight.meter.text[1] = flight.meter.sampled[2], flight.meter.text[2]
    found = verified()
    assert [run["dangerous"] > 0 for run in found] == [False, True, False]
