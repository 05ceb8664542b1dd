"""The rules of custody, attacked: a log that is folded by hand, signed statements, and nothing else.

Every decision here is checked to leave the state as it was, whether it refuses or not; and what has been decided in a
test is folded again, restored from its snapshot, and put before the offline verifier when the test ends.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strongroom.crypto import signatures
from strongroom.crypto.release import check_challenge, make_challenge
from strongroom.crypto.signatures import Signer
from strongroom.errors import (
    AuthRequired,
    Denied,
    NotFound,
    Pending,
    StrongroomError,
    Tampered,
    UsageError,
)
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.ledger.statements import Statements
from strongroom.policy import acts
from strongroom.policy.custody import REQUEST_LIFE, WAITING, Custody, Facts
from strongroom.policy.engine import ROLES, Policies
from strongroom.policy.explain import what_is_missing
from strongroom.policy.facts import CEILINGS, subject
from strongroom.policy.speaker import OWN_KEY, Speaker
from strongroom.policy.state import State
from strongroom.vault.requests import describe_ended

ROOM = "ab" * 16
NOW = 1_790_000_000
DAY = 86_400
YEAR = 365 * DAY
REF, OTHER = "acme/tiny@1", "acme/tiny@2"
REASON = "5" * 64
TEAM = Policies.shipped("team")
CHALLENGES = bytes(range(32))
MANIFEST = "c" * 64


class Book:
    """A room's log in a list, with its state; `now` is the custodian's clock and everybody's."""

    def __init__(self, policies=TEAM):
        self.texts = {policies.digest: policies}
        self.rules = Custody(self.texts.__getitem__)
        self.state, self.entries, self.now = State(), [], NOW
        self.signers = {}
        body = {"room": ROOM, "signer": "0" * 64, "policy": policies.digest, "custody": "team"}
        self.add(Entry("genesis", NOW, "custodian", "", body))
        for number, ref in enumerate((REF, OTHER), 1):
            body = {"version": f"{number:032x}", "revision": 1, "manifest": MANIFEST, "bytes": 1, "positions": 1}
            body["statement"] = ""
            self.add(Entry("put", NOW, "custodian", ref, body))

    @classmethod
    def team(cls):
        """With Ana, researcher; Ben and Bob, officers; Eva and Eli, executives; Pia, partner; Abe, auditor."""
        book = cls()
        for path, role in (
            ("user/ana", "researcher"),
            ("user/ben", "officer"),
            ("user/bob", "officer"),
            ("user/eva", "executive"),
            ("user/eli", "executive"),
            ("user/pia", "partner"),
            ("user/abe", "auditor"),
            ("user/oto", "operator"),
        ):
            book.person(path, role)
        return book

    def copy(self):
        made = copy.copy(self)
        made.texts, made.entries, made.signers = {**self.texts}, [*self.entries], {**self.signers}
        made.rules, made.state = Custody(made.texts.__getitem__), copy.deepcopy(self.state)
        return made

    def add(self, entry):
        entry = Entry.decode(entry.encode())
        self.state.apply(len(self.entries), entry)
        self.entries.append(entry)
        return entry

    def person(self, path, *roles, person=None, state="active", key=None, teams=()):
        """What the custodian writes by itself, as for a room's owner: no rule is asked."""
        signer = self.signers.setdefault(path, Signer(path.encode().ljust(32, b".")))
        body = {
            "principal": path,
            "key": signer.public_key.hex() if key is None else key,
            "person": person or path,
            "roles": sorted(roles),
            "teams": sorted(teams),
            "state": state,
            "statement": "",
        }
        self.add(Entry("principal", self.now, "custodian", path, body))

    def say(self, kind, by, body, *, at=None, room=ROOM, signer=None):
        return Statement.sign(
            kind,
            body,
            room=room,
            by=by,
            at=self.now if at is None else at,
            signer=signer or self.signers.setdefault(by, Signer(by.encode().ljust(32, b"."))),
        )

    def decide(self, rule, *args, **options):
        """The decision's entry, appended. Whatever it decides, it changes nothing by itself."""
        before = copy.deepcopy(self.state)
        try:
            entry = rule(self.state, *args, self.now, **options)
        finally:
            assert self.state == before
        return self.add(entry)

    # -- what people say -----------------------------------------------------------------------------------------

    def asking(self, by, *, holder=None, action="load", ref=REF, duration=3600, uses=None, **how):
        body = {"action": action, "ref": ref, "for": holder or by, "duration": duration, "uses": uses, "reason": REASON}
        return self.say("request", by, body, **how)

    def ask(self, by="user/ana", **options):
        statement = self.asking(by, **options)
        self.decide(self.rules.request, statement, REASON)
        return statement

    def yes(self, by, asked, *, duration=0, uses=None, **how):
        return self.say("approve", by, {"request": asked.digest, "duration": duration, "uses": uses}, **how)

    def approve(self, by, asked, **options):
        """The lease that this approval grants, or None."""
        return self.decide(self.rules.approve, self.yes(by, asked, **options)).body["lease"]

    def lease(self, holder="user/ana", *, by=("user/ben", "user/eva"), **options):
        asked = self.ask(holder, **options)
        for each in by:
            self.approve(each, asked)
        return self.state.leases[asked.id]

    def deny(self, by, asked):
        self.decide(self.rules.deny, self.say("deny", by, {"request": asked.digest, "reason": REASON}), REASON)

    def revoke(self, by, target):
        self.decide(self.rules.revoke, self.say("revoke", by, {"target": target, "reason": REASON}), REASON)

    def renew(self, by, lease, duration=0):
        return self.decide(self.rules.renew, self.say("renew", by, {"lease": lease, "duration": duration}))

    def taking(self, by="user/ana", *, action="load", ref=REF, holder=None, glass=False, challenge=None, **how):
        challenge = challenge or make_challenge(CHALLENGES, bytes.fromhex(ROOM), self.state.era, self.now)
        body = {
            "action": action,
            "ref": ref,
            "holder": holder or by,
            "public_key": "9" * 64,
            "challenge": challenge.hex(),
            "break_glass": glass,
            "reason": REASON if glass else "",
        }
        return self.say("release", by, body, **how)

    def hand_out(self, statement, facts=None):
        challenge = bytes.fromhex(statement.body["challenge"])
        return self.decide(
            lambda state, now: self.rules.release(
                state,
                statement,
                lambda: check_challenge(challenge, CHALLENGES, bytes.fromhex(ROOM), state.era, now),
                lambda: facts or Facts(1, MANIFEST),
                now,
                reason=statement.body["reason"] or None,
            )
        )

    def release(self, by="user/ana", **options):
        return self.hand_out(self.taking(by, **options))

    def granting(self, by, path, *roles, person=None, state="active", key=None, teams=(), **how):
        signer = self.signers.setdefault(path, Signer(path.encode().ljust(32, b".")))
        body = {
            "principal": path,
            "key": signer.public_key.hex() if key is None else key,
            "person": person or path,
            "roles": sorted(roles),
            "teams": sorted(teams),
            "state": state,
            "before": before.entry if (before := self.state.principals.get(path)) else None,
        }
        return self.say("principal", by, body, **how)

    def grant(self, by, path, *roles, **options):
        statement = self.granting(by, path, *roles, **options)
        return statement, self.decide(self.rules.principal, statement)

    def propose(self, by, policies):
        self.texts[policies.digest] = policies
        statement = self.say("propose", by, {"digest": policies.digest, "reason": REASON})
        self.decide(self.rules.propose, statement, REASON)
        return statement

    def enact(self, by, proposal, reason=""):
        return self.act("enact", by, {"proposal": proposal.id, "reason": reason})

    def put_in_force(self, policies):
        said = self.propose("user/ben", policies)
        self.approve("user/eva", said)
        self.now += WAITING
        self.enact("user/ben", said)

    def set_back(self):
        """The clock had been ahead."""
        self.now += 600
        self.deny("user/oto", self.ask("user/oto"))
        self.now -= 600
        self.clock()

    def clock(self, by="user/ben"):
        return self.act("clock", by, {"reason": REASON})

    def act(self, kind, by, body):
        return self.do(self.say(kind, by, body))

    def do(self, statement, state=None):
        """What `statement` does, appended; to another `state` it is only decided."""
        rule = ACTS[statement.kind]
        if state is not None:
            return rule(self.rules, state, statement, self.now)
        return self.decide(lambda state, now: rule(self.rules, state, statement, now))

    # -- when all is done ----------------------------------------------------------------------------------------

    def check(self):
        """The same entries make the same state, its snapshot is that state, and the verifier accepts them all."""
        again, verifier = State(), Statements(f"strongroom/{ROOM}", signatures.verify)
        for index, entry in enumerate(self.entries):
            again.apply(index, entry)
            if index and entry.body.get("statement") == "":  # what this book writes by itself, and no verifier takes
                verifier.apply(index, entry)
            else:
                verifier.check(index, entry)
        assert again == self.state
        assert State.from_json(json.loads(json.dumps(again.as_json()))) == again


PUT = {"version": "e" * 32, "revision": 1, "manifest": MANIFEST, "bytes": 1, "positions": 1}
# What is done, by the kind of statement; what the custodian adds to it is added here.
ACTS = {
    **{kind: getattr(acts, kind) for kind in ("enact", "ceiling", "thaw", "clock", "redact", "review", "copy")},
    **{kind: getattr(acts, kind) for kind in ("keystore", "shred")},
    "rotate": lambda *said: acts.rotate(*said, {"revision": 2, "manifest": "d" * 64}),
    "put": lambda *said: acts.put(*said, "acme/new@1", PUT, files="4" * 64),
}
# A statement of each of these that somebody may make, and who.
SAID = {
    "ceiling": ("user/ben", {"ref": REF, "holders": 3, "copies": 2, "copiers": 1}),
    "redact": ("user/ben", {"entry": 3}),
    "review": ("user/ben", {"size": 3, "findings": 2, "removed": 1}),
    "copy": ("user/ana", {"ref": REF, "holder": "user/ana", "release": 3, "files": 2, "bytes": 1}),
    "keystore": ("user/ben", {"operation": "rotate", "epoch": 2}),
    "shred": ("user/ben", {"ref": REF}),
    "rotate": ("user/ben", {"ref": REF}),
    "put": ("user/oto", {"name": "acme/new", "files": "4" * 64}),
}


def said_of(book, kind):
    by, body = SAID[kind]
    return by, {**body, "release": book.copied} if kind == "copy" else body


@pytest.fixture
def book():
    book = Book.team()
    yield book
    book.check()


def unheard(call, *args):
    """A guest is refused what concerns others as if there were nothing to be refused."""
    return refused("request.unknown", call, *args)


def refused(code, call, *args, **options):
    with pytest.raises(StrongroomError) as caught:
        call(*args, **options)
    assert caught.value.code == code
    return caught.value


# A statement of each kind that its rule accepts of somebody, and that rule.
KINDS = {
    "request": (
        lambda book, how: book.asking("user/ana", **how),
        lambda book, said: book.rules.request(book.state, said, REASON, book.now),
    ),
    "approve": (
        lambda book, how: book.yes("user/ben", book.asked, **how),
        lambda book, said: book.rules.approve(book.state, said, book.now),
    ),
    "approve-proposal": (
        lambda book, how: book.yes("user/eva", book.proposed, **how),
        lambda book, said: book.rules.approve(book.state, said, book.now),
    ),
    "approve-grant": (
        lambda book, how: book.yes("user/eva", book.granted, **how),
        lambda book, said: book.rules.approve(book.state, said, book.now),
    ),
    "deny": (
        lambda book, how: book.say("deny", "user/ben", {"request": book.asked.digest, "reason": REASON}, **how),
        lambda book, said: book.rules.deny(book.state, said, REASON, book.now),
    ),
    "revoke": (
        lambda book, how: book.say("revoke", "user/ben", {"target": REF, "reason": REASON}, **how),
        lambda book, said: book.rules.revoke(book.state, said, REASON, book.now),
    ),
    "renew": (
        lambda book, how: book.say("renew", "user/ben", {"lease": book.leased.id, "duration": 0}, **how),
        lambda book, said: book.rules.renew(book.state, said, book.now),
    ),
    "release": (
        lambda book, how: book.taking("user/ana", **how),
        lambda book, said: book.rules.release(book.state, said, lambda: None, lambda: Facts(1, MANIFEST), book.now),
    ),
    "trace": (
        lambda book, how: book.say("trace", "user/ben", {"suspect": MANIFEST, "ref": None, "lease": None}, **how),
        lambda book, said: acts.trace(book.rules, book.state, said, book.now, "none", []),
    ),
    "propose": (
        lambda book, how: book.say("propose", "user/ben", {"digest": TEAM.digest, "reason": REASON}, **how),
        lambda book, said: book.rules.propose(book.state, said, REASON, book.now),
    ),
    "principal": (
        lambda book, how: book.granting("user/ben", "user/new", "researcher", **how),
        lambda book, said: book.rules.principal(book.state, said, book.now),
    ),
    **{
        kind: (
            lambda book, how, kind=kind: book.say(kind, *said_of(book, kind), **how),
            lambda book, said: book.do(said, book.state),
        )
        for kind in SAID
    },
}


@functools.cache
def made_busy():
    book = Book.team()
    book.leased = book.lease()
    book.lease(action="copy")
    book.release(action="copy")
    book.copied = len(book.entries) - 1
    book.now += 1000
    book.asked = book.ask(ref=OTHER)
    book.proposed = book.propose("user/ben", TEAM)
    book.granted, _ = book.grant("user/ben", "user/zoe", "officer")
    return book


@pytest.fixture
def busy():
    """With a request, a lease, a proposal and a grant that wait for something."""
    book = made_busy().copy()
    yield book
    book.check()


@pytest.mark.parametrize("kind", KINDS)
class TestWhoSpeaks:
    def test_as_it_should_be(self, busy, kind):
        make, rule = KINDS[kind]
        said = make(busy, {})
        assert rule(busy, said).by == said.by
        for off in (-300, 300):
            assert rule(busy, make(busy, {"at": busy.now + off}))

    @pytest.mark.parametrize("off", [-301, 301, -YEAR, YEAR, -NOW, 2**53 - 1001 - NOW])
    def test_at_another_time(self, busy, kind, off):
        make, rule = KINDS[kind]
        refused("statement.stale", rule, busy, make(busy, {"at": busy.now + off}))

    def test_in_another_room(self, busy, kind):
        make, rule = KINDS[kind]
        refused("auth.refused", rule, busy, make(busy, {"room": "cd" * 16}))

    def test_under_another_key(self, busy, kind):
        make, rule = KINDS[kind]
        for name in ("user/eli", "user/ana", "user/nobody"):
            signer = Signer((name + "x").encode().ljust(32, b"."))
            refused("auth.refused", rule, busy, make(busy, {"signer": signer}))

    @pytest.mark.parametrize("state", ["suspended", "removed"])
    def test_by_somebody_who_is_not_active(self, busy, kind, state):
        make, rule = KINDS[kind]
        said = make(busy, {})
        who = busy.state.principals[said.by]
        busy.person(who.path, *who.roles, state=state)
        refused("auth.refused", rule, busy, said)

    def test_by_somebody_without_a_key(self, busy, kind):
        make, rule = KINDS[kind]
        said = make(busy, {})
        busy.person(said.by, *busy.state.principals[said.by].roles, key="")
        refused("auth.refused", rule, busy, said)

    def test_under_a_key_that_was_replaced(self, busy, kind):
        make, rule = KINDS[kind]
        said = make(busy, {})
        busy.person(said.by, *busy.state.principals[said.by].roles, key=Signer(bytes(32)).public_key.hex())
        refused("auth.refused", rule, busy, said)

    def test_while_the_clock_is_behind(self, busy, kind):
        make, rule = KINDS[kind]
        busy.now -= 301
        if kind != "shred":  # it has to be possible always
            refused("clock.backwards", rule, busy, make(busy, {}))
        busy.now += 1
        assert rule(busy, make(busy, {}))

    def test_nobody_learns_who_is_there(self, busy, kind):
        make, rule = KINDS[kind]
        said = make(busy, {"signer": Signer(bytes(32))})
        there = refused("auth.refused", rule, busy, said)
        del busy.state.principals[said.by]
        gone = refused("auth.refused", rule, busy, said)
        assert there.as_json() == gone.as_json()
        busy.state = State()
        for index, entry in enumerate(busy.entries):
            busy.state.apply(index, entry)

    def test_twice(self, busy, kind):
        make, rule = KINDS[kind]
        said = make(busy, {})
        if kind == "revoke":
            said = busy.say("revoke", "user/ben", {"target": "user/abe", "reason": REASON})
        busy.add(rule(busy, said))
        refused("statement.replayed", rule, busy, said)
        busy.now += 299
        refused("statement.replayed", rule, busy, said)


def test_by_nobody_that_the_log_knows(book):
    refused("auth.refused", book.ask, "user/nobody")


class TestReplay:
    def everything(self, book):
        """A statement of each kind, said and recorded; with what would say it again."""
        asked = book.asking("user/ana")
        yes = book.yes("user/ben", asked)
        no = book.say("deny", "user/eva", {"request": asked.digest, "reason": REASON})
        target = book.say("revoke", "user/ben", {"target": "user/abe", "reason": REASON})
        granted = book.granting("user/ben", "user/new", "researcher")
        proposed = book.say("propose", "user/ben", {"digest": TEAM.digest, "reason": REASON})
        said = [
            (asked, lambda each: book.decide(book.rules.request, each, REASON)),
            (yes, lambda each: book.decide(book.rules.approve, each)),
            (no, lambda each: book.decide(book.rules.deny, each, REASON)),
            (target, lambda each: book.decide(book.rules.revoke, each, REASON)),
            (granted, lambda each: book.decide(book.rules.principal, each)),
            (proposed, lambda each: book.decide(book.rules.propose, each, REASON)),
            (book.taking("user/eva", glass=True), book.hand_out),
        ]
        for statement, again in said:
            again(statement)
        return said

    def test_after_any_number_of_other_entries(self, book):
        said = self.everything(book)
        for _ in range(150):
            book.release("user/eva", glass=True)
        for statement, again in said:
            refused("statement.replayed", again, statement)

    def test_after_the_clock_was_ahead_and_was_set_back(self, book):
        """What was said before is young again, and the log must know it still: a role that was taken away since comes
        back with the statement that gave it."""
        said = self.everything(book)
        book.person("user/new", "researcher", state="removed")
        book.now += YEAR
        for _ in range(150):  # so that what is old then is forgotten
            book.release("user/eva", glass=True)
        book.now -= YEAR - 10
        book.clock()
        for statement, again in said[:-1]:
            refused("statement.replayed", again, statement)
        with pytest.raises(AuthRequired):
            said[-1][1](said[-1][0])
        assert book.state.principals["user/new"].state == "removed"

    def test_of_what_was_said_while_the_clock_was_ahead_when_that_time_comes(self, book):
        book.now += YEAR
        said = self.everything(book)
        for _ in range(40):
            book.now += 100
            for _ in range(5):
                book.release("user/eva", glass=True)
        book.now -= YEAR + 4000
        book.clock()
        book.now += YEAR
        book.ask()
        for statement, again in said[:-1]:
            refused("statement.replayed", again, statement)
        refused("challenge.foreign", said[-1][1], said[-1][0])

    def test_the_state_does_not_grow_with_releases(self, book):
        for _ in range(600):
            book.release("user/eva", glass=True)
            book.now += 60
        assert len(book.state.recent) < 128

    def test_a_challenge(self, book):
        book.lease()
        challenge = make_challenge(CHALLENGES, bytes.fromhex(ROOM), 0, book.now)
        book.release(challenge=challenge)
        refused("challenge.used", book.release, challenge=challenge)
        refused("challenge.used", book.release, "user/eva", challenge=challenge, glass=True)
        for off in (-301, 301):
            stale = make_challenge(CHALLENGES, bytes.fromhex(ROOM), 0, book.now + off)
            refused("challenge.expired", book.release, challenge=stale)
        for key, room, era in (
            (bytes(32), bytes.fromhex(ROOM), 0),
            (CHALLENGES, bytes(16), 0),
            (CHALLENGES, bytes.fromhex(ROOM), 1),
        ):
            refused("challenge.foreign", book.release, challenge=make_challenge(key, room, era, book.now))


class TestIdentifiers:
    """Sixteen digits: who hashes for half an hour has two statements that share them."""

    def collide(self, book, kind, said):
        """An entry of `kind` that has the identifier of the statement `said`, as if somebody had found it."""
        by = "user/bob"
        other = book.propose(by, TEAM) if kind == "proposal" else book.ask("user/oto")
        book.state.requests.pop(other.id, None)
        book.state.proposals.pop(other.id, None)
        entry = book.entries.pop()
        body = {**entry.body, "id": said.id}
        book.add(replace(entry, body=body))
        return other

    @pytest.mark.parametrize("kind", ["proposal", "request"])
    def test_one_that_is_taken_is_refused(self, kind):
        book = Book.team()
        asked = book.asking("user/ana")
        self.collide(book, kind, asked)
        refused("request.exists", book.decide, book.rules.request, asked, REASON)
        proposed = book.say("propose", "user/ben", {"digest": TEAM.digest, "reason": REASON})
        self.collide(book, kind, proposed)
        refused("request.exists", book.decide, book.rules.propose, proposed, REASON)
        granted = book.granting("user/ben", "user/zoe", "officer")
        self.collide(book, kind, granted)
        refused("request.exists", book.decide, book.rules.principal, granted)

    def test_an_approval_names_the_whole_hash(self, book):
        asked = book.ask()
        changed = book.asking("user/ana", duration=7200)
        digest = asked.digest[:16] + changed.digest[16:]
        said = book.say("approve", "user/ben", {"request": digest, "duration": 0, "uses": None})
        refused("request.unknown", book.decide, book.rules.approve, said)
        said = book.say("deny", "user/ben", {"request": digest, "reason": REASON})
        refused("request.unknown", book.decide, book.rules.deny, said, REASON)
        refused("request.unknown", book.approve, "user/ben", changed)


class TestApproving:
    @pytest.mark.parametrize("holder", ["user/ana", "user/ben-work"])
    def test_ones_own(self, book, holder):
        """As who asks, as who it is for, and as the same human under another name."""
        book.person("user/ben-work", "researcher", person="user/ben")
        book.person("user/ben-home", "executive", person="user/ben")
        asked = book.ask("user/ben", holder=holder)
        for path in ("user/ben", "user/ben-home"):
            refused("approve.own", book.approve, path, asked)

    def test_as_the_person_that_it_is_for(self, book):
        book.person("user/eva-lab", "researcher", person="user/eva")
        asked = book.ask("user/ben", holder="user/eva-lab")
        refused("approve.own", book.approve, "user/eva", asked)
        book.approve("user/bob", asked)
        assert book.approve("user/eli", asked)

    def test_twice_under_one_name_or_two(self, book):
        book.person("user/ben-home", "executive", person="user/ben")
        asked = book.ask()
        book.approve("user/ben", asked)
        refused("approve.duplicate", book.approve, "user/ben", asked)
        refused("approve.duplicate", book.approve, "user/ben-home", asked)
        assert asked.id not in book.state.leases

    def test_two_that_become_one_person_afterwards_are_one(self, book):
        book.person("user/bo", "officer")
        asked = book.ask()
        book.approve("user/bo", asked)
        book.person("user/bo", "officer", person="user/ben")
        assert book.approve("user/ben", asked) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"roles": []},
            {"roles": ["researcher"]},
            {"roles": ["officer", "partner"]},  # partners never approve
            {"roles": ["executive"]},  # not with a role that it has now and had not then
            {"roles": ["officer"], "state": "suspended"},
            {"roles": ["officer"], "state": "removed"},
            {"roles": ["officer"], "person": "user/ana"},
        ],
    )
    def test_of_somebody_who_could_not_any_more(self, book, change):
        asked = book.ask()
        book.approve("user/ben", asked)
        options = dict(change)
        book.person("user/ben", *options.pop("roles"), **options)
        assert book.approve("user/eva", asked) is None
        assert book.approve("user/bob", asked)

    def test_of_somebody_who_was_suspended_and_is_back(self, book):
        asked = book.ask()
        book.approve("user/ben", asked)
        book.revoke("user/bob", "user/ben")
        assert book.approve("user/eva", asked) is None
        book.person("user/ben", "officer")
        (need,) = book.rules.missing(book.state, book.state.requests[asked.id], book.now)()
        assert f"strongroom approve {asked.id}" in need
        assert book.approve("user/bob", asked)

    def test_counted_under_the_role_that_was_had_then(self, book):
        """An executive who was an officer: the first approval does not become that of an executive."""
        asked = book.ask("user/ana", action="copy")
        book.approve("user/ben", asked)
        book.person("user/ben", "executive", "officer")
        assert book.approve("user/bob", asked) is None
        assert book.approve("user/eva", asked)

    def test_under_a_policy_that_came_later(self, book):
        asked = book.ask()
        book.approve("user/ben", asked)
        text = TEAM.text.replace(
            'Role::"officer", action == Strongroom::Action::"approve"',
            'Role::"chief", action == Strongroom::Action::"approve"',
        )
        assert text != TEAM.text
        book.put_in_force(Policies.parse(text))
        assert book.approve("user/eva", asked) is None  # Ben's was given when officers could
        assert book.approve("user/eli", asked)

    def test_a_lease_of_before_under_a_policy_that_came_later(self, book):
        book.lease(duration=2 * DAY)
        shut = 'forbid (principal, action == Strongroom::Action::"load", resource);'
        text = f'{TEAM.text}\n@id("closed") @reason("Closed.") @ask("wait") {shut}'
        book.release()
        book.put_in_force(Policies.parse(text))
        refused("denied.rule", book.release)

    @pytest.mark.parametrize("end", ["denied", "withdrawn", "expired", "revoked", "approved"])
    def test_what_is_over(self, book, end):
        asked = book.ask()
        book.approve("user/ben", asked)
        if end == "denied":
            book.deny("user/bob", asked)
        elif end == "withdrawn":
            book.deny("user/ana", asked)
        elif end == "revoked":
            book.revoke("user/bob", asked.id)
        elif end == "approved":
            book.approve("user/eva", asked)
        else:
            book.now += REQUEST_LIFE
        refused("request.over", book.approve, "user/eli", asked)
        refused("request.over", book.deny, "user/eli", asked)

    def test_in_the_last_second(self, book):
        asked = book.ask()
        book.approve("user/ben", asked)
        book.now += REQUEST_LIFE - 1
        assert book.approve("user/eva", asked)["expires_at"] == book.now + 3600

    def test_of_a_version_that_has_gone(self, book):
        asked, other = book.ask(), book.ask(ref=OTHER)
        book.revoke("user/ben", REF)
        refused("version.frozen", book.approve, "user/eva", asked)
        book.act("shred", "user/ben", {"ref": OTHER})
        refused("version.missing", book.approve, "user/eva", other)

    def test_for_a_holder_who_is_suspended_meanwhile(self, book):
        asked = book.ask()
        book.approve("user/ben", asked)
        book.revoke("user/ben", "user/ana")
        assert book.approve("user/eva", asked) is None
        assert asked.id not in book.state.leases

    def test_for_a_holder_who_lost_the_role_meanwhile(self, book):
        asked = book.ask()
        book.approve("user/ben", asked)
        book.person("user/ana", "auditor")
        assert book.approve("user/eva", asked) is None

    def test_denying_is_for_approvers_and_who_asked(self, book):
        asked = book.ask()
        for path in ("user/oto", "user/abe"):
            with pytest.raises(Denied) as caught:
                book.deny(path, asked)
            assert caught.value.message.startswith(f"{path} may not deny ")
        unheard(book.deny, "user/pia", asked)
        book.person("user/ana-lab", person="user/ana")
        book.deny("user/ana-lab", asked)


class TestNarrowing:
    def test_an_approver_does_not_lengthen(self, book):
        asked = book.ask(duration=3600)
        refused("approve.longer", book.approve, "user/ben", asked, duration=3601)
        book.approve("user/ben", asked, duration=1800)
        refused("approve.longer", book.approve, "user/eva", asked, duration=1801)
        assert book.approve("user/eva", asked, duration=0)["expires_at"] == book.now + 1800

    def test_no_uses_are_no_lease(self, book):
        asked = book.ask()
        refused("approve.nothing", book.approve, "user/ben", asked, uses=0)
        refused("request.nothing", book.ask, uses=0)
        refused("request.nothing", book.ask, duration=0)
        refused("request.nothing", book.ask, duration=2**53 - 1)
        refused("denied.rule", book.ask, duration=30 * DAY + 1)

    @given(
        asked=st.tuples(st.integers(1, 30 * DAY), st.none() | st.integers(1, 9)),
        given=st.lists(st.tuples(st.integers(0, 30 * DAY), st.none() | st.integers(1, 9)), min_size=4, max_size=4),
    )
    def test_the_least_of_all_is_what_is_left(self, asked, given):
        """A copy, which takes an executive: three officers first, then her."""
        book = Book.team()
        book.person("user/bea", "officer")
        request = book.ask(action="copy", duration=asked[0], uses=asked[1])
        shortest, fewest = asked[0], [count for count in (asked[1],) if count is not None]
        lease = None
        for by, (duration, uses) in zip(("user/ben", "user/bob", "user/bea", "user/eva"), given, strict=True):
            assert lease is None
            if duration > shortest:
                refused("approve.longer", book.approve, by, request, duration=duration, uses=uses)
                duration = shortest  # noqa: PLW2901 - and is content with less
            lease = book.approve(by, request, duration=duration, uses=uses)
            shortest = duration or shortest
            fewest += [uses] if uses is not None else []
        assert lease == {
            "id": request.id,
            "holder": "user/ana",
            "action": "copy",
            "ref": REF,
            "expires_at": book.now + shortest,
            "uses": min(fewest, default=None),
        }
        book.check()


class TestAsking:
    def test_for_somebody_else_takes_a_rank(self, book):
        book.person("user/ana-lab", "researcher", person="user/ana")
        refused("request.for_other", book.ask, "user/pia", holder="user/ana")
        refused("request.for_other", book.ask, "user/abe", holder="user/ana")
        book.ask("user/ana", holder="user/ana-lab")
        book.ask("user/oto", holder="user/ana")

    def test_for_nobody_who_is_here(self, book):
        refused("principal.unknown", book.ask, "user/ben", holder="user/nobody")
        book.person("user/ana", "researcher", state="suspended")
        refused("principal.unknown", book.ask, "user/ben", holder="user/ana")

    def test_for_a_team_is_an_error_of_ours(self, book):
        book.person("team/red", "researcher")
        refused("policy.subject", book.ask, "user/ben", holder="team/red")
        refused("policy.subject", book.ask, "team/red")

    @pytest.mark.parametrize("ref", ["acme/tiny", "acme/tiny@3", "room", "acme/other@1"])
    def test_for_what_is_not_there(self, book, ref):
        refused("version.missing", book.ask, ref=ref)

    @pytest.mark.parametrize("ref", ["", "../x", "acme/tiny@01", "acme/tiny@", "ACME/tiny@1", "acme/tiny@1\n", "\0"])
    def test_for_what_is_no_name(self, book, ref):
        refused("ref.malformed", book.ask, ref=ref)

    def test_for_what_could_never_be(self, book):
        for path, action in (("user/ben", "load"), ("user/abe", "load"), ("user/ben", "copy"), ("user/eva", "load")):
            with pytest.raises(Denied):
                book.ask(path, action=action)
        free = '@id("free") @reason("x") permit (principal, action == Strongroom::Action::"load", resource);'
        book.put_in_force(Policies.parse(f"{TEAM.text}\n{free}"))
        refused("request.not_needed", book.ask, "user/ana")

    @pytest.mark.parametrize(("action", "command"), [("load", "run"), ("copy", "copy"), ("trace", "trace FILE")])
    def test_for_what_needs_none_says_what_does_it(self, book, action, command):
        free = f'@id("free") @reason("x") permit (principal, action == Strongroom::Action::"{action}", resource);'
        book.put_in_force(Policies.parse(f"{TEAM.text}\n{free}"))
        asked = refused("request.not_needed", book.ask, "user/eva" if action == "trace" else "user/ana", action=action)
        assert asked.hint.startswith(f"strongroom {command} ")


class TestLeases:
    def test_are_for_one_holder_action_and_version(self, book):
        book.person("user/amy", "researcher")
        book.person("user/ana-lab", "researcher", person="user/ana")
        book.lease()
        book.release()
        for options in ({"action": "copy"}, {"ref": OTHER}):
            with pytest.raises(Denied):
                book.release(**options)
        for path in ("user/amy", "user/ana-lab"):
            with pytest.raises(Denied):
                book.release(path)
            refused("release.holder", book.release, path, holder="user/ana")
        book.lease(action="copy", ref=OTHER)
        with pytest.raises(Denied):
            book.release(ref=OTHER)
        with pytest.raises(Denied):
            book.release(action="copy")
        book.release(action="copy", ref=OTHER)

    def test_for_so_many_uses(self, book):
        lease = book.lease(uses=3)
        for used in (1, 2, 3):
            assert book.release().body["lease"] == lease.id
            assert lease.used == used
        with pytest.raises(Denied):
            book.release()
        other = book.lease(uses=1)
        assert book.release().body["lease"] == other.id
        with pytest.raises(Denied):
            book.release()

    def test_a_refusal_uses_nothing(self, book):
        lease = book.lease(uses=1)
        with pytest.raises(StrongroomError):
            book.hand_out(book.taking(), Facts(2, MANIFEST))
        with pytest.raises(StrongroomError):
            book.release(holder="user/ben")
        assert lease.used == 0
        book.release()

    def test_until_they_end(self, book):
        book.lease(duration=3600)
        book.now += 3599
        book.release()
        book.now += 1
        with pytest.raises(Denied):
            book.release()

    def test_from_before_they_were_granted_by_as_much_as_clocks_may_be_off(self, book):
        lease = book.lease()
        assert lease.holds(lease.granted_at - 300)
        assert not lease.holds(lease.granted_at - 301)
        book.now -= 300
        book.release()
        book.now -= 1
        refused("clock.backwards", book.release)

    def test_do_not_come_back_with_a_clock_that_is_set_back(self, book):
        lease = book.lease(duration=3600)
        book.now += 4000
        book.release("user/eva", glass=True)
        book.now -= 1000
        refused("clock.backwards", book.release)
        book.clock()
        assert lease.ended
        with pytest.raises(Denied):
            book.release()
        book.lease()
        book.release()

    def test_a_clock_entry_ends_all_and_only_those_before(self, book):
        book.person("user/amy", "researcher")
        leases = [book.lease(), book.lease("user/amy"), book.lease(action="copy", ref=OTHER)]
        book.set_back()
        assert all(lease.ended for lease in leases)
        for options in ({}, {"by": "user/amy"}, {"action": "copy", "ref": OTHER}):
            with pytest.raises(Denied):
                book.release(**options)

    def test_a_clock_that_runs_ahead_ends_them_and_no_more(self, book):
        book.lease(duration=3600)
        book.now += YEAR
        with pytest.raises(Denied):
            book.release()

    def test_of_what_was_rotated_are_for_the_new_revision(self, book):
        book.lease()
        book.act("rotate", "user/ben", {"ref": REF})
        for facts in (Facts(1, MANIFEST), Facts(2, MANIFEST), Facts(1, "d" * 64)):
            refused("release.revision", book.hand_out, book.taking(), facts)
        assert book.hand_out(book.taking(), Facts(2, "d" * 64)).body["revision"] == 2

    def test_of_several_any_that_holds(self, book):
        short, long = book.lease(duration=600), book.lease(duration=6000, uses=1)
        assert book.release().body["lease"] == long.id
        assert book.release().body["lease"] == short.id
        book.revoke("user/ben", short.id)
        with pytest.raises(Denied):
            book.release()

    def test_a_reason_is_the_one_that_was_signed(self, book):
        """Else the entry would not say what was signed, and no verifier would accept the log again."""
        book.lease()
        said = book.taking()
        said = book.say("release", "user/ana", {**said.body, "reason": REASON})
        for reason in (None, "6" * 64):
            refused(
                "release.reason",
                book.rules.release,
                book.state,
                said,
                lambda: None,
                lambda: Facts(1, MANIFEST),
                book.now,
                reason=reason,
            )


ENDS = {
    "the lease": lambda book, lease: book.revoke("user/bob", lease.id),
    "the lease, by its holder": lambda book, lease: book.revoke("user/ana", lease.id),
    "the principal": lambda book, _: book.revoke("user/bob", "user/ana"),
    "the version": lambda book, _: book.revoke("user/bob", REF),
    "the version, for good": lambda book, _: book.act("shred", "user/ben", {"ref": REF}),
    "the role": lambda book, _: book.grant("user/ben", "user/ana"),
    "the state": lambda book, _: book.grant("user/ben", "user/ana", "researcher", state="removed"),
    "the clock": lambda book, _: book.set_back(),
}


class TestRevoking:
    @pytest.mark.parametrize("end", ENDS)
    def test_is_in_force_for_the_next_entry(self, book, end):
        """In the same second: the log's order decides, and nothing else."""
        lease = book.lease()
        book.release()
        before = book.taking()
        after = book.taking()
        book.hand_out(before)
        ENDS[end](book, lease)
        with pytest.raises(StrongroomError):
            book.hand_out(after)
        assert book.entries[-1].type != "release"

    @pytest.mark.parametrize("end", ["the principal", "the state"])
    def test_of_a_principal_lasts_when_it_comes_back(self, book, end):
        lease = book.lease()
        ENDS[end](book, lease)
        book.person("user/ana", "researcher")
        with pytest.raises(Denied):
            book.release()

    def test_of_a_key_ends_the_leases(self, book):
        book.lease()
        book.person("user/ana", "researcher", key=Signer(b"z" * 32).public_key.hex())
        book.signers["user/ana"] = Signer(b"z" * 32)
        with pytest.raises(Denied):
            book.release()

    def test_by_whom(self, book):
        book.person("user/amy", "researcher")
        lease = book.lease()
        for path in ("user/amy", "user/oto", "user/pia", "user/abe"):
            for target in (lease.id, "user/ana", REF, path):
                if path == "user/pia" and target != path:
                    unheard(book.revoke, path, target)
                    continue
                with pytest.raises(Denied) as caught:
                    book.revoke(path, target)
                assert caught.value.message.startswith(f"{path} may not revoke ")
        with pytest.raises(Denied):
            book.revoke("user/ana", "user/ana")

    def test_of_nothing(self, book):
        for target in ("", "user/nobody", "acme/tiny@9", "0" * 16, "room"):
            refused("revoke.unknown", book.revoke, "user/ben", target)

    def test_of_somebody_who_was_removed_is_not_a_way_back(self, book):
        book.person("user/ana", "researcher", state="removed")
        refused("revoke.over", book.revoke, "user/ben", "user/ana")
        assert book.state.principals["user/ana"].state == "removed"

    def test_of_what_is_revoked_already(self, book):
        lease = book.lease()
        asked, used = book.ask("user/oto"), book.lease("user/oto", uses=1, ref=OTHER)
        book.release("user/oto", ref=OTHER)
        book.deny("user/ben", asked)
        refused("revoke.over", book.revoke, "user/ben", asked.id)
        book.revoke("user/ben", used.id)
        refused("revoke.over", book.revoke, "user/ben", used.id)
        for target in (lease.id, REF, "user/ana"):
            book.revoke("user/ben", target)
            assert refused("revoke.over", book.revoke, "user/bob", target).evidence["state"]
            refused("denied.default", book.revoke, "user/oto", target)

    def test_of_a_lease_that_was_used_ends_what_was_given_under_it(self, book):
        """Whoever took the keys under its only use has them for as long as it lasts."""
        lease = book.lease(uses=1)
        book.release()
        book.revoke("user/ben", lease.id)
        assert book.state.leases[lease.id].ended == f"revoked in entry {len(book.entries) - 1}"
        assert [each["id"] for each in describe_ended(book.state, len(book.entries) - 1, book.now)["ended"]] == [
            lease.id
        ]

    def test_of_a_lease_that_was_used_and_whose_time_is_over_is_none(self, book):
        lease = book.lease(uses=1)
        book.release()
        book.now += 3601
        refused("revoke.over", book.revoke, "user/ben", lease.id)

    def test_of_a_name_says_which_versions_it_has(self, book):
        assert REF in refused("revoke.unknown", book.revoke, "user/ben", "acme/tiny").hint


class TestTheLastPeople:
    """A room without people who may grant could let nobody in again, ever."""

    def away(self, book, by, path, way):
        if way == "revoked":
            return book.revoke(by, path)
        how = {"suspended": (["officer"], "suspended"), "removed": (["officer"], "removed"), "demoted": ([], "active")}
        roles, state = how[way]
        return book.grant(by, path, *roles, state=state)

    @pytest.mark.parametrize("way", ["revoked", "suspended", "removed", "demoted"])
    def test_do_not_go(self, book, way):
        for path in ("user/bob", "user/eli"):
            book.revoke("user/ben", path)
        refused("grant.last", self.away, book, "user/ben", "user/ben", way)  # as the last but one, by his own hand
        self.away(book, "user/ben", "user/eva", way)  # but he can send her away: she may be an attacker
        refused("grant.last", self.away, book, "user/ben", "user/ben", way)
        assert book.state.principals["user/ben"].active

    @pytest.mark.parametrize("way", ["revoked", "suspended", "removed", "demoted"])
    def test_of_a_room_that_is_being_set_up_may_go_but_for_one(self, way):
        book = Book()
        book.person("user/ben", "officer")
        book.person("user/eva", "officer")
        refused_last = lambda: refused("grant.last", self.away, book, "user/ben", "user/ben", way)  # noqa: E731
        self.away(book, "user/eva", "user/eva", way)
        refused_last()

    def test_may_have_another_name(self, book):
        """It is people who count: one who has two is not gone with one of them."""
        for path in ("user/bob", "user/eli", "user/eva"):
            book.revoke("user/ben", path)
        book.person("user/ben2", "executive", person="user/ben")
        book.revoke("user/ben", "user/ben2")


class TestRenewing:
    def test_by_others_and_for_no_longer(self, book):
        book.person("user/ana-boss", "executive", person="user/ana")
        lease = book.lease(duration=3600)
        book.now += 1800
        assert "`strongroom identity ls`" in refused("auth.refused", book.renew, "user/nobody", lease.id).hint
        for path in ("user/ana-boss", "user/ana"):
            refused("approve.own", book.renew, path, lease.id)
        for path in ("user/oto", "user/abe"):
            with pytest.raises(Denied) as caught:
                book.renew(path, lease.id)
            assert caught.value.message.startswith(f"{path} may not renew ")
        none = unheard(book.renew, "user/pia", "0" * 16)
        other = unheard(book.renew, "user/pia", lease.id)
        assert other.message == none.message.replace("0" * 16, lease.id)
        assert (other.hint, other.evidence) == (none.hint, none.evidence)
        refused("approve.longer", book.renew, "user/ben", lease.id, 3601)
        book.renew("user/ben", lease.id)
        assert lease.expires_at == book.now + 3600

    @pytest.mark.parametrize("end", ENDS)
    def test_never_what_has_ended(self, book, end):
        lease = book.lease()
        ENDS[end](book, lease)
        with pytest.raises(StrongroomError):
            book.renew("user/ben", lease.id)

    def test_never_what_has_expired_or_is_used_up(self, book):
        lease = book.lease(uses=1)
        book.release()
        refused("renew.no_lease", book.renew, "user/ben", lease.id)
        lease = book.lease(duration=60)
        book.now += 60
        refused("renew.no_lease", book.renew, "user/ben", lease.id)
        refused("request.unknown", book.renew, "user/ben", "0" * 16)


class TestBreakingTheGlass:
    @pytest.mark.parametrize("leased", [False, True])
    @pytest.mark.parametrize("roles", [*itertools.combinations(ROLES, 1), *itertools.combinations(ROLES, 2), ()])
    def test_is_for_officers_and_executives_and_to_load(self, roles, leased):
        book = Book.team()
        book.person("user/x", *roles)
        if leased:
            forge_leases(book, "user/x")
        with pytest.raises(Denied):
            book.release("user/x", action="copy", glass=True)
        chiefs = {"officer", "executive"} & set(roles)
        holders = leased and {"researcher", "operator", "partner"} & set(roles)
        if (chiefs or holders) and not {"auditor", "gateway"} & set(roles):
            entry = book.release("user/x", glass=True)
            assert entry.body["break_glass"] is True
            assert entry.private == {"reason": REASON}
        else:
            with pytest.raises(Denied):
                book.release("user/x", glass=True)

    def test_opens_nothing_that_is_frozen(self, book):
        book.revoke("user/ben", REF)
        refused("version.frozen", book.release, "user/eva", glass=True)

    def test_is_for_one_release(self, book):
        book.release("user/eva", glass=True)
        with pytest.raises(Denied):
            book.release("user/eva")


def forge_leases(book, holder):
    """Leases of `holder` for everything, as if they had been granted: what is left is what policy says at a release."""
    for action in ("load", "copy"):
        asked = book.asking(holder, action=action)
        body = {
            "id": f"{len(book.entries):016x}",
            "action": action,
            "for": holder,
            "duration": 3600,
            "uses": None,
            "expires_at": book.now + DAY,
            "statement": asked.envelope,
        }
        book.add(Entry("request", book.now, holder, REF, body))
        lease = {"id": body["id"], "holder": holder, "action": action, "ref": REF, "uses": None}
        lease["expires_at"] = book.now + 3600
        body = {"id": body["id"], "duration": 3600, "uses": None, "roles": [], "lease": lease}
        body["statement"] = book.yes("user/ben", asked).envelope
        book.add(Entry("approve", book.now, "user/ben", REF, body))


class TestCeilings:
    def take(self, book, holder, action, ref=REF):
        body = {
            "action": action,
            "holder": holder,
            "lease": None,
            "revision": 1,
            "manifest": MANIFEST,
            "public_key": "9" * 64,
            "challenge": f"{len(book.entries):064x}",
            "break_glass": False,
            "statement": "",
        }
        book.add(Entry("release", book.now, holder, ref, body))

    def test_holders(self, book):
        lease = book.lease()
        for number in range(CEILINGS[0] - 1):
            self.take(book, f"user/h{number}", "load")
        book.release()  # the hundredth
        book.release()  # who has them already is not one more
        self.take(book, "user/h100", "load")
        error = refused("denied.rule", book.release)
        assert error.evidence["rule"] == "holders-ceiling"
        assert lease.used == 2
        book.lease(ref=OTHER)
        book.release(ref=OTHER)
        with pytest.raises(Denied):
            book.ask("user/pia")

    def test_copies(self, book):
        book.lease(action="copy")
        for _ in range(CEILINGS[1]):
            book.release(action="copy")
        error = refused("denied.rule", book.release, action="copy")
        assert "copies-ceiling" in error.evidence["rules"]
        refused("denied.rule", book.ask, action="copy")

    def test_people_who_have_copies(self, book):
        book.lease(action="copy")
        for number in range(CEILINGS[2]):
            self.take(book, f"user/c{number}", "copy")
        error = refused("denied.rule", book.release, action="copy")
        assert "copiers-ceiling" in error.evidence["rules"]


def small():
    """Two who may grant: not enough for grants to take both."""
    book = Book()
    for path, role in (("user/ben", "officer"), ("user/eva", "executive"), ("user/ana", "researcher")):
        book.person(path, role)
    return book


class TestGrantingOneself:
    @pytest.fixture(params=[small, Book.team])
    def book(self, request):
        book = request.param()
        yield book
        book.check()

    @pytest.mark.parametrize("role", [*ROLES, "intern"])
    def test_directly(self, book, role):
        if role != "officer":
            refused("grant.own", book.grant, "user/ben", "user/ben", "officer", role)
        refused("grant.own", book.grant, "user/ben", "user/ben", role, person="user/eva")

    def test_a_team(self, book):
        refused("grant.own", book.grant, "user/ben", "user/ben", "officer", teams=["team/chiefs"])

    def test_a_second_identity_with_roles(self, book):
        for role in ROLES:
            refused("grant.own", book.grant, "user/ben", "user/ben2", role, person="user/ben")
        refused("grant.own", book.grant, "user/ben", "user/ben2", teams=["team/chiefs"], person="user/ben")

    def test_over_a_chain_of_persons(self, book):
        book.grant("user/ben", "user/ben2", person="user/ben")
        for role in (*ROLES, None):
            roles = [role] if role else []
            refused("principal.person", book.grant, "user/ben", "user/ben3", *roles, person="user/ben2")
        refused("principal.person", book.grant, "user/ben", "user/ben3", "officer", person="user/nobody")

    def test_by_becoming_somebody_else(self, book):
        book.grant("user/ben", "user/ben2", person="user/ben")
        refused("grant.own", book.grant, "user/ben", "user/ben2", person="user/ben2")
        refused("grant.own", book.grant, "user/ben", "user/ana", "researcher", person="user/ben")

    def test_nor_does_a_person_whom_others_name_become_another(self, book):
        book.grant("user/ben", "user/ana2", "researcher", person="user/ana")
        refused("principal.person", book.grant, "user/ben", "user/ana", "researcher", person="user/eva")

    @pytest.mark.parametrize("state", ["suspended", "removed"])
    def test_by_coming_back_under_a_name_that_was_taken_away(self, book, state):
        book.person("user/ben-old", "executive", person="user/ben", state=state)
        refused("grant.own", book.grant, "user/ben", "user/ben-old", "executive", person="user/ben")
        refused("grant.own", book.grant, "user/ben", "user/ben-old", person="user/ben")

    def test_under_ones_own_key(self, book):
        key = book.signers["user/ben"].public_key.hex()
        refused("principal.key", book.grant, "user/ben", "user/new", "executive", key=key)
        refused("principal.key", book.grant, "user/ben", "user/ana", "researcher", key=key)
        book.grant("user/ben", "user/ben2", person="user/ben", key=key)

    def test_what_one_may_do(self, book):
        """Take from oneself, and change one's key."""
        book.grant("user/ben", "user/ben", "officer", key=Signer(b"n" * 32).public_key.hex())

    def test_less_for_oneself(self, book):
        book.grant("user/ben", "user/ben")
        with pytest.raises(Denied):
            book.grant("user/ben", "user/ana")


class TestRecords:
    """What is written of a principal has to be something that can be asked about: else every list of people fails."""

    @pytest.mark.parametrize(
        "bad",
        [
            {"teams": ["user/x"]},
            {"teams": ["Team/x"]},
            {"teams": ["team/" + "x" * 65]},
            {"roles": ["Chief Officer"]},
            {"roles": ["x\x1b[2J"]},
            {"roles": [""]},
            {"roles": ["r" * 65]},
            {"path": "user/" + "/".join("x" * 64 for _ in range(5))},
            {"path": "custodian"},
            {"path": "unknown"},
            {"path": "user/../x"},
            {"person": "ana"},
            {"person": ""},
        ],
    )
    def test_are_refused_when_they_could_not(self, book, bad):
        path = bad.get("path", "user/new")
        signer = book.signers.setdefault("user/new", Signer(b"n" * 32))
        body = {
            "principal": path,
            "key": signer.public_key.hex(),
            "person": bad.get("person", path),
            "roles": bad.get("roles", []),
            "teams": bad.get("teams", []),
            "state": "active",
            "before": None,
        }
        with pytest.raises(UsageError):
            book.decide(book.rules.principal, book.say("principal", "user/ben", body))

    @given(
        st.text(max_size=20),
        st.lists(st.text(max_size=8), max_size=2),
        st.lists(st.text(max_size=12) | st.just("team/x"), max_size=2),
        st.sampled_from(["active", "suspended", "removed"]),
    )
    def test_whatever_they_are(self, name, roles, teams, state):
        book = Book.team()
        body = {
            "principal": f"user/{name}",
            "key": "",
            "person": f"user/{name}",
            "roles": sorted(set(roles)),
            "teams": sorted(set(teams)),
            "state": state,
        }
        try:
            statement = book.say("principal", "user/ben", body)
        except ValueError:
            return  # not text that a statement can hold
        try:
            book.decide(book.rules.principal, statement)
        except StrongroomError:
            return
        for each in book.state.principals.values():
            subject(each)


class TestGrantsByTwo:
    @pytest.fixture
    def pending(self, book):
        book.granted, entry = book.grant("user/ben", "user/zoe", "officer")
        assert entry.type == "grant"
        return book

    def test_take_effect_with_somebody_elses_yes(self, pending):
        refused("auth.refused", pending.ask, "user/zoe")
        pending.approve("user/eva", pending.granted)
        assert pending.state.principals["user/zoe"].roles == ["officer"]
        pending.approve("user/zoe", pending.ask())

    def test_not_ones_own(self, pending):
        pending.person("user/ben2", "executive", person="user/ben")
        for path in ("user/ben", "user/ben2"):
            refused("approve.own", pending.approve, path, pending.granted)

    def test_not_by_whom_it_is_about(self, book):
        said, _ = book.grant("user/ben", "user/eva", "executive", "officer")
        refused("approve.own", book.approve, "user/eva", said)
        said, _ = book.grant("user/ben", "user/eli", "executive", person="user/eva")
        for path in ("user/eva", "user/eli"):
            refused("approve.own", book.approve, path, said)

    def test_not_by_those_who_may_not_grant(self, pending):
        for path in ("user/ana", "user/oto", "user/abe"):
            with pytest.raises(Denied):
                pending.approve(path, pending.granted)
        unheard(pending.approve, "user/pia", pending.granted)

    def test_not_twice_nor_when_over(self, pending):
        pending.approve("user/eva", pending.granted)
        refused("request.over", pending.approve, "user/bob", pending.granted)
        other, _ = pending.grant("user/ben", "user/zac", "officer")
        pending.deny("user/eva", other)
        refused("request.over", pending.approve, "user/bob", other)
        other, _ = pending.grant("user/ben", "user/zac", "officer")
        pending.now += REQUEST_LIFE
        refused("request.over", pending.approve, "user/bob", other)

    def test_not_of_a_principal_that_was_changed_since(self, book):
        """A key that was stolen and replaced must not come back with a grant that was asked for before."""
        said, _ = book.grant("user/ben", "user/ana", "operator")
        book.person("user/ana", "researcher", key=Signer(b"k" * 32).public_key.hex())
        refused("grant.outdated", book.approve, "user/eva", said)
        said, _ = book.grant("user/ben", "user/oto", "officer", "operator")
        book.revoke("user/bob", "user/oto")
        refused("grant.outdated", book.approve, "user/eva", said)

    @pytest.mark.parametrize("change", [{"state": "suspended"}, {"roles": ["researcher"]}, {"roles": []}])
    def test_not_of_somebody_who_may_not_grant_any_more(self, pending, change):
        pending.person("user/ben", *change.get("roles", ["officer"]), state=change.get("state", "active"))
        refused("grant.lapsed", pending.approve, "user/eva", pending.granted)

    def test_not_with_a_key_that_somebody_got_meanwhile(self, pending):
        pending.person("user/zed", key=pending.signers["user/zoe"].public_key.hex())
        refused("principal.key", pending.approve, "user/eva", pending.granted)

    def test_cover_every_way_to_an_approver(self, book):
        key = Signer(b"k" * 32).public_key.hex()
        book.person("user/sam", "officer", state="suspended")
        for path, roles, options in (
            ("user/new", ["executive"], {}),
            ("user/new", ["operator"], {}),
            ("user/ana", ["researcher", "officer"], {}),
            ("user/bob", ["officer"], {"key": key}),
            ("user/bob", ["officer"], {"person": "user/eli"}),
            ("user/sam", ["officer"], {}),
        ):
            _, entry = book.grant("user/ben", path, *roles, **options)
            assert entry.type == "grant"
        for path in ("user/bob", "user/eva", "user/eli"):
            _, entry = book.grant("user/ben", path, state="removed")
            assert entry.type == "principal"
        _, entry = book.grant("user/ben", "user/new", "executive")
        assert entry.type == "grant"


LENIENT = Policies.parse(TEAM.text.replace("context.approvals.total >= 2", "context.approvals.total >= 1"))


class TestProposals:
    def test_take_another_person_and_a_day(self, book):
        said = book.propose("user/ben", LENIENT)
        book.person("user/ben2", "executive", person="user/ben")
        for path in ("user/ben", "user/ben2"):
            refused("approve.own", book.approve, path, said)
        for path in ("user/ana", "user/oto", "user/abe"):
            with pytest.raises(Denied):
                book.approve(path, said)
        unheard(book.approve, "user/pia", said)
        book.now += WAITING
        with pytest.raises(Pending):
            book.enact("user/ben", said)
        book.approve("user/eva", said)
        refused("approve.duplicate", book.approve, "user/eva", said)
        book.now -= 1
        refused("policy.waiting", book.enact, "user/ben", said)
        book.now += 1
        for path in ("user/eva", "user/ana", "user/abe"):
            with pytest.raises(Denied):
                book.enact(path, said)
        book.enact("user/ben", said)
        assert book.state.policy == LENIENT.digest
        refused("policy.no_proposal", book.enact, "user/ben", said)
        refused("request.over", book.approve, "user/eli", said)
        refused("request.over", book.deny, "user/eli", said)

    @pytest.mark.parametrize(
        "change", [{"state": "suspended"}, {"roles": []}, {"roles": ["officer", "partner"]}, {"person": "user/ben"}]
    )
    def test_take_a_person_who_could_still(self, book, change):
        said = book.propose("user/ben", LENIENT)
        book.approve("user/bob", said)
        book.now += WAITING
        options = dict(change)
        book.person("user/bob", *options.pop("roles", ["officer"]), **options)
        refused("policy.needs_second", book.enact, "user/ben", said)
        book.approve("user/eva", said)
        book.enact("user/ben", said)

    def test_of_somebody_who_may_not_any_more_take_two_others(self, book):
        said = book.propose("user/ben", LENIENT)
        book.approve("user/bob", said)
        book.now += WAITING
        book.revoke("user/eva", "user/ben")
        refused("policy.needs_second", book.enact, "user/bob", said)
        book.approve("user/eva", said)
        book.enact("user/bob", said)

    def test_do_not_wait_in_an_emergency(self, book):
        said = book.propose("user/ben", LENIENT)
        refused("policy.needs_second", book.enact, "user/ben", said, REASON)
        book.approve("user/eva", said)
        refused("policy.waiting", book.enact, "user/ben", said)
        with pytest.raises(Denied):
            book.enact("user/eva", said, REASON)
        entry = book.enact("user/ben", said, REASON)
        assert entry.body["break_glass"]
        assert book.state.policy == LENIENT.digest
        at = len(book.entries) - 1
        assert book.state.emergencies == {str(at): "user/ben"}
        book.act("review", "user/bob", {"size": at, "findings": 0, "removed": 0})  # who has not seen it
        book.act("review", "user/ben", {"size": at + 1, "findings": 0, "removed": 0})  # whose own it is
        assert book.state.emergencies
        book.act("review", "user/bob", {"size": at + 1, "findings": 0, "removed": 0})
        assert not book.state.emergencies

    def test_that_were_denied(self, book):
        said = book.propose("user/ben", LENIENT)
        book.approve("user/eva", said)
        with pytest.raises(Denied):
            book.deny("user/ana", said)
        book.deny("user/eli", said)
        book.now += WAITING
        refused("policy.no_proposal", book.enact, "user/ben", said)
        other = book.propose("user/ben", LENIENT)
        book.deny("user/ben", other)  # it may be taken back

    def test_while_the_clock_is_behind(self, book):
        said = book.propose("user/ben", LENIENT)
        book.approve("user/eva", said)
        book.now += WAITING
        book.ask()
        book.now -= 301
        refused("clock.backwards", book.enact, "user/ben", said)

    def test_unknown(self, book):
        refused("policy.no_proposal", book.enact, "user/ben", book.asking("user/ana"))


REVIEWED = Policies.parse(
    TEAM.text.replace("context.approvals.officers + context.approvals.executives >= 1", "context.approvals.total >= 1")
    + """
@id("reviewers-approve") @reason("Reviewers approve.")
permit (principal in Strongroom::Role::"reviewer", action == Strongroom::Action::"approve", resource);
"""
)
APPROVERS = st.lists(st.sets(st.sampled_from(["officer", "executive", "operator", "auditor"]), max_size=3), max_size=2)


class TestExplanations:
    """What is said to be needed is what it takes: exactly these approvals, in any order, and nothing less."""

    def approvals_do(self, book, asked, chance):
        request = book.state.requests[asked.id]
        query = book.rules._grant(
            book.state,
            book.state.principals[request.holder],
            request.action,
            request.ref,
            request.approvals,
            request.duration,
            book.now,
        )
        policies = book.texts[book.state.policy]
        missing = what_is_missing(policies, query)
        said = book.rules.missing(book.state, request, book.now)()
        assert said == list(missing.needs(query))
        entries, before = len(book.entries), copy.deepcopy(book.state)
        for number, roles in enumerate(missing.combinations):
            for place, role in enumerate(chance.sample(roles, len(roles))):
                path = f"user/giver{number}-{place}"
                book.person(path, role or "reviewer")
                lease = book.approve(path, asked)
                assert bool(lease) == (place == len(roles) - 1)
            book.release(request.holder, action=request.action)
            book.check()
            # And the next one, on the same state as before.
            del book.entries[entries:]
            book.state = copy.deepcopy(before)
        # Fewer people, whoever they are, would not have done.
        for place in range(len(missing.combinations[0]) - 1):
            path = f"user/all{place}"
            book.person(path, "officer", "executive")
            assert book.approve(path, asked) is None

    @settings(max_examples=40)
    @given(
        roles=st.sets(st.sampled_from([*ROLES, "intern"])),
        action=st.sampled_from(["load", "copy"]),
        given=APPROVERS,
        chance=st.randoms(use_true_random=False),
        policies=st.sampled_from([TEAM, REVIEWED]),
    )
    def test_are_true(self, roles, action, given, chance, policies):
        book = Book(policies)
        book.person("user/ben", "officer")
        book.person("user/h", *roles)
        try:
            asked = book.ask("user/h", action=action)
        except Denied:
            # Then nobody's approvals would do: neither of two executives nor of everybody.
            assert not {"researcher", "operator", "partner"} & roles or {"officer", "auditor", "gateway"} & roles
            return
        for number, held in enumerate(given):
            path = f"user/early{number}"
            book.person(path, *held)
            try:
                if book.approve(path, asked):
                    return
            except (Denied, NotFound):  # a guest is told that there is nothing to approve
                assert not {"officer", "executive"} & held
        self.approvals_do(book, asked, chance)

    def test_of_approvals_by_people_of_no_rank(self):
        book = Book(REVIEWED)
        book.person("user/ana", "researcher")
        asked = book.ask()
        for path in ("user/r1", "user/r2"):
            book.person(path, "reviewer")
        assert book.approve("user/r1", asked) is None
        (needs,) = book.rules.missing(book.state, book.state.requests[asked.id], book.now)()
        assert needs.startswith("1 more approval by others")
        assert book.approve("user/r2", asked)


# What each role may do at the level of custody, under the policy of a team; whoever is not named is refused.
DOES = {
    "ask to load": ({"researcher", "operator", "partner"}, lambda book: book.ask("user/x")),
    "ask for a copy": ({"researcher", "operator", "partner"}, lambda book: book.ask("user/x", action="copy")),
    "ask to trace": ({"operator", "officer"}, lambda book: book.ask("user/x", action="trace")),
    "ask for others": ({"operator", "officer", "executive"}, lambda book: book.ask("user/x", holder="user/ana")),
    "approve": ({"officer", "executive"}, lambda book: book.approve("user/x", book.ask("user/ana"))),
    "approve a policy": (
        {"officer", "executive"},
        lambda book: book.approve("user/x", book.propose("user/ben", LENIENT)),
    ),
    "approve a grant": (
        {"officer", "executive"},
        lambda book: book.approve("user/x", book.grant("user/ben", "user/z", "officer")[0]),
    ),
    "deny": ({"officer", "executive"}, lambda book: book.deny("user/x", book.ask("user/ana"))),
    "deny a policy": ({"officer", "executive"}, lambda book: book.deny("user/x", book.propose("user/ben", LENIENT))),
    "revoke a lease": ({"officer", "executive"}, lambda book: book.revoke("user/x", book.lease().id)),
    "revoke a person": ({"officer", "executive"}, lambda book: book.revoke("user/x", "user/ana")),
    "revoke a version": ({"officer", "executive"}, lambda book: book.revoke("user/x", REF)),
    "renew": ({"officer", "executive"}, lambda book: book.renew("user/x", book.lease().id)),
    "load without a lease": (set(), lambda book: book.release("user/x")),
    "copy without a lease": (set(), lambda book: book.release("user/x", action="copy")),
    "load under a lease": (
        {"researcher", "operator", "partner"},
        lambda book: (forge_leases(book, "user/x"), book.release("user/x")),
    ),
    "copy under a lease": (
        {"researcher", "operator", "partner"},
        lambda book: (forge_leases(book, "user/x"), book.release("user/x", action="copy")),
    ),
    "break the glass": ({"officer", "executive"}, lambda book: book.release("user/x", glass=True)),
    "register": ({"officer", "executive"}, lambda book: book.grant("user/x", "user/z", "researcher")),
    "take roles away": ({"officer", "executive"}, lambda book: book.grant("user/x", "user/ana")),
    "propose": ({"officer"}, lambda book: book.propose("user/x", LENIENT)),
    "enact": ({"officer"}, lambda book: book.enact("user/x", ready(book))),
    **{
        kind: ({"operator"} if kind == "put" else {"officer"}, lambda book, kind=kind: act(book, kind))
        for kind in SAID
        if kind != "copy"
    },
    **{
        f"{action} {ref}": (roles, lambda book, action=action, ref=ref: may(book, action, ref))
        for action, ref, roles in (
            ("put", "room", {"operator"}),
            ("trace", "room", {"operator", "officer"}),
            ("trace", REF, set()),
            ("infer", REF, {"partner", "researcher", "operator"}),
            ("adapt", REF, set()),
            ("audit", "room", {"auditor"}),
            ("relay", "room", {"gateway"}),
            ("administer", REF, {"officer"}),
            ("grant", "room", {"officer", "executive"}),
        )
    },
}


def ready(book):
    said = book.propose("user/ben", LENIENT)
    book.approve("user/eva", said)
    book.now += WAITING
    return said


def act(book, kind):
    return book.act(kind, "user/x", SAID[kind][1])


def spoke(state, path):
    return Speaker(state.principals[path], OWN_KEY)


def may(book, action, ref):
    return book.rules.may(book.state, spoke(book.state, "user/x"), action, ref, now=book.now)


_ANSWERS = ("approve", "deny", "renew", "revoke")  # of which guests are not told that there is anything to answer


@pytest.mark.parametrize("role", [*ROLES, "intern", "officers", ""])
@pytest.mark.parametrize("does", DOES)
def test_who_is_not_named_is_refused(does, role):
    allowed, act = DOES[does]
    book = Book.team()
    book.person("user/x", *([role] if role else []))
    if role in allowed:
        act(book)
        return
    with pytest.raises(StrongroomError) as caught:
        act(book)
    hidden = ("request.unknown",) if role in ("partner", "gateway", "") and does.split()[0] in _ANSWERS else ()
    assert isinstance(caught.value, Denied | UsageError) or hidden
    assert caught.value.code in (hidden or ("denied.default", "denied.rule", "request.for_other", "request.not_needed"))


class TestTheFold:
    def test_an_entry_that_refers_to_nothing(self, book):
        lease = {"id": "0" * 16, "holder": "user/x", "action": "load", "ref": REF, "expires_at": 1, "uses": None}
        approve = {"id": "0" * 16, "duration": 1, "uses": None, "roles": [], "statement": "", "lease": lease}
        release = {
            "action": "load",
            "holder": "user/ana",
            "lease": "0" * 16,
            "revision": 1,
            "manifest": MANIFEST,
            "public_key": "9" * 64,
            "challenge": "9" * 64,
            "break_glass": False,
            "statement": "",
        }
        for kind, ref, body in (
            ("approve", REF, approve),
            ("deny", REF, {"id": "0" * 16, "statement": ""}),
            ("release", REF, release),
            ("renew", REF, {"lease": "0" * 16, "expires_at": 1, "statement": ""}),
            ("revoke", "", {"target": "acme/tiny@7", "statement": ""}),
            ("rotate", "acme/tiny@7", {"revision": 2, "manifest": MANIFEST}),
            ("shred", "acme/tiny@7", {}),
            ("policy", "", {"digest": TEAM.digest, "proposal": "0" * 16}),
            ("genesis", "", dict(book.entries[0].body)),
        ):
            state = copy.deepcopy(book.state)
            with pytest.raises(Tampered) as caught:
                state.apply(len(book.entries), Entry(kind, NOW, "user/ben", ref, body))
            assert caught.value.code == "log.malformed"

    def test_begins_with_genesis_and_only_with_it(self):
        with pytest.raises(Tampered):
            State().apply(0, Entry("refused", NOW, "user/ana", "", {"action": "x", "code": "x.y", "rule": ""}))

    def test_a_snapshot_that_lacks_something(self, book):
        whole = json.loads(json.dumps(book.state.as_json()))
        for name in ("principals", "versions", "requests", "leases", "uses", "proposals", "grants"):
            with pytest.raises(Tampered):
                State.from_json({each: value for each, value in whole.items() if each != name})
        with pytest.raises(Tampered):
            State.from_json({**whole, "more": 1})

    def test_time_goes_back_with_a_clock_entry_only(self, book):
        book.now += YEAR
        book.ask()
        latest = book.state.latest
        book.add(Entry("refused", NOW, "user/ana", "", {"action": "x", "code": "x.y", "rule": ""}))
        assert book.state.latest == latest
        book.now = NOW
        book.clock()
        assert book.state.latest == NOW


class TestTraces:
    def say(self, book, by, ref=REF, lease=None):
        return book.say("trace", by, {"suspect": MANIFEST, "ref": ref, "lease": lease})

    def trace(self, book, by, ref=REF, lease=None, verdict="none", accused=()):
        return acts.trace(book.rules, book.state, self.say(book, by, ref, lease), book.now, verdict, accused)

    def test_say_what_was_searched_for_what_and_by_whom(self, book):
        lease = book.lease("user/oto", by=("user/ben",), action="trace")
        for ref, under in ((REF, lease.id), (None, None)):
            entry = book.add(self.trace(book, "user/oto", ref, under, "one", ["user/ana"]))
            assert (entry.type, entry.by, entry.ref) == ("trace", "user/oto", ref or "")
            assert entry.body["suspect"] == MANIFEST
            assert (entry.body["verdict"], entry.body["accused"]) == ("one", ["user/ana"])

    def test_take_a_lease_of_ones_own_for_that_very_version(self, book):
        for by in ("user/ana", "user/eva", "user/pia", "user/oto", "user/ben"):
            with pytest.raises(Denied):
                self.trace(book, by)
        given = 'context.stage == "grant" && context.approvals.total >= 2'
        taken = 'context.stage == "release" && context.lease'
        rule = '@id("trace-{}") @reason("By lease.") permit (principal, action == {}, resource) when {{ {} }};'
        action = 'Strongroom::Action::"trace"'
        rules = [rule.format(number, action, when) for number, when in enumerate((given, taken))]
        book.put_in_force(Policies.parse("\n".join([TEAM.text, *rules])))
        lease = book.lease(action="trace", uses=1)
        for by, ref in (("user/ben", REF), ("user/ana", OTHER), ("user/ana", None)):
            with pytest.raises(Denied) as caught:
                self.trace(book, by, ref, lease.id)
            assert caught.value.code == "trace.lease"
        with pytest.raises(Denied):  # a lease that is there, and that nobody has named
            self.trace(book, "user/ana")
        book.add(self.trace(book, "user/ana", REF, lease.id))
        with pytest.raises(Denied):  # it was for one use
            self.trace(book, "user/ana", REF, lease.id)

    def test_of_what_is_not_there(self, book):
        with pytest.raises(NotFound):
            self.trace(book, "user/oto", "acme/none@1")

    def ended(self, book, said, since):
        """What a search comes to that began at `since`."""
        return acts.trace(book.rules, book.state, said, book.now, "one", [], since=since)

    def test_a_search_that_began_under_a_lease_is_told_of_after_the_time_of_the_lease(self, book):
        lease = book.lease("user/oto", by=("user/ben",), action="trace", duration=3600)
        book.now = lease.expires_at - 1
        said, since = self.say(book, "user/oto", REF, lease.id), book.now
        book.now += 7 * 3600
        assert book.add(self.ended(book, said, since)).body["lease"] == lease.id
        late = self.say(book, "user/oto", REF, lease.id)  # what begins now has no lease
        with pytest.raises(Denied) as caught:
            self.ended(book, late, book.now)
        assert caught.value.code == "trace.lease"

    @pytest.mark.parametrize(
        ("by", "target"), [("user/eva", "lease"), ("user/ben", "user/oto"), ("user/eva", REF), ("user/oto", "lease")]
    )
    def test_what_was_revoked_meanwhile_is_not_told_and_that_is_said(self, book, by, target):
        lease = book.lease("user/oto", by=("user/ben",), action="trace")
        said, since = self.say(book, "user/oto", REF, lease.id), book.now
        book.now += 60
        book.revoke(by, lease.id if target == "lease" else target)
        with pytest.raises((Denied, AuthRequired)) as caught:
            self.ended(book, said, since)
        if target != "user/oto":  # who is nobody now
            assert caught.value.code == "trace.lease"
            assert f"ended meanwhile: revoked in entry {len(book.entries) - 1}" in caught.value.message
            assert caught.value.hint == f"strongroom requests {lease.id}"

    def test_who_was_suspended_and_is_back_has_the_lease_no_more(self, book):
        lease = book.lease("user/oto", by=("user/ben",), action="trace")
        said, since = self.say(book, "user/oto", REF, lease.id), book.now
        book.now += 60
        book.person("user/oto", "operator", state="suspended")
        book.person("user/oto", "operator")
        with pytest.raises(Denied) as caught:
            self.ended(book, said, since)
        assert "ended meanwhile: the principal changed in entry" in caught.value.message

    def test_of_two_searches_under_a_lease_for_one_the_second_is_not_told(self, book):
        lease = book.lease("user/oto", by=("user/ben",), action="trace", uses=1)
        first, second = (self.say(book, "user/oto", REF, lease.id) for _ in range(2))
        second = book.say("trace", "user/oto", {**second.body, "suspect": "d" * 64})
        since, book.now = book.now, book.now + 60
        book.add(self.ended(book, first, since))
        with pytest.raises(Denied) as caught:
            self.ended(book, second, since)
        assert "ended meanwhile: other searches have used it up" in caught.value.message


def test_what_a_principal_is_does_not_change_with_what_is_made_of_it(book):
    """Entries and state share nothing that one could change under the other."""
    entry = book.entries[4]
    before = asdict(book.state.principals[entry.ref])
    with pytest.raises((TypeError, AttributeError)):
        entry.body = {}
    entry.body["roles"].append("executive")
    assert asdict(book.state.principals[entry.ref]) == before
    entry.body["roles"].pop()


class TestStale:
    def test_a_change_of_an_older_record_brings_nothing_back(self, book):
        said = book.granting("user/ben", "user/ana", "researcher", "auditor")
        book.revoke("user/bob", "user/ana")
        refused("principal.changed", book.decide, book.rules.principal, said)
        assert book.state.principals["user/ana"].state == "suspended"

    def test_nor_is_somebody_made_twice(self, book):
        first, second = (book.granting("user/ben", "user/new", role) for role in ("auditor", "researcher"))
        book.decide(book.rules.principal, first)
        refused("principal.changed", book.decide, book.rules.principal, second)


class TestRenewingForLess:
    def test_ends_nothing_early(self, book):
        lease = book.lease(duration=8 * 3600)
        book.now += 60
        refused("renew.shorter", book.renew, "user/ben", lease.id, 60)
        until = lease.expires_at
        book.renew("user/ben", lease.id)
        assert book.state.leases[lease.id].expires_at > until


class TestTakingAwayUnderARuleAboutApprovals:
    """The recipe of docs/how-to/passkeys.md: approvals take a passkey, and nobody has one here."""

    RULE = (
        '@id("approvals-by-passkey") @reason("By passkey.") @ask("--passkey") '
        'forbid (principal, action == Strongroom::Action::"approve", resource) '
        'unless { context.authentication == "passkey" || context.asked == "" };'
    )

    def test_is_possible_still(self, book):
        lease, asked = book.lease(duration=2 * DAY), book.ask(ref=OTHER)
        book.put_in_force(Policies.parse(f"{TEAM.text}\n{self.RULE}"))
        refused("denied.rule", book.approve, "user/ben", asked)
        refused("denied.rule", book.renew, "user/ben", lease.id)
        for target in (lease.id, OTHER, "user/ana"):
            book.revoke("user/ben", target)


class TestDenying:
    def test_a_grant_is_for_who_could_agree_to_it(self, book):
        said, _ = book.grant("user/ben", "user/new", "officer")
        with pytest.raises(Denied):
            book.deny("user/ana", said)
        book.deny("user/eva", said)
        refused("request.over", book.deny, "user/eva", said)
        late, _ = book.grant("user/ben", "user/newer", "officer")
        book.now += REQUEST_LIFE
        assert refused("request.over", book.deny, "user/eva", late).evidence["state"] == "expired"


class TestVersionsAndGuests:
    """Whoever has no business with weights does not find out which there are by asking for them."""

    def same(self, call, known, unknown="acme/none@7"):
        errors = []
        for ref in (known, unknown):
            with pytest.raises(StrongroomError) as caught:
                call(ref)
            errors.append(json.dumps(caught.value.as_json()).replace(ref, "REF"))
        assert errors[0] == errors[1]
        return caught.value

    def test_without_a_role(self, book):
        book.person("user/x")
        for action in ("load", "copy"):
            error = self.same(lambda ref, action=action: book.ask("user/x", ref=ref, action=action), REF)
            assert "that takes the role" in error.message  # it is told what it lacks all the same
            self.same(lambda ref, action=action: book.release("user/x", ref=ref, action=action), REF)

    def test_a_frozen_version_that_it_never_asked_for(self, book):
        lease = book.lease("user/pia")
        book.revoke("user/ben", REF)
        book.revoke("user/ben", OTHER)
        assert self.same(lambda ref: book.ask("user/pia", ref=ref), OTHER).code == "version.missing"
        assert self.same(lambda ref: book.release("user/pia", ref=ref), OTHER).code == "version.missing"
        # Of what it had it learns why it has it no more.
        refused("version.frozen", book.release, "user/pia")
        assert lease.ended
