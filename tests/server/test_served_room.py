"""The story of custody against a served room: every command on a client that has a card and a key, and nothing else."""

from __future__ import annotations

import json
import sys

import pytest

from server.served import REF, Served

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def served(request, tmp_path_factory):
    local = request.param == "sqlite"
    db = "sqlite:room.db" if local else request.getfixturevalue("new_postgresql_url")()
    made = Served(tmp_path_factory.mktemp("served"), db)
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
    assert error["hint"].startswith(f"strongroom --room {served.url} --as user/ana request acme/tiny@1")
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
    asked = served.cli("request", REF, "--action", "copy", "--uses", "2", "--reason", "edge")
    served.cli("approve", asked["id"], as_="user/ben")
    served.cli("approve", asked["id"], as_="user/eva")
    done = served.cli("copy", REF, "--to", "user/ana", "--out", "out")
    assert len(done["files"]) == 5
    assert json.loads((served.home / "out" / "config.json").read_text())["architectures"] == ["TinyForCausalLM"]
    wrong = served.cli("copy", REF, "--to", "user/ana", "--out", "other", "--quantise", "q8_0", check=2)["error"]
    assert wrong["code"] == "form.kind"
    assert wrong["hint"].endswith(" copy REF --to PRINCIPAL --out DIR --quantise int4 or int8")
    done = served.cli("copy", REF, "--to", "user/ana", "--out", "small", "--quantise", "int4")
    assert (done["form"], len(done["files"])) == ("int4", 5)
    config = json.loads((served.home / "small" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert served.cli("copy", REF, "--to", "user/ana", "--out", "again", check=3)["error"]["exit_code"] == 3
    assert not (served.home / "again").exists()


def test_the_copy_is_found_and_its_holder_named(served):
    found = served.cli("trace", "out", as_="user/ben", check=13)
    assert (found["weights"], found["withheld"]) == (REF, True)
    asked = served.cli("request", REF, "--action", "trace", "--reason", "case 12", as_="user/ben")
    error = served.cli("trace", "out", "--weights", REF, as_="user/ben", check=5)["error"]
    assert error["code"] == "trace.pending"
    assert "more approval" in error["message"]
    served.cli("approve", asked["id"], as_="user/eva")
    found = served.cli("trace", "out", "--weights", REF, as_="user/ben", check=14)
    assert [each["holder"] for each in found["accused"]] == ["user/ana"]
    assert "user/ana" in served.cli("log", "show", str(found["entry"]), as_="user/ada")["body"]["accused"]


def test_who_and_policy_and_principals(served):
    access = served.cli("who", REF)["access"]
    assert any(item["principal"] == "user/ana" and item["action"] == "load" for item in access)
    assert "auditors-audit" in {rule["id"] for rule in served.cli("policy", "show")["rules"]}
    assert served.cli("principal", "show", "user/ben")["roles"] == ["officer"]
    made = served.cli("principal", "add", "user/kim", "--role", "researcher", "--public-key", "5" * 64, as_="user/ben")
    assert made["state"] == "active"
    key = ("--public-key", "4" * 64)
    assert served.cli("principal", "add", "user/lou", "--role", "officer", *key, check=3)["error"]["exit_code"] == 3
    # Nobody makes somebody else's private key: with it an officer could approve what it asks for itself.
    there = {*(served.home / "identities").rglob("*")}
    error = served.cli("principal", "add", "user/lou", "--role", "officer", as_="user/ben", check=2)["error"]
    assert error["code"] == "principal.no_key"
    assert "identity new user/lou" in error["hint"]
    assert {*(served.home / "identities").rglob("*")} == there
    assert served.cli("principal", "key", "user/kim", *key, as_="user/ben")["state"] == "active"
    assert served.cli("principal", "show", "user/kim")["key"] == "4" * 64
    asked = served.cli("principal", "key", "user/eva", "--public-key", "6" * 64, as_="user/ben")
    assert asked["state"] == "pending"
    assert served.cli("requests", asked["id"], as_="user/eva")["details"]["key"] == "6" * 64
    served.cli("deny", asked["id"], "--reason", "I have not lost it", as_="user/eva")
    served.cli("principal", "suspend", "user/kim", as_="user/ben")
    again = served.cli("principal", "suspend", "user/kim", as_="user/ben", check=2)["error"]
    assert again["code"] == "principal.unchanged"
    assert again["message"].startswith("user/kim is suspended already, since entry ")


def test_a_copy_is_written_down_by_its_holder(served):
    entries = served.cli("log", "tail", "-n", "200", as_="user/ada")["entries"]
    copies = [entry for entry in entries if entry["type"] == "copy"]
    assert [(copy["by"], copy["body"]["files"]) for copy in copies] == [("user/ana", 5)] * 2
    releases = [entries[copy["body"]["release"] - entries[0]["index"]]["body"] for copy in copies]
    assert [(body["action"], body.get("form")) for body in releases] == [("copy", None), ("copy", "int4")]
    assert copies[1]["body"]["bytes"] < copies[0]["body"]["bytes"]  # what has left, and not what lies here


def test_what_has_left_is_shown_to_those_who_audit(served):
    """The copies that were written are whole artefacts; nothing has left as answers."""
    found = served.cli("budget", "acme/tiny", as_="user/ada")
    assert (found["ref"], found["copies"], found["gone_bits"]) == (REF, 2, 0)
    assert {each["scope"] for each in found["budgets"]} == {"model", "everybody"}
    assert {each["accounted"] for each in found["budgets"]} == {0}
    assert found["exfiltration"]["current_seconds"] is None
    assert served.cli("budget", REF, as_="user/ana", check=3)["error"]["hint"]
    error = served.cli("budget", REF, "--settings", "gateway.toml", as_="user/ada", check=2)["error"]
    assert error["code"] == "budget.settings"
    assert served.cli("budget", "acme/none", as_="user/ada", check=8)["error"]["code"] == "weights.missing"


def test_looking_after_the_room_from_another_machine(served):
    found = served.cli("ceiling", REF, "--copies", "9", as_="user/ben")
    assert found["copies"] == 9
    assert served.cli("ceiling", REF, "--holders", "50", as_="user/ben")["copies"] == 9
    assert served.cli("ceiling", REF) == {"ref": REF, "holders": 50, "copies": 9, "copiers": 3}
    assert served.cli("show", REF)["ceiling"] == {"holders": 50, "copies": 9, "copiers": 3}
    assert served.cli("revoke", REF, "--reason", "it leaked", as_="user/ben")["ref"] == REF
    assert served.cli("ls")["versions"][0]["state"] == "frozen"
    assert served.cli("show", "acme/tiny")["state"] == "frozen"
    assert served.cli("thaw", REF, "--reason", "it did not", check=3)["error"]["code"] == "denied.default"
    served.cli("thaw", REF, "--reason", "it did not", as_="user/ben")
    asked = served.cli("request", REF, "--reason", "evaluation 8")
    assert served.cli("requests", asked["id"], as_="user/eva")["reason"] == "evaluation 8"
    assert served.cli("requests", asked["id"], as_="user/ada")["reason"] == "evaluation 8"
    index = served.cli("deny", asked["id"], "--reason", "no", as_="user/ben")["entry"]
    done = served.cli("log", "redact", str(index), as_="user/ben")
    assert done["redacted"] == index
    policy = served.home / "other.cedar"
    policy.write_text(served.cli("policy", "show")["text"] + "\n// tidier\n")
    proposed = served.cli("policy", "propose", str(policy), "--reason", "tidier", as_="user/ben")["id"]
    served.cli("approve", proposed, as_="user/eva")
    assert served.cli("policy", "enact", proposed, as_="user/ben", check=None)["error"]["code"] == "policy.waiting"
    served.cli("policy", "enact", proposed, "--break-glass", "fire", as_="user/ben")
    assert served.cli("status", as_="user/eva")["emergencies"]
    reviewed = served.cli("review", "--apply", as_="user/ben", check=None)
    assert reviewed["left"]
    assert not reviewed["reviewed"]
    proof = served.cli("log", "prove", str(done["entry"]), as_="user/ada")
    assert proof["index"] == done["entry"]
    report = served.cli("log", "verify", as_="user/ada")
    assert report["ok"]
    for path in ("user/ben", "user/ana", "user/ada"):
        served.cli("log", "clock", "--reason", "x", as_=path, check=None)


def test_what_is_not_offered_says_so(served):
    error = served.cli("verify", "acme/tiny@1", check=2)["error"]
    assert error["code"] == "room.not_here"
