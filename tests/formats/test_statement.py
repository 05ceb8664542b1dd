"""Signed statements: one spelling, exactly the members of spec/ledger.md, and any text raises only our errors."""

import base64
import copy
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.crypto import signatures
from strongroom.crypto.signatures import Signer
from strongroom.errors import LimitExceeded, StrongroomError, Tampered
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.statement import BODIES, PAYLOAD_TYPE, Statement

SIGNER, OTHER = Signer(bytes(range(32))), Signer(bytes(32))
SHORT, ID, DIGEST = "0123456789abcdef", "ab" * 16, "cd" * 32

# One whole body of each kind.
WHOLE = {
    "request": {
        "action": "load",
        "ref": "acme/tiny@1",
        "for": "user/ana",
        "duration": 60,
        "uses": 3,
        "reason": DIGEST,
    },
    "approve": {"request": DIGEST, "duration": 0, "uses": None},
    "deny": {"request": DIGEST, "reason": DIGEST},
    "renew": {"lease": SHORT, "duration": 60},
    "revoke": {"target": "user/ana", "reason": DIGEST},
    "release": {
        "action": "copy",
        "ref": "acme/tiny@1",
        "holder": "user/ana",
        "public_key": DIGEST,
        "challenge": DIGEST,
        "break_glass": False,
        "reason": "",
    },
    "call": {"method": "POST", "path": "/x", "body": DIGEST},
    "propose": {"digest": DIGEST, "reason": DIGEST},
    "principal": {
        "principal": "user/ana",
        "key": "",
        "person": "user/ana",
        "roles": ["auditor", "researcher"],
        "teams": [],
        "state": "active",
        "before": None,
    },
    "authority": {"authority": "https://id.example", "text": "{}"},
    "passkey": {"key": "30" * 91, "credential": "abc", "state": "active"},
    "login": {"method": "oidc", "authority": "https://id.example", "public_key": DIGEST, "duration": 60},
    "put": {"name": "acme/tiny", "files": DIGEST},
    "rotate": {"ref": "acme/tiny@1"},
    "shred": {"ref": "acme/tiny@1"},
    "copy": {"ref": "acme/tiny@1", "holder": "user/ana", "release": 7, "files": 3, "bytes": 5},
    "trace": {"suspect": DIGEST, "ref": "acme/tiny@1", "lease": SHORT},
    "enact": {"proposal": SHORT, "reason": ""},
    "reinstate": {"principal": "user/ana", "key": "", "role": "officer", "reason": DIGEST},
    "ceiling": {"ref": "acme/tiny", "holders": 3, "copies": 2, "copiers": 1},
    "thaw": {"ref": "acme/tiny@1", "reason": DIGEST},
    "clock": {"reason": DIGEST},
    "redact": {"entry": 7},
    "review": {"size": 7, "findings": 2, "removed": 1},
    "keystore": {"operation": "rotate", "epoch": 2},
    "apikey": {"key": DIGEST, "principal": "user/ana", "name": "ci", "expires_at": 9, "state": "active"},
    "inference": {
        "account": 7,
        "ref": "acme/tiny@1",
        "gateway": "ab" * 16,
        "records": 3,
        "head": DIGEST,
        "requests": 3,
        "refused": 1,
        "tokens": 40,
        "bits": 700,
        "settings": DIGEST,
    },
}
SAME = ("rotate", "shred")  # say the same of what they are about
NEVER = [1.5, -1, 2**53, [1], {"a": 1}, True]


def payload_of(kind):
    return {
        "statement": kind,
        "room": ID,
        "by": "user/ana",
        "at": 1_790_000_000,
        "nonce": "ef" * 16,
        "body": copy.deepcopy(WHOLE[kind]),
    }


def spelled(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8", "surrogatepass")


def sealed(payload, *, kind=PAYLOAD_TYPE, signers=(SIGNER,)):
    said = pre_authentication_encoding(kind, payload)
    return Envelope(kind, payload, tuple((each.key_id, each.sign(said)) for each in signers)).encode().decode()


def refused(value, code="statement.malformed"):
    with pytest.raises(StrongroomError) as caught:
        Statement.decode(sealed(spelled(value)))
    assert caught.value.code in (code, "json.malformed", "json.not_canonical")


def test_there_is_a_whole_body_of_every_kind():
    assert WHOLE.keys() == BODIES.keys()


@pytest.mark.parametrize("kind", WHOLE)
class TestEachKind:
    def test_has_one_spelling(self, kind):
        envelope = sealed(spelled(payload_of(kind)))
        found = Statement.decode(envelope)
        assert found.envelope == envelope
        assert found.payload == spelled(payload_of(kind))
        assert found.digest == hashlib.sha256(found.payload).hexdigest()
        assert found.id == found.digest[:16]
        again = Statement.sign(
            kind, found.body, room=found.room, by=found.by, at=found.at, nonce=found.nonce, signer=SIGNER
        )
        assert again == found
        assert again.envelope == envelope
        found.verify(SIGNER.public_key.hex(), signatures.verify)

    def test_lacks_nothing(self, kind):
        for name in payload_of(kind):
            value = payload_of(kind)
            del value[name]
            refused(value)
        for name in WHOLE[kind]:
            value = payload_of(kind)
            del value["body"][name]
            refused(value)

    def test_has_nothing_more(self, kind):
        refused({**payload_of(kind), "more": 1})
        for name in ("more", "statement", "lease", "uses", ""):
            if name not in WHOLE[kind]:
                value = payload_of(kind)
                value["body"][name] = None
                refused(value)

    def test_has_every_member_of_its_kind(self, kind):
        for name, right in WHOLE[kind].items():
            wrong = [each for each in NEVER if not (right is False and each is True)]
            open_to = kind == "principal" and name != "principal"  # null: as it was
            open_to |= kind == "trace" and name != "suspect"
            wrong += [None] if name != "uses" and not open_to else []
            wrong += ["x"] if not isinstance(right, str) else []
            for each in wrong:
                value = payload_of(kind)
                value["body"][name] = each
                refused(value)

    def test_has_hexadecimal_of_its_length_in_lower_case(self, kind):
        for name, right in WHOLE[kind].items():
            if right not in (SHORT, ID, DIGEST):
                continue
            for wrong in (
                right[:-1],
                right + "0",
                right[:-1] + "g",
                right.upper(),
                right[:-1] + "\n",
                right[:-1] + "٣",
            ):
                value = payload_of(kind)
                value["body"][name] = wrong
                refused(value)

    def test_is_of_its_kind(self, kind):
        for other in (*WHOLE, "", "approved", None, 5, ["request"]):
            if other != kind and WHOLE[kind] != (other in SAME and WHOLE[other]):
                refused({**payload_of(kind), "statement": other})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("at", each) for each in (-1, 1.0, "1", None, True, 2**53, 2**70)),
        *(("room", each) for each in ("", ID[:-1], ID.upper(), None, 5)),
        *(("nonce", each) for each in ("", ID + "0", None, 5)),
        *(("by", each) for each in (None, 5, ["user/ana"])),
        *(("body", each) for each in (None, [], "{}", 5)),
    ],
)
def test_a_member_of_another_kind(name, wrong):
    refused({**payload_of("approve"), name: wrong})


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        ("request", "action", "put"),
        ("request", "action", "Load"),
        ("release", "action", "trace"),
        ("release", "reason", "x"),
        ("release", "reason", None),
        ("release", "break_glass", 1),
        ("release", "break_glass", "true"),
        ("principal", "state", "Active"),
        ("principal", "key", DIGEST[:-2]),
        ("principal", "roles", ["b", "a"]),
        ("principal", "roles", ["a", "a"]),
        ("principal", "teams", ["a", None]),
        ("principal", "teams", "ab"),
    ],
)
def test_what_looks_like_one(kind, name, wrong):
    value = payload_of(kind)
    value["body"][name] = wrong
    refused(value)


def test_one_signature_and_no_more():
    payload = spelled(payload_of("approve"))
    with pytest.raises(Tampered):
        Statement.decode(sealed(payload, signers=(SIGNER, OTHER)))
    with pytest.raises(Tampered):
        Statement.decode(sealed(payload, signers=()))


@pytest.mark.parametrize(
    "kind", ["application/vnd.strongroom.manifest+json", PAYLOAD_TYPE.upper(), "", PAYLOAD_TYPE + " "]
)
def test_what_was_signed_as_something_else(kind):
    with pytest.raises(Tampered):
        Statement.decode(sealed(spelled(payload_of("approve")), kind=kind))


class TestVerifying:
    def said(self, **changes):
        return Statement.sign("approve", WHOLE["approve"], room=ID, by="user/ana", at=5, signer=SIGNER, **changes)

    def test_under_another_key(self):
        with pytest.raises(Tampered) as caught:
            self.said().verify(OTHER.public_key.hex(), signatures.verify)
        assert caught.value.code == "statement.other_key"

    def test_by_another_key_that_names_the_right_one(self):
        payload = spelled(payload_of("approve"))
        signature = OTHER.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        forged = Envelope(PAYLOAD_TYPE, payload, ((SIGNER.key_id, signature),)).encode().decode()
        with pytest.raises(Tampered):
            Statement.decode(forged).verify(SIGNER.public_key.hex(), signatures.verify)

    def test_by_the_right_key_that_names_another(self):
        """There is one text for one statement: nobody makes a second of it that verifies as well."""
        payload = spelled(payload_of("approve"))
        signature = SIGNER.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        for name in (OTHER.key_id, "", SIGNER.key_id.upper(), SIGNER.key_id + " "):
            other = Envelope(PAYLOAD_TYPE, payload, ((name, signature),)).encode().decode()
            with pytest.raises(Tampered):
                Statement.decode(other).verify(SIGNER.public_key.hex(), signatures.verify)

    def test_of_the_bare_payload(self):
        payload = spelled(payload_of("approve"))
        bare = Envelope(PAYLOAD_TYPE, payload, ((SIGNER.key_id, SIGNER.sign(payload)),)).encode().decode()
        with pytest.raises(Tampered):
            Statement.decode(bare).verify(SIGNER.public_key.hex(), signatures.verify)

    @pytest.mark.parametrize("size", [0, 63, 65, 128])
    def test_of_a_signature_of_another_size(self, size):
        payload = spelled(payload_of("approve"))
        short = Envelope(PAYLOAD_TYPE, payload, ((SIGNER.key_id, bytes(size)),)).encode().decode()
        with pytest.raises(Tampered):
            Statement.decode(short).verify(SIGNER.public_key.hex(), signatures.verify)

    @given(st.integers(0), st.integers(0, 7))
    def test_every_bit_counts(self, place, bit):
        envelope = bytearray(self.said(nonce="1" * 32).envelope.encode())
        envelope[place % len(envelope)] ^= 1 << bit
        with pytest.raises(StrongroomError):
            Statement.decode(envelope.decode("latin-1")).verify(SIGNER.public_key.hex(), signatures.verify)

    def test_a_nonce_makes_two_of_what_says_the_same(self):
        assert self.said().digest != self.said().digest


def test_what_is_no_statement_is_a_fault_of_ours_when_it_is_signed():
    for kind, body in (("approve", {}), ("nothing", {}), ("approve", {**WHOLE["approve"], "more": 1})):
        with pytest.raises(ValueError, match="not a statement"):
            Statement.sign(kind, body, room=ID, by="user/ana", at=5, signer=SIGNER)


def test_no_more_than_an_entry_takes():
    with pytest.raises(LimitExceeded):
        Statement.decode("x" * (LIMITS.entry + 1))


def one_spelling(envelope):
    """Refused with one of our errors, or exactly what is written again."""
    try:
        found = Statement.decode(envelope)
    except StrongroomError:
        return
    parsed = Envelope.decode(envelope.encode(), payload_type=PAYLOAD_TYPE)
    assert parsed.encode().decode() == envelope
    value = {"statement": found.kind, "room": found.room, "by": found.by, "at": found.at, "nonce": found.nonce}
    assert spelled({**value, "body": found.body}) == parsed.payload


@given(st.text(max_size=200))
def test_any_text(envelope):
    one_spelling(envelope)


@given(st.binary(max_size=200))
def test_any_payload(payload):
    one_spelling(sealed(payload))


@given(st.sampled_from(sorted(WHOLE)), st.integers(0), st.binary(max_size=3), st.integers(0, 3))
def test_any_bytes_in_any_place_of_a_payload(kind, place, new, out):
    payload = spelled(payload_of(kind))
    place %= len(payload)
    one_spelling(sealed(payload[:place] + new + payload[place + out :]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_value_in_any_place(kind, data):
    value = payload_of(kind)
    place = data.draw(st.sampled_from([*value, *(("body", name) for name in value["body"])]))
    new = data.draw(JSON)
    if isinstance(place, tuple):
        value[place[0]][place[1]] = new
    else:
        value[place] = new
    one_spelling(sealed(spelled(value)))


@pytest.mark.parametrize("depth", [33, 500, 5000])
def test_nested_deeply(depth):
    payload = spelled(payload_of("approve")).replace(b'"uses":null', b'"uses":' + b"[" * depth + b"]" * depth)
    with pytest.raises(StrongroomError):
        Statement.decode(sealed(payload))


def test_base64_with_stray_bits():
    payload = spelled({**payload_of("approve"), "by": "user/an"})
    payload += b"" if len(payload) % 3 else b" "
    envelope = sealed(payload)
    text = base64.b64encode(payload).decode()
    assert text in envelope
    assert text.endswith("=")
    stray = text.rstrip("=")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = letters[letters.index(stray[-1]) ^ 1]
    with pytest.raises(Tampered):
        Statement.decode(envelope.replace(text, stray[:-1] + other + text[len(stray) :]))
