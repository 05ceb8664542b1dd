"""API keys and accounts of inference in a log, checked offline: what a custodian that lies can't write (spec/ledger.md,
sections 7 and 12)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.test_statements import DAY, DIGEST, ISSUER, NOW, OTHER, PEOPLE, REF, ROOM, Log
from strongroom.crypto.signatures import Signer
from strongroom.errors import Conflict
from strongroom.formats.authority import Authority
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.formats.stream import fresh
from strongroom.policy import usage
from strongroom.policy.state import State

HOUR = 3600
KEY = "a" * 64
SESSION = Signer(b"session".ljust(32, b"."))
ACCOUNT = {"gateway": "0" * 32, "records": 3, "head": DIGEST, "requests": 3, "refused": 1, "tokens": 10, "bits": 170}
ACCOUNT |= {"settings": OTHER}
STREAM = fresh(bytes.fromhex(ROOM), "user/ben")


class Keys(Log):
    """A log that has begun, in which somebody may also have logged in."""

    def apikey(self, by="user/ben", *, at=NOW, signer=None, ref=None, wrote=None, **changes):
        body = {"key": KEY, "principal": by, "name": "ci", "expires_at": NOW + HOUR, "state": "active", **changes}
        room = self.entries[0].body["room"]
        said = Statement.sign("apikey", body, room=room, by=by, at=at, signer=signer or PEOPLE[by])
        body |= {"statement": said.envelope, **(wrote or {})}
        self.write("apikey", by, body, body["principal"] if ref is None else ref, at=at)

    def login(self, by="user/new", signer=SESSION, seconds=600, at=NOW):
        body = {"method": "oidc", "authority": ISSUER, "public_key": signer.public_key.hex(), "duration": seconds}
        said = Statement.sign("login", body, room=self.entries[0].body["room"], by=by, at=at, signer=signer)
        del body["duration"]
        body |= {"expires_at": at + seconds, "proof": said.digest, "statement": said.envelope}
        self.write("session", by, body, at=at)

    def account(self, ref=REF, by="custodian", at=NOW, **changes):
        self.write("inference", by, {**ACCOUNT, **changes}, ref, at=at)

    def signed(self, account, ref=REF, by="user/ben", *, at=NOW, said_at=None, signer=None, wrote=None, **changes):
        """An account that `by` signs; `wrote`: what the entry says otherwise (None: not at all)."""
        body = {**ACCOUNT, "gateway": STREAM, **changes}
        room = self.entries[0].body["room"]
        said = {"account": account, "ref": ref, **body}
        said = Statement.sign("inference", said, room=room, by=by, at=said_at or at, signer=signer or PEOPLE[by])
        body |= {"statement": said.envelope, **(wrote or {})}
        body = {name: value for name, value in body.items() if value is not None}
        self.write("inference", by, body, ref, at=at)
        return said


@pytest.fixture
def log():
    return Keys()


@pytest.fixture
def inside(log):
    """Somebody without a key of their own, who has logged in for ten minutes."""
    text = Authority("oidc", ISSUER, audience="room", binding="nonce", algorithms=("ES256",)).encode()
    said = log.say("authority", "user/ana", {"authority": ISSUER, "text": text})
    body = {"id": said.id, "authority": ISSUER, "expires_at": None, "statement": said.envelope}
    # Before there are three who could have a say in it.
    log.entries = log.entries[:3]
    log.people = {"user/ana": 1}
    log.write("authority", "user/ana", body)
    log.person("user/new", key="", roles=["partner"], subject=DIGEST)
    log.person("user/ben")
    log.login()
    return log


class TestApiKeys:
    def test_are_made_and_ended(self, log):
        log.apikey()
        log.apikey("user/eva", key="b" * 64)
        log.apikey(state="ended")
        # By somebody else, who may grant: which policy says, and a verifier does not ask.
        log.apikey("user/ben", key="b" * 64, principal="user/eva", state="ended")
        log.verify()

    @pytest.mark.parametrize(
        "how",
        [
            {"principal": "user/eva"},
            {"principal": "user/none"},
            {"ref": "user/eva"},
            {"ref": ""},
            {"expires_at": NOW},
            {"expires_at": NOW + 367 * DAY},
            {"name": "A"},
            {"name": ""},
            {"state": "ended"},  # of one that there is not
        ],
    )
    def test_are_what_they_may_be(self, log, how):
        log.apikey(**how)
        log.refused("log.unfounded")

    def test_are_said_by_whom_they_are_for(self, log):
        log.apikey(signer=PEOPLE["user/eva"])
        log.refused("statement.other_key")
        log.entries.pop()
        log.apikey(wrote={"statement": ""})
        log.refused("statement.missing")
        log.entries.pop()
        log.apikey()
        entry = log.entries.pop()
        log.write("apikey", "custodian", {**entry.body, "statement": ""}, entry.ref)
        log.refused("statement.missing")

    @pytest.mark.parametrize("wrote", [{"key": "c" * 64}, {"name": "x"}, {"expires_at": NOW + DAY}, {"state": "ended"}])
    def test_are_as_they_were_said(self, log, wrote):
        log.apikey(wrote=wrote)
        log.refused("statement.differs")

    def test_are_made_once(self, log):
        log.apikey()
        log.apikey(name="again")
        log.refused("log.unfounded")
        log.entries.pop()
        log.apikey(state="ended")
        for by in ("user/ben", "user/eva"):
            log.apikey(by, name="again")
            log.refused("log.unfounded")
            log.entries.pop()

    def test_end_once_and_as_they_are(self, log):
        log.apikey()
        for wrong in ({"name": "x"}, {"expires_at": NOW + 1}, {"principal": "user/eva"}, {"at": NOW + HOUR}):
            log.apikey(**{"state": "ended", "ref": None, **wrong})
            log.refused("log.unfounded")
            log.entries.pop()
        log.apikey(state="ended")
        log.apikey(state="ended")
        log.refused("log.unfounded")

    @pytest.mark.parametrize("state", ["suspended", "removed", "revoked"])
    def test_end_with_their_principal(self, log, state):
        log.apikey("user/eva")
        if state == "revoked":
            said = log.say("revoke", "user/ben", {"target": "user/eva", "reason": DIGEST})
            body = {"target": "user/eva", "statement": said.envelope}
            log.write("revoke", "user/ben", body, "user/eva", {"reason": DIGEST})
        else:
            log.person("user/eva", state)
        log.apikey("user/ben", principal="user/eva", state="ended")
        log.refused("log.unfounded")

    def test_thirty_two_of_a_principal_at_a_time(self, log):
        for number in range(32):
            log.apikey(key=f"{number:064x}")
        log.apikey()
        log.refused("log.unfounded")
        log.entries.pop()
        log.apikey("user/eva")
        log.apikey(key=f"{7:064x}", state="ended")
        log.apikey(key="d" * 64)
        log.verify()
        log.apikey(key="e" * 64, at=NOW + HOUR, expires_at=NOW + DAY)  # when those before have expired
        log.verify()

    def test_under_a_login_end_when_it_does(self, inside):
        for until, good in ((NOW + 601, False), (NOW + 600, True)):
            inside.apikey("user/new", signer=SESSION, expires_at=until)
            if good:
                inside.verify()
            else:
                inside.refused("log.unfounded")
                inside.entries.pop()
        inside.person("user/new", key="", roles=["auditor"], subject=DIGEST)
        inside.apikey("user/ben", principal="user/new", expires_at=NOW + 600, state="ended")
        inside.refused("log.unfounded")

    def test_under_a_login_end_with_the_clock(self, inside):
        inside.apikey("user/new", signer=SESSION, expires_at=NOW + 600)
        inside.act("clock")
        inside.apikey("user/ben", principal="user/new", expires_at=NOW + 600, state="ended")
        inside.refused("log.unfounded")


class TestInference:
    def test_is_accounted_for(self, log):
        log.account()
        log.account("", records=3)  # of the same stream, about no version
        log.account(records=9, head=OTHER)
        log.account(gateway="1" * 32)
        log.act("shred")
        log.account(records=10)  # what had been counted until then
        log.verify()

    @pytest.mark.parametrize("by", ["user/ben", "unknown", ""])
    def test_by_the_custodian(self, log, by):
        log.account(by=by)
        log.refused("statement.missing")

    def test_of_a_version_that_there_was(self, log):
        for ref in ("acme/other@1", "acme/tiny", "user/ben"):
            log.account(ref)
            log.refused("log.unfounded")
            log.entries.pop()

    def test_a_gateway_s_records_grow_and_are_not_exchanged(self, log):
        log.account()
        for wrong in ({"records": 2}, {"records": 0}, {"head": OTHER}):
            log.account(**wrong)
            log.refused("log.unfounded")
            log.entries.pop()

    def test_says_nothing_of_whom_or_what(self):
        with pytest.raises(ValueError, match="inference"):
            Entry("inference", NOW, "custodian", REF, {**ACCOUNT, "prompt": "x"}).encode()
        with pytest.raises(ValueError, match="inference"):
            Entry("inference", NOW, "custodian", REF, ACCOUNT, {"detail": DIGEST}).encode()


class TestSignedAccounts:
    """Of a gateway away from the room: said by whose stream it is, one after the other, and by nobody else."""

    def test_are_said_by_whose_stream_it_is(self, log):
        log.signed(0)
        log.signed(1, "")
        log.signed(2, records=9, head=OTHER, capture=DIGEST)
        log.signed(0, by="user/eva", gateway=fresh(bytes.fromhex(ROOM), "user/eva"))
        log.account()  # a gateway in the custodian's own process
        log.verify()

    def test_are_about_nobody_elses_stream(self, log):
        log.signed(0)
        theirs = fresh(bytes.fromhex(ROOM), "user/eva")
        for how in ({"by": "user/eva"}, {"gateway": theirs}, {"gateway": "0" * 32}):
            log.signed(1 if how.get("by") else 0, **how)
            log.refused("log.unfounded")
            log.entries.pop()
        # Nor can the custodian say by itself what a gateway has answered, however long that has been silent.
        for at in (NOW, NOW + 30 * DAY):
            log.account(at=at - 1, gateway="1" * 32)
            log.account(at=at, gateway=STREAM, records=5)
            log.refused("log.unfounded")
            del log.entries[-2:]
        log.account(gateway=STREAM, records=5, by="user/ben")
        log.refused("statement.missing")

    def test_are_signed_with_their_principals_key(self, log):
        log.signed(0, signer=PEOPLE["user/eva"])
        log.refused("statement.other_key")
        log.entries.pop()
        log.person("user/eva", "suspended")
        log.signed(0, by="user/eva", gateway=fresh(bytes.fromhex(ROOM), "user/eva"))
        log.refused("statement.foreign")

    @pytest.mark.parametrize(
        "name", ["records", "head", "requests", "refused", "tokens", "bits", "settings", "capture"]
    )
    def test_are_as_they_were_said(self, log, name):
        said = {"head": OTHER, "settings": DIGEST, "capture": OTHER}.get(name, 11)
        log.signed(0, capture=DIGEST, wrote={name: said})
        log.refused("statement.differs")

    def test_say_what_is_captured_or_that_nothing_is(self, log):
        log.signed(0, capture=DIGEST, wrote={"capture": None})
        log.refused("statement.differs")
        log.entries.pop()
        log.signed(0, wrote={"capture": DIGEST})
        log.refused("statement.differs")

    def test_come_one_after_the_other(self, log):
        """None is left out, and none is said twice, whatever the clocks were."""
        log.signed(0)
        for account, more in ((0, {}), (2, {}), (1, {"records": 2}), (1, {"head": OTHER})):
            log.signed(account, **more)
            log.refused("log.unfounded")
            log.entries.pop()
        entry = log.entries[-1]
        log.write("inference", entry.by, entry.body, entry.ref)
        log.refused("statement.replayed")
        log.entries.pop()
        log.signed(1, at=NOW, said_at=NOW - 301)
        log.refused("statement.late")

    def test_end_before_no_integer_is_left_to_count_them(self, log):
        """A custodian counts them, and could write no snapshot of a number that there is not."""
        log.signed(2**53 - 1)
        log.refused("log.unfounded")

    def test_are_of_a_version_that_there_was(self, log):
        log.signed(0, "acme/other@1")
        log.refused("log.unfounded")

    @given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 3), st.integers(0, 2)), max_size=12))
    def test_are_taken_by_custodian_and_verifier_alike(self, steps):
        """What a custodian takes and a verifier refuses would end the verifying of a log: whoever holds a gateway's key
        must find no such account, also after weeks of silence."""
        log, at, body = Keys(), NOW, {**ACCOUNT, "gateway": STREAM}
        for days, mine, account, records in steps:
            at += days * DAY
            state = State()
            for index, entry in enumerate(log.entries):
                state.apply(index, entry)
            body |= {"records": records, "head": f"{records:064x}"}
            try:
                usage.check(state, body, account if mine else None)
            except Conflict:
                taken = False
            else:
                taken = True
            if mine:
                log.signed(account, at=at, **body)
            else:
                log.account(at=at, **body)
            if taken and mine:
                log.verify()
            elif not taken:
                log.refused("log.unfounded")
            if not taken or not mine:
                log.entries.pop()
