"""Entries of the log: one spelling, exactly the members of spec/ledger.md, and any bytes raise only our errors."""

import copy
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, LimitExceeded, StrongroomError, Tampered, UsageError
from strongroom.formats.entry import BODIES, Entry, Private

SHORT, ID, DIGEST = "0123456789abcdef", "ab" * 16, "cd" * 32
LEASE = {"id": SHORT, "holder": "user/ana", "action": "load", "ref": "acme/tiny@1", "expires_at": 9, "uses": None}

# One whole body of each type.
WHOLE = {
    "genesis": {"room": ID, "signer": DIGEST, "policy": DIGEST, "custody": "team"},
    "principal": {
        "principal": "user/ana",
        "key": DIGEST,
        "person": "user/ana",
        "roles": ["auditor", "researcher"],
        "teams": [],
        "state": "active",
        "statement": "",
    },
    "grant": {"id": SHORT, "principal": "user/ana", "expires_at": 9, "statement": ""},
    "policy": {"digest": DIGEST, "proposal": SHORT, "break_glass": False, "statement": "said"},
    "proposal": {"id": SHORT, "digest": DIGEST, "enact_after": 9, "statement": "said"},
    "put": {"version": ID, "revision": 1, "manifest": DIGEST, "bytes": 5, "positions": 0, "statement": "said"},
    "rotate": {"revision": 2, "manifest": DIGEST, "statement": "said"},
    "shred": {"statement": "said"},
    "request": {
        "id": SHORT,
        "action": "copy",
        "for": "user/ana",
        "duration": 60,
        "uses": 3,
        "expires_at": 9,
        "statement": "said",
    },
    "approve": {"id": SHORT, "duration": 60, "uses": None, "roles": ["officer"], "statement": "said", "lease": LEASE},
    "deny": {"id": SHORT, "statement": "said"},
    "release": {
        "action": "load",
        "holder": "user/ana",
        "lease": SHORT,
        "revision": 1,
        "manifest": DIGEST,
        "public_key": DIGEST,
        "challenge": DIGEST,
        "break_glass": False,
        "statement": "said",
    },
    "copy": {"holder": "user/ana", "release": 7, "files": 3, "bytes": 5, "statement": "said"},
    "renew": {"lease": SHORT, "expires_at": 9, "statement": "said"},
    "revoke": {"target": "user/ana", "statement": "said"},
    "refused": {"action": "load", "code": "denied.rule", "rule": ""},
    "clock": {"before": 9, "statement": "said"},
    "trace": {"suspect": DIGEST, "lease": SHORT, "verdict": "one", "accused": ["user/ana"], "statement": "said"},
    "review": {"size": 2, "findings": 1, "removed": 0, "statement": "said"},
    "session": {
        "method": "oidc",
        "authority": "https://id.example",
        "public_key": DIGEST,
        "expires_at": 9,
        "proof": DIGEST,
        "statement": "said",
    },
    "passkey": {"key": "30" * 91, "credential": "abc", "state": "active", "statement": "said"},
    "authority": {"id": SHORT, "authority": "https://id.example", "expires_at": None, "statement": "said"},
    "keystore": {"operation": "rotate", "epoch": 2, "statement": "said"},
    "redact": {"entry": 7, "statement": "said"},
    "ceiling": {"holders": 100, "copies": 5, "copiers": 3, "statement": "said"},
    "thaw": {"statement": "said"},
    "reinstate": {"principal": "user/ana", "key": "", "role": "officer", "statement": "said"},
    "apikey": {
        "key": DIGEST,
        "principal": "user/ana",
        "name": "ci",
        "expires_at": 9,
        "state": "active",
        "statement": "said",
    },
    "inference": {
        "gateway": ID,
        "records": 3,
        "head": DIGEST,
        "requests": 3,
        "refused": 1,
        "tokens": 40,
        "bits": 680,
        "settings": DIGEST,
    },
}
PRIVATE = {
    "principal": ["oidc", "spiffe", "contact"],
    "refused": ["detail"],
    "trace": ["detail"],
    "put": ["files"],
    **{
        kind: ["reason"]
        for kind in ("proposal", "policy", "request", "deny", "release", "revoke", "clock", "thaw", "reinstate")
    },
}
# What no member is, whatever its kind; and for some kinds what looks like one and is not.
NEVER = [1.5, -1, 2**53, [1], {"a": 1}, [["x"]], True, 0.0]
TEXTS = ("roles", "teams", "accused")


def whole(kind):
    private = dict.fromkeys(PRIVATE.get(kind, []), DIGEST)
    return {
        "format": 1,
        "type": kind,
        "at": 1_790_000_000,
        "by": "user/ana",
        "ref": "acme/tiny@1",
        "body": copy.deepcopy(WHOLE[kind]),
        "private": private,
    }


def spelled(value):
    """As the strictest writer would write it, also where the format has no form for it."""
    import json

    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8", "surrogatepass")


def refused(value, code="entry.malformed"):
    with pytest.raises(StrongroomError) as caught:
        Entry.decode(spelled(value))
    assert caught.value.code in (code, "json.malformed", "json.not_canonical")


def test_there_is_a_whole_body_of_every_type():
    assert WHOLE.keys() == BODIES.keys()


def test_an_account_of_inference_may_say_to_whom_it_is_captured_and_nothing_empty():
    value = whole("inference")
    value["body"]["capture"] = "ab" * 32
    assert Entry.decode(spelled(value)).encode() == spelled(value)
    for wrong in ("", "ab", None, 5):
        value["body"]["capture"] = wrong
        refused(value)


def test_an_account_of_inference_may_be_somebodys_statement():
    value = whole("inference")
    value["body"]["statement"] = "said"
    assert Entry.decode(spelled(value)).encode() == spelled(value)
    for wrong in (None, 5, ["said"]):
        value["body"]["statement"] = wrong
        refused(value)


@pytest.mark.parametrize("kind", WHOLE)
class TestEachType:
    def test_has_one_spelling(self, kind):
        data = spelled(whole(kind))
        entry = Entry.decode(data)
        assert entry.encode() == data
        assert Entry.decode(entry.encode()) == entry
        assert vars(entry) == {name: value for name, value in whole(kind).items() if name != "format"}

    def test_lacks_nothing(self, kind):
        for name in whole(kind):
            value = whole(kind)
            del value[name]
            refused(value)
        for name in WHOLE[kind]:
            value = whole(kind)
            del value["body"][name]
            refused(value)

    def test_has_nothing_more(self, kind):
        refused({**whole(kind), "more": 1})
        for name in ("more", "statement", "reason", "", "id"):
            if name not in WHOLE[kind] and (kind, name) != ("inference", "statement"):
                value = whole(kind)
                value["body"][name] = SHORT
                refused(value)
        for name in ("more", "reason", "detail", "address", "oidc", ""):
            if name not in PRIVATE.get(kind, []):
                value = whole(kind)
                value["private"][name] = DIGEST
                refused(value)

    def test_has_every_member_of_its_kind(self, kind):
        for name, right in WHOLE[kind].items():
            wrong = [each for each in NEVER if not (right is False and each is True)]
            wrong += ["x", None] if not isinstance(right, str) else [None]
            for each in wrong:
                nullable = name in ("uses", "proposal", "lease") or (kind, name) == ("authority", "expires_at")
                if nullable and each is None:
                    continue
                value = whole(kind)
                value["body"][name] = each
                refused(value)

    def test_has_hexadecimal_of_its_length_in_lower_case(self, kind):
        for name, right in WHOLE[kind].items():
            if right not in (SHORT, ID, DIGEST):
                continue
            for wrong in (
                right[:-1],
                right + "0",
                right[:-1] + "G",
                right.upper(),
                right[:-1] + "\n",
                right[:-1] + "٣",
            ):
                value = whole(kind)
                value["body"][name] = wrong
                refused(value)

    def test_has_lists_of_texts_that_are_in_order_and_say_nothing_twice(self, kind):
        for name in TEXTS:
            if name in WHOLE[kind]:
                for wrong in (["b", "a"], ["a", "a"], ["a", None], ["a", 1], "ab", {"a": "b"}):
                    value = whole(kind)
                    value["body"][name] = wrong
                    refused(value)

    def test_commits_in_hexadecimal(self, kind):
        for name in PRIVATE.get(kind, []):
            for wrong in ("", DIGEST[:-1], DIGEST.upper(), 5, None, [DIGEST]):
                value = whole(kind)
                value["private"][name] = wrong
                refused(value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("at", each) for each in (-1, 1.0, "1", None, True, 2**53, 2**64, 2**70)),
        *(("by", each) for each in (None, 1, ["user/ana"])),
        *(("ref", each) for each in (None, 1)),
        *(("type", each) for each in (None, 1, "", "Review", "unknown", "login", ["review"], {"review": 1})),
        *(("body", each) for each in (None, [], "{}", 1)),
        *(("private", each) for each in (None, [], "{}", 1)),
        *(("format", each) for each in (0, -1, 1.0, True, "1", None)),
    ],
)
def test_a_member_of_another_kind(name, wrong):
    refused({**whole("review"), name: wrong})


def test_a_lease_lacks_nothing_and_has_nothing_more():
    for name in LEASE:
        value = whole("approve")
        del value["body"]["lease"][name]
        refused(value)
    for more in ({"more": 1}, {"action": "put"}, {"uses": -1}, {"uses": "1"}, {"id": "x"}, {"expires_at": None}):
        value = whole("approve")
        value["body"]["lease"].update(more)
        refused(value)
    value = whole("approve")
    value["body"]["lease"] = None
    assert Entry.decode(spelled(value)).body["lease"] is None


def test_of_another_release_of_strongroom():
    value = {**whole("review"), "format": 2, "news": True}
    with pytest.raises(CannotVerify) as caught:
        Entry.decode(spelled(value))
    assert caught.value.code == "format.unknown"


def test_no_more_than_an_entry_bundle_takes():
    entry = Entry.decode(spelled(whole("refused")))
    room_left = LIMITS.entry - len(entry.encode())
    body = {**entry.body, "action": entry.body["action"] + "x" * room_left}
    most = Entry("refused", entry.at, entry.by, entry.ref, body, entry.private)
    assert Entry.decode(most.encode()) == most
    more = Entry("refused", entry.at, entry.by, entry.ref, {**body, "action": body["action"] + "x"}, entry.private)
    with pytest.raises(LimitExceeded):
        more.encode()
    with pytest.raises(LimitExceeded):
        Entry.decode(most.encode() + b" ")


def test_an_entry_of_ours_that_is_none_is_a_fault_of_ours():
    for entry in (
        Entry("refused", 1, "user/ana"),
        Entry("refused", -1, "user/ana", "", WHOLE["refused"]),
        Entry("nothing", 1, "user/ana", "", {}),
        Entry("refused", 1, "user/ana", "", WHOLE["refused"], {"reason": DIGEST}),
        Entry("refused", 1, "user/ana", "", {**WHOLE["refused"], "action": "\ud800"}),
    ):
        with pytest.raises((ValueError, TypeError)):
            entry.encode()


SPELLINGS = [
    (b'"at":1790000000', b'"at":1790000000.0'),
    (b'"at":1790000000', b'"at":1.79e9'),
    (b'"at":1790000000', b'"at":01790000000'),
    (b'"at":1790000000', b'"at":+1790000000'),
    (b'"at":1790000000', b'"at":-0'),
    (b'"at":1790000000', b'"at":NaN'),
    (b'"by":"user/ana"', b'"by":"user\\/ana"'),
    (b'"by":"user/ana"', b'"by":"user/\\u0061na"'),
    (b'"by":"user/ana"', b'"by":"user/ana","by":"user/ana"'),
    (b'"by":"user/ana"', b'"by":"user/eve","by":"user/ana"'),
    (b'"by":"user/ana"', b'"by": "user/ana"'),
    (b'"by":"user/ana"', b'"by":"user/ana\x00"'),
    (b'"by":"user/ana"', b'"by":"user/\xff"'),
    (b'"by":"user/ana"', b'"by":"\\ud800"'),
    (b'"by":"user/ana"', b'"by":"\xed\xa0\x80"'),
    (b'"by":"user/ana"', b'"by":"\\u000A"'),
    (b'{"at"', b'\xef\xbb\xbf{"at"'),
    (b'{"at"', b' {"at"'),
    (b'"type":"review"}', b'"type":"review"}\n'),
    (b'"type":"review"}', b'"type":"login",}'),
]


@pytest.mark.parametrize(("old", "new"), SPELLINGS)
def test_another_spelling(old, new):
    data = spelled(whole("review"))
    assert old in data
    with pytest.raises(Tampered):
        Entry.decode(data.replace(old, new, 1))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = st.integers(0, 2**53 - 1)


@given(at=COUNT, by=TEXT, ref=TEXT, action=TEXT, detail=st.none() | st.binary(min_size=32, max_size=32))
def test_whatever_it_says_has_one_spelling(at, by, ref, action, detail):
    private = {} if detail is None else {"detail": detail.hex()}
    entry = Entry("refused", at, by, ref, {"action": action, "code": action, "rule": ""}, private)
    data = entry.encode()
    assert Entry.decode(data) == entry
    assert data == canonical.encode(canonical.decode(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def one_spelling(data):
    """Refused with one of our errors, or exactly what is written again."""
    try:
        entry = Entry.decode(data)
    except StrongroomError:
        return
    assert entry.encode() == data


@given(st.binary(max_size=200))
def test_any_bytes(data):
    one_spelling(data)


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_value_in_any_place(kind, data):
    value = whole(kind)
    place = data.draw(st.sampled_from([*value, *(("body", name) for name in value["body"]), ("private", "reason")]))
    new = data.draw(JSON)
    if isinstance(place, tuple):
        value[place[0]][place[1]] = new
    else:
        value[place] = new
    one_spelling(spelled(value))


@given(st.sampled_from(sorted(WHOLE)), st.integers(0), st.binary(max_size=3), st.integers(0, 3))
def test_any_bytes_in_any_place(kind, place, new, out):
    data = spelled(whole(kind))
    place %= len(data)
    one_spelling(data[:place] + new + data[place + out :])


@pytest.mark.parametrize("depth", [33, 500, 20_000])
@pytest.mark.parametrize("ends", ["[]", "{}"])
def test_nested_deeply(depth, ends):
    inside = "[" * depth + "]" * depth if ends == "[]" else '{"a":' * depth + "1" + "}" * depth
    data = spelled(whole("refused")).replace(b'"load"', inside.encode())
    with pytest.raises(StrongroomError):
        Entry.decode(data)


class TestPrivate:
    def test_commits_to_name_salt_and_value(self):
        note = Private("reason", "Grüße", bytes(range(32)))
        said = b"strongroom/1 private\x00" + bytes(range(32)) + '["reason","Grüße"]'.encode()
        assert note.commitment == hashlib.sha256(said).hexdigest()
        note.check(note.commitment)

    @given(TEXT, TEXT, st.binary(min_size=32, max_size=32))
    def test_nothing_else_has_the_commitment(self, name, value, salt):
        note = Private(name, value, salt)
        for other in (
            Private(name + "x", value, salt),
            Private(name, value + "x", salt),
            Private(name, value, bytes(32) if any(salt) else b"\1" * 32),
            Private(value, name, salt) if name != value else Private(name, "", bytes(31)),
        ):
            with pytest.raises(Tampered):
                other.check(note.commitment)

    def test_takes_a_whole_salt(self):
        """Else bytes could move between salt and value."""
        for size in (0, 16, 31, 33, 64):
            note = Private("reason", "x", bytes(size))
            with pytest.raises(Tampered):
                note.check(note.commitment)

    def test_never_has_a_salt_twice(self):
        assert len({Private.fresh("reason", "x").commitment for _ in range(100)}) == 100

    def test_does_not_show_itself(self):
        text = repr(Private("reason", "for Mrs Smith", b"s" * 32))
        assert "Smith" not in text
        assert "ssss" not in text

    def test_of_no_text(self):
        with pytest.raises(UsageError) as caught:
            _ = Private.fresh("reason", "\udcff").commitment
        assert caught.value.code == "private.text"
