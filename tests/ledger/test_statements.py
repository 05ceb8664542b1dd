"""Acts in a log, checked offline: what a custodian that lies can't write in somebody's name (spec/ledger.md, section 7,
step 5)."""

from __future__ import annotations

import pytest

from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import Tampered
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.ledger.statements import Statements

ROOM, NOW, DAY = "ab" * 16, 1_790_000_000, 86_400
REF = "acme/tiny@1"
DIGEST, OTHER = "5" * 64, "6" * 64
PEOPLE = {path: Signer(path.encode().ljust(32, b".")) for path in ("user/ana", "user/ben", "user/eva", "user/bis")}

# Kind of statement: what is said, the entry's type, its body besides what is said, ref and private.
ACTS = {
    "put": (
        {"name": "acme/tiny", "files": DIGEST},
        "put",
        {"version": "e" * 32, "revision": 1, "manifest": DIGEST, "bytes": 1, "positions": 1},
        REF,
        {"files": DIGEST},
    ),
    "rotate": ({"ref": REF}, "rotate", {"revision": 2, "manifest": DIGEST}, REF, {}),
    "shred": ({"ref": REF}, "shred", {}, REF, {}),
    "copy": ({"ref": REF, "holder": "user/ben", "release": 3, "files": 2, "bytes": 1}, "copy", {}, REF, {}),
    "ceiling": ({"ref": "acme/tiny", "holders": 3, "copies": 2, "copiers": 1}, "ceiling", {}, "acme/tiny", {}),
    "thaw": ({"ref": REF, "reason": DIGEST}, "thaw", {}, REF, {"reason": DIGEST}),
    "clock": ({"reason": DIGEST}, "clock", {"before": 9}, "", {"reason": DIGEST}),
    "redact": ({"entry": 3}, "redact", {}, "", {}),
    "review": ({"size": 3, "findings": 2, "removed": 1}, "review", {}, "", {}),
    "keystore": ({"operation": "rotate", "epoch": 2}, "keystore", {}, "", {}),
}
# What the custodian alone knows, and nobody has signed.
OWN = {"version", "revision", "manifest", "bytes", "positions", "before"}


class Log:
    """A log that has begun, with four people in it, one of them twice."""

    def __init__(self):
        self.entries = []
        self.write("genesis", "custodian", {"room": ROOM, "signer": DIGEST, "policy": DIGEST, "custody": "team"})
        for path in PEOPLE:
            self.person(path)

    def person(self, path, state="active", by="custodian", statement=""):
        body = {"principal": path, "key": PEOPLE[path].public_key.hex(), "roles": ["officer"], "teams": []}
        body |= {"person": "user/ben" if path == "user/bis" else path, "state": state, "statement": statement}
        self.write("principal", by, body, path)

    def say(self, kind, by, body, at=NOW):
        return Statement.sign(kind, body, room=ROOM, by=by, at=at, signer=PEOPLE[by])

    def write(self, kind, by, body, ref="", private=None, at=NOW):
        self.entries.append(Entry.decode(Entry(kind, at, by, ref, body, private or {}).encode()))

    def act(self, kind, by="user/ben", *, said=None, at=NOW, changes=None, **fields):
        body, written, more, ref, private = ACTS[kind]
        said = self.say(kind, by, body) if said is None else said
        shared = {name: body[name] for name in body if name not in ("ref", "name", "reason") and kind != "put"}
        body = {**shared, **more, "statement": said if isinstance(said, str) else said.envelope, **(changes or {})}
        found = {"ref": ref, "private": private, "by": by, **fields}
        self.write(written, found["by"], body, found["ref"], found["private"], at=at)

    def propose(self, by="user/ben", digest=DIGEST):
        said = self.say("propose", by, {"digest": digest, "reason": OTHER})
        body = {"id": said.id, "digest": digest, "enact_after": NOW + DAY, "statement": said.envelope}
        self.write("proposal", by, body, private={"reason": OTHER})
        return said

    def approve(self, by, asked):
        said = self.say("approve", by, {"request": asked.digest, "duration": 0, "uses": None})
        body = {"id": asked.id, "duration": 0, "uses": None, "roles": ["officer"], "lease": None}
        self.write("approve", by, body | {"statement": said.envelope})

    def enact(self, asked, by="user/ben", *, at=NOW + DAY, digest=DIGEST, reason="", **changes):
        said = self.say("enact", by, {"proposal": asked.id, "reason": reason})
        body = {"digest": digest, "proposal": asked.id, "break_glass": bool(reason), "statement": said.envelope}
        self.write("policy", by, body | changes, private={"reason": reason} if reason else {}, at=at)

    def verify(self):
        statements = Statements(f"strongroom/{ROOM}", signatures.verify)
        for index, entry in enumerate(self.entries):
            statements.check(index, entry)
        return statements.count

    def refused(self, code):
        *before, last = self.entries
        with pytest.raises(Tampered) as caught:
            self.verify()
        assert caught.value.code == code
        self.entries = before
        self.verify()  # it is the last one that is refused
        self.entries.append(last)


@pytest.fixture
def log():
    return Log()


@pytest.mark.parametrize("kind", ACTS)
class TestActs:
    def test_that_were_said(self, log, kind):
        log.act(kind)
        assert log.verify() == 1

    def test_that_nobody_has_said(self, log, kind):
        log.act("redact", "user/ana")
        for by in ("user/ben", "custodian"):
            log.entries = log.entries[:6]
            log.act(kind, by, said="")
            log.refused("statement.missing")

    def test_that_another_has_said(self, log, kind):
        log.act(kind, said=log.say(kind, "user/eva", ACTS[kind][0]))
        log.refused("statement.foreign")

    def test_twice(self, log, kind):
        log.act(kind)
        log.entries.append(log.entries[-1])
        log.refused("statement.replayed")

    @pytest.mark.parametrize("state", ["suspended", "removed", "revoked"])
    def test_by_somebody_who_may_not_act_any_more(self, log, kind, state):
        if state == "revoked":
            said = log.say("revoke", "user/eva", {"target": "user/ben", "reason": DIGEST})
            body = {"target": "user/ben", "statement": said.envelope}
            log.write("revoke", "user/eva", body, "user/ben", {"reason": DIGEST})
        else:
            log.person("user/ben", state)
        log.act(kind)
        log.refused("statement.foreign")
        log.entries.pop()
        said = {"principal": "user/ben", "key": PEOPLE["user/ben"].public_key.hex(), "person": "user/ben"}
        said |= {"roles": ["officer"], "teams": [], "state": "active", "before": 9}
        log.person("user/ben", by="user/eva", statement=log.say("principal", "user/eva", said).envelope)
        log.act(kind)
        log.verify()

    def test_of_which_the_entry_says_something_else(self, log, kind):
        log.act(kind)
        entry = log.entries.pop()
        for name, value in entry.body.items():
            if name in OWN | {"statement", "operation"}:
                continue
            log.act(kind, changes={name: value + 1 if isinstance(value, int) else "user/eva"})
            log.refused("statement.differs")
            log.entries.pop()
        for name in entry.private:
            for private in ({}, {name: OTHER}):
                log.act(kind, private=private)
                log.refused("statement.differs")
                log.entries.pop()
        if entry.ref:
            log.act(kind, ref="acme/other@1")
            log.refused("statement.differs")


def test_a_put_is_of_whatever_number(log):
    log.act("put", ref="acme/tiny@7")
    log.verify()


def test_what_was_there_when_the_log_began_nobody_has_said(log):
    """A room of a release without a log: its versions are brought in by the upgrade."""
    log.act("put", "custodian", said="")
    log.act("shred", "custodian", said="")
    assert log.verify() == 0


def test_who_recovers_a_room_shows_shares_and_no_key(log):
    log.act("redact")
    log.act("keystore", "custodian", said="", changes={"operation": "recover"})
    log.verify()
    log.act("keystore", "user/ben", said="", changes={"operation": "recover"})
    log.refused("statement.missing")


class TestPolicies:
    def test_take_two_people_and_a_day(self, log):
        asked = log.propose()
        log.enact(asked)
        log.refused("policy.hasty")
        log.entries.pop()
        log.approve("user/bis", asked)  # who is the same person
        log.enact(asked)
        log.refused("policy.hasty")
        log.entries.pop()
        log.approve("user/eva", asked)
        log.enact(asked, at=NOW + DAY - 1)
        log.refused("policy.hasty")
        log.entries.pop()
        log.enact(asked)
        log.verify()
        log.enact(asked, "user/eva")
        log.refused("policy.unproposed")

    def test_are_those_that_were_proposed(self, log):
        asked, other = log.propose(), log.propose(digest=OTHER)
        log.approve("user/eva", asked)
        log.enact(asked, digest=OTHER)
        log.refused("policy.unproposed")
        log.entries.pop()
        log.enact(asked, proposal=other.id, digest=OTHER)
        log.refused("statement.differs")
        log.entries.pop()
        log.enact(other, digest=OTHER)
        log.refused("policy.hasty")

    def test_that_did_not_wait_are_somebodys_emergency(self, log):
        asked = log.propose()
        log.enact(asked, at=NOW, reason=OTHER)
        log.refused("policy.hasty")  # two people it takes all the same
        log.entries.pop()
        log.approve("user/eva", asked)
        log.enact(asked, at=NOW, reason=OTHER)
        log.verify()
        log.entries.pop()
        for changes in ({"break_glass": True}, {"reason": OTHER, "break_glass": False}):
            log.enact(asked, at=NOW, **changes)
            with pytest.raises(Tampered):
                log.verify()
            log.entries.pop()

    def test_are_not_enacted_on_the_custodians_word(self, log):
        asked = log.propose()
        log.approve("user/eva", asked)
        body = {"digest": DIGEST, "proposal": asked.id, "break_glass": False, "statement": ""}
        log.write("policy", "custodian", body, at=NOW + DAY)
        log.refused("statement.missing")
