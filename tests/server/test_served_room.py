"""The story of custody against a served room: every command on a client that has a card and a key, and nothing else."""

from __future__ import annotations

import json
import sys

import pytest

from server.served import REF, Served

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.stop()


def test_the_story(served):
    error = served.cli("ls", check=8)["error"]
    assert error["code"] == "card.missing"
    served.cli("trust", str(served.folder / "card.json"))
    assert [item["ref"] for item in served.cli("ls")["versions"]] == [REF]
    program = (
        "import strongroom; f = strongroom.safe_open('acme/tiny@1', 'np'); "
        "print(sum(f.get_tensor(key).nbytes for key in f.keys()))"
    )
    run = ("run", REF, "--", sys.executable, "-c", program)
    error = served.cli(*run, check=3)["error"]
    assert error["code"] == "denied.default"
    assert error["hint"].startswith("strongroom request acme/tiny@1")
    asked = served.cli("request", REF, "--reason", "evaluation")
    assert asked["state"] == "pending"
    assert served.cli("approve", asked["id"], check=3)["error"]["code"] == "approve.own"
    assert served.cli("approve", asked["id"], as_="user/ben")["state"] == "pending"
    assert served.cli("approve", asked["id"], as_="user/eva")["state"] == "approved"
    assert int(served.cli(*run)) > 100_000
    assert [item["state"] for item in served.cli("requests")["requests"]] == ["approved"]
    served.cli("revoke", asked["id"], "--reason", "done", as_="user/ben")
    assert served.cli(*run, check=3)["error"]["code"] == "denied.default"
    # An auditor reads the whole log, from another machine, and trusts the card alone.
    report = served.cli("log", "verify", as_="user/ada")
    assert report["ok"]
    assert report["statements"] >= 8
    assert served.cli("log", "verify", check=3)["error"]["exit_code"] == 3
    kinds = [entry["type"] for entry in served.cli("log", "tail", "-n", "50", as_="user/ada")["entries"]]
    assert kinds.count("release") == 1
    assert kinds.count("refused") >= 3


def test_a_copy(served):
    asked = served.cli("request", REF, "--action", "copy", "--uses", "1", "--reason", "edge")
    served.cli("approve", asked["id"], as_="user/ben")
    served.cli("approve", asked["id"], as_="user/eva")
    done = served.cli("copy", REF, "--to", "user/ana", "--out", "out")
    assert len(done["files"]) == 5
    assert json.loads((served.home / "out" / "config.json").read_text())["architectures"] == ["TinyForCausalLM"]
    assert served.cli("copy", REF, "--to", "user/ana", "--out", "again", check=3)["error"]["exit_code"] == 3


def test_who_and_policy_and_principals(served):
    access = served.cli("who", REF)["access"]
    assert any(item["principal"] == "user/ana" and item["action"] == "load" for item in access)
    assert "auditors-audit" in {rule["id"] for rule in served.cli("policy", "show")["rules"]}
    assert served.cli("principal", "show", "user/ben")["roles"] == ["officer"]
    made = served.cli("principal", "add", "user/kim", "--role", "researcher", "--public-key", "5" * 64, as_="user/ben")
    assert made["state"] == "active"
    assert served.cli("principal", "add", "user/lou", "--role", "officer", check=3)["error"]["exit_code"] == 3


def test_what_is_not_offered_says_so(served):
    error = served.cli("verify", "acme/tiny@1", check=2)["error"]
    assert error["code"] == "room.not_here"
