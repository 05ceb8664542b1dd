"""What has left of a version, as people and programs are shown it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from cli.desk import Desk, desk_in, write_model
from strongroom.client import Room
from strongroom.errors import Denied
from strongroom.policy import usage
from strongroom.storage.db import Database
from strongroom.vault.callers import Callers
from strongroom.watch.budget import Budgets
from strongroom.watch.drawing import OwnCounters
from strongroom.watch.rules import RULES, Spender

REF = "acme/tiny@1"
ANA = Spender("user/ana", "127.0.0.0/24", ("team/red",))


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> Desk:
    """A room of which 12,345 bits have left as answers, and the weights once as a copy and once as a release."""
    desk = desk_in(tmp_path_factory.mktemp("budget"))
    write_model(desk.model)
    assert desk.run("init", "--custody", "solo", "--owner", "user/ana").code == 0
    assert desk.run("put", "model", "acme/tiny").code == 0
    database = Database.open(f"sqlite:///{desk.room}/room.db")
    # At noon of tomorrow, which is the counters' time from then on: no day or hour ends while these tests run.
    noon = time.time() // 86_400 * 86_400 + 86_400 + 43_200
    worker = Budgets(OwnCounters(database), RULES, lambda _: 10**6, lambda: noon)
    worker.reserve(ANA, REF, 30_000).settle(12_345)
    worker.close()
    database.close()
    assert desk.run("run", REF, "--", "true").code == 0
    return desk


def test_for_programs(used: Desk):
    found = used.run("budget", "acme/tiny", "--json").json
    assert found["ref"] == REF
    assert found["gone_bits"] == 12_345
    assert found["effective_bits"] == found["parameters"] * found["bits_per_parameter"] // found["compression"]
    # Its tensors of F16, and a norm of F32.
    assert found["parameters"] == used.run("show", REF, "--json").json["markable_bytes"] // 2 + 512
    by = {(each["scope"], each["window"], each["who"]): each for each in found["budgets"]}
    identity = by["identity", "day", "user/ana"]
    assert (identity["used"], identity["limit"], identity["left"]) == (12_345, 2_000_000, 2_000_000 - 12_345)
    assert by["model", "lifetime", ""]["used"] == 12_345
    assert (found["releases"], found["copies"], found["artefacts"][0]["holder"]) == (1, 0, "user/ana")
    assert found["logged"]["bits"] == 0


def test_for_people(used: Desk):
    ended = used.run("budget", "acme/tiny", "--explain")
    assert ended.code == 0
    for text in ("parameters · 4 bits ÷ 16", "12.3 kbit", "at the current rate", "one caller", "1 release of the"):
        assert text in ended.out
    assert "arXiv 2601.01296" in ended.err


def test_with_the_settings_of_the_gateway(used: Desk):
    settings = used.folder / "gateway.toml"
    settings.write_text('[budgets]\ncompression = 32\n[[budgets.rule]]\nscope = "model"\nwindow = "day"\nhard = true\n')
    assert "--settings" in used.run("budget", REF).err  # else limits would be taken for the gateway's that are not
    assert "--settings" not in used.run("budget", REF, "--settings", str(settings)).err
    found = used.run("budget", REF, "--settings", str(settings), "--json").json
    assert found["compression"] == 32
    (day,) = [each for each in found["budgets"] if (each["scope"], each["window"]) == ("model", "day")]
    assert (day["hard"], day["limit"], day["left"]) == (True, 0, 0)
    settings.write_text("budget = 5\n")
    ended = used.run("budget", REF, "--settings", str(settings), "--json")
    assert (ended.code, ended.json["error"]["code"]) == (2, "settings.unknown")


def test_of_nothing(used: Desk):
    assert used.run("budget", "acme/none").code == 8


def test_counters_that_were_set_back_are_said_to_be(used: Desk):
    """The database is trusted with nothing; what gateways have accounted for stands in the signed log."""
    body = {
        "gateway": "ab" * 16,
        "records": 1,
        "head": "cd" * 32,
        "requests": 1,
        "refused": 0,
        "tokens": 5000,
        "bits": 77_000,
        "settings": "ef" * 32,
    }
    with Room(used.room, "user/ana") as room:
        Callers(room._embedded).record(REF, body)
    ended = used.run("budget", REF)
    assert "was set back" in ended.err
    assert "77 kbit" in ended.err


def test_what_was_drawn_in_advance_is_not_the_current_rate(used: Desk):
    before = used.run("budget", REF, "--json").json
    database = Database.open(f"sqlite:///{used.room}/room.db")
    worker = Budgets(OwnCounters(database), RULES, lambda _: 10**11, time.time)
    worker.reserve(Spender("user/bob", "10.0.0.0/24", ()), REF, 1000).settle(1000)
    found = used.run("budget", REF, "--json").json  # its worker still holds what it drew
    assert found["charged_bits_a_day"] > 2 * before["charged_bits_a_day"]
    current = found["exfiltration"]["current_seconds"]  # never, unless another test has accounted for something
    assert current is None or found["exfiltration"]["charged_seconds"] < current
    assert found["bits_a_day"] <= before["bits_a_day"]  # as accounted for, in a day that has grown older
    ended = used.run("budget", REF)
    assert "at the current rate, " in ended.out
    assert "that gateways have accounted for: " in ended.out
    assert "with what they have drawn in advance: " in ended.out
    worker.close()
    database.close()


def test_in_each_window_what_was_accounted_for_is_told_from_what_was_drawn_in_advance(tmp_path):
    """A worker draws what thousands of answers may have of a budget whose alarm has sounded."""

    def shown():
        found = used.run("budget", REF, "--json").json
        return {(each["scope"], each["window"], each["who"]): each for each in found["budgets"]}

    def account(records, bits):
        body = {"gateway": "ba" * 16, "records": records, "head": "cd" * 32, "requests": 1, "refused": 0}
        with Room(used.room, "user/ana") as room:
            Callers(room._embedded).record(REF, {**body, "tokens": 100, "bits": bits, "settings": "ef" * 32})

    used = desk_in(tmp_path)
    write_model(used.model)
    assert used.run("init", "--custody", "solo", "--owner", "user/ana").code == 0
    assert used.run("put", "model", "acme/tiny").code == 0
    database = Database.open(f"sqlite:///{used.room}/room.db")
    worker = Budgets(OwnCounters(database), RULES, lambda _: 10**6, time.time)
    bob = Spender("user/bob", "10.0.0.0/24", ("team/red",))
    for again in range(2):
        hour = time.time() // 3600
        for bits in (200_000, 2000):  # the alarms sound at the first, and the second draws beyond them
            worker.reserve(bob, REF, bits).settle(bits)
        before = shown()
        account(1 + again, 1700)
        after, text = shown(), used.run("budget", REF).out
        if time.time() // 3600 == hour:
            break
    windows = [
        (scope, window, "") for scope in ("model", "everybody") for window in ("hour", "day", "month", "lifetime")
    ]
    for key in windows:
        assert after[key]["accounted"] - before[key]["accounted"] == 1700
        assert after[key]["used"] == before[key]["used"] > 4000 * 2000 > after[key]["accounted"]
    # Of whom it is, the log does not say.
    for key in (("identity", "day", "user/bob"), ("team", "hour", "team/red")):
        assert after[key]["used"] > 1000
        assert after[key]["accounted"] is None
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["model", "lifetime"])
    assert row[:4] == ["model", "lifetime", "all", "callers"]
    assert (row[5], row[7]) == ("Mbit", "kbit")
    worker.close()
    database.close()


def test_what_was_accounted_for_in_an_hour_is_of_that_hour():
    state = SimpleNamespace(usage={}, gateways={}, hours={})
    body = {"gateway": "ba" * 16, "records": 1, "head": "cd" * 32, "requests": 1, "refused": 0, "tokens": 5}
    noon = 1_790_000_000 - 1_790_000_000 % 86_400 + 43_200
    for at, ref, bits in (
        (noon - 90_000, "acme/tiny@1", 1),
        (noon - 10, "acme/tiny@1", 10),
        (noon, "acme/tiny@1", 100),
        (noon + 5, "acme/tiny@2", 1000),
        (noon + 9, "acme/tiny2@1", 10_000),
    ):
        usage.apply(state, SimpleNamespace(at=at, ref=ref, body={**body, "bits": bits}))
    for ref, hourly, begin, bits in (
        ("acme/tiny@1", True, noon, 100),
        ("acme/tiny@1", True, noon - 3600, 110),
        ("acme/tiny@1", False, noon - 43_200, 110),
        ("acme/tiny@1", False, 0, 111),
        ("acme/tiny", True, noon, 1100),
        ("acme/tiny", False, 0, 1111),
        ("acme/none", True, noon, 0),
    ):
        assert usage.bits(state, ref, begin, hourly=hourly) == bits, (ref, hourly, begin)
    assert len(state.hours) == 2  # it does not grow
    usage.apply(state, SimpleNamespace(at=noon + 7200, ref="acme/tiny@1", body={**body, "bits": 1}))
    assert len(state.hours) == 1


def test_for_those_who_audit_or_administer(used: Desk):
    with Room(used.room, "user/ana") as room:
        room.principal_add("user/res", roles=["researcher"])
        room.principal_add("user/aud", roles=["auditor"])
    with Room(used.room, "user/aud") as room:
        assert room.budget(REF)["ref"] == REF
    with Room(used.room, "user/res") as room, pytest.raises(Denied) as caught:
        room.budget(REF)
    assert caught.value.hint
