"""Found files that are traced over the network."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import socket
import socketserver
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial

import pytest
from starlette.requests import Request

from server.served import REF, Served
from server.test_uploads import call
from strongroom.client import Room
from strongroom.core.clock import unix
from strongroom.core.limits import MIB
from strongroom.crypto.signatures import Signer
from strongroom.errors import AuthRequired, Conflict, LimitExceeded, NotFound, StrongroomError, UsageError
from strongroom.formats.statement import Voice
from strongroom.formats.suspect import FoundFile, FoundFiles, suspect_digest
from strongroom.formats.tlogproof import LogProof
from strongroom.policy.speaker import speaking
from strongroom.server.memory import Memory, free_bytes
from strongroom.server.problem import problem
from strongroom.server.traces import Traces
from strongroom.vault.suspect import Suspect
from vault.rooms import write_model

pytestmark = pytest.mark.server

TWO = (("a.safetensors", b"aa"), ("b.safetensors", b"b"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A room in which an operator has a marked copy, and a lease to trace its version; and another version."""
    folder = tmp_path_factory.mktemp("served")
    made = Served(folder, operators=("user/oto",))
    made.cli("trust", str(made.folder / "card.json"))
    made.cli("put", str(write_model(folder / "other", seed=3)), "acme/other", as_="user/oto")
    asked = made.cli("request", REF, "--action", "copy", "--reason", "edge", as_="user/oto")
    for who in ("user/ben", "user/eva"):
        made.cli("approve", asked["id"], as_=who)
    made.cli("copy", REF, "--to", "user/oto", "--out", "leak", as_="user/oto")
    made.leak = made.home / "leak"
    yield made
    made.stop()


def oto(served):
    return Voice(served.card.room.hex(), "user/oto", served.identities.signer("user/oto"), unix)


def announcement(voice, files=TWO, *, ref=None, lease=None, digest=None, suspect=None, **more):
    found = tuple(FoundFile(path, len(data), digest or hashlib.sha256(data).hexdigest()) for path, data in files)
    said = voice.say("trace", {"suspect": suspect or suspect_digest(found), "ref": ref, "lease": lease})
    return replace(FoundFiles("leak", found, said.envelope), **more).encode()


def send(served, head, data, *, by="user/oto"):
    """The whole body at once: status and answer."""
    body = len(head).to_bytes(4, "big") + head + data
    status, _, answer = served.raw("POST", "/v1/traces", body, call(served, "/v1/traces", head, by=by))
    return status, json.loads(answer)


def show(served, identifier, by="user/oto"):
    path = f"/v1/traces/{identifier}"
    status, _, answer = served.raw("GET", path, b"", call(served, path, b"", by=by, method="GET"))
    return status, json.loads(answer)


def ended(ask):
    deadline = time.monotonic() + 200
    while (found := ask())["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def newest(served, count=1):
    return served.host("log", "tail", "-n", str(count))["entries"]


def test_whose_copy_it_is_is_told_under_an_approved_request_once_it_is_in_the_log(served):
    found = served.cli("trace", str(served.leak), as_="user/oto", check=13)
    assert (found["weights"], found["withheld"], found["accused"], found["scores"]) == (REF, True, [], [])
    assert newest(served)[0]["body"]["accused"] == []
    error = served.cli("trace", str(served.leak), "--weights", REF, as_="user/oto", check=3)["error"]
    assert "a lease to trace" in error["message"]
    assert "--action trace" in error["hint"]
    asked = served.cli("request", REF, "--action", "trace", "--uses", "2", "--reason", "case 12", as_="user/oto")
    served.cli("approve", asked["id"], as_="user/ben")
    page = served.home / "case-12.html"
    arguments = ("--weights", "acme/tiny", "--report", str(page))
    found = served.cli("trace", str(served.leak), *arguments, as_="user/oto", check=14)
    assert [each["holder"] for each in found["accused"]] == ["user/oto"]
    assert found["false_accusation_bound"] == 1e-9
    files = [FoundFile(each["path"], each["bytes"], each["sha256"]) for each in found["suspect"]["files"]]
    assert {each.path: each.sha256 for each in files} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in served.leak.iterdir()
    }
    (entry,) = newest(served)
    body = entry["body"]
    assert (entry["index"], entry["by"], entry["ref"]) == (found["entry"], "user/oto", REF)
    assert (body["verdict"], body["accused"], body["lease"]) == ("named", ["user/oto"], asked["id"])
    assert body["suspect"] == suspect_digest(files)
    # The proof is for whoever sees the report, and needs nobody who may read the log.
    (release,) = found["accused"][0]["releases"]
    proven = served.cli("log", "prove", str(release["entry"]), as_="user/ada")
    assert proven["leaf"] == release["leaf"]
    assert LogProof.decode(release["proof"].encode()).index == release["entry"]
    assert release["proof"] in page.read_text()
    # On the host it comes out as it did here.
    served.cli("trace", str(served.leak), "--weights", REF, as_="user/oto", check=14)
    # The lease was for two.
    error = served.cli("trace", str(served.leak), "--weights", REF, as_="user/oto", check=3)["error"]
    assert error["code"].startswith("denied")
    assert served.cli("log", "verify", as_="user/ada")["ok"]


def test_text_is_traced_as_weights_are(served):
    """The version here is no model to run: that is said once the files have come, and not before it is known who asks;
    what a text names is in tests/vault/test_texttrace.py."""
    path = served.home / "answers.jsonl"
    path.write_text("[1, 2, 3]\n")
    error = served.cli("trace", "--text", str(path), as_="user/oto", check=2)["error"]
    assert error["code"] == "trace.text_version"
    error = served.cli("trace", "--text", str(path), "--weights", REF, as_="user/oto", check=3)["error"]
    assert "--action trace" in error["hint"]
    asked = served.cli("request", REF, "--action", "trace", "--reason", "case 14", as_="user/oto")
    served.cli("approve", asked["id"], as_="user/ben")
    error = served.cli("trace", "--text", str(path), "--weights", REF, as_="user/oto", check=2)["error"]
    assert error["code"] == "text.unsupported"
    path.write_text("[1, 2")
    error = served.cli("trace", "--text", str(path), "--weights", REF, as_="user/oto", check=2)["error"]
    assert error["code"] == "text.malformed"
    # Who leaves out the version by hand is told so, too, before anything is sent.
    status, answer = send(served, announcement(oto(served), text=True), b"aab")
    assert (status, answer["code"]) == (400, "trace.text_version")
    served.cli("revoke", asked["id"], "--reason", "done", as_="user/ben")


def test_who_may_not_is_told_so_before_anything_is_sent(served):
    for arguments in ((), ("--weights", REF)):
        error = served.cli("trace", str(served.leak), *arguments, as_="user/ana", check=3)["error"]
        assert error["code"] == "denied.default"
    voice = replace(oto(served), by="user/ana", signer=served.identities.signer("user/ana"))
    status, answer = send(served, announcement(voice), b"aab", by="user/ana")
    assert (status, answer["code"]) == (403, "denied.default")
    assert newest(served)[0]["by"] == "user/ana"


def test_nobody_traces_without_a_call_of_that_very_head(served):
    head = announcement(oto(served))
    body = len(head).to_bytes(4, "big") + head + b"aab"
    for headers in ({}, call(served, "/v1/traces", announcement(oto(served))), call(served, "/v1/suspects", head)):
        status, _, answer = served.raw("POST", "/v1/traces", body, headers)
        assert (status, json.loads(answer)["code"]) == (401, "auth.refused")


def lease(served, ref=REF):
    asked = served.cli("request", ref, "--action", "trace", "--reason", "x", as_="user/oto")
    return served.cli("approve", asked["id"], as_="user/ben")["lease"]["id"]


@pytest.mark.parametrize(
    ("head", "data", "status", "code"),
    [
        (lambda voice: announcement(voice, digest="0" * 64), b"aab", 409, "source.changed"),
        (announcement, b"aaB", 409, "source.changed"),
        (announcement, b"aa", 400, "upload.length"),
        (announcement, b"aabb", 400, "upload.length"),
        (lambda voice: announcement(voice, suspect="0" * 64), b"aab", 400, "trace.other"),
        (lambda voice: announcement(replace(voice, by="user/ben")), b"aab", 400, "trace.other"),
        (lambda voice: announcement(voice, statement=put(voice)), b"aab", 400, "trace.other"),
        (lambda voice: announcement(replace(voice, signer=Signer(bytes(32)))), b"aab", 401, "auth.refused"),
        (lambda voice: announcement(replace(voice, clock=lambda: unix() - 400)), b"aab", 401, "statement.stale"),
        (lambda voice: announcement(voice, ref="acme/none@1"), b"aab", 404, "version.missing"),
        (lambda voice: announcement(voice, ref="acme/tiny"), b"aab", 404, "version.missing"),
        (lambda voice: announcement(voice, ref=REF, lease="0" * 16), b"aab", 403, "trace.lease"),
        (lambda voice: announcement(voice, lease="0" * 16), b"aab", 403, "trace.lease"),
        (lambda voice: announcement(voice, (("../x", b"aab"),)), b"aab", 400, "source.name"),
        (lambda voice: announcement(voice, name=""), b"aab", 400, "trace.malformed"),
        (lambda voice: announcement(voice, name="\x1b[2J"), b"aab", 400, "trace.malformed"),
        (lambda _: b"{}", b"", 400, "trace.malformed"),
        (lambda _: b"", b"", 400, "trace.malformed"),
    ],
)
def test_what_is_refused_is_not_searched(served, head, data, status, code):
    before = newest(served)[0]["index"]
    found, answer = send(served, head(oto(served)), data)
    assert (found, answer["code"]) == (status, code)
    (entry,) = newest(served)
    assert (entry["index"], entry["type"], entry["body"]["code"]) == (before + 1, "refused", code)
    assert entry["by"] == ("unknown" if status == 401 else "user/oto")


def put(voice):
    return voice.say("put", {"name": "acme/x", "files": "0" * 64}).envelope


def test_a_lease_is_for_its_version(served):
    held = lease(served, "acme/other@1")
    for ref in (REF, None):
        status, answer = send(served, announcement(oto(served), ref=ref, lease=held), b"aab")
        assert (status, answer["code"]) == (403, "trace.lease")
    status, answer = send(served, announcement(oto(served), ref="acme/other@1", lease=held), b"aab")
    assert status == 202
    # What comes of it is in the log before the next test looks there.
    assert ended(lambda: show(served, answer["id"])[1])["state"] == "failed"


def test_more_than_there_is_memory_for_is_refused_before_it_is_read(served):
    voice = oto(served)
    files = (FoundFile("a.safetensors", 1 << 45, "0" * 64),)
    said = voice.say("trace", {"suspect": suspect_digest(files), "ref": None, "lease": None})
    head = FoundFiles("leak", files, said.envelope).encode()
    for path, body in (("/v1/suspects", head), ("/v1/traces", len(head).to_bytes(4, "big") + head)):
        status, _, answer = served.raw("POST", path, body, call(served, path, head))
        found = json.loads(answer)
        assert (status, found["code"]) == (429, "trace.too_large")
        assert "--trace-memory" in found["hint"]


def test_a_search_is_told_of_to_whoever_began_it(served):
    data = (served.leak / "model-00001-of-00002.safetensors").read_bytes()
    head = announcement(oto(served), (("model.safetensors", data),))
    status, answer = send(served, head, data)
    assert status == 202
    for who in ("user/ben", "user/eva", "user/ada"):
        status, other = show(served, answer["id"], by=who)
        assert (status, other) == (404, show(served, "0" * 32, by=who)[1])
    found = ended(lambda: show(served, answer["id"])[1])
    assert (found["state"], found["error"]) == ("done", None)
    assert 0 < found["done"] == found["total"]
    assert found["report"]["weights"] == REF
    # Said once, and not again.
    for _ in range(2):
        status, answer = send(served, head, data)
        assert (status, answer["code"]) == (409, "statement.replayed")
    for bad in ("x", "0" * 16):
        assert show(served, bad)[0] == 404


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def zip_bomb():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(64 << 20))
    return stream.getvalue()


def header(text):
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("three.safetensors", b"abc", "safetensors"),
        ("long.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "safetensors"),
        (
            "bomb.safetensors",
            header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
            "suspect.empty",  # cut off, with nothing left of it
        ),
        ("none.safetensors", header(b"{}"), "suspect.empty"),
        ("bad.gguf", b"GGUF" + b"\xff" * 60, "gguf"),
        ("text.txt", b"hello", "suspect.empty"),
        ("leak.pt", pickle.dumps(Bomb()), "convert"),
        ("leak.bin", zip_bomb(), "convert"),
    ],
)
def test_bad_files_are_a_search_that_failed(served, name, data, code):
    status, answer = send(served, announcement(oto(served), ((name, data),)), data)
    assert status == 202
    found = ended(lambda: show(served, answer["id"])[1])
    assert (found["state"], found["report"]) == ("failed", None)
    assert found["error"]["code"].startswith(code)
    assert found["error"]["status"] in (400, 429)
    (entry,) = newest(served)
    assert (entry["type"], entry["by"], entry["body"]["action"]) == ("refused", "user/oto", "trace")
    assert entry["body"]["code"] == found["error"]["code"]


def test_a_pickle_is_known_by_what_was_found_and_read_in_the_sandbox(served):
    torch = pytest.importorskip("torch")
    stream = io.BytesIO()
    torch.save({"x": torch.ones(64, 64)}, stream)
    data = stream.getvalue()
    (served.home / "found.pt").write_bytes(data)
    found = served.cli("trace", "found.pt", as_="user/oto", check=0)
    assert found["verdict"] == "unrelated"
    assert newest(served)[0]["body"]["suspect"] == hashlib.sha256(data).hexdigest()


def test_nothing_of_the_files_is_on_a_disk_of_the_custodian(served):
    """The bytes of a suspect, which the store has as ciphertext only, and so does everything else in the folder."""
    data = (served.leak / "model-00001-of-00002.safetensors").read_bytes()
    status, answer = send(served, announcement(oto(served), (("model.safetensors", data),)), data)
    assert status == 202
    assert ended(lambda: show(served, answer["id"])[1])["state"] == "done"
    piece = data[-64:]
    for path in served.folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another file has come into its place, or the database was closed
            assert not path.is_file() or piece not in path.read_bytes(), path


class Balancer(socketserver.ThreadingTCPServer):
    """Passes each connection on to the next of several servers, as it is: clients believe the room's own TLS only."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, urls):
        super().__init__(("127.0.0.1", 0), None)
        self.servers = itertools.cycle(int(url.rpartition(":")[2]) for url in urls)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, request, client_address):
        with socket.create_connection(("127.0.0.1", next(self.servers))) as server:
            back = threading.Thread(target=self.pass_on, args=(server, request), daemon=True)
            back.start()
            self.pass_on(request, server)
            back.join()

    @staticmethod
    def pass_on(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_client_asks_the_server_that_has_its_files(served, monkeypatch):
    """Of several behind one address: the others know nothing of it."""
    monkeypatch.setenv("STRONGROOM_STATE", str(served.home / "state"))
    monkeypatch.setenv("STRONGROOM_IDENTITIES", str(served.home / "identities"))
    card, first = served.card, served.url
    second = served.start()
    seen = []
    with Balancer([first, second]) as balancer:
        card = replace(card, url=f"https://127.0.0.1:{balancer.server_address[1]}")
        with Room(card, "user/oto") as room:
            for _ in range(2):
                found = room.trace(served.leak, progress=lambda *progress: seen.append(progress))
                assert found["weights"] == REF
        balancer.shutdown()
    size = sum(each["bytes"] for each in found["suspect"]["files"])
    assert seen.count((size, size)) == 2  # all was sent, and said so


# -- one server, in this process -----------------------------------------------------------------------------------


class Here:
    """The searches of a server over a room of one's own; time is what the test says."""

    def __init__(self, folder, memory=None):
        self.room, _ = Room.init(folder / "room", owner="user/olga")
        self.room.put(write_model(folder / "model"), "acme/tiny", share="1/2")
        self.room.principal_add("user/oto", roles=["operator"])
        self.vault = self.room._vault
        self.now = 0.0
        self.traces = Traces(self.vault, self.caller, memory or Memory(64 * MIB), clock=self.clock)
        self.data = (folder / "model" / "model-00001-of-00002.safetensors").read_bytes()

    def clock(self):
        return self.now

    def caller(self, _, __, path="user/oto"):
        with self.vault.custodian.ledger.view() as state:
            return speaking(state, path)

    def head(self, **more):
        return announcement(self.vault.voice("user/oto"), (("model.safetensors", self.data),), **more)

    def send(self, head, *, length=None, before_last=lambda: None):
        half = len(self.data) // 2
        pieces = [len(head).to_bytes(4, "big") + head + self.data[:half], self.data[half:]]

        async def receive():
            if len(pieces) == 1:
                before_last()
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        total = 4 + len(head) + len(self.data) if length is None else length
        headers = [(b"content-length", str(total).encode())]
        request = Request({"type": "http", "method": "POST", "path": "/v1/traces", "headers": headers}, receive)
        return asyncio.run(self.traces.receive(request))["id"]

    def show(self, identifier):
        return self.traces.show(Request({"type": "http", "headers": [], "path_params": {"trace": identifier}}), b"")

    def stop(self, identifier):
        return self.traces.stop(Request({"type": "http", "headers": [], "path_params": {"trace": identifier}}), b"")

    def ended(self, identifier):
        return ended(lambda: self.show(identifier))

    def newest(self):
        return self.room.log.tail(1)[0]


@pytest.fixture
def here(tmp_path):
    made = Here(tmp_path)
    with made.room:
        yield made


def test_a_search_that_nobody_asks_about_is_given_up_and_that_is_recorded(here, monkeypatch):
    real = here.traces._search

    def late(*work):
        here.now += 121
        real(*work)

    monkeypatch.setattr(here.traces, "_search", late)
    identifier = here.send(here.head())
    found = ended(here.traces._jobs[identifier].as_json)  # which asks nobody
    assert (found["state"], found["error"]["code"], found["report"]) == ("failed", "trace.stopped", None)
    assert here.newest()["body"] == {"action": "trace", "code": "trace.stopped", "rule": ""}


def test_a_search_ends_when_whoever_began_it_wants_that(here, monkeypatch):
    began, stopped = threading.Event(), threading.Event()
    real = Suspect.read

    def waiting(self, name, begin=0, end=None):
        began.set()
        assert stopped.wait(60)
        return real(self, name, begin, end)

    monkeypatch.setattr(Suspect, "read", waiting)
    identifier = here.send(here.head())
    assert began.wait(60)
    assert here.stop(identifier)["state"] == "running"
    stopped.set()
    found = here.ended(identifier)
    assert (found["state"], found["error"]["code"], found["report"]) == ("failed", "trace.stopped", None)
    assert here.newest()["body"] == {"action": "trace", "code": "trace.stopped", "rule": ""}
    assert here.stop(identifier) == found  # once more changes nothing
    # Its place is free, and its statement in no entry.
    monkeypatch.setattr(Suspect, "read", real)
    assert here.ended(here.send(here.head()))["state"] == "done"


def test_a_search_that_has_ended_stays_as_it_is(here):
    identifier = here.send(here.head())
    found = here.ended(identifier)
    assert here.stop(identifier) == found
    assert found["state"] == "done"


def test_nobody_else_stops_a_search(here):
    identifier = here.send(here.head())
    here.traces._caller = partial(here.caller, path="user/olga")
    with pytest.raises(NotFound) as caught:
        here.stop(identifier)
    assert caught.value.code == "trace.unknown"
    here.traces._caller = here.caller
    assert here.ended(identifier)["state"] == "done"


def test_of_two_equal_searches_at_once_one_is_had(here):
    head, refused = here.head(), []

    def again():
        with pytest.raises(Conflict) as caught:
            here.send(head)
        refused.append(caught.value.code)

    def beside():
        thread = threading.Thread(target=again)
        thread.start()
        thread.join(60)

    identifier = here.send(head, before_last=beside)  # while the files of the first are on their way
    assert refused == ["statement.replayed"]
    assert here.ended(identifier)["state"] == "done"
    again()  # and once it is in the log
    assert not here.traces._coming


def test_a_search_whose_files_did_not_come_may_come_again(here):
    head, whole = here.head(), here.data
    here.data = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(Conflict) as caught:
        here.send(head)
    assert caught.value.code == "source.changed"
    here.data = whole
    assert here.ended(here.send(head))["state"] == "done"


def test_what_came_of_searches_is_kept_for_a_while_and_only_of_so_many(here):
    first = here.send(here.head())
    assert here.ended(first)["state"] == "done"
    here.now += 899
    assert here.show(first)["state"] == "done"
    here.now += 2
    with pytest.raises(NotFound) as caught:
        here.show(first)
    assert caught.value.code == "trace.unknown"
    many = []
    here.data = b"abc"
    for _ in range(20):
        many.append(here.send(here.head()))
        assert here.ended(many[-1])["state"] == "failed"
        here.now += 1  # by when each has ended they are told apart
    kept = []
    for each in many:
        try:
            here.show(each)
            kept.append(each)
        except NotFound:
            continue
    assert kept == many[-16:]


@pytest.mark.parametrize("how", ["suspended", "demoted"])
def test_who_is_suspended_meanwhile_is_told_nothing(here, how):
    def change():
        if how == "suspended":
            here.room.principal_change("user/oto", state="suspended")
        else:
            here.room.principal_change("user/oto", roles=["researcher"])

    identifier = here.send(here.head(), before_last=change)
    job = here.traces._jobs[identifier]
    found = ended(job.as_json)
    assert (found["state"], found["report"]) == ("failed", None)
    assert found["error"]["status"] in (401, 403)
    assert here.newest()["type"] == "refused"
    if how == "suspended":
        with pytest.raises(AuthRequired):
            here.show(identifier)


def test_two_at_a_time_and_whoever_is_third_is_told_to_wait(here):
    memory = here.traces._memory
    with memory.held(1), memory.held(1):
        with pytest.raises(LimitExceeded) as caught:
            here.send(here.head())
        assert caught.value.code == "server.busy"
        assert problem(caught.value).headers["retry-after"]
        assert here.newest()["type"] != "refused"  # nobody was refused anything
    assert here.ended(here.send(here.head()))["state"] == "done"
    assert memory._held == {}


def test_another_length_is_refused_before_the_files_are_read(here):
    head = here.head()
    for length in ("", 4, -1, 4 + len(head)):
        with pytest.raises(UsageError) as caught:
            here.send(head, length=length, before_last=lambda: pytest.fail("it was read"))
        assert caught.value.code == "upload.length"


def test_files_that_end_early_are_let_go(here):
    head = here.head()
    here.data, whole = here.data[:-1], here.data
    with pytest.raises(StrongroomError):
        here.send(head, length=4 + len(head) + len(whole))
    assert here.traces._memory._held == {}
    assert here.traces._jobs == {}


class TestMemory:
    def test_so_much_and_no_more(self):
        memory = Memory(100)
        memory.check(100)
        with pytest.raises(LimitExceeded) as caught:
            memory.check(101)
        assert (caught.value.code, caught.value.evidence) == ("trace.too_large", {"most": 100})
        with memory.held(60) as take:
            with pytest.raises(LimitExceeded) as caught:
                memory.check(41)
            assert caught.value.code == "server.busy"
            take(40)
            for more, code in ((1, "trace.too_large"), (61, "trace.too_large")):
                with pytest.raises(LimitExceeded) as caught:
                    take(more)
                assert caught.value.code == code
        with memory.held(100):
            pass

    def test_by_default_half_of_what_is_free_and_never_more_than_8_gib(self):
        memory = Memory(free=lambda: 1000)
        memory.check(500)
        with pytest.raises(LimitExceeded):
            memory.check(501)
        memory = Memory(free=lambda: 1 << 50)
        memory.check(8192 * MIB)
        with pytest.raises(LimitExceeded):
            memory.check(8192 * MIB + 1)

    def test_what_is_free_is_known(self):
        assert free_bytes() > 0

    def test_what_a_pickle_becomes_counts(self, tmp_path):
        torch = pytest.importorskip("torch")
        stream = io.BytesIO()
        torch.save({"x": torch.ones(256, 256)}, stream)
        made = Here(tmp_path, Memory(len(stream.getvalue()) + 1000))
        with made.room:
            made.data = stream.getvalue()
            head = announcement(made.vault.voice("user/oto"), (("x.pt", made.data),))
            found = made.ended(made.send(head))
            assert found["error"]["code"] == "trace.too_large"


def test_a_search_computes_on_one_thread_unless_it_is_told():
    """By the libraries' own variables, which they read as they are imported."""
    code = "from strongroom.cli.serve import one_thread_each as f; f(); import os, sys; print('numpy' in sys.modules, "
    code += "os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'])"
    for told, expected in (({}, "False 1 1"), ({"OPENBLAS_NUM_THREADS": "4"}, "False 4 1")):
        usual = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=usual | told, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == expected, done
