"""Approvals that a passkey has signed: what counts, what does not, and that anybody can check it later."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webauthn import verify_authentication_response
from webauthn.helpers import encode_cbor
from webauthn.helpers.exceptions import WebAuthnException

from strongroom.client import Room
from strongroom.crypto import passkey
from strongroom.errors import AuthRequired, Conflict, Denied, NotFound, StrongroomError, Tampered, UsageError
from strongroom.formats.entry import Entry
from strongroom.formats.passkey import Assertion
from strongroom.formats.statement import Statement
from strongroom.ledger.log import Draft
from vault.authenticator import Authenticator, text
from vault.team import PEOPLE

REF = "acme/tiny@1"
MESSAGE = b"what a statement signs"


@pytest.fixture
def rooms(team_folder):
    """A room as each of its people sees it."""
    found = {path.partition("/")[2]: Room(team_folder / "room", path) for path in ("user/olga", *PEOPLE)}
    yield found
    for each in found.values():
        each.close()


def add(room, key):
    body = {"key": key.key.hex(), "credential": key.credential, "state": "active"}
    return room._vault.custodian.change_passkey(room._say("passkey", body))


def approve(room, asked, signer):
    body = {"request": asked["digest"], "duration": 0, "uses": None}
    return room._vault.custodian.approve(room._say("approve", body, signer))


class TestInARoom:
    @pytest.mark.parametrize("kind", ["ES256", "EdDSA", "RS256"])
    def test_an_approval_counts_and_the_log_proves_it(self, rooms, kind):
        key = Authenticator(kind)
        add(rooms["ben"], key)
        asked = rooms["ana"].request(REF, reason="x")
        assert approve(rooms["ben"], asked, key)["state"] == "pending"
        assert rooms["eva"].approve(asked["id"])["state"] == "approved"
        report = rooms["olga"].log.verify()
        assert report["ok"]
        with rooms["olga"]._vault.custodian.ledger.view() as state:
            assert [each.method for each in state.requests[asked["id"]].approvals] == ["passkey", "key"]

    def test_what_it_signs_is_that_very_statement(self, rooms):
        key = Authenticator()
        add(rooms["ben"], key)
        first, second = (rooms["ana"].request(REF, reason=each) for each in "xy")
        body = {"request": first["digest"], "duration": 0, "uses": None}
        said = rooms["ben"]._say("approve", body, key)
        envelope = json.loads(said)
        payload = json.loads(base64.b64decode(envelope["payload"]))
        payload["body"]["request"] = second["digest"]
        forged = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
        envelope["payload"] = base64.b64encode(forged).decode()
        with pytest.raises(AuthRequired):
            rooms["ben"]._vault.custodian.approve(json.dumps(envelope, sort_keys=True, separators=(",", ":")))

    def test_the_page_shows_the_answer_that_is_signed(self, rooms, monkeypatch):
        """A server that is asked twice could have one answer read, and the other one signed."""
        key = Authenticator()
        add(rooms["ben"], key)
        asked = rooms["ana"].request(REF, reason="x", duration=8 * 3600)
        custodian = rooms["ben"]._vault.custodian
        real = custodian.show_request
        shorter = iter((8 * 3600, 60, 60))
        monkeypatch.setattr(custodian, "show_request", lambda name: {**real(name), "duration": next(shorter)})
        shown, said = [], []
        monkeypatch.setattr(custodian, "approve", lambda envelope: said.append(Statement.decode(envelope).body))
        page = "strongroom.client.passkey.PasskeySigner"
        monkeypatch.setattr(page, lambda keys, title, facts, show: shown.append(facts) or key)
        rooms["ben"].approve(asked["id"], show=print)
        assert shown[0]["seconds"] == str(said[0]["duration"]) == str(8 * 3600)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"rp": "evil.example"},
            {"flags": 0x01},
            {"flags": 0x04},
            {"flags": 0x00},
            {"client": {"origin": "https://evil.example"}},
            {"client": {"origin": "http://localhost.evil.example"}},
            {"client": {"origin": "http://localhost:8471/path"}},
            {"client": {"crossOrigin": True}},
            {"client": {"topOrigin": "https://evil.example"}},
            {"client": {"type": "webauthn.create"}},
            {"client": {"challenge": text(hashlib.sha256(b"another").digest())}},
            {"client": {"challenge": 7}},
            {"raw": lambda made: made.replace(b"{", b'{"type":"webauthn.create",', 1)},
            {"raw": lambda made: b"\xef\xbb\xbf" + made},
            {"raw": lambda made: made + b"{}"},
            {"raw": lambda _: b"[]"},
            {"raw": lambda _: b"\xff"},
        ],
    )
    def test_what_does_not_hold_is_nobody_s_approval(self, rooms, wrong):
        key = Authenticator(**wrong)
        add(rooms["ben"], key)
        asked = rooms["ana"].request(REF, reason="x")
        with pytest.raises(AuthRequired) as caught:
            approve(rooms["ben"], asked, key)
        assert caught.value.code == "auth.refused"
        assert rooms["ana"].requests()[0]["approved_by"] == []

    def test_another_key_with_the_same_name_for_it(self, rooms):
        key, other = Authenticator(), Authenticator()
        add(rooms["ben"], key)
        other.key = key.key  # says that it is, and signs with its own
        with pytest.raises(AuthRequired):
            approve(rooms["ben"], rooms["ana"].request(REF, reason="x"), other)

    def test_somebody_else_s_passkey(self, rooms):
        key = Authenticator()
        add(rooms["ben"], key)
        asked = rooms["ana"].request(REF, reason="x")
        with pytest.raises(AuthRequired):
            approve(rooms["eva"], asked, key)
        with pytest.raises(Conflict):
            add(rooms["eva"], key)

    def test_one_s_own_request_by_one_s_own_passkey(self, rooms):
        rooms["olga"].principal_add("user/ben-too", roles=["researcher"], person="user/ben")
        with Room(rooms["olga"]._vault.folder, "user/ben-too") as second:
            asked = second.request(REF, reason="x")
        key = Authenticator()
        add(rooms["ben"], key)
        with pytest.raises(Denied) as caught:
            approve(rooms["ben"], asked, key)
        assert caught.value.code == "approve.own"

    def test_a_counter_that_goes_back_is_a_copy(self, rooms):
        key = Authenticator(counts=True)
        add(rooms["ben"], key)
        for _ in range(2):
            approve(rooms["ben"], rooms["ana"].request(REF, reason="x"), key)
        key.count = 0
        with pytest.raises(AuthRequired) as caught:
            approve(rooms["ben"], rooms["ana"].request(REF, reason="x"), key)
        assert caught.value.code == "passkey.cloned"

    def test_removed_and_ended(self, rooms):
        key = Authenticator()
        add(rooms["ben"], key)
        asked = rooms["ana"].request(REF, reason="x")
        (listed,) = rooms["ben"].passkeys.ls()
        assert listed["credential"] == key.credential
        rooms["ben"].passkeys.rm(hashlib.sha256(key.key).hexdigest()[:12])
        with pytest.raises(AuthRequired):
            approve(rooms["ben"], asked, key)
        with pytest.raises(NotFound):
            rooms["ben"].passkeys.rm("")
        add(rooms["ben"], key)
        # Another key of the principal's: whoever had the old one may have added the passkey.
        before = rooms["olga"]._vault.custodian.known("user/ben").entry
        rooms["olga"]._registry._change("user/ben", before, key="5" * 64)
        (grant,) = [item for item in rooms["eva"].requests() if item["action"] == "grant"]
        rooms["eva"].approve(grant["id"])
        with pytest.raises(AuthRequired):
            approve(rooms["ben"], asked, key)
        assert rooms["olga"].log.verify()["ok"]

    def test_of_somebody_suspended(self, rooms):
        key = Authenticator()
        add(rooms["ben"], key)
        asked = rooms["ana"].request(REF, reason="x")
        rooms["olga"].principal_change("user/ben", state="suspended")
        with pytest.raises(AuthRequired):
            approve(rooms["ben"], asked, key)

    def test_a_passkey_adds_no_passkey(self, rooms):
        key, other = Authenticator(), Authenticator()
        add(rooms["ben"], key)
        body = {"key": other.key.hex(), "credential": other.credential, "state": "active"}
        with pytest.raises(Denied) as caught:
            rooms["ben"]._vault.custodian.change_passkey(rooms["ben"]._say("passkey", body, key))
        assert caught.value.code == "passkey.own_key"

    @pytest.mark.parametrize("state", ["active", "removed"])
    def test_a_log_in_which_a_passkey_adds_one_or_takes_another_s_is_refused(self, rooms, state):
        """Written by a custodian that lies: whoever borrows a passkey once must not get one that stays."""
        key, other = Authenticator(), Authenticator()
        add(rooms["ben"], key)
        if state == "removed":
            add(rooms["eva"], other)
        body = {"key": other.key.hex(), "credential": other.credential, "state": state}
        said = rooms["ben"]._say("passkey", body, key)
        written = {**body, "statement": said}
        ledger = rooms["ben"]._vault.custodian.ledger
        ledger.append(lambda _, __, now: Draft(Entry("passkey", now, "user/ben", "", written)))
        with pytest.raises(Tampered) as caught:
            rooms["olga"].log.verify()
        assert caught.value.code == "statement.foreign"

    def test_a_log_in_which_nobody_added_a_passkey_is_refused(self, rooms):
        other = Authenticator()
        body = {"key": other.key.hex(), "credential": other.credential, "state": "active", "statement": ""}
        ledger = rooms["ben"]._vault.custodian.ledger
        ledger.append(lambda _, __, now: Draft(Entry("passkey", now, "user/ben", "", body)))
        with pytest.raises(Tampered) as caught:
            rooms["olga"].log.verify()
        assert caught.value.code == "statement.missing"

    def test_a_log_in_which_the_custodian_gives_somebody_another_key_is_refused(self, rooms):
        body = {"principal": "user/ben", "key": "7" * 64, "person": "user/ben", "roles": [], "teams": []}
        body |= {"state": "active", "statement": ""}
        ledger = rooms["ben"]._vault.custodian.ledger
        ledger.append(lambda _, __, now: Draft(Entry("principal", now, "custodian", "user/ben", body)))
        with pytest.raises(Tampered) as caught:
            rooms["olga"].log.verify()
        assert caught.value.code == "statement.missing"

    @pytest.mark.parametrize(
        "key", ["00" * 91, "30" * 91, Authenticator().key.hex() + "00"], ids=["zeros", "tags", "more than one"]
    )
    def test_what_is_no_key_of_a_passkey(self, rooms, key):
        body = {"key": key, "credential": "abc", "state": "active"}
        with pytest.raises(UsageError):
            rooms["ben"]._vault.custodian.change_passkey(rooms["ben"]._say("passkey", body))

    def test_a_point_that_is_not_on_the_curve(self, rooms):
        key = bytearray(Authenticator().key)
        key[-1] ^= 1
        with pytest.raises(UsageError):
            passkey.check_key(bytes(key))


class TestAgainstAnotherImplementation:
    """py_webauthn says the same of what it can judge: one origin, and no counter here."""

    def judged(self, key, assertion):
        numbers = key.private.public_key().public_numbers()
        cose = {1: 2, 3: -7, -1: 1, -2: numbers.x.to_bytes(32, "big"), -3: numbers.y.to_bytes(32, "big")}
        verify_authentication_response(
            credential={
                "id": key.credential,
                "rawId": key.credential,
                "type": "public-key",
                "response": {
                    "clientDataJSON": text(assertion.client),
                    "authenticatorData": text(assertion.data),
                    "signature": text(assertion.signature),
                },
            },
            expected_challenge=hashlib.sha256(MESSAGE).digest(),
            expected_rp_id="localhost",
            expected_origin="http://localhost:8471",
            credential_public_key=encode_cbor(cose),
            credential_current_sign_count=0,
            require_user_verification=True,
        )

    @pytest.mark.parametrize(
        ("wrong", "holds"),
        [
            ({}, True),
            ({"rp": "evil.example"}, False),
            ({"flags": 0x01}, False),
            ({"flags": 0x04}, False),
            ({"client": {"type": "webauthn.create"}}, False),
            ({"client": {"origin": "https://evil.example"}}, False),
            ({"client": {"challenge": text(bytes(32))}}, False),
        ],
    )
    def test_they_agree(self, wrong, holds):
        key = Authenticator(**wrong)
        assertion = key.assertion(MESSAGE)
        if holds:
            self.judged(key, assertion)
            passkey.verify(key.key, assertion.encode(), MESSAGE)
            return
        with pytest.raises(WebAuthnException):
            self.judged(key, assertion)
        with pytest.raises(Tampered):
            passkey.verify(key.key, assertion.encode(), MESSAGE)


class TestTheBytes:
    def test_they_come_back(self):
        assertion = Authenticator().assertion(MESSAGE)
        assert Assertion.decode(assertion.encode()) == assertion

    @given(st.binary(max_size=300))
    def test_whatever_they_are(self, data):
        try:
            made = Assertion.decode(data)
        except Tampered:
            return
        assert made.encode() == data

    @given(st.integers(0, 4000), st.integers(1, 255))
    def test_no_bit_of_them_can_be_changed(self, at, flip):
        data = bytearray(SIGNED)
        data[at % len(data)] ^= flip
        with pytest.raises(StrongroomError):
            passkey.verify(KEY.key, bytes(data), MESSAGE)


KEY = Authenticator("EdDSA")
SIGNED = KEY.sign(MESSAGE)
