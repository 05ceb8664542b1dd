"""API keys in a room: who makes them, for whom, how long they are good, and what ends them."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest

from strongroom.client import Room
from strongroom.crypto.signatures import Signer
from strongroom.errors import AuthRequired, Conflict, Denied, LimitExceeded, NotFound, StrongroomError, UsageError
from strongroom.formats.apikey import LONGEST, MOST, digest_of, is_one, make
from strongroom.formats.statement import Statement
from strongroom.policy.state import State
from strongroom.vault.callers import Callers
from vault.authenticator import Authenticator
from vault.team import Team

HOUR, DAY = 3600, 86_400


@pytest.fixture
def team(team_folder):
    made = Team(team_folder)
    made.pat = made.add("user/pat", "partner")
    made.callers = Callers(made.olga._vault)
    return made


def known(team, key):
    """The principal that the gateway takes this key for, or nothing."""
    found = team.callers.by_key(digest_of(key))
    return found[0].principal if found else ""


def said(room, signer=None, **changes):
    """A statement that makes a key, or something else."""
    who = room.principal
    body = {"key": digest_of(make()), "principal": who, "name": "ci", "state": "active"}
    body |= {"expires_at": room._vault.clock() + HOUR, **changes}
    return room._say("apikey", body, signer)


def change(room, envelope):
    return room._vault.custodian.apikeys.change(envelope)


def refused(kind, code, room, envelope):
    """Refused so, and recorded."""
    with pytest.raises(kind) as caught:
        change(room, envelope)
    assert caught.value.code == code, caught.value
    entry = room.log.tail(1)[0]
    assert (entry["type"], entry["body"]["code"]) == ("refused", code)
    return caught.value


class TestMaking:
    def test_a_key_is_known_by_its_digest_and_by_nothing_else(self, team):
        made = team.pat.apikeys.new("evaluation-7", HOUR)
        key = made["key"]
        assert is_one(key)
        assert made["id"] == hashlib.sha256(key.encode()).hexdigest()[:16]
        assert (made["principal"], made["name"]) == ("user/pat", "evaluation-7")
        assert known(team, key) == "user/pat"
        assert not known(team, make())
        entry = team.olga.log.show(made["entry"])
        assert (entry["by"], entry["ref"], entry["body"]["state"]) == ("user/pat", "user/pat", "active")
        size = team.olga._vault.custodian.ledger.checkpoint()[0].size
        log = b"".join(team.olga._vault.custodian.ledger.entries(0, size))
        assert key.encode() not in log
        assert base64.b64encode(key.encode()) not in log
        assert team.olga.log.verify()["ok"]

    def test_two_keys_are_two(self, team):
        one, two = team.pat.apikeys.new("a"), team.pat.apikeys.new("b")
        assert one["key"] != two["key"]
        assert [each["name"] for each in team.pat.apikeys.ls()] == ["a", "b"]
        team.pat.apikeys.end(one["id"])
        assert [each["name"] for each in team.pat.apikeys.ls()] == ["b"]
        assert (known(team, one["key"]), known(team, two["key"])) == ("", "user/pat")

    @pytest.mark.parametrize("who", ["olga", "ben", "ana"])
    def test_nobody_makes_one_for_somebody_else(self, team, who):
        """An officer who could would be able to act as that person."""
        for other in ("user/pat", "user/nobody", "team/x"):
            error = refused(Denied, "apikey.other", getattr(team, who), said(getattr(team, who), principal=other))
            assert "strongroom apikey new" in error.hint

    def test_a_statement_of_nobody_s(self, team):
        for signer in (Signer(b"x" * 32), team.ben._vault.identities.signer("user/ben")):
            with pytest.raises(AuthRequired) as caught:
                change(team.pat, said(team.pat, signer))
            assert caught.value.code == "auth.refused"

    def test_a_statement_that_was_changed(self, team):
        envelope = json.loads(said(team.pat))
        payload = json.loads(base64.b64decode(envelope["payload"]))
        payload["body"]["key"] = digest_of(make())
        forged = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
        envelope["payload"] = base64.b64encode(forged).decode()
        with pytest.raises(AuthRequired):
            change(team.pat, json.dumps(envelope, sort_keys=True, separators=(",", ":")))

    def test_another_room_s_statement(self, team, tmp_path):
        body = {"key": digest_of(make()), "principal": "user/pat", "name": "ci", "state": "active"}
        body["expires_at"] = team.clock() + HOUR
        signer = team.pat._vault.identities.signer("user/pat")
        elsewhere = Statement.sign("apikey", body, room="ab" * 16, by="user/pat", at=team.clock(), signer=signer)
        with pytest.raises(AuthRequired):
            change(team.pat, elsewhere.envelope)

    @pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "..", "a..b", "-a", "ä", "a" * 65, "a\n"])
    def test_a_name_that_is_none(self, team, name):
        refused(UsageError, "apikey.name", team.pat, said(team.pat, name=name))

    def test_an_end_that_is_none(self, team):
        now = team.clock()
        for at in (0, now - 1, now + LONGEST + 60, 2**53 - 1):
            refused(UsageError, "apikey.time", team.pat, said(team.pat, expires_at=at))
        assert known(team, team.pat.apikeys.new(duration=LONGEST)["key"]) == "user/pat"

    def test_a_digest_that_was_ever_there(self, team):
        """Whoever has seen the log could else bring a key back, or claim somebody else's."""
        made = team.pat.apikeys.new()
        digest = digest_of(made["key"])
        for room in (team.pat, team.ana):
            refused(Conflict, "apikey.exists", room, said(room, key=digest))
        team.pat.apikeys.end(made["id"])
        for room in (team.pat, team.ana):
            refused(Conflict, "apikey.exists", room, said(room, key=digest))
        assert not known(team, made["key"])

    def test_as_many_as_one_may_have(self, team):
        for _ in range(MOST):
            made = team.pat.apikeys.new(duration=HOUR)
        error = refused(LimitExceeded, "apikey.too_many", team.pat, said(team.pat))
        assert "strongroom apikey" in error.hint
        team.ana.apikeys.new()  # each has their own
        team.pat.apikeys.end(made["id"])
        team.pat.apikeys.new(duration=HOUR)
        team.later(HOUR + 1)  # those that have expired do not count
        team.pat.apikeys.new()
        assert team.olga.log.verify()["ok"]

    def test_a_passkey_makes_none(self, team):
        """It was borrowed once, maybe: a key would stay."""
        key = Authenticator()
        body = {"key": key.key.hex(), "credential": key.credential, "state": "active"}
        team.pat._vault.custodian.change_passkey(team.pat._say("passkey", body))
        refused(Denied, "apikey.own_key", team.pat, said(team.pat, key))
        made = team.pat.apikeys.new()
        entry = {name: made[name] for name in ("principal", "name", "expires_at")}
        ended = said(team.pat, key, key=digest_of(made["key"]), state="ended", **entry)
        assert change(team.pat, ended)["state"] == "ended"  # taking away waits for nothing


class TestEnding:
    def test_its_principal_ends_it(self, team):
        made = team.pat.apikeys.new()
        done = team.pat.apikeys.end(made["id"][:8])
        assert (done["id"], done["state"]) == (made["id"], "ended")
        assert not known(team, made["key"])
        assert team.olga.log.verify()["ok"]

    def test_so_does_whoever_may_grant(self, team):
        made = team.pat.apikeys.new()
        assert [each["id"] for each in team.ben.apikeys.ls()] == [made["id"]]
        assert team.ben.apikeys.end(made["id"])["principal"] == "user/pat"
        assert not known(team, made["key"])
        assert team.olga.log.verify()["ok"]

    def test_nobody_else_does_or_learns_that_it_is_there(self, team):
        made = team.pat.apikeys.new()
        entry = {name: made[name] for name in ("principal", "name", "expires_at")}
        for key in (digest_of(made["key"]), digest_of(make())):
            refused(Denied, "denied.default", team.ana, said(team.ana, key=key, state="ended", **entry))
        with pytest.raises(NotFound):
            team.ana.apikeys.end(made["id"])
        assert known(team, made["key"]) == "user/pat"
        refused(NotFound, "apikey.missing", team.ben, said(team.ben, state="ended"))

    def test_what_is_said_of_it_has_to_be_so(self, team):
        made = team.pat.apikeys.new("ci")
        right = {"key": digest_of(made["key"]), "name": "ci", "expires_at": made["expires_at"], "state": "ended"}
        for wrong in ({"name": "other"}, {"expires_at": made["expires_at"] + 1}, {"principal": "user/ana"}):
            refused(UsageError, "apikey.differs", team.pat, said(team.pat, **{**right, **wrong}))
        assert known(team, made["key"])

    def test_an_ended_key_stays_so_whatever_is_said_again(self, team):
        envelope = said(team.pat, key=digest_of(key := make()))
        first = change(team.pat, envelope)
        assert (first["state"], known(team, key)) == ("active", "user/pat")
        assert change(team.pat, envelope) == first  # whoever lost the answer says it again
        team.pat.apikeys.end(first["id"])
        again = change(team.pat, envelope)
        assert (again["state"], again["entry"]) == ("ended", first["entry"])
        assert not known(team, key)
        team.later(HOUR)
        with pytest.raises(AuthRequired) as caught:
            change(team.pat, envelope)
        assert caught.value.code == "statement.stale"

    def test_it_ends_once(self, team):
        made = team.pat.apikeys.new("ci", HOUR)
        entry = {name: made[name] for name in ("name", "expires_at")}
        right = {"key": digest_of(made["key"]), **entry, "state": "ended"}
        team.pat.apikeys.end(made["id"])
        refused(Conflict, "apikey.over", team.pat, said(team.pat, **right))
        other = team.pat.apikeys.new("ci", HOUR)
        team.later(HOUR)
        right |= {"key": digest_of(other["key"]), "expires_at": other["expires_at"]}
        refused(Conflict, "apikey.over", team.pat, said(team.pat, **right))

    def test_time_ends_it(self, team):
        made = team.pat.apikeys.new(duration=HOUR)
        team.later(HOUR - 60)
        assert known(team, made["key"])
        team.later(60)
        assert not known(team, made["key"])
        # By the log's time, too: a clock that is set back brings no key back.
        team.ana.request("acme/tiny", reason="x")
        team.later(-250)
        assert not known(team, made["key"])

    @pytest.mark.parametrize("how", ["suspend", "revoke", "remove", "key"])
    def test_what_happens_to_its_principal_ends_it_for_good(self, team, how):
        made = team.pat.apikeys.new()
        match how:
            case "suspend":
                team.ben.principal_change("user/pat", state="suspended")
            case "revoke":
                team.ben.revoke("user/pat", reason="stolen")
            case "remove":
                team.ben.principal_change("user/pat", state="removed")
            case "key":
                team.ben.principal_key("user/pat", Signer(b"k" * 32).public_key.hex())
        assert not known(team, made["key"])
        assert team.ben.apikeys.ls("user/pat") == []
        if how in ("suspend", "revoke"):
            team.ben.principal_change("user/pat", state="active")
        if how == "remove":
            team.ben.principal_add("user/pat", roles=["partner"], public_key=Signer(b"n" * 32).public_key.hex())
        assert not known(team, made["key"])
        assert team.olga.log.verify()["ok"]

    def test_another_role_does_not(self, team):
        made = team.pat.apikeys.new()
        team.ben.principal_change("user/pat", roles=["auditor"])
        assert team.callers.by_key(digest_of(made["key"]))[0].roles == ("auditor",)

    def test_who_was_suspended_makes_none(self, team):
        team.ben.principal_change("user/pat", state="suspended")
        with pytest.raises(AuthRequired):
            change(team.pat, said(team.pat))

    @pytest.mark.parametrize("wrong", ["", "sr-" + "a" * 43, "xyz", "abc", "0" * 65])
    def test_what_is_no_identifier(self, team, wrong):
        """The key itself, say: it must not be looked for, or told in an error by its end."""
        with pytest.raises(UsageError) as caught:
            team.pat.apikeys.end(wrong)
        assert caught.value.code == "apikey.malformed"

    def test_what_could_be_two(self, team):
        first = team.pat.apikeys.new()
        with pytest.raises(NotFound) as caught:
            team.pat.apikeys.end("0000" if not first["id"].startswith("0000") else "1111")
        assert caught.value.code == "apikey.missing"


class TestListing:
    def test_each_sees_their_own_and_overseers_all(self, team):
        ada = team.add("user/ada", "auditor")
        mine, other = team.pat.apikeys.new("p"), team.ana.apikeys.new("a")
        assert [each["id"] for each in team.pat.apikeys.ls()] == [mine["id"]]
        assert [each["id"] for each in team.pat.apikeys.ls("user/pat")] == [mine["id"]]
        for room in (team.ben, team.eva, ada):
            assert {each["id"] for each in room.apikeys.ls()} == {mine["id"], other["id"]}
            assert [each["id"] for each in room.apikeys.ls("user/ana")] == [other["id"]]
            assert room.apikeys.ls("user/nobody") == []
        for path in ("user/ana", "user/nobody"):
            with pytest.raises(Denied):
                team.pat.apikeys.ls(path)
        assert team.olga.log.tail(1)[0]["type"] == "refused"
        assert "sr-" not in json.dumps(ada.apikeys.ls())

    def test_a_principal_is_shown_with_its_keys(self, team):
        made = team.pat.apikeys.new("p")
        (shown,) = team.olga.principal_show("user/pat")["apikeys"]
        assert (shown["id"], shown["name"], shown["entry"]) == (made["id"], "p", made["entry"])
        team.pat.apikeys.end(made["id"])
        assert team.olga.principal_show("user/pat")["apikeys"] == []


def test_the_state_is_the_same_from_a_snapshot(team):
    made = [team.pat.apikeys.new(str(number)) for number in range(3)]
    team.pat.apikeys.end(made[0]["id"])
    body = {"gateway": "0" * 32, "records": 1, "head": "1" * 64, "requests": 1, "refused": 0}
    team.callers.record("acme/tiny@1", {**body, "tokens": 5, "bits": 85, "settings": "2" * 64})
    with team.olga._vault.custodian.ledger.view() as state:
        assert State.from_json(json.loads(json.dumps(state.as_json()))) == state
    with Room(team.folder / "room", "user/olga") as fresh:
        callers = Callers(fresh._vault)
        assert [bool(callers.by_key(digest_of(each["key"]))) for each in made] == [False, True, True]


def test_errors_are_of_our_own(team):
    """Whatever is in the members that the format leaves open."""
    for name in ("\u202e", "x" * 30_000):
        for principal in ("", "user/pat\n", "x" * 30_000):
            with pytest.raises(StrongroomError):
                change(team.pat, said(team.pat, name=name, principal=principal))


def test_days(team):
    """What a duration of the command line comes to."""
    before = team.clock()
    assert before <= team.pat.apikeys.new()["expires_at"] - 90 * DAY <= team.clock()


def test_whoever_calls_the_gateway_is_not_taken_for_idle(team):
    """What is done there is in nobody's name in the log: a review must not take rights away for that."""
    team.pat.apikeys.new(duration=300 * DAY)
    account = {"gateway": "0" * 32, "records": 1, "head": "1" * 64, "requests": 1, "refused": 0}
    account |= {"tokens": 5, "bits": 85, "settings": "2" * 64}

    def idle():
        return {each["about"]: each["removes"] for each in team.ben.review()["findings"] if each["kind"] == "idle"}

    team.later(100 * DAY)
    assert (idle()["user/pat"], idle()["user/ana"]) == ("user/pat", "user/ana")  # nobody has inferred at all
    team.callers.record("acme/tiny@1", account)
    assert (idle()["user/pat"], idle()["user/ana"]) == ("", "user/ana")
    team.later(201 * DAY)
    team.callers.record("acme/tiny@1", account)
    assert idle()["user/pat"] == "user/pat"  # its key has ended
