"""Acts in a log, checked offline: what a custodian that lies can't write in somebody's name (spec/ledger.md, section 7,
step 5)."""

from __future__ import annotations

import pytest

from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import Tampered
from strongroom.formats.authority import Authority
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.ledger.statements import Statements

ROOM, NOW, DAY = "ab" * 16, 1_790_000_000, 86_400
REF = "acme/tiny@1"
DIGEST, OTHER = "5" * 64, "6" * 64
PEOPLE = {
    path: Signer(path.encode().ljust(32, b"."))
    for path in ("user/ana", "user/ben", "user/bis", "user/eva", "user/new", "team/new")
}
PUT = {"version": "e" * 32, "revision": 1, "manifest": DIGEST, "bytes": 1, "positions": 1}
ISSUER = "https://id.example"
COPIED = 6  # the index of the release to copy that each log has

# Kind of statement: what is said, the entry's type, its body besides what is said, ref and private.
ACTS = {
    "put": (
        {"name": "acme/new", "files": DIGEST},
        "put",
        PUT,
        "acme/new@1",
        {"files": DIGEST},
    ),
    "rotate": ({"ref": REF}, "rotate", {"revision": 2, "manifest": DIGEST}, REF, {}),
    "shred": ({"ref": REF}, "shred", {}, REF, {}),
    "copy": ({"ref": REF, "holder": "user/ben", "release": COPIED, "files": 2, "bytes": 1}, "copy", {}, REF, {}),
    "ceiling": ({"ref": "acme/tiny", "holders": 3, "copies": 2, "copiers": 1}, "ceiling", {}, "acme/tiny", {}),
    "thaw": ({"ref": REF, "reason": DIGEST}, "thaw", {}, REF, {"reason": DIGEST}),
    "clock": ({"reason": DIGEST}, "clock", {"before": 9}, "", {"reason": DIGEST}),
    "redact": ({"entry": 3}, "redact", {}, "", {}),
    "trace": (
        {"suspect": DIGEST, "ref": REF, "lease": None},
        "trace",
        {"verdict": "one", "accused": ["user/eva"]},
        REF,
        {"detail": OTHER},
    ),
    "review": ({"size": 3, "findings": 2, "removed": 1}, "review", {}, "", {}),
    "keystore": ({"operation": "rotate", "epoch": 2}, "keystore", {}, "", {}),
}
# What the custodian alone knows, and nobody has signed.
OWN = {"version", "revision", "manifest", "bytes", "positions", "before", "verdict", "accused", "detail"}


class Log:
    """A log that has begun, with four people in it, one of them twice."""

    def __init__(self):
        self.entries = []
        self.write("genesis", "custodian", {"room": ROOM, "signer": DIGEST, "policy": DIGEST, "custody": "team"})
        self.people = {}
        self.person("user/ana", by="custodian")
        self.write("put", "custodian", {**PUT, "statement": ""}, REF)
        for path in ("user/ben", "user/bis", "user/eva"):
            self.person(path)
        said = {"action": "copy", "ref": REF, "holder": "user/ben", "public_key": DIGEST, "challenge": DIGEST}
        said = self.say("release", "user/ben", {**said, "break_glass": False, "reason": ""})
        body = {name: said.body[name] for name in ("action", "holder", "public_key", "challenge", "break_glass")}
        body |= {"lease": None, "revision": 1, "manifest": DIGEST, "statement": said.envelope}
        assert len(self.entries) == COPIED
        self.write("release", "user/ben", body, REF)

    def person(self, path, state="active", by="user/ana", **changes):
        body = {"principal": path, "key": PEOPLE[path].public_key.hex(), "roles": ["officer"], "teams": []}
        body |= {"person": "user/ben" if path == "user/bis" else path, "state": state, **changes}
        if by == "custodian":
            said = ""
        else:
            said = self.say("principal", by, {**body, "before": self.people.get(path)}).envelope
        self.people[path] = len(self.entries)
        self.write("principal", by, {**body, "statement": said}, path)

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

    def propose(self, by="user/ben", digest=DIGEST, wait=DAY):
        said = self.say("propose", by, {"digest": digest, "reason": OTHER})
        body = {"id": said.id, "digest": digest, "enact_after": NOW + wait, "statement": said.envelope}
        self.write("proposal", by, body, private={"reason": OTHER})
        return said

    def approve(self, by, asked):
        said = self.say("approve", by, {"request": asked.digest, "duration": 0, "uses": None})
        body = {"id": asked.id, "duration": 0, "uses": None, "roles": ["officer"], "lease": None}
        self.write("approve", by, body | {"statement": said.envelope})

    def enact(self, asked, by="user/ben", *, at=NOW + DAY, digest=DIGEST, reason="", **changes):
        said = self.say("enact", by, {"proposal": asked.id, "reason": reason}, at=at)
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
        assert log.verify() == len(log.entries) - 3

    def test_that_nobody_has_said(self, log, kind):
        log.act("redact", "user/ana")
        for by in ("user/ben", "custodian"):
            log.entries = log.entries[: COPIED + 2]
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

    def test_of_which_the_entry_says_something_else(self, log, kind):
        log.act(kind)
        entry = log.entries.pop()
        for name, value in entry.body.items():
            if name in OWN | {"statement", "operation"}:
                continue
            other = value + 1 if isinstance(value, int) else OTHER[:16] if name == "lease" else "user/eva"
            log.act(kind, changes={name: OTHER if name == "suspect" else other})
            log.refused("statement.differs")
            log.entries.pop()
        for name in entry.private.keys() - OWN:
            for private in ({}, {name: OTHER}):
                log.act(kind, private=private)
                log.refused("statement.differs")
                log.entries.pop()
        if entry.ref:
            log.act(kind, ref="acme/other@1")
            log.refused("statement.differs")


def test_a_put_is_of_a_new_version_of_its_name(log):
    log.act("put", ref="acme/new@7")
    log.verify()
    log.act("put", ref="acme/new@7")
    log.refused("log.unfounded")
    log.entries.pop()
    for ref in ("acme/new", "acme/new@", "acme/new@0", "acme/new@1@\n x"):
        log.act("put", ref=ref)
        log.refused("log.unfounded")
        log.entries.pop()


def test_what_was_there_when_the_log_began_nobody_has_said(log):
    """A room of a release without a log: its versions are brought in by the upgrade."""
    log.entries = log.entries[:2]
    log.act("put", "custodian", said="")
    log.act("shred", "custodian", said="", ref="acme/new@1")
    assert log.verify() == 0


def test_a_room_has_one_owner(log):
    log.entries = log.entries[:2]
    log.person("user/eva", by="custodian")
    log.refused("statement.missing")


@pytest.mark.parametrize("kind", ACTS)
def test_what_was_held_back_is_not_another_days_decision(log, kind):
    log.act(kind, at=NOW + 301)
    if kind in ("put", "trace"):  # which take their time
        log.verify()
    else:
        log.refused("statement.late")


def test_entries_are_not_dated_back(log):
    log.act("redact", said=log.say("redact", "user/ben", ACTS["redact"][0], at=NOW + 1000), at=NOW + 1000)
    log.act("review")
    log.refused("entry.early")
    log.entries.pop()
    log.act("clock")
    log.act("review")
    log.verify()


class TestPeople:
    def test_one_alone_makes_no_approver_once_there_are_three(self, log):
        log.person("user/new")
        log.refused("log.unfounded")
        log.entries.pop()
        del log.people["user/new"]
        log.person("user/new", roles=["researcher"])
        log.verify()

    def test_whoever_may_grant_puts_others_into_teams_and_takes_them_out(self, log):
        log.person("user/ben", teams=["team/x", "team/y"])
        log.person("user/ben", teams=["team/x"])
        log.person("user/ana", teams=["team/z"], by="user/ben")
        log.person("user/ana")  # to leave takes nobody else
        log.verify()

    @pytest.mark.parametrize(
        ("path", "by"), [("user/ana", "user/ana"), ("user/bis", "user/ben"), ("user/ben", "user/bis")]
    )
    def test_nobody_joins_a_team_by_their_own_hand(self, log, path, by):
        """Under no name: what policy permits the team would be theirs."""
        log.person(path, by=by, teams=["team/x"])
        log.refused("log.unfounded")

    def test_a_change_is_of_the_record_that_there_is(self, log):
        log.people["user/eva"] -= 1
        log.person("user/eva", state="suspended")
        log.refused("log.unfounded")

    @pytest.mark.parametrize(
        "lie", [{}, {"key": "5" * 64}, {"person": "user/ana"}, {"roles": ["auditor", "officer"]}, {"teams": ["team/x"]}]
    )
    def test_what_a_change_leaves_open_stays_as_it_was(self, log, lie):
        """Somebody is suspended; whoever signs that says nothing of keys."""
        said = dict.fromkeys(("key", "person", "roles", "teams", "subject")) | {"state": "suspended"}
        said |= {"principal": "user/eva", "before": log.people["user/eva"]}
        envelope = log.say("principal", "user/ben", said).envelope
        body = {"principal": "user/eva", "key": PEOPLE["user/eva"].public_key.hex(), "person": "user/eva"}
        body |= {"roles": ["officer"], "teams": [], "state": "suspended", "statement": envelope}
        log.write("principal", "user/ben", body | lie, "user/eva")
        if lie:
            log.refused("log.unfounded")
        else:
            log.verify()

    def grant(self, log, by="user/ben"):
        body = {"principal": "user/new", "key": PEOPLE["user/new"].public_key.hex(), "person": "user/new"}
        said = log.say("principal", by, body | {"roles": ["officer"], "teams": [], "state": "active", "before": None})
        body = {"id": said.id, "principal": "user/new", "expires_at": NOW + DAY, "statement": said.envelope}
        log.write("grant", by, body, "user/new")
        return said

    def test_a_grant_takes_another_person(self, log):
        said = self.grant(log)
        for by in ("user/ben", "user/bis"):
            log.approve(by, said)
            log.refused("log.unfounded")
            log.entries.pop()
        log.act("redact", "user/ana")
        log.approve("user/eva", said)
        log.act("review", "user/new")
        log.verify()

    def test_a_grant_that_was_denied_is_over(self, log):
        said = self.grant(log)
        no = log.say("deny", "user/eva", {"request": said.digest, "reason": OTHER})
        log.write("deny", "user/eva", {"id": said.id, "statement": no.envelope}, private={"reason": OTHER})
        log.approve("user/ana", said)
        log.refused("log.unfounded")

    def test_a_login_is_by_an_authority_of_somebody_who_is_bound(self, log):
        key = Signer(b"s" * 32)
        body = {"method": "oidc", "authority": "https://id.example", "public_key": key.public_key.hex(), "duration": 60}
        said = Statement.sign("login", body, room=ROOM, by="user/ben", at=NOW, signer=key)
        del body["duration"]
        log.write("session", "user/ben", body | {"expires_at": NOW + 60, "proof": DIGEST, "statement": said.envelope})
        log.refused("session.unfounded")

    def login(self, log, by="user/new", key=b"s" * 32, at=NOW, **changes):
        signer = Signer(key) if isinstance(key, bytes) else key
        body = {"method": "oidc", "authority": ISSUER, "public_key": signer.public_key.hex(), "duration": 3600}
        said = Statement.sign("login", body, room=ROOM, by=by, at=at, signer=signer)
        del body["duration"]
        body |= {"expires_at": at + 3600, "proof": DIGEST, "statement": said.envelope, **changes}
        log.write("session", by, body, at=at)

    def test_a_proof_introduces_one_key_and_a_key_speaks_for_one(self, log):
        text = Authority("oidc", ISSUER, audience="x", binding="nonce", algorithms=("EdDSA",)).encode()
        said = log.say("authority", "user/ana", {"authority": ISSUER, "text": text})
        body = {"id": said.id, "authority": ISSUER, "expires_at": NOW + DAY, "statement": said.envelope}
        log.write("authority", "user/ana", body)
        log.approve("user/eva", said)
        for path in ("user/new", "team/new"):
            log.person(path, roles=["researcher"], subject=OTHER, **({"key": ""} if path == "team/new" else {}))
        self.login(log)
        log.verify()
        for how in (
            {"key": b"t" * 32},  # with the proof of before
            {"proof": OTHER},  # the key of before
            {"proof": OTHER, "key": PEOPLE["user/eva"]},  # somebody's own
            {"proof": OTHER, "key": b"t" * 32, "by": "team/new"},
            {"proof": OTHER, "key": b"t" * 32, "by": "user/eva"},  # who is not bound
        ):
            self.login(log, **how)
            log.refused("session.unfounded")
            log.entries.pop()
        self.login(log, proof=OTHER, at=NOW + 3600)  # the key of before has ended
        log.verify()


@pytest.mark.parametrize("kind", ["login", "trace"])
def test_nothing_is_in_anybodys_name_without_their_word(log, kind):
    body = {"login": {"method": "key"}, "trace": {"verdict": "one", "accused": ["user/eva"]}}[kind]
    with pytest.raises(ValueError, match=kind):
        log.write(kind, "user/ben", body)


def test_a_refusal_is_of_somebody_whom_the_log_knows_or_of_nobody(log):
    body = {"action": "load", "code": "denied.default", "rule": ""}
    for by in ("user/ben", "unknown"):
        log.write("refused", by, body)
    log.verify()
    for by in ("user/none", "custodian", ""):
        log.write("refused", by, body)
        log.refused("statement.missing")
        log.entries.pop()


class TestReinstating:
    """What nobody but the shares can do, and a custodian that lies least of all."""

    SHARES = Signer(b"r" * 32)

    @pytest.fixture
    def log(self):
        log = Log()
        first = log.entries[0]
        body = {**first.body, "recovery": self.SHARES.public_key.hex()}
        log.entries[0] = Entry(first.type, first.at, first.by, first.ref, body)
        return log

    def act(self, log, path="user/ben", key="", *, by="custodian", signer=SHARES, ref=None, **changes):
        body = {"principal": path, "key": key, "role": "officer"}
        said = {**body, "reason": OTHER}
        said = Statement.sign("reinstate", said, room=ROOM, by=by, at=NOW, signer=signer).envelope
        log.write("reinstate", by, {**body, "statement": said, **changes}, ref or path, {"reason": OTHER})

    def test_brings_back_who_was_sent_away(self, log):
        log.person("user/ben", "suspended")
        log.act("redact")
        log.refused("statement.foreign")
        log.entries.pop()
        self.act(log)
        log.act("redact")
        log.verify()

    def test_gives_another_key_and_takes_the_old_one(self, log):
        self.act(log, key=PEOPLE["user/new"].public_key.hex())
        log.act("redact")
        log.refused("statement.other_key")

    def test_somebody_new_counts_among_those_who_let_others_in(self, log):
        self.act(log, "user/new", PEOPLE["user/new"].public_key.hex())
        log.people["user/new"] = len(log.entries) - 1
        log.act("redact", "user/new")
        log.verify()

    @pytest.mark.parametrize(
        ("how", "code"),
        [
            ({"signer": PEOPLE["user/ana"]}, "statement.other_key"),
            ({"signer": Signer(b"x" * 32)}, "statement.other_key"),
            ({"by": "user/ana"}, "statement.foreign"),
            ({"by": "user/ana", "signer": PEOPLE["user/ana"]}, "statement.foreign"),
            ({"statement": ""}, "statement.missing"),
            ({"role": "executive"}, "statement.differs"),
            ({"key": "5" * 64, "statement": None}, "statement.differs"),
            ({"ref": "user/eva"}, "log.unfounded"),
            ({"path": "user/new"}, "log.unfounded"),  # with no key
            ({"path": "team/new", "key": "5" * 64}, "log.unfounded"),
        ],
    )
    def test_is_by_the_shares_and_as_they_signed(self, log, how, code):
        if how.get("statement", "") is None:
            self.act(log)
            entry = log.entries.pop()
            log.write("reinstate", entry.by, {**entry.body, "key": how["key"]}, entry.ref, entry.private)
        else:
            self.act(log, **how)
        log.refused(code)

    def test_is_not_where_there_are_no_shares(self):
        log = Log()
        self.act(log)
        log.refused("statement.foreign")


class TestLeases:
    def trace(self, log, lease, by="user/ana", ref=REF, at=NOW, told=None, **changes):
        said = log.say("trace", by, {"suspect": DIGEST, "ref": ref, "lease": lease}, at=at)
        body = {"suspect": DIGEST, "lease": lease, "verdict": "one", "accused": [], "statement": said.envelope}
        log.write("trace", by, body | changes, ref or "", at=at if told is None else told)

    def test_to_trace_are_of_who_traces_and_for_what(self, log):
        asked = self.ask(log, action="trace")
        self.yes(log, asked, lease={"action": "trace"})
        for wrong in (
            {"by": "user/ben"},
            {"ref": "acme/other@1"},
            {"ref": None},
            {"at": NOW + 360},
            {"at": NOW + 360, "told": NOW + 400},
            {"at": NOW - 601, "told": NOW},
            {"lease": "0" * 16},
            {"accused": ["user/none"]},
        ):
            self.trace(log, **{"lease": asked.id, **wrong})
            log.refused("log.unfounded")
            log.entries.pop()
        self.trace(log, None, by="user/ben", ref=None)  # policy may let an officer
        self.trace(log, asked.id)
        log.verify()
        self.trace(log, asked.id, at=NOW + 1)
        log.refused("log.unfounded")  # one use was allowed
        log.entries.pop()
        self.take(log, asked, at=NOW + 2)
        log.refused("log.unfounded")

    def test_to_trace_hold_when_the_search_begins(self, log):
        asked = self.ask(log, action="trace")
        self.yes(log, asked, lease={"action": "trace"})
        self.trace(log, asked.id, at=NOW + 59, told=NOW + 7200)
        log.verify()

    def ask(self, log, action="load", **changes):
        body = {"action": action, "ref": REF, "for": "user/ana", "duration": 3600, "uses": 1, "reason": OTHER}
        said = log.say("request", "user/ana", body)
        body = {name: body[name] for name in ("action", "for", "duration", "uses")}
        body |= {"id": said.id, "expires_at": NOW + DAY, "statement": said.envelope}
        log.write("request", "user/ana", body | changes, REF, {"reason": OTHER})
        return said

    def yes(self, log, asked, by="user/ben", lease=None, ref=REF, duration=60, **changes):
        said = log.say("approve", by, {"request": asked.digest, "duration": duration, "uses": None})
        given = {"id": asked.id, "holder": "user/ana", "action": "load", "ref": REF, "expires_at": NOW + 60, "uses": 1}
        body = {"id": asked.id, "duration": 60, "uses": 1, "roles": ["officer"], "lease": {**given, **(lease or {})}}
        log.write("approve", by, body | changes | {"statement": said.envelope}, ref)

    def take(self, log, asked, at=NOW, **changes):
        said = {"action": "load", "ref": REF, "holder": "user/ana", "public_key": DIGEST, "challenge": OTHER}
        said = log.say("release", "user/ana", {**said, "break_glass": False, "reason": ""}, at=at)
        body = {name: said.body[name] for name in ("action", "holder", "public_key", "challenge", "break_glass")}
        body |= {"lease": asked.id, "revision": 1, "manifest": DIGEST, "statement": said.envelope}
        log.write("release", "user/ana", body | changes, REF, at=at)

    def test_that_were_asked_for_and_allowed(self, log):
        asked = self.ask(log)
        self.yes(log, asked)
        self.take(log, asked)
        log.verify()
        self.take(log, asked)
        log.refused("log.unfounded")  # one use was allowed

    @pytest.mark.parametrize("changes", [{"duration": 10**9}, {"uses": None}, {"for": "user/eva"}])
    def test_are_asked_for_as_was_signed(self, log, changes):
        self.ask(log, **changes)
        log.refused("statement.differs")

    @pytest.mark.parametrize(
        "changes",
        [
            {"by": "user/ana"},
            {"duration": 4000},
            {"duration": 30},
            {"ref": "acme/other@7"},
            {"roles": ["executive"]},
            {"uses": None},
            *({"lease": {name: value}} for name, value in (("holder", "user/eva"), ("action", "copy"), ("uses", None))),
            {"lease": {"expires_at": NOW + 61}},
            {"lease": {"ref": "acme/crown@9"}},
        ],
    )
    def test_are_not_more(self, log, changes):
        self.yes(log, self.ask(log), **changes)
        log.refused("log.unfounded")

    @pytest.mark.parametrize("end", ["revoked", "person", "version", "clock", "time", "shredded"])
    def test_that_have_ended(self, log, end):
        asked = self.ask(log)
        self.yes(log, asked)
        at = NOW
        if end == "clock":
            log.act("clock")
        elif end == "shredded":
            log.act("shred")
        elif end == "time":
            at = NOW + 60
        else:
            target = {"revoked": asked.id, "person": "user/ana", "version": REF}[end]
            said = log.say("revoke", "user/eva", {"target": target, "reason": OTHER})
            body = {"target": target, "statement": said.envelope}
            log.write("revoke", "user/eva", body, "" if end == "revoked" else target, {"reason": OTHER})
        self.take(log, asked, at)
        log.refused("statement.foreign" if end == "person" else "log.unfounded")


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
        log.refused("log.unfounded")
        log.entries.pop()
        log.approve("user/bis", asked)  # who is the same person
        log.refused("log.unfounded")
        log.entries.pop()
        log.approve("user/eva", asked)
        log.enact(asked, at=NOW + DAY - 1)
        log.refused("log.unfounded")
        log.entries.pop()
        log.enact(asked)
        log.verify()
        log.enact(asked, "user/eva")
        log.refused("log.unfounded")

    def test_that_were_denied_are_over(self, log):
        asked = log.propose()
        log.approve("user/eva", asked)
        no = log.say("deny", "user/ana", {"request": asked.digest, "reason": OTHER})
        log.write("deny", "user/ana", {"id": asked.id, "statement": no.envelope}, private={"reason": OTHER})
        log.enact(asked)
        log.refused("log.unfounded")

    def test_wait_for_a_day_whatever_the_proposal_says(self, log):
        log.propose(wait=DAY - 1)
        log.refused("log.unfounded")

    def test_are_those_that_were_proposed(self, log):
        asked, other = log.propose(), log.propose(digest=OTHER)
        log.approve("user/eva", asked)
        log.enact(asked, digest=OTHER)
        log.refused("log.unfounded")
        log.entries.pop()
        log.enact(asked, proposal=other.id, digest=OTHER)
        log.refused("statement.differs")
        log.entries.pop()
        log.enact(other, digest=OTHER)
        log.refused("log.unfounded")

    def test_that_did_not_wait_are_somebodys_emergency(self, log):
        asked = log.propose()
        log.enact(asked, at=NOW, reason=OTHER)
        log.refused("log.unfounded")  # two people it takes all the same
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


@pytest.mark.parametrize(("said", "wrote"), [("int4", None), (None, "int4"), ("int4", "int8")])
def test_a_copy_leaves_in_the_form_that_was_signed_for(log, said, wrote):
    """Else a custodian could give out floats for a quantised copy, or say that somebody has had them who has not."""
    base = {"action": "copy", "holder": "user/ben", "public_key": DIGEST, "challenge": OTHER, "break_glass": False}

    def release(said, wrote):
        forms = [{"form": form} if form else {} for form in (said, wrote)]
        signed = log.say("release", "user/ben", {**base, "ref": REF, "reason": "", **forms[0]})
        more = {"lease": None, "revision": 1, "manifest": DIGEST, "statement": signed.envelope}
        log.write("release", "user/ben", {**base, **more, **forms[1]}, REF)

    release(said, wrote)
    log.refused("statement.differs")
    log.entries.pop()
    release(said, said)
    log.verify()
