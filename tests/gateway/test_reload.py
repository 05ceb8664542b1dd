"""Settings that change while a gateway runs: in all workers or in none, and not for what is under way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from gateway.places import ANA, OWNER, REF, STREAM, Gateway, chat, ended, token, whole
from gateway.test_gateway import eventually
from gateway.test_limits_redis import Server
from loopback import free_port
from strongroom.crypto.authority import Authority as WebAuthority
from strongroom.crypto.capture import CaptureKey
from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.gateway import changes, generations
from strongroom.gateway.hangup import Hangup
from strongroom.gateway.metrics import GatewayMetrics
from strongroom.gateway.records import verify
from strongroom.gateway.reload import Reload
from strongroom.gateway.settings import Settings
from strongroom.gateway.unsealing import opened
from strongroom.gateway.workers import _Answer, coordinate
from strongroom.storage.db import Database
from strongroom.watch.tallies import Tallies
from strongroom.watch.verdict import Tally


class Running:
    """A gateway in a process of its own, whose settings are in a file."""

    def __init__(self, place, folder, workers: int, settings: str) -> None:
        self.place, self.file, self.said = place, folder / "gateway.toml", folder / "stderr"
        self.records = folder / "records"
        port = free_port()
        self.write(settings)
        room = ["--room", str(place.folder), "--json", "gateway", "--listen", f"127.0.0.1:{port}"]
        upstream = ["--upstream", f"http://127.0.0.1:{place.inference.port}", "--records", str(self.records)]
        command = [sys.executable, "-m", "strongroom.cli", *room, *upstream]
        with self.said.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--settings", str(self.file), "--workers", str(workers)],
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.digest = json.loads(self.process.stdout.readline())["settings"]
        self.gateway = Gateway(place, port)

    def write(self, settings: str) -> None:
        self.file.write_text(settings)

    def hangup(self, settings: str, expected: str) -> str:
        """What it says on stderr after new settings."""
        before = len(self.said.read_text())
        self.write(settings)
        self.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 120
        while expected not in (found := self.said.read_text()[before:]) or not found.endswith("\n"):
            assert time.monotonic() < end, found
            assert self.process.poll() is None
            time.sleep(0.02)
        return found

    def asks(self, tokens: int) -> set[int]:
        """The status of some requests for so many tokens: enough to reach every worker."""
        return {self.gateway.post(chat(max_tokens=tokens))[0] for _ in range(12)}

    def stop(self) -> None:
        self.process.terminate()
        code = self.process.wait(120)
        self.process.stdout.close()
        assert code in (0, -signal.SIGTERM)  # one worker alone ends by the signal, when all is done


@pytest.mark.parametrize("workers", [1, 2])
def test_new_settings_for_what_is_asked_next(place, tmp_path, workers):
    running = Running(place, tmp_path, workers, "[answer]\nmax_tokens = 64\nmax_tokens_default = 64\n")
    try:
        assert running.asks(50) == {200}
        go, begun, got = threading.Event(), threading.Event(), []

        def slow(body):
            yield STREAM
            yield token(" word")
            begun.set()
            while not go.is_set():
                yield 0.02
            yield token(" word")
            yield ended(2)

        answer = place.inference.script
        place.inference.script = slow
        body = chat(stream=True, max_tokens=50)
        under_way = threading.Thread(target=lambda: got.append(running.gateway.post(body)))
        under_way.start()
        assert begun.wait(60)
        place.inference.script = answer
        said = running.hangup("[answer]\nmax_tokens = 10\nmax_tokens_default = 10\n", "new settings are in force")
        assert ": answer.max_tokens_default; answer.max_tokens" in said
        assert running.asks(50) == {400}
        assert running.asks(10) == {200}
        # What was begun under the old ones goes on.
        go.set()
        under_way.join(60)
        status, _, text = got[0]
        assert (status, text.count(" word"), text.endswith("data: [DONE]\n\n")) == (200, 2, True)
        # What can't be used is refused whole, with the reason; and the old ones stay.
        closed = free_port()
        for wrong, why in (
            ("[answer]\nmax_tokens = 0\n", "answer.max_tokens is from 1"),
            ("[answer\n", "is no TOML"),
            ('[redis]\nurl = "redis://127.0.0.1:1"\n', "redis.url can't change while the gateway runs"),
            (f'[[upstream]]\nurl = "http://127.0.0.1:{closed}"\n', f"http://127.0.0.1:{closed} is to say"),
            (
                '[[upstream]]\nurl = "http://127.0.0.1:1"\nmodels = { "acme/tiny" = "tiny" }\nkey = "nowhere"\n',
                "can't read nowhere",
            ),
        ):
            assert "the settings stay as they were" in running.hangup(f"{wrong}", why)
            assert running.asks(50) == {400}
        assert running.asks(10) == {200}
    finally:
        running.stop()
    digest = said.split("in force: ")[1].split(":")[0]
    assert digest not in ("", running.digest)
    with place.room() as room:
        entries = [each["body"] for each in map(json.loads, room.log.export("jsonl")) if each["type"] == "inference"]
    chains = {path.stem: path.read_bytes().splitlines() for path in running.records.glob("*.jsonl")}
    assert len(chains) == workers
    mine = [each for each in entries if each["gateway"] in chains]
    # Of each settings the log has what was begun under them: that one stream, too.
    assert {each["settings"] for each in mine} == {running.digest, digest}
    old = sum(each["requests"] for each in mine if each["settings"] == running.digest)
    assert old == 13
    for stream, lines in chains.items():
        assert verify(lines, [each for each in mine if each["gateway"] == stream]) == len(lines)


def test_a_gateway_without_settings_ends_with_its_terminal(place, tmp_path):
    command = [sys.executable, "-m", "strongroom.cli", "--room", str(place.folder), "--json", "gateway"]
    upstream = f"http://127.0.0.1:{place.inference.port}"
    for more in ([], ["--workers", "2"]):
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and would be there
        try:
            process = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0", "--upstream", upstream, *more],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        try:
            assert json.loads(process.stdout.readline())["url"]
            process.send_signal(signal.SIGHUP)
            process.wait(120)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_limit_that_was_not_changed_goes_on(place):
    """Else whoever can have the settings read again has every burst anew; and an alarm would be over."""
    gateway = place.gateway("[limits.identity]\nrequests = 1\nburst = 5\n")
    app = place.newest
    assert isinstance(app, generations.Generations)
    assert [gateway.post(chat())[0] for _ in range(6)] == [200] * 5 + [429]
    upstream = f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n'
    _take(place, app, f"[limits.identity]\nrequests = 1\nburst = 5\n[answer]\nmax_tokens = 2048\n{upstream}")
    assert gateway.post(chat())[0] == 429
    _take(place, app, f"[limits.identity]\nrequests = 1\nburst = 7\n{upstream}")
    assert gateway.post(chat())[0] == 200


def test_what_is_counted_goes_on(place):
    """A counter that falls is taken for a gateway that was started anew, and what it had counted is lost."""
    key = CaptureKey().public_key.hex()
    gateway = place.gateway(f'[capture]\nkey = "{key}"\nmodels = ["{REF}"]\n')
    app = place.newest
    assert gateway.post(chat())[0] == 200
    app.counts.misspelled += 1
    _take(place, app, f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n')
    assert gateway.post(chat())[0] == 200  # not captured
    shown = GatewayMetrics(app).exposition().decode().splitlines()
    assert "strongroom_gateway_captured_total 1.0" in shown
    assert "strongroom_gateway_misspelled_total 1.0" in shown


def _take(place, app, settings: str) -> None:
    async def take() -> None:
        parsed = Settings.parse(settings)
        app.take(parsed, await app.prepare(parsed))

    asyncio.run_coroutine_threadsafe(take(), place.server.servers[0].get_loop()).result(60)


@pytest.mark.parametrize("which", ["capture", "traces"])
def test_settings_that_can_not_be_used_leave_nothing_behind(place, tmp_path, which):
    place.gateway()
    app = place.newest
    upstream = f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n'
    capture = f'[capture]\nkey = "{CaptureKey().public_key.hex()}"\nwho = ["{ANA}"]\n'
    traces = '[traces]\nendpoint = "http://127.0.0.1:1/v1/traces"\n'
    if which == "capture":
        app._records.path.with_suffix(".sealed").write_text("{")
    else:
        traces += f'key = "{tmp_path}/none"\n'
    pools = ("asyncio", "uvloop")  # of threads for what may take a while
    before = threading.enumerate()
    for _ in range(3):
        with pytest.raises(StrongroomError):
            _take(place, app, capture + traces + upstream)
    assert [each for each in threading.enumerate() if each not in before and not each.name.startswith(pools)] == []


def test_an_alarm_is_over_with_a_new_term_and_not_because_settings_were_read_again(place, tmp_path):
    (tmp_path / "channel").write_text("ab" * 32)

    def settings(term: int, more: str = "") -> str:
        return (
            f'[verify]\nurl = "http://127.0.0.1:1"\nchannel = "{tmp_path / "channel"}"\nstop = true\nterm = {term}\n'
            f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\nchannel = "{tmp_path / "channel"}"\n{more}'
        )

    database = Database.open(f"sqlite:///{place.folder}/room.db")
    Tallies(database, 7).add(REF, "float32", Tally(dangerous=1))
    database.close()
    said = {"strongroom": {"tokens": [1, 2, 3], "logprobs": [-1.0] * 3}}
    place.inference.script = lambda _: [whole(**said)]
    gateway = place.gateway(settings(7), channel=tmp_path / "channel")
    app = place.newest
    assert gateway.post(chat())[2]["error"]["code"] == "sealed"
    _take(place, app, settings(7, "[answer]\nmax_tokens = 2048\n"))
    assert gateway.post(chat())[2]["error"]["code"] == "sealed"
    _take(place, app, settings(8))
    assert gateway.post(chat())[0] == 200


def test_the_log_says_of_what_is_captured_before_it_is_and_when_it_is_over(place):
    gateway = place.gateway()
    app = place.newest
    key = CaptureKey()

    def told():
        """What each `inference` entry of this gateway says that is captured, and under which settings."""
        stream = app._records.stream
        with place.room(OWNER) as room:
            bodies = [each["body"] for each in map(json.loads, room.log.export("jsonl")) if each["type"] == "inference"]
        return [(body.get("capture", ""), body["settings"]) for body in bodies if body["gateway"] == stream]

    upstream = f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n'
    assert gateway.get("/readyz")[1].get("capture") is None
    _take(place, app, f'[capture]\nkey = "{key.public_key.hex()}"\nwho = ["{ANA}"]\n{upstream}')
    assert told()[-1] == (key.key_id, app.settings.digest)
    assert gateway.get("/readyz")[1]["capture"] == key.key_id
    assert gateway.post(chat("Keep this"))[0] == 200
    path = app.capture.path
    _take(place, app, upstream)
    eventually(lambda: told()[-1] == ("", app.settings.digest))
    assert gateway.post(chat("And not this"))[0] == 200
    place.stop_gateways()
    assert [each["asked"]["messages"][0]["content"] for each in opened(path, key)] == ["Keep this"]


@pytest.mark.server
def test_limits_in_redis_go_on_and_its_address_stays(place, tmp_path):
    redis = Server(tmp_path)
    try:
        shared = f'[redis]\nurl = "{redis.url}"\ntimeout = 30\n[limits.identity]\nrequests = 1\nburst = 3\n'
        gateway = place.gateway(shared)
        app = place.newest
        assert [gateway.post(chat())[0] for _ in range(4)] == [200] * 3 + [429]
        upstream = f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n'
        _take(place, app, f"{shared}[answer]\nmax_tokens = 2048\n{upstream}")
        assert gateway.post(chat())[0] == 429
        for other in (upstream, f'[redis]\nurl = "redis://127.0.0.1:1"\n{upstream}'):
            with pytest.raises(UsageError) as caught:
                _take(place, app, other)
            assert caught.value.code == "settings.restart"
        assert gateway.post(chat())[0] == 429
    finally:
        place.stop_gateways()
        redis.kill()


def test_when_the_first_process_is_killed_its_workers_end_too(place, tmp_path):
    """They would answer on, under settings that nobody can change, at the address that the next gateway is to have."""
    running = Running(place, tmp_path, 2, "")
    number = running.process.pid
    workers = [int(each) for each in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    try:
        assert len(workers) == 2
        assert running.asks(10) == {200}
        running.process.kill()
        running.process.wait()
        eventually(lambda: not any(Path(f"/proc/{each}").exists() for each in workers), 100)
        with pytest.raises(ConnectionRefusedError):
            running.gateway.get("/healthz")
        assert "start the gateway again" in running.said.read_text()
    finally:
        for each in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        running.process.stdout.close()
    found = [json.loads(line) for path in running.records.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(found) == 12


def test_a_worker_that_could_not_take_what_it_prepared_leaves_no_other_with_the_old_settings():
    heard: list[list[str]] = [[], []]

    def work(line, which):
        for _ in range(2):
            word, _ = line.recv()
            heard[which].append(word)
            line.send(_Answer(why="the log can't be asked" if (word, which) == ("take", 0) else ""))

    pairs = [multiprocessing.Pipe() for _ in heard]
    never = [multiprocessing.Pipe() for _ in heard]  # in the place of a process that does not end
    threads = [threading.Thread(target=work, args=(there, which)) for which, (_, there) in enumerate(pairs)]
    for each in threads:
        each.start()
    workers = [(here, SimpleNamespace(sentinel=end)) for (here, _), (end, _) in zip(pairs, never, strict=True)]
    with pytest.raises(UsageError, match="the log can't be asked"):
        coordinate(Settings(), workers)
    for each in threads:
        each.join(60)
    assert heard == [["prepare", "take"]] * 2


def test_what_has_changed_is_told_by_name_and_never_by_value():
    """Whoever reads the gateway's stderr need not know its passwords, its words, or whose requests are kept."""
    text = """
[answer]
max_tokens = 77
[limits.key]
requests = 5
[role.partner]
max_tokens = 9
[requests]
words = ["hush"]
[redis]
url = "redis://user:hunter2@127.0.0.1:1"
[capture]
key = "{key}"
who = ["user/ana"]
[[upstream]]
url = "http://u:hunter3@127.0.0.1:1"
"""
    before, after = (
        Settings(),
        Settings.parse(text.format(key="ab" * 32).replace("max_tokens = 77", "max_tokens = 5000")),
    )
    found = changes.of_settings(before, after)
    assert found == (
        *("limits.key.requests", "role.partner", "answer.max_tokens", "requests.words", "upstream", "redis.url"),
        *("capture.key", "capture.who"),
    )
    assert changes.of_settings(after, before) == found
    assert changes.of_settings(after, after) == ()
    # A password alone is a change, and the digest does not have it.
    other = Settings.parse(text.format(key="ab" * 32).replace("hunter2", "hunter4").replace("= 77", "= 5000"))
    assert (changes.of_settings(after, other), after.digest) == (("redis.url",), other.digest)


def test_many_hangups_are_one(monkeypatch):
    """Each would make all parts of a worker anew. The last one is never passed over: it may be of a file that was
    written after the one under way was read."""
    go, read, told = threading.Event(), [], []

    def reading() -> Settings:
        read.append(len(read))
        assert go.wait(60)
        return Settings()

    async def story() -> None:
        prepared = Reload(None, None, None)
        monkeypatch.setattr(prepared, "prepare", _nothing)
        monkeypatch.setattr(prepared, "take", _nothing)
        before = signal.getsignal(signal.SIGHUP)
        loop, others = asyncio.get_running_loop(), asyncio.all_tasks()
        Hangup(prepared, reading, told.append).listen()
        try:
            while not read:
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.005)
            for _ in range(20):
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.005)
            go.set()
            while len(told) < 2 or asyncio.all_tasks() - others:  # noqa: ASYNC110 - and their threads
                await asyncio.sleep(0.005)
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, before)

    asyncio.run(asyncio.wait_for(story(), 60))
    assert (len(read), [each.settings for each in told]) == (2, [Settings()] * 2)


async def _nothing(*_) -> None:
    """What a test is not about."""


def test_that_a_model_is_too_small_is_said_once(place, caplog):
    """And again with budgets that are others: it is about these."""
    gateway = place.gateway()
    app = place.newest
    upstream = f'[[upstream]]\nurl = "http://127.0.0.1:{place.inference.port}"\n'

    def said() -> int:
        return sum("too small for its budget" in each.getMessage() for each in caplog.records)

    for settings, times in (
        ("", 1),
        (f"[answer]\nmax_tokens = 2048\n{upstream}", 1),
        (f"[budgets]\ncompression = 10\n{upstream}", 2),
        (upstream, 2),
    ):
        if settings:
            _take(place, app, settings)
        assert gateway.post(chat())[0] == 200
        assert said() == times


def test_nobody_is_asked_for_a_passphrase_while_it_runs(tmp_path, capfd):
    """A terminal may be there, and nobody at it: the whole gateway would wait."""
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    (tmp_path / "key").write_bytes(key)
    authority = WebAuthority(tmp_path / "web", "Gateway")
    with authority.issued(["127.0.0.1"]) as chain:
        prepared = Reload(None, None, (chain, tmp_path / "key"))
        with pytest.raises(BackendError) as caught:
            asyncio.run(prepared.prepare(Settings()))
    assert caught.value.code == "gateway.certificate"
    assert "is encrypted" in caught.value.message
    assert capfd.readouterr() == ("", "")
