"""Custody on the command line: exit codes, what is asked for next, and what programs read from --json."""

from __future__ import annotations

import json
import re
import sys

import pytest

from cli.desk import Desk, desk_in, environment, write_model
from strongroom.crypto.authority import Authority
from strongroom.formats.card import Card

REF = "acme/tiny@1"
READ = "import strongroom; f = strongroom.safe_open('acme/tiny@1', 'np'); print(len(f.keys()))"


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Desk:
    """A team room, made as the README does."""
    desk = desk_in(tmp_path_factory.mktemp("team"))
    write_model(desk.model)
    assert desk.run("init", "--owner", "user/olga").code == 0
    assert desk.run("put", "model", "acme/tiny").code == 0  # the only identity here: nobody has to say who they are
    for name, role in (("ana", "researcher"), ("ben", "officer"), ("eva", "executive"), ("ada", "auditor")):
        ended = desk.run("principal", "add", f"user/{name}", "--role", role, "--as", "user/olga")
        assert ended.out == f"user/{name} is registered: {role}\n"
    return desk


def ask(desk, *options, as_="user/ana"):
    return desk.run("request", REF, "--reason", "evaluation", "--as", as_, "--json", *options).json["id"]


def run(desk, as_="user/ana", *options):
    return desk.run("run", REF, "--as", as_, *options, "--", sys.executable, "-c", READ)


def test_denied_asks_is_approved_loads_and_is_revoked(team):
    ended = run(team)
    assert ended.code == 3
    assert ended.err.startswith("strongroom: user/ana may not load acme/tiny@1 yet: it needs a lease")
    command = ended.err.split("→ ")[1].split()
    assert command[:4] == ["strongroom", "--as", "user/ana", "request"]  # as who was refused
    # What it says next works as it stands, but for the reason.
    asked = team.run(*command[1:-1], "evaluation")
    assert asked.code == 0
    identifier = asked.out.split(":")[0]
    assert "still needed: 2 more approvals by others" in asked.err
    own = team.run("approve", identifier, "--as", "user/ana", "--json")
    assert (own.code, own.error["code"]) == (3, "approve.own")
    assert team.run("approve", identifier, "--as", "user/ben").code == 0
    twice = team.run("approve", identifier, "--as", "user/ben", "--json")
    assert (twice.code, twice.error["code"]) == (2, "approve.duplicate")
    done = team.run("approve", identifier, "--duration", "1h", "--as", "user/eva", "--json").json
    assert (done["state"], done["needs"], done["duration"]) == ("approved", [], 3600)
    assert run(team).out.strip() == "7"
    assert "approved" in team.run("requests", "--as", "user/ada").out
    assert team.run("revoke", identifier, "--reason", "done", "--as", "user/ben").code == 0
    assert run(team).code == 3


def test_an_id_that_is_not_there(team):
    for command in (("approve",), ("deny", "--reason", "x"), ("requests",)):
        for identifier, expected in (("0123456789abcdef", (8, "request.unknown")), ("no", (2, "request.malformed"))):
            ended = team.run(command[0], identifier, *command[1:], "--as", "user/ben", "--json")
            assert (ended.code, ended.error["code"]) == expected


def test_break_glass(team):
    broken = run(team, "user/ben", "--break-glass", "fire")
    assert broken.out.strip() == "7"
    assert "this was an emergency" in broken.err  # before the command begins, and not for --quiet
    assert "emergency" not in run(team, "user/ben", "--break-glass", "fire", "--quiet").err
    assert run(team, "user/ana", "--break-glass", "fire").code == 3
    ended = team.run("doctor", "--as", "user/ben")
    assert ended.code == 14
    assert "the glass was broken, or recovery shares used" in ended.out
    tail = team.run("log", "tail", "--as", "user/ben").out
    assert "load, BROKE THE GLASS" in tail
    ended = team.run("review", "--as", "user/ben")
    assert ended.code == 14
    assert "broke the glass" in ended.out
    ended = team.run("review", "--apply", "--as", "user/ben")
    assert "somebody else has to review it" in ended.err
    assert "the glass was broken" in team.run("doctor", "--as", "user/ben").out
    team.run("review", "--apply", "--as", "user/olga")
    assert "the glass was broken" not in team.run("doctor", "--as", "user/ben").out


def test_how_often_a_lease_holds_is_said_when_it_is_asked_for_approved_and_shown(team):
    before = {each["id"] for each in team.run("requests", "--as", "user/ada", "--json").json["requests"]}
    asked = team.run("request", REF, "--action", "copy", "--reason", "x", "--as", "user/ana").out
    assert asked.endswith(f" asks to copy {REF} for 8h\n")
    identifier = asked.split(":")[0]
    team.run("approve", identifier, "--as", "user/ben", "--uses", "1")
    assert team.run("approve", identifier, "--as", "user/eva").out.endswith("Z, once\n")
    assert re.search("^uses +0 of 1$", team.run("requests", identifier, "--as", "user/ana").out, re.MULTILINE)
    # A trace is for once, unless the request says otherwise.
    asked = team.run("request", REF, "--action", "trace", "--reason", "x", "--as", "user/ben").out
    assert asked.endswith(f" asks to trace {REF} for 8h, once\n")
    asked = team.run("request", REF, "--uses", "3", "--reason", "x", "--as", "user/ana").out
    assert asked.endswith(f" asks to load {REF} for 8h, at most 3 times\n")
    for each in team.run("requests", "--as", "user/ada", "--json").json["requests"]:  # the room is others' as well
        if each["id"] not in before:
            end = "revoke" if each["state"] == "approved" else "deny"
            assert team.run(end, each["id"], "--reason", "x", "--as", "user/eva").code == 0


def test_copy(team, tmp_path):
    out = tmp_path / "copy"
    refused = team.run("copy", REF, "--to", "user/ana", "--out", str(out), "--as", "user/ana", "--json")
    assert refused.code == 3
    assert not out.exists()
    other = team.run("copy", REF, "--to", "user/ben", "--out", str(out), "--as", "user/ana", "--json")
    assert (other.code, other.error["code"]) == (2, "copy.other")
    identifier = ask(team, "--action", "copy", "--uses", "1")
    team.run("approve", identifier, "--as", "user/ben")
    team.run("approve", identifier, "--as", "user/eva")
    done = team.run("copy", REF, "--to", "user/ana", "--out", str(out), "--as", "user/ana", "--json").json
    assert done["files"] == ["config.json", "model.safetensors"]
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == dict.fromkeys(done["files"], 0o600)
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", framework="np") as copy:
        assert len(list(copy.keys())) == 7


def test_grants_say_that_they_wait(team):
    ended = team.run("principal", "add", "user/kim", "--role", "officer", "--as", "user/olga")
    assert ended.code == 0
    assert "waits for a second person" in ended.out
    identifier = ended.out.split(":")[0]
    assert f"strongroom approve {identifier}" in ended.err
    assert "user/kim is officer" in team.run("approve", identifier, "--as", "user/ben").out
    assert team.run("principal", "suspend", "user/kim", "--as", "user/olga").out == "user/kim is suspended\n"
    assert team.run("principal", "restore", "user/kim", "--as", "user/olga", "--json").json["state"] == "pending"


def test_policy(team, tmp_path):
    text = team.run("policy", "show", "--as", "user/ana").out
    file = tmp_path / "leases.cedar"
    file.write_text(text.replace("context.duration > 2592000", "context.duration > 86400"))
    assert "is a policy" in team.run("policy", "check", str(file)).out
    proposed = team.run("policy", "propose", str(file), "--reason", "shorter", "--as", "user/ben", "--json").json
    early = team.run("policy", "enact", proposed["id"], "--as", "user/ben", "--json")
    assert (early.code, early.error["code"]) == (5, "policy.needs_second")
    team.run("approve", proposed["id"], "--as", "user/eva")
    early = team.run("policy", "enact", proposed["id"], "--as", "user/ben", "--json")
    assert (early.code, early.error["code"]) == (5, "policy.waiting")
    file.write_text("permit (principal, action, resource);")
    assert team.run("policy", "check", str(file), "--json").error["code"] == "policy.invalid"
    table = tmp_path / "table.toml"
    table.write_text(
        '[subjects]\nana = { roles = ["researcher"] }\n\n'
        '[[case]]\nname = "puts"\naction = "put"\nresource = { ref = "room" }\nallow = ["ana"]\n'
    )
    ended = team.run("policy", "test", str(table), "--as", "user/ana")
    assert ended.code == 14
    assert "1 decision: 1 not as expected" in ended.out


def test_who_and_reach(team):
    rows = team.run("who", REF, "--as", "user/ana", "--json").json["access"]
    found = {(row["principal"], row["action"]): row for row in rows}
    assert found["user/ana", "load"]["answer"].startswith("with approvals: ")
    assert found["user/ben", "load"]["answer"] == "by breaking the glass"
    assert ("user/ada", "load") not in found
    ended = team.run("reach", "user/ada", "--as", "user/ana")
    assert ended.err == ""
    assert "audit" in ended.out
    assert "user/ada → role/auditor → auditors-audit" in ended.out


def test_log(team, tmp_path):
    report = team.run("log", "verify", "--as", "user/ada", "--json").json
    assert report["ok"] is True
    assert {"size", "root", "origin", "signed_by", "witnessed_by"} <= report.keys()
    key = team.run("log", "key", "--as", "user/ada").out.strip()
    # Somebody with the published folder and the key, and without the room.
    alone = desk_in(tmp_path)
    ended = alone.run("log", "verify", str(team.room / "log"), "--key", key)
    assert ended.code == 0, ended.err
    bundle = next((team.room / "log" / "tile" / "entries").rglob(f"{report['size']}"))
    data = bundle.read_bytes()
    bundle.write_bytes(data.replace(b"user/eva", b"user/eve", 1))
    ended = alone.run("log", "verify", str(team.room / "log"), "--key", key, "--json")
    assert ended.code == 6
    assert ended.error["evidence"]["entry"] > 0
    bundle.unlink()
    ended = alone.run("log", "verify", str(team.room / "log"), "--key", key, "--json")
    assert (ended.code, ended.error["code"]) == (6, "log.truncated")
    assert ended.error["hint"].startswith("copy the room's folder log once more")
    bundle.write_bytes(data)
    shown = team.run("log", "show", "1", "--as", "user/ada")
    assert "user/olga" in shown.out
    proof = team.run("log", "prove", "1", "--as", "user/ada").out
    assert proof.startswith("c2sp.org/tlog-proof@v1\nindex 1\n")
    lines = team.run("log", "export", "--as", "user/ada").out.splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert team.run("log", "show", "99999", "--as", "user/ada").code == 8


def test_who_one_is_has_to_be_said_and_shown(team):
    ended = team.run("request", REF, "--reason", "x", "--json")
    assert (ended.code, ended.error["code"]) == (4, "principal.ambiguous")
    (team.room / "identities" / "user" / "eva.key").rename(team.folder / "eva.key")
    try:
        ended = team.run("request", REF, "--reason", "x", "--as", "user/eva", "--json")
        assert (ended.code, ended.error["code"]) == (4, "identity.missing")
    finally:
        (team.folder / "eva.key").rename(team.room / "identities" / "user" / "eva.key")


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        (("renew", "0000"), 2, "renew.malformed"),
        (("principal", "add", "user/x", "--public-key", "zz"), 2, "principal.public_key"),
        (("ceiling", "acme/none"), 8, "version.missing"),
        (("log", "verify", "--key", "garbage"), 2, "log.vkey"),
        (("log", "verify", ".", "--key", "garbage"), 2, "log.vkey"),
        (("trust", "nowhere.json"), 2, "card.unreadable"),
        (("request", "acme/tiny", "--reason", " "), 2, "reason.empty"),
    ],
)
def test_a_slip_of_the_hand_is_a_usage_error_and_says_what_helps(team, command, code, error):
    ended = team.run(*command, "--as", "user/ben", "--json")
    assert (ended.code, ended.error["code"]) == (code, error)
    assert ended.error["hint"]


def test_a_file_that_is_no_card(team):
    (team.folder / "card.json").write_text('{"a": 1}')
    ended = team.run("trust", str(team.folder / "card.json"), "--json")
    assert ended.code == 2
    assert "is not the card of a room" in ended.error["message"]
    assert ended.error["hint"].startswith("strongroom trust card.json")


def test_who_trusts_a_card_and_has_no_key_is_told_how_to_make_one(team, tmp_path):
    pem = Authority(tmp_path / "tls", "room").pem
    card = Card("https://custodian.example:8470", b"r" * 16, b"l" * 32, b"s" * 32, pem)
    (tmp_path / "card.json").write_bytes(card.encode())
    env = environment(STRONGROOM_STATE=str(tmp_path / "state"), STRONGROOM_IDENTITIES=str(tmp_path / "identities"))
    assert "strongroom identity new user/NAME" in team.run("trust", str(tmp_path / "card.json"), env=env).err
    made = team.run("identity", "new", "user/kay", "--json", env=env).json["public_key"]
    assert "--room https://custodian.example:8470 ls" in team.run("trust", str(tmp_path / "card.json"), env=env).err
    again = team.run("identity", "new", "user/kay", "--json", env=env)
    assert (again.code, again.error["code"]) == (2, "identity.exists")
    assert "strongroom identity ls" in again.error["hint"]
    assert made in team.run("identity", "ls", env=env).out


def test_a_load_that_is_refused_names_the_request_that_waits_and_the_lease_that_ended(team):
    asked = team.run("request", "acme/tiny", "--reason", "x", "--as", "user/ana", "--json").json
    ended = run(team, "user/ana")
    assert ended.code == 5
    assert asked["id"] in ended.err
    for who in ("user/ben", "user/eva"):
        team.run("approve", asked["id"], "--as", who)
    assert run(team, "user/ana").code == 0
    team.run("revoke", asked["id"], "--reason", "enough", "--as", "user/ben")
    ended = run(team, "user/ana")
    assert ended.code == 3
    assert f"the lease {asked['id']} has ended: revoked in entry" in ended.err


def test_a_frozen_version_is_shown_as_frozen(team):
    def states():
        listed = team.run("ls", "--json").json["versions"][0]["state"]
        return listed, team.run("show", REF, "--json").json["state"]

    assert states() == ("active", "active")
    ended = team.run("revoke", REF, "--reason", "it leaked", "--as", "user/ben")
    assert f"on the room's host, strongroom rotate {REF} ends that" in ended.err
    assert states() == ("frozen", "frozen")
    assert "frozen" in team.run("ls").out
    again = team.run("revoke", REF, "--reason", "it leaked", "--as", "user/ben", "--json").error
    assert (again["code"], again["hint"]) == ("revoke.over", f"strongroom --as user/ben show {REF}")
    assert team.run("status", "--json").json["versions"] == 1
    assert team.run("thaw", REF, "--reason", "it did not", "--as", "user/olga").code == 0
    assert states() == ("active", "active")


def test_a_ceiling_can_be_read(team):
    assert team.run("ceiling", REF, "--as", "user/ana").out == f"{REF}: 100 holders, 5 copies, 3 people with copies\n"
    size = len(team.run("log", "export", "--as", "user/ada").out.splitlines())
    team.run("ceiling", REF, "--holders", "1", "--copiers", "1", "--as", "user/ben")
    expected = "1 holder, 5 copies, 1 person with copies"
    assert team.run("ceiling", REF, "--as", "user/ana").out == f"{REF}: {expected}\n"
    assert expected in team.run("show", REF).out
    # To read it is no entry, to set it is one.
    assert len(team.run("log", "export", "--as", "user/ada").out.splitlines()) == size + 1
    team.run("ceiling", REF, "--holders", "100", "--copiers", "3", "--as", "user/ben")


def test_what_is_over_says_what_to_do_now(team):
    identifier = ask(team, "--duration", "90m")
    error = team.run("revoke", identifier, "--reason", "x", "--as", "user/ada", "--json").error
    assert error["message"].startswith("user/ada may not revoke ")
    team.run("approve", identifier, "--as", "user/ben")
    twice = team.run("approve", identifier, "--as", "user/ben", "--json").error
    assert twice["hint"] == f"somebody else runs: strongroom approve {identifier}"
    longer = team.run("approve", identifier, "--duration", "2h", "--as", "user/eva", "--json").error
    assert "is for 90m, which may be shortened, and not made 2h" in longer["message"]
    team.run("approve", identifier, "--as", "user/eva")
    over = team.run("deny", identifier, "--reason", "x", "--as", "user/ben", "--json").error
    assert over["code"] == "request.over"
    assert f"revoke {identifier} --reason TEXT" in over["hint"]
    error = team.run("renew", identifier, "--as", "user/ada", "--json").error
    assert error["message"].startswith("user/ada may not renew ")
    ended = team.run("revoke", identifier, "--reason", "done", "--as", "user/ben")
    assert f"strongroom rotate {REF} ends that" in ended.err
    shown = team.run("requests", identifier, "--as", "user/ana").out
    assert "state        revoked in entry " in shown
    again = team.run("revoke", identifier, "--reason", "done", "--as", "user/ben", "--json").error
    assert again["hint"] == f"strongroom --as user/ben requests {identifier}"


def test_a_second_person_is_spoken_of_as_somebody_else(team, tmp_path):
    file = tmp_path / "other.cedar"
    file.write_text(team.run("policy", "show").out + "\n// other\n")
    proposed = team.run("policy", "propose", str(file), "--reason", "x", "--as", "user/ben", "--json").json["id"]
    early = team.run("policy", "enact", proposed, "--as", "user/ben", "--json").error
    assert early["hint"] == f"somebody else runs: strongroom approve {proposed}"
    team.run("approve", proposed, "--as", "user/olga")
    early = team.run("policy", "enact", proposed, "--as", "user/ben", "--json").error
    assert early["message"].endswith("in 24h")
    assert early["hint"].startswith(f"then: strongroom policy enact {proposed}")


def test_a_copy_for_somebody_else_names_both(team):
    error = team.run("copy", REF, "--to", "user/eva", "--out", "hers", "--as", "user/ana", "--json").error
    assert (
        error["hint"]
        == f"user/eva runs: strongroom copy {REF} --to user/eva --out hers; for one of your own: --to user/ana"
    )


def test_what_was_redacted_is_said_to_be(team):
    asked = ask(team)
    index = team.run("deny", asked, "--reason", "no", "--as", "user/ben", "--json").json["entry"]
    assert "redacted" not in team.run("log", "show", str(index), "--as", "user/ada").out
    done = team.run("log", "redact", str(index), "--as", "user/ben", "--json").json["entry"]
    shown = team.run("log", "show", str(index), "--as", "user/ada")
    assert re.search(rf"^ +reason +redacted \(entry {done}\)$", shown.out, re.MULTILINE)
    assert team.run("log", "show", str(index), "--as", "user/ada", "--json").json["redacted"] == done


def test_what_nothing_serves_yet_is_said_to_be_the_policys_word(team, tmp_path):
    said = "no command of this release does it yet"
    team.run("principal", "add", "user/pat", "--role", "partner", "--as", "user/olga")
    ended = team.run("who", REF)
    assert "user/pat" in ended.out
    assert said not in ended.err  # inference is served
    alone = desk_in(tmp_path)
    write_model(alone.model)
    alone.run("init", "--custody", "solo", "--owner", "user/olga")
    alone.run("put", "model", "acme/tiny")
    assert f"adapt: that is what the policy says; {said}" in alone.run("who", REF).err


def test_review_names_everybody_who_may_and_explains_its_exit_codes(team):
    error = team.run("review", "--as", "user/ana", "--json").error
    assert "takes the role auditor or officer" in error["message"]
    # Auditors hold no weights: as one she could not do any more what she is there for.
    assert error["hint"].startswith("auditor does not go with researcher: let another principal do it;")
    text = " ".join(team.run("review", "--help").out.split())
    assert "11 for one that is for your information, 12 for low, 13 for medium, 14 for high severity" in text


def test_teams_are_joined_and_left(team):
    made = team.run("principal", "add", "team/evals", "--as", "user/olga", "--json")
    assert (made.code, made.error["code"]) == (2, "principal.team")
    assert "principal team PRINCIPAL team/evals" in made.error["hint"]
    assert not (team.room / "identities" / "team").exists()
    ended = team.run("principal", "team", "user/ana", "team/evals", "team/red", "--as", "user/ben")
    assert (ended.code, ended.out) == (0, "user/ana: team/evals, team/red\n")
    assert "teams      team/evals, team/red" in team.run("principal", "show", "user/ana", "--as", "user/ben").out
    found = team.run("principal", "show", "user/ana", "--as", "user/ben", "--json").json
    assert (found["teams"], found["roles"]) == (["team/evals", "team/red"], ["researcher"])
    assert team.run("principal", "team", "user/ana", "--as", "user/ben").out == "user/ana: no team\n"
    for words, code, error in (
        (("user/ben", "team/evals", "--as", "user/ben"), 3, "grant.own"),
        (("user/ana", "team/evals", "--as", "user/ada"), 3, "denied.default"),
        (("user/ana", "user/ben", "--as", "user/ben"), 2, "principal.team"),
        (("team/evals", "team/red", "--as", "user/ben"), 2, "principal.team"),
        (("user/ana", "Evals", "--as", "user/ben"), 2, "principal.malformed"),
        (("user/ana", "--as", "user/ben"), 2, "principal.unchanged"),
        (("user/nobody", "team/evals", "--as", "user/ben"), 8, "principal.missing"),
    ):
        ended = team.run("principal", "team", *words, "--json")
        assert (ended.code, ended.error["code"]) == (code, error)
    assert team.run("log", "verify", "--as", "user/olga").code == 0


def test_a_lease_that_was_used_is_revoked_all_the_same(team):
    """An inference server that took its keys under the only use ends by that."""
    identifier = ask(team, "--uses", "1")
    for who in ("user/ben", "user/eva"):
        assert team.run("approve", identifier, "--as", who).code == 0
    assert run(team).code == 0
    assert run(team).code == 3
    assert team.run("requests", identifier, "--as", "user/ben", "--json").json["state"] == "used"
    done = team.run("revoke", identifier, "--reason", "done", "--as", "user/ben", "--json").json
    assert [each["id"] for each in done["ended"]] == [identifier]
    found = team.run("requests", identifier, "--as", "user/ben", "--json").json
    assert (found["state"], found["lease"]["ended"]) == ("revoked", f"revoked in entry {done['entry']}")
    again = team.run("revoke", identifier, "--reason", "done", "--as", "user/ben", "--json")
    assert (again.code, again.error["code"]) == (2, "revoke.over")
