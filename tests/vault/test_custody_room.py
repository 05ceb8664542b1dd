"""Custody in a room as it is used: grants by two, renewal, review, redaction, the commands of a day."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from strongroom.core.clock import unix
from strongroom.crypto.signatures import Signer
from strongroom.errors import (
    AuthRequired,
    Conflict,
    Denied,
    NotFound,
    Pending,
    Sealed,
    StrongroomError,
    Tampered,
    UsageError,
)
from strongroom.formats.entry import Entry, Private
from strongroom.formats.statement import Statement
from strongroom.policy.engine import Policies
from strongroom.vault import custodian
from vault.rooms import write_model
from vault.team import Team

REF = "acme/tiny@1"
DAY = 86_400


@pytest.fixture
def team(team_folder):
    return Team(team_folder)


class TestGrants:
    def test_one_officer_alone_makes_no_approvers_once_there_are_three(self, team):
        made = team.olga.principal_add("user/kim", roles=["officer"])
        assert made["state"] == "pending"
        kim = team.be("user/kim")
        asked = team.ana.request("acme/tiny", reason="x")
        with pytest.raises(StrongroomError):
            kim.approve(asked["id"])
        with pytest.raises(Denied) as caught:
            team.olga.approve(made["id"])
        assert caught.value.code == "approve.own"
        assert [item["id"] for item in team.olga.requests() if item["action"] == "grant"] == [made["id"]]
        team.ben.approve(made["id"])
        assert team.olga.principal_show("user/kim")["roles"] == ["officer"]
        kim.approve(asked["id"])
        with pytest.raises(Conflict):
            team.eva.approve(made["id"])
        assert team.olga.log.verify()["ok"]

    def test_nor_by_taking_over_an_approver(self, team):
        """Another key, another person, a role more, back from suspension: each would make a second approver of one."""
        team.ben.principal_change("user/eva", state="suspended")
        for change in (
            lambda: team.ben.principal_change("user/eva", state="active"),
            lambda: team.ben.principal_change("user/ana", roles=["operator"]),
            lambda: team.ben._registry._change("user/olga", 1, key="5" * 64),
        ):
            assert change()["state"] == "pending"
        assert team.ben.principal_show("user/eva")["state"] == "suspended"
        # With the others gone, too: it does not begin again.
        team.ben.principal_change("user/olga", roles=[])
        assert team.ben.principal_add("user/kim", roles=["executive"])["state"] == "pending"

    def test_what_needs_no_second_person(self, team):
        assert team.olga.principal_add("user/kim", roles=["researcher"])["state"] == "active"
        assert team.olga.principal_change("user/ben", roles=[])["state"] == "active"
        assert team.olga.principal_change("user/eva", state="removed")["state"] == "removed"

    def test_another_key_for_somebody(self, team):
        """Ana has lost hers: the old one is worth nothing from then on, and neither is what it was given."""
        lost, seed = team.be("user/ana"), b"n" * 32
        new = Signer(seed)
        team.lease()
        lost.load(REF)
        assert team.ben.principal_key("user/ana", new.public_key.hex())["state"] == "active"
        with pytest.raises(AuthRequired):
            lost.load(REF)
        identities = team.olga._vault.identities
        identities.file("user/ana").write_text(f"strongroom-identity-v1 user/ana\n{seed.hex()}\n")
        assert team.ana.principal_show("user/ana")["key"] == new.public_key.hex()
        with pytest.raises(Denied):  # with the new key, and without the lease
            team.ana.load(REF)
        assert team.ana.request("acme/tiny", reason="again")["state"] == "pending"
        assert team.olga.log.verify()["ok"]

    def test_another_key_for_an_approver_takes_two(self, team):
        key = "ab" * 32
        asked = team.olga.principal_key("user/ben", key)
        assert asked["state"] == "pending"
        # As `identity new` shows it, so that whoever agrees can ask ben for it.
        assert team.eva.show_request(asked["id"])["details"]["key"] == key
        with pytest.raises(Denied):
            team.ben.approve(asked["id"])  # not by his own hand either
        team.eva.approve(asked["id"])
        assert team.olga.principal_show("user/ben")["key"] == key
        assert team.olga.log.verify()["ok"]

    def test_no_key_that_is_somebody_elses_or_none(self, team):
        for key, code in (
            (team.olga.principal_show("user/eva")["key"], "principal.key"),
            ("AB" * 32, "principal.public_key"),
            ("", "principal.public_key"),
        ):
            with pytest.raises(UsageError) as caught:
                team.olga.principal_key("user/ana", key)
            assert caught.value.code == code
        team.olga.principal_change("user/ana", state="removed")
        with pytest.raises(Conflict) as caught:
            team.olga.principal_key("user/ana", "ab" * 32)
        assert caught.value.code == "principal.removed"

    def test_what_is_so_already_is_said(self, team):
        entry = team.olga.principal_change("user/ana", state="suspended")["entry"]
        key = team.olga.principal_show("user/ana")["key"]
        for again in (
            lambda: team.ben.principal_change("user/ana", state="suspended"),
            lambda: team.ben.principal_change("user/ana", roles=["researcher"]),
            lambda: team.ben.principal_key("user/ana", key),
        ):
            with pytest.raises(Conflict) as caught:
                again()
            assert caught.value.code == "principal.unchanged"
            assert caught.value.message.startswith("user/ana is ")
            assert caught.value.message.endswith(f"already, since entry {entry}")
        assert caught.value.hint == "strongroom principal show user/ana"
        kinds = {item["type"] for item in team.olga.log.tail(3)}
        assert kinds == {"refused"}

    def test_denied_and_expired(self, team):
        made = team.olga.principal_add("user/kim", roles=["officer"])
        team.ben.deny(made["id"], reason="who is that?")
        with pytest.raises(Conflict):
            team.eva.approve(made["id"])
        made = team.olga.principal_add("user/lou", roles=["officer"])
        team.later(8 * DAY)
        with pytest.raises(Conflict):
            team.ben.approve(made["id"])


class TestRenewal:
    def test_takes_a_fresh_yes(self, team):
        lease = team.lease(duration=3600)["id"]
        with pytest.raises(Denied):
            team.ana.renew(lease)
        team.later(3000)
        before = team.clock()
        renewed = team.ben.renew(lease)
        assert before <= renewed["lease"]["expires_at"] - 3600 <= team.clock()
        team.later(3000)
        team.ana.load(REF)
        team.later(700)
        with pytest.raises(Denied):
            team.ana.load(REF)
        with pytest.raises(NotFound):
            team.ben.renew(lease)

    def test_and_those_of_before_have_to_count_still(self, team):
        lease = team.lease()["id"]
        team.olga.revoke("user/eva", reason="left")
        with pytest.raises(Denied):
            team.ben.renew(lease)

    def test_never_of_a_copy(self, team):
        lease = team.lease(action="copy")["id"]
        with pytest.raises(Denied) as caught:
            team.ben.renew(lease)
        assert caught.value.code == "renew.copy"

    def test_never_longer_than_was_granted(self, team):
        lease = team.lease(duration=3600)["id"]
        with pytest.raises(StrongroomError):
            team.ben.renew(lease, duration=7200)


class TestReview:
    def test_of_a_room_where_all_is_well(self, team):
        team.lease()
        team.ana.load(REF)
        found = team.ben.review()
        assert [item["kind"] for item in found["findings"]] == []
        (holding,) = found["holdings"]
        assert (holding["holder"], holding["used"]) == ("user/ana", 1)
        assert holding["approved_by"] == ["user/ben", "user/eva"]
        ana = next(item for item in found["activity"] if item["principal"] == "user/ana")
        assert (ana["releases"], ana["requests"], ana["refused"]) == (1, 1, 0)

    def test_finds_and_takes_away_what_is_unused(self, team):
        lease = team.lease(duration=7 * DAY)["id"]
        team.later(2 * DAY)
        found = team.ben.review()
        assert [(item["kind"], item["removes"]) for item in found["findings"]] == [("unused-lease", lease)]
        done = team.ben.review(apply=True)
        assert done["removed"] == [lease]
        with pytest.raises(Denied):
            team.ana.load(REF)
        assert team.ben.review()["findings"] == []
        assert team.ben.log.show(done["entry"])["type"] == "review"

    def test_an_emergency_stays_until_it_is_reviewed(self, team):
        team.eva.load(REF, break_glass="the cluster is on fire")
        (finding,) = team.ben.review()["findings"]
        assert (finding["severity"], finding["kind"], finding["about"]) == ("high", "break-glass", "user/eva")
        team.ben.review(apply=True)
        assert team.ben.review()["findings"] == []

    def test_an_emergency_that_comes_as_it_is_made_is_not_reviewed_by_it(self, team, monkeypatch):
        """Another process breaks the glass right after the state was copied that is looked at."""
        late = [lambda: team.eva.load(REF, break_glass="the cluster is on fire")]

        class Copying:
            @staticmethod
            def deepcopy(value):
                found = copy.deepcopy(value)
                while late:
                    late.pop()()
                return found

        monkeypatch.setattr(custodian, "copy", Copying)
        done = team.ben.review(apply=True)
        assert (done["emergencies"], late) == ([], [])
        (finding,) = team.ben.review()["findings"]
        assert (finding["kind"], finding["about"]) == ("break-glass", "user/eva")

    def test_nobody_reviews_their_own_emergency_under_any_identity(self, team):
        second = team.add("user/ben-too", "officer", person="user/ben")
        if not any(item["path"] == "user/ben-too" for item in team.olga.principal_ls()):
            (grant,) = [item["id"] for item in team.olga.requests() if item["action"] == "grant"]
            team.eva.approve(grant)
        team.ben.load(REF, break_glass="the cluster is on fire")
        for who in (team.ben, second):
            assert len(who.review(apply=True)["left"]) == 1
            assert "break-glass" in [item["kind"] for item in who.review()["findings"]]
        failed = [check.message for check in team.ben.doctor() if check.level == "fail"]
        assert len(failed) == 1
        assert "user/ben" in failed[0]
        assert team.olga.review(apply=True)["left"] == []
        assert "break-glass" not in [item["kind"] for item in team.ben.review()["findings"]]

    @pytest.mark.parametrize("reason", ["", " ", "\n\t "])
    def test_a_reason_says_something(self, team, reason):
        lease = team.lease()["id"]
        text = team.ben.policy()["text"]
        for act in (
            lambda: team.ana.request(REF, reason=reason),
            lambda: team.eva.load(REF, break_glass=reason),
            lambda: team.ben.revoke(lease, reason=reason),
            lambda: team.ben.thaw(REF, reason=reason),
            lambda: team.ben.propose(text, reason=reason),
            lambda: team.ben.set_clock(reason),
        ):
            with pytest.raises(UsageError) as caught:
                act()
            assert caught.value.code == "reason.empty"

    def test_repeated_refusals(self, team):
        for _ in range(10):
            with pytest.raises(Denied):
                team.ana.load(REF)
        (finding,) = team.ben.review()["findings"]
        assert (finding["severity"], finding["kind"], finding["removes"]) == ("high", "refusals", "")
        # Mistyping is no reason to lose everything: a person decides.
        assert team.ben.review(apply=True)["removed"] == []
        assert team.ben.principal_show("user/ana")["state"] == "active"

    def test_an_approver_who_has_left_and_people_who_do_nothing(self, team):
        lease = team.lease(duration=29 * DAY)["id"]
        team.ana.load(REF)
        team.olga.revoke("user/eva", reason="left")
        assert ("approver-gone", lease) in [(item["kind"], item["removes"]) for item in team.ben.review()["findings"]]
        team.later(91 * DAY)
        idle = {item["about"] for item in team.ben.review()["findings"] if item["kind"] == "idle"}
        assert "user/ana" in idle

    def test_who_may_not_look(self, team):
        with pytest.raises(Denied):
            team.ana.review()
        auditor = team.add("user/ada", "auditor")
        auditor.review()
        with pytest.raises(Denied):
            auditor.review(apply=True)


class TestWhatARuleBlocks:
    """All approvals are there, and a rule that no approval overrides keeps the request from becoming a lease."""

    def test_it_says_which_and_goes_on_when_the_rule_does_not_apply_any_more(self, team):
        team.olga.set_ceiling(REF, holders=0)
        with pytest.raises(Denied):  # what no approval can help is refused at once
            team.ana.request(REF, reason="x")
        team.olga.set_ceiling(REF, holders=1)
        asked = team.ana.request(REF, reason="x")
        team.olga.set_ceiling(REF, holders=0)
        for who in (team.ben, team.eva):
            (need,) = who.approve(asked["id"])["needs"]
            assert "holders-ceiling" in need
            assert "strongroom" in need
        with pytest.raises(Conflict) as caught:
            team.ben.approve(asked["id"])
        assert caught.value.code == "approve.duplicate"
        team.olga.set_ceiling(REF, holders=1)
        (need,) = next(item for item in team.ana.requests() if item["id"] == asked["id"])["needs"]
        assert f"strongroom approve {asked['id']}" in need
        with pytest.raises(Pending) as waits:
            team.ana.load(REF)
        assert need in waits.value.message
        done = team.ben.approve(asked["id"])
        assert done["state"] == "approved"
        assert done["approved_by"] == ["user/ben", "user/eva"]
        team.ana.load(REF)
        assert team.olga.log.verify()["ok"]

    def test_one_person_alone_is_still_not_enough(self, team):
        asked = team.ana.request(REF, reason="x")
        team.ben.approve(asked["id"])
        with pytest.raises(Conflict):
            team.ben.approve(asked["id"])


class TestWhatIsTold:
    def test_nobody_learns_from_a_request_for_somebody_else_whether_there_is_one(self, team):
        guest = team.add("user/pat", "partner")
        told = set()
        for other in ("user/ben", "user/nobody"):
            with pytest.raises(Denied) as caught:
                guest.request(REF, reason="x", holder=other)
            told.add((caught.value.code, caught.value.message.replace(other, "…"), caught.value.hint))
        assert len(told) == 1

    def test_the_same_statement_again_is_answered_as_it_was(self, team):
        """Whoever lost the answer with the connection says it again."""
        custodian = team.olga._vault.custodian
        size = custodian.ledger.checkpoint()[0].size
        note = team.ana._private("reason", "evaluation")
        said = team.ana._say(
            "request",
            {"action": "load", "ref": REF, "for": "user/ana", "duration": 60, "uses": None, "reason": note.commitment},
        )
        first = custodian.request(said, note)
        assert custodian.request(said, note) == first
        approval = team.ben._say("approve", {"request": first["digest"], "duration": 0, "uses": None})
        answers = [custodian.approve(approval) for _ in range(3)]
        assert answers[0] == answers[1] == answers[2]
        assert answers[0]["approved_by"] == ["user/ben"]
        text = custodian.policy()["text"] + "\n// more\n"
        proposal = team.ben._say("propose", {"digest": Policies.parse(text).digest, "reason": note.commitment})
        assert custodian.propose(proposal, text, note) == custodian.propose(proposal, text, note)
        change = team.olga._say(
            "principal",
            {
                "principal": "team/x",
                "key": "",
                "person": "team/x",
                "roles": [],
                "teams": [],
                "state": "active",
                "before": None,
            },
        )
        assert custodian.change_principal(change) == custodian.change_principal(change)
        assert custodian.ledger.checkpoint()[0].size == size + 4

    def test_what_was_recorded_long_ago_is_not_said_again(self, team):
        asked = team.ana.request(REF, reason="x")
        approval = team.ben._say("approve", {"request": asked["digest"], "duration": 0, "uses": None})
        team.ben._vault.custodian.approve(approval)
        team.later(301)
        with pytest.raises(AuthRequired) as caught:
            team.ben._vault.custodian.approve(approval)
        assert caught.value.code == "statement.stale"

    def test_whoever_is_refused_without_end_does_not_fill_the_log(self, team):
        size = team.olga.log._ledger.checkpoint()[0].size
        for _ in range(100):
            with pytest.raises(Denied):
                team.ana.load(REF)
        assert team.olga.log._ledger.checkpoint()[0].size == size + 60
        # Of others nothing is kept from the log by that.
        with pytest.raises(Denied):
            team.eva.load(REF)
        assert team.olga.log._ledger.checkpoint()[0].size == size + 61


def asking(team, **changes):
    note = team.ana._private("reason", "evaluation")
    body = {"action": "load", "ref": REF, "for": "user/ana", "duration": 60, "uses": None, "reason": note.commitment}
    return team.ana._say("request", {**body, **changes}), note


class TestRefusals:
    """Whatever is refused of what somebody has said is an entry in their name, and nobody else's."""

    @pytest.mark.parametrize(
        ("code", "action"),
        [
            ("request.nothing", "load"),
            ("version.missing", "load"),
            ("entry.private", "load"),
            ("reason.empty", "load"),
            ("approve.longer", "approve"),
            ("copy.holder", "copy"),
            ("clock.right", "administer"),
            ("policy.other_text", "administer"),
            ("authority.malformed", "authority"),
        ],
    )
    def test_are_entries_whatever_was_wrong(self, team, code, action):
        custodian, empty = team.olga._vault.custodian, Private.fresh("reason", " ")
        asked = custodian.request(*asking(team))
        longer = {"request": asked["digest"], "duration": 61, "uses": None}
        copied = {"ref": REF, "holder": "user/ben", "release": 1, "files": 1, "bytes": 1}
        note = Private.fresh("reason", "a change")
        tried = {
            "request.nothing": lambda: custodian.request(*asking(team, duration=0)),
            "version.missing": lambda: custodian.request(*asking(team, ref="acme/none@1")),
            "entry.private": lambda: custodian.request(asking(team)[0], Private.fresh("reason", "another")),
            "reason.empty": lambda: custodian.request(asking(team, reason=empty.commitment)[0], empty),
            "approve.longer": lambda: custodian.approve(team.ben._say("approve", longer)),
            "copy.holder": lambda: custodian.acted(team.ana._say("copy", copied)),
            "clock.right": lambda: custodian.acted(team.olga._say("clock", {"reason": note.commitment}), note),
            "policy.other_text": lambda: custodian.propose(
                team.olga._say("propose", {"digest": "0" * 64, "reason": note.commitment}),
                custodian.policy()["text"],
                note,
            ),
            "authority.malformed": lambda: custodian.change_authority(
                team.olga._say("authority", {"authority": "https://x", "text": "{}"})
            ),
        }
        size = custodian.ledger.checkpoint()[0].size
        with pytest.raises(StrongroomError) as caught:
            tried[code]()
        assert caught.value.code == code
        (entry,) = [Entry.decode(each) for each in custodian.ledger.proven(size, custodian.ledger.checkpoint()[0].size)]
        assert (entry.type, entry.body["code"], entry.body["action"]) == ("refused", code, action)
        by = {"approve.longer": "user/ben", "request.nothing": "user/ana", "copy.holder": "user/ana"}
        assert entry.by == by.get(code, "user/ana" if action == "load" else "user/olga")

    def test_of_strangers_are_nobodys_and_few(self, team):
        """Else anybody could have somebody refused in the log, or fill it under names that nobody has."""
        custodian, eve = team.olga._vault.custodian, Signer(b"e" * 32)
        note = Private.fresh("reason", " ")
        size = custodian.ledger.checkpoint()[0].size
        body = {"action": "load", "ref": "x", "for": "x", "duration": 0, "uses": 0, "reason": "0" * 64}
        for number in range(70):
            by = "user/ana" if number % 2 else f"user/eve{number}"
            said = Statement.sign("request", body, room=team.olga._vault.id.hex(), by=by, at=unix(), signer=eve)
            with pytest.raises(AuthRequired) as caught:
                custodian.request(said.envelope, note)
            assert caught.value.code == "auth.refused"
        found = [Entry.decode(each) for each in custodian.ledger.proven(size, custodian.ledger.checkpoint()[0].size)]
        assert [(each.type, each.by, each.ref) for each in found] == [("refused", "unknown", "")] * 60

    def test_are_recorded_once_and_failures_of_ours_are_not(self, team):
        custodian = team.olga._vault.custodian
        team.add("user/kim", "researcher")  # now: what is in the log of the room may be minutes old
        size = custodian.ledger.checkpoint()[0].size
        with pytest.raises(UsageError):  # nobody has said this of a request
            custodian.request(team.ben._say("renew", {"lease": "0" * 16, "duration": 1}), Private.fresh("reason", "x"))
        team.later(-400)
        with pytest.raises(Sealed):
            custodian.request(*asking(team))
        assert custodian.ledger.checkpoint()[0].size == size
        team.later(400)
        with pytest.raises(Denied):
            team.ana.load(REF)
        assert custodian.ledger.checkpoint()[0].size == size + 1


class TestRedaction:
    def test_the_log_stands_and_the_reason_is_gone(self, team):
        asked = team.ana.request("acme/tiny", reason="for Mrs Smith of Ward 5")
        index = asked["entry"]
        assert team.ben.log.show(index)["private"] == {"reason": "for Mrs Smith of Ward 5"}
        before = team.ben.log.verify()
        with pytest.raises(Denied):
            team.ana.log.redact(index)
        team.ben.log.redact(index)
        assert team.ben.log.show(index)["private"] == {}
        after = team.ben.log.verify()
        assert after["size"] > before["size"]
        with pytest.raises(NotFound):
            team.ben.log.redact(index)
        # Neither in the database nor in what is published.
        for path in (team.folder / "room").rglob("*"):
            if path.is_file() and "model" not in path.parts:
                assert b"Mrs Smith" not in path.read_bytes(), path


class TestPolicyChange:
    def test_takes_two_people_and_a_day(self, team):
        text = Policies.shipped("team").text.replace("context.approvals.total >= 2", "context.approvals.total >= 1")
        proposed = team.ben.propose(text, reason="we are too slow")
        with pytest.raises(Denied):
            team.ana.propose(text, reason="me too")
        with pytest.raises(Denied):
            team.ben.approve(proposed["id"])
        with pytest.raises(Pending):
            team.ben.enact(proposed["id"])
        team.eva.approve(proposed["id"])
        with pytest.raises(Pending):
            team.ben.enact(proposed["id"])
        team.later(DAY + 1)
        team.ben.enact(proposed["id"])
        assert team.ana.policy()["digest"] == proposed_digest(text)
        asked = team.ana.request("acme/tiny", reason="quick")
        assert team.ben.approve(asked["id"])["state"] == "approved"
        team.ana.load(REF)
        assert team.ana.log.verify()["ok"]

    def test_an_altered_text_in_the_database_is_refused(self, team):
        import sqlite3

        with sqlite3.connect(team.folder / "room" / "room.db") as db:
            db.execute("UPDATE documents SET data = replace(data, 'forbid', 'permit')")
        db.close()
        fresh = team.be("user/ana")
        with pytest.raises(StrongroomError) as caught:
            fresh.load(REF)
        assert caught.value.code == "document.tampered"


class TestCeilings:
    def test_hold_whatever_is_approved(self, team):
        with pytest.raises(Denied):
            team.ana.set_ceiling("acme/tiny", copies=9)
        team.ben.set_ceiling("acme/tiny", copies=1)
        assert team.ben.set_ceiling(REF, holders=1)["copies"] == 1
        team.lease(action="copy")
        team.ana.copy(REF, "user/ana", team.folder / "one")
        with pytest.raises(Denied) as caught:
            team.ana.copy(REF, "user/ana", team.folder / "two")
        assert caught.value.evidence["rule"] == "copies-ceiling"
        kim = team.add("user/kim", "researcher")
        with pytest.raises(Denied) as caught:
            kim.request(REF, reason="me too")
        assert caught.value.evidence["rule"] == "holders-ceiling"
        team.ben.set_ceiling(REF, holders=2)
        assert kim.request(REF, reason="me too")["state"] == "pending"
        with pytest.raises(NotFound):
            team.ben.set_ceiling("acme/other", holders=2)

    def test_a_version_is_frozen_and_thawed(self, team):
        team.lease()
        team.ben.revoke(REF, reason="it leaked")
        with pytest.raises(Denied) as caught:
            team.ana.load(REF)
        assert caught.value.code == "version.frozen"
        with pytest.raises(Denied):
            team.ana.thaw(REF, reason="please")
        team.ben.thaw(REF, reason="it was another one")
        with pytest.raises(Denied):
            team.ana.load(REF)  # the lease has ended all the same
        team.lease()
        team.ana.load(REF)
        with pytest.raises(NotFound):
            team.ben.thaw(REF, reason="twice")


class TestTheClock:
    def test_set_back_brings_no_lease_to_life(self, team):
        team.lease(duration=3600)
        team.later(4000)
        with pytest.raises(Denied):
            team.ana.load(REF)  # and that is recorded, at that time
        team.later(-3500)
        with pytest.raises(Sealed) as caught:
            team.ana.load(REF)
        assert caught.value.code == "clock.backwards"
        with pytest.raises(Denied):
            team.ana.set_clock("please")
        team.ben.set_clock("the clock had been ahead")
        with pytest.raises(Denied):
            team.ana.load(REF)
        team.lease(duration=3600)
        team.ana.load(REF)

    def test_that_is_right_needs_no_mending(self, team):
        with pytest.raises(StrongroomError) as caught:
            team.ben.set_clock("just so")
        assert caught.value.code == "clock.right"


def proposed_digest(text):
    return Policies.parse(text).digest


class TestWhatIsApproved:
    """A custodian that shows one request and has another approved gets no signature."""

    @pytest.mark.parametrize(
        "lie",
        [
            lambda one, other: {**one, "digest": other["digest"]},
            lambda one, other: {**one, "digest": other["digest"], "statement": other["statement"]},
            lambda one, other: {**other, "id": one["id"]},
            lambda _, other: other,
            lambda one, _: {**one, "ref": "acme/other@1"},
            lambda one, _: {**one, "action": "load"},
            lambda one, _: {**one, "for": "user/amy"},
            lambda one, _: {**one, "by": "user/amy"},
            lambda one, _: {**one, "duration": one["duration"] + 1},
            lambda one, _: {**one, "statement": "{}"},
        ],
    )
    def test_is_what_its_asker_has_signed(self, team, monkeypatch, lie):
        one = team.ana.request(REF, action="copy", reason="x")
        other = team.ana.request(REF, reason="y")
        custodian = team.ben._vault.custodian
        shown = {each["id"]: custodian.show_request(each["id"]) for each in (one, other)}
        size = custodian.ledger.checkpoint()[0].size
        monkeypatch.setattr(custodian, "show_request", lambda _: lie(shown[one["id"]], shown[other["id"]]))
        for act in (
            lambda: team.ben.approve(one["id"]),
            lambda: team.ben.deny(one["id"], reason="no"),
            lambda: team.ben.show_request(one["id"]),
        ):
            with pytest.raises(Tampered) as caught:
                act()
            assert caught.value.code == "request.other"
        assert custodian.ledger.checkpoint()[0].size == size
        monkeypatch.undo()
        assert team.ben.approve(one["id"])["approved_by"] == ["user/ben"]

    def test_of_every_kind_can_be_looked_at(self, team):
        assert team.ben.show_request(team.ana.request(REF, reason="evaluation 7")["id"])["reason"] == "evaluation 7"
        text = team.ben.policy()["text"] + "\n// more\n"
        proposed = team.ben.propose(text, reason="tidier")
        assert team.olga.show_request(proposed["id"])["reason"] == "tidier"
        team.olga.principal_add("user/kim", roles=["executive"])
        (grant,) = [each for each in team.ben.requests() if each["for"] == "user/kim"]
        assert team.ben.show_request(grant["id"])["reason"] is None
        assert [each["action"] for each in team.ben.requests()] == ["load", "policy", "grant"]


class TestWhatIsTakenBack:
    def test_a_key_that_was_there_before_is_not(self, team):
        """A refused registration removes the key that it made, and no other."""
        key = team.ana._vault.identities.create("user/zed").public_key
        with pytest.raises(Denied):
            team.ana.principal_add("user/zed")
        assert team.ana._vault.identities.signer("user/zed").public_key == key
        with pytest.raises(Denied):
            team.ana.principal_add("user/zoe")
        assert "user/zoe" not in team.ana._vault.identities.ls()

    def test_somebody_who_was_removed_comes_back_by_being_added(self, team):
        team.ben.principal_change("user/ana", state="removed")
        with pytest.raises(Conflict) as caught:
            team.ben.principal_change("user/ana", state="active")
        assert caught.value.code == "principal.removed"
        with pytest.raises(Conflict) as caught:
            team.ben.principal_add("user/ana", roles=["researcher"])
        assert caught.value.code == "identity.exists"
        done = team.ben.principal_add("user/ana", roles=["researcher"], public_key="5" * 64)
        assert done["state"] == "active"


def test_the_same_files_put_twice_are_told(team, tmp_path):
    model = write_model(tmp_path / "again", seed=91)
    first = team.olga.put(model, "acme/again")
    assert first.same_as == ()
    second = team.olga.put(model, "acme/other")
    assert second.same_as == (first.ref,)
    entry = team.olga.log.show(second.entry)
    assert entry["private"]["files"] == team.olga.log.show(first.entry)["private"]["files"]
    assert entry["body"]["statement"]
    team.olga.shred(first.ref, confirm=first.ref)
    assert team.olga.put(model, "acme/third").same_as == (second.ref,)


class TestWhatIsShownAndSigned:
    def test_an_approval_is_of_what_was_shown_and_of_no_more(self, team, monkeypatch):
        """A server that shows less than was asked for gets a signature for that only."""
        asked = team.ana.request(REF, reason="x", duration=8 * 3600)
        custodian = team.ben._vault.custodian
        shown = {**custodian.show_request(asked["id"]), "duration": 60, "uses": 1}
        monkeypatch.setattr(custodian, "show_request", lambda _: shown)
        said = []
        monkeypatch.setattr(custodian, "approve", lambda envelope: said.append(Statement.decode(envelope).body))
        team.ben.approve(asked["id"])
        assert (said[0]["duration"], said[0]["uses"]) == (60, 1)

    @pytest.mark.parametrize(
        "lie",
        [{"reason": "nothing to worry about"}, {"salt": "00" * 32}, {"salt": "x"}, {"uses": None}, {"uses": 3}],
    )
    def test_reasons_and_uses_are_those_that_were_signed(self, team, monkeypatch, lie):
        asked = team.ana.request(REF, reason="x", uses=2)
        custodian = team.ben._vault.custodian
        shown = {**custodian.show_request(asked["id"]), **lie}
        monkeypatch.setattr(custodian, "show_request", lambda _: shown)
        with pytest.raises(Tampered) as caught:
            team.ben.approve(asked["id"])
        assert caught.value.code == "request.other"

    def test_a_proposed_policy_can_be_read_and_is_the_one_that_was_signed(self, team, monkeypatch):
        text = team.ben.policy()["text"] + "\n// tidier\n"
        proposed = team.ben.propose(text, reason="tidier")["id"]
        assert team.olga.policy(proposed)["text"] == text
        custodian = team.olga._vault.custodian
        other = custodian.policy()
        monkeypatch.setattr(custodian, "policy", lambda _: other)
        with pytest.raises(Tampered):
            team.olga.policy(proposed)
        monkeypatch.undo()
        with pytest.raises(NotFound):
            custodian.policy("0" * 64)

    def test_a_grant_is_shown_with_its_key_and_person(self, team):
        made = team.olga.principal_add("user/kim", roles=["officer"])
        details = team.ben.show_request(made["id"])["details"]
        key = team.olga._vault.identities.signer("user/kim").public_key
        assert details["key"] == key.hex()  # what its owner can read out
        assert (details["person"], details["state"]) == ("user/kim", "active")


class TestWhatStrangersAndOthersLearn:
    def test_of_what_might_be_revoked(self, team):
        """Whether there is such a principal, version or request is told to who might revoke it."""
        for target in ("user/ben", "user/nobody", REF, "acme/none@1", "acme/tiny", "0" * 16):
            with pytest.raises(Denied):
                team.ana.revoke(target, reason="x")
        with pytest.raises(NotFound) as caught:
            team.ben.revoke("acme/tiny", reason="x")
        assert REF in caught.value.hint

    def test_of_the_size_of_the_log(self, team):
        custodian = team.ben._vault.custodian
        body = {"size": 10**12, "findings": 0, "removed": 0}
        said = Statement.sign(
            "review", body, room=team.ben._vault.id.hex(), by="user/ben", at=team.clock(), signer=Signer(bytes(32))
        )
        with pytest.raises(AuthRequired):
            custodian.acted(said.envelope)
        with pytest.raises(UsageError) as caught:
            custodian.acted(team.ben._say("review", body))
        assert caught.value.code == "review.size"


def test_who_broke_the_glass_does_not_take_the_reason_away(team):
    team.ben.load(REF, break_glass="fire")
    (index,) = team.ben.status()["emergencies"]
    for who in (team.ben, team.olga):
        with pytest.raises(Denied) as caught:
            who.log.redact(index)
        assert caught.value.code == "redact.open"
    assert team.olga.review(apply=True)["reviewed"] == [index]
    team.ben.log.redact(index)


@pytest.mark.parametrize("reason", ["", "   ", "\u3164", "\u2800\u115f", "...", "\n"])
def test_a_reason_says_something(team, reason):
    with pytest.raises(UsageError) as caught:
        team.ana.request(REF, reason=reason)
    assert caught.value.code == "reason.empty"


def test_the_key_store_is_not_touched_where_it_could_not_be_recorded(team):
    before = team.olga.keystore_show()
    team.later(1000)
    team.ana.request(REF, reason="x")
    team.later(-1000)
    with pytest.raises(Sealed) as caught:
        team.olga.keystore_rotate()
    assert caught.value.code == "clock.backwards"
    assert team.olga.keystore_show() == before


def test_a_copy_is_of_a_release_that_the_log_has(team):
    """Also for somebody who writes to the database, and would have it recorded otherwise."""
    size = team.ana._vault.custodian.ledger.checkpoint()[0].size
    for release in (0, 1, size, 2**40):
        body = {"ref": REF, "holder": "user/ana", "release": release, "files": 1, "bytes": 1}
        with pytest.raises(UsageError) as caught:
            team.ana._act("copy", body)
        assert caught.value.code == "copy.release"


class TestWhatALyingServerSaysOfSomebody:
    @pytest.mark.parametrize(
        "lie", [{"key": "5" * 64}, {"person": "user/ben"}, {"teams": ["team/x"]}, {"subject": "a" * 64}]
    )
    def test_is_not_signed(self, team, monkeypatch, lie):
        custodian = team.ben._vault.custodian
        told = replace(custodian.known("user/ana"), **lie)
        monkeypatch.setattr(custodian, "known", lambda _: told)
        sent = []
        monkeypatch.setattr(custodian, "change_principal", sent.append)
        team.ben.principal_change("user/ana", roles=["auditor"])
        team.ben.principal_change("user/ana", state="suspended")
        team.ben.principal_bind("user/ana")
        said = [Statement.decode(envelope).body for envelope in sent]
        assert [said[0][name] for name in ("key", "person", "teams", "state", "subject")] == [None] * 5
        assert said[0]["roles"] == ["auditor"]
        assert (said[1]["state"], said[1]["roles"]) == ("suspended", None)
        assert "subject" not in said[2]
        assert said[2]["key"] is None

    def test_and_what_is_open_stays(self, team):
        before = team.ben.principal_show("user/ana")
        team.ben.principal_change("user/ana", roles=["auditor"])
        after = team.ben.principal_show("user/ana")
        assert after["roles"] == ["auditor"]
        assert all(before[name] == after[name] for name in ("key", "person", "teams", "state", "subject"))
        team.ana.log.verify()

    def test_nothing_of_somebody_new_is_open(self, team):
        with pytest.raises(UsageError) as caught:
            team.ben._registry._change("user/new", None, person="user/new", roles=[], teams=[], state="active")
        assert caught.value.code == "principal.new"
