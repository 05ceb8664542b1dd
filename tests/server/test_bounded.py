"""The small servers: a witness's, and that of the metrics."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from strongroom.client import Room
from strongroom.crypto.identity import Identities
from strongroom.errors import BackendError, UsageError
from strongroom.formats.card import Card
from strongroom.ledger.witness import Witness
from strongroom.server.metrics import Metrics, MetricsServer
from strongroom.server.witness import WitnessServer


@contextlib.contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def witness(tmp_path):
    signer = Identities(tmp_path / "identity").create("workload/witness")
    return Witness("w.example/1", signer, tmp_path / "seen", {}, lambda: 0)


def connect(server):
    return socket.create_connection(server.server_address[:2], timeout=60)


def ask(wire):
    wire.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\n\r\n")
    return wire.recv(4096)


def test_a_witness_has_so_many_connections_at_a_time(witness):
    with serving(WitnessServer(witness, ("127.0.0.1", 0), at_a_time=3)) as server:
        opened = [connect(server) for _ in range(3)]
        assert all(ask(each).startswith(b"HTTP/1.1 404") for each in opened)
        with connect(server) as more:
            assert more.recv(1) == b""  # closed at once
        opened.pop().close()
        while True:  # its place is free when its thread has seen that
            with connect(server) as another, contextlib.suppress(ConnectionError):
                if ask(another):
                    break
        for each in opened:
            each.close()


def test_a_witness_cuts_off_who_sends_in_drops(witness):
    now = [0.0]
    with serving(WitnessServer(witness, ("127.0.0.1", 0), life=30, clock=lambda: now[0])) as server:
        with connect(server) as wire:
            assert ask(wire)
            now[0] = 29.0
            assert ask(wire)  # it is open still
            wire.sendall(b"POST /add-checkpoint HTT")
            now[0] = 31.0
            assert wire.recv(1) == b""
        with connect(server) as wire:
            assert ask(wire)


@pytest.fixture
def room(tmp_path):
    made, _ = Room.init(tmp_path / "room", owner="user/olga")
    with made:
        yield made


def samples(text):
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def test_metrics_of_a_room(room):
    metrics = Metrics(room._vault)
    metrics.answered("/v1/releases", "POST", 200)
    metrics.answered("/v1/releases", "POST", 403)
    metrics.refused("denied.default")
    with metrics.timed("/v1/releases", "POST"):
        pass
    with serving(MetricsServer(metrics, "127.0.0.1", 0)) as server:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
            found = samples(answer.read().decode())
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}/other", timeout=60)
        caught.value.close()
    assert caught.value.code == 404
    assert found['strongroom_requests_total{method="POST",route="/v1/releases",status="200"}'] == 1
    assert found["strongroom_releases_total"] == 1
    assert found['strongroom_refusals_total{code="denied.default"}'] == 1
    assert found['strongroom_request_seconds_count{method="POST",route="/v1/releases"}'] == 1
    assert found["strongroom_log_entries"] == room._vault.custodian.ledger.checkpoint()[0].size
    assert found["strongroom_leases"] == found["strongroom_emergencies"] == 0
    assert found["strongroom_log_readable"] == 1
    assert found["strongroom_checkpoint_age_seconds"] >= 0
    assert not any("olga" in name for name in found)


def test_metrics_of_a_log_that_can_not_be_read(room, tmp_path):
    metrics = Metrics(room._vault)
    with contextlib.closing(sqlite3.connect(tmp_path / "room" / "room.db")) as db, db:
        db.execute("UPDATE log_state SET checkpoint = X'00'")
    found = samples(metrics.exposition().decode())
    assert found["strongroom_log_readable"] == 0
    assert "strongroom_log_entries" not in found


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "custodian.example", "localhost.example"])
def test_metrics_stay_on_this_machine(room, host):
    with pytest.raises(UsageError) as caught:
        MetricsServer(Metrics(room._vault), host, 0)
    assert caught.value.code == "serve.metrics"


def test_a_port_that_is_taken(room):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BackendError) as caught:
        MetricsServer(Metrics(room._vault), "127.0.0.1", taken.getsockname()[1])
    assert caught.value.code == "serve.listen"


@pytest.mark.server
def test_metrics_of_a_server_that_runs(room, tmp_path):
    command = [sys.executable, "-m", "strongroom.cli", "--room", str(tmp_path / "room"), "--json", "serve"]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        answer = json.loads(started.stdout.readline())
        context = ssl.create_default_context(
            cadata=Card.decode((tmp_path / "room" / "card.json").read_bytes()).authority
        )
        urllib.request.urlopen(f"{answer['url']}/healthz", timeout=30, context=context).close()
        for path in ("/v1/weights", "/whatever"):  # refused, and not there
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(answer["url"] + path, timeout=30, context=context)
            caught.value.close()
        with urllib.request.urlopen(answer["metrics"], timeout=30) as shown:
            found = samples(shown.read().decode())
    finally:
        started.terminate()
        started.wait(30)
        started.stdout.close()
    assert found['strongroom_requests_total{method="GET",route="/healthz",status="200"}'] == 1
    assert found['strongroom_requests_total{method="GET",route="/v1/weights",status="401"}'] == 1
    assert found['strongroom_requests_total{method="any",route="none",status="404"}'] == 1
    assert found['strongroom_refusals_total{code="auth.refused"}'] == 1
    assert not any("whatever" in name for name in found)
