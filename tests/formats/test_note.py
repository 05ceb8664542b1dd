"""Signed notes and verifier keys: the published examples, one spelling for each, and who is taken to have signed."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.crypto.signatures import Signer, verify
from strongroom.errors import CannotVerify, LimitExceeded, StrongroomError, Tampered
from strongroom.formats.note import COSIGNATURE, ED25519, Note, Signature, VerifierKey, is_text, verify_note

# The example of golang.org/x/mod/sumdb/note, which the specification was written from.
EXAMPLE_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
EXAMPLE = """\
If you think cryptography is the answer to your problem,
then you don't know what your problem is.

— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=
""".encode()
# The example of C2SP signed-note: its text has an empty line.
POEM = """\
Ognuno sta solo sul cuor della terra
trafitto da un raggio di sole:

ed è subito sera.

— quasimodo.example/salvatore NnugSzTjtVAewIS+Z/iJhUPeFDkO/5QQ2i5ddnGITLlC+EhfLW9oJKONrMouFSQU0xMcXxj99ihAQwaqP3ZekRwNtIc=
""".encode()  # noqa: E501 - one line in the specification

SIGNER, OTHER = Signer(b"a" * 32), Signer(b"b" * 32)
KEY = VerifierKey("example.com/log", ED25519, SIGNER.public_key)
TEXT = "example.com/log\n\nè — text\n"


def signed(text, *keys):
    """A note with the signatures of pairs of key and signer."""
    lines = tuple(Signature(key.name, key.key_id, signer.sign(text.encode())) for key, signer in keys)
    return Note(text, lines)


WHOLE = signed(TEXT, (KEY, SIGNER))

names = st.text(min_size=1, max_size=20).filter(
    lambda text: is_text(text) and "+" not in text and not any(char.isspace() for char in text)
)
lines = st.builds(Signature, names, st.binary(min_size=4, max_size=4), st.binary(min_size=1, max_size=80))
texts = st.text(max_size=60).filter(is_text).map(lambda text: text + "\n")


# -- notes -------------------------------------------------------------------------------------------------------------


def test_the_published_example_verifies():
    note = Note.decode(EXAMPLE)
    assert note.text.endswith("what your problem is.\n")
    assert verify_note(note, [VerifierKey.parse(EXAMPLE_KEY)], verify) == ["PeterNeumann"]
    for altered in (EXAMPLE.replace(b"think", b"thinK"), EXAMPLE.replace(b"x08go/Z", b"x08go/a")):
        with pytest.raises(Tampered) as caught:
            verify_note(Note.decode(altered), [VerifierKey.parse(EXAMPLE_KEY)], verify)
        assert caught.value.code == "note.signature"


def test_the_last_empty_line_divides():
    note = Note.decode(POEM)
    assert note.text.count("\n\n") == 1
    assert [each.name for each in note.signatures] == ["quasimodo.example/salvatore"]
    assert note.signatures[0].key_id.hex() == "367ba04b"
    assert note.encode() == POEM


@given(texts, st.lists(lines, min_size=1, max_size=4))
def test_a_note_survives_its_encoding(text, signatures):
    note = Note(text, tuple(signatures))
    assert Note.decode(note.encode()) == note


@given(st.binary(max_size=300))
def test_any_bytes_into_a_note(data):
    with contextlib.suppress(StrongroomError):
        assert Note.decode(data).encode() == data


@given(st.data())
def test_an_altered_note_is_refused_or_has_one_spelling(data):
    note = bytearray(WHOLE.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(note) - 1))
        note[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(StrongroomError):
        assert Note.decode(bytes(note)).encode() == note


SIGNATURE = WHOLE.signatures[0].encode().encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"\n\n",
        b"text\n",
        b"text\n\n",
        b"text" + SIGNATURE,
        b"text\n" + SIGNATURE,
        SIGNATURE,
        b"\n" + SIGNATURE,
        b"text\n\n" + SIGNATURE[:-1],
        b"text\n\n" + SIGNATURE + b"\n",
        b"text\n\n" + SIGNATURE + b"more\n",
        b"text\r\n\n" + SIGNATURE,
        b"te\x00xt\n\n" + SIGNATURE,
        b"te\txt\n\n" + SIGNATURE,
        b"te\x1bxt\n\n" + SIGNATURE,
        b"te\xffxt\n\n" + SIGNATURE,
        b"te\xed\xa0\x80xt\n\n" + SIGNATURE,  # a surrogate
        b"te\xc0\xafxt\n\n" + SIGNATURE,  # overlong
        b"text\n\n" + SIGNATURE.replace("— ".encode(), b"- "),
        b"text\n\n" + SIGNATURE.replace("— ".encode(), "—".encode()),
        b"text\n\n" + SIGNATURE.replace(b"example.com/log ", b" "),
        b"text\n\n" + SIGNATURE.replace(b"example.com/log", b"example.com+log"),
        b"text\n\n" + SIGNATURE.replace(b"example.com/log", "example\u00a0log".encode()),
        b"text\n\n" + SIGNATURE.replace(b"example.com/log", "example\u2028log".encode()),
        b"text\n\n" + SIGNATURE.replace(b"example.com/log", "example\u3000log".encode()),
        b"text\n\n" + SIGNATURE.replace(b"example.com/log", "example\u0085log".encode()),
        b"text\n\n" + SIGNATURE.replace(b"log ", b"log  "),
        b"text\n\n" + SIGNATURE.replace(b"==\n", b"=\n").replace(b"=\n", b"\n"),
        b"text\n\n" + SIGNATURE[:-1] + b" \n",
        "text\n\n— name AAAAAA==\n".encode(),  # a key id and no signature
        "text\n\n— name AAAAAAB=\n".encode(),  # stray bits
        "text\n\n— name AAAA-AA=\n".encode(),  # the other alphabet
        "text\n\n— name \n".encode(),
        "text\n\n— name\n".encode(),
    ],
)
def test_what_is_no_note(data):
    with pytest.raises(Tampered):
        Note.decode(data)


def test_other_characters_may_be_in_a_text():
    # "ASCII control characters (those below U+0020)": this one is not.
    assert Note.decode(b"te\x7fxt\n\n" + SIGNATURE).text == "te\x7fxt\n"


def test_many_signatures():
    """At least 16 have to be read."""
    for count in (16, LIMITS.note_signatures):
        assert len(Note.decode(Note("text\n", WHOLE.signatures * count).encode()).signatures) == count
    with pytest.raises(LimitExceeded):
        Note.decode(Note("text\n", WHOLE.signatures * (LIMITS.note_signatures + 1)).encode())


def test_a_large_note():
    rest = len(Note("\n", WHOLE.signatures).encode())
    assert Note.decode(Note("x" * (LIMITS.note - rest) + "\n", WHOLE.signatures).encode())
    with pytest.raises(LimitExceeded):
        Note.decode(Note("x" * (LIMITS.note - rest + 1) + "\n", WHOLE.signatures).encode())


# -- who signed --------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_signed_text_counts():
    data = WHOLE.encode()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(Tampered):
            assert verify_note(Note.decode(bytes(flipped)), [KEY], verify) == []


def test_unknown_keys_are_passed_over():
    """Even those that share a name, or a key id, with a known one."""
    same_name = VerifierKey(KEY.name, ED25519, OTHER.public_key)
    foreign = VerifierKey("example.com/other", ED25519, OTHER.public_key)
    same_id = Signature("example.com/other", KEY.key_id, b"of nobody")
    note = signed(TEXT, (same_name, OTHER), (foreign, OTHER), (KEY, SIGNER))
    note = Note(TEXT, (same_id, *note.signatures))
    assert verify_note(note, [KEY], verify) == [KEY.name]
    assert verify_note(note, [], verify) == []
    assert verify_note(note, [VerifierKey("example.com/third", ED25519, OTHER.public_key)], verify) == []
    assert verify_note(note, [foreign, KEY], verify) == [foreign.name, KEY.name]


def test_one_good_signature_does_not_excuse_a_bad_one():
    foreign = VerifierKey("example.com/other", ED25519, OTHER.public_key)
    bad = Signature(foreign.name, foreign.key_id, bytes(64))
    for order in ((WHOLE.signatures[0], bad), (bad, WHOLE.signatures[0])):
        with pytest.raises(Tampered) as caught:
            verify_note(Note(TEXT, order), [KEY, foreign], verify)
        assert caught.value.code == "note.signature"
    assert verify_note(Note(TEXT, (WHOLE.signatures[0], bad)), [KEY], verify) == [KEY.name]


@pytest.mark.parametrize("value", [b"x", bytes(63), bytes(64), bytes(65)])
def test_a_known_key_with_any_other_signature(value):
    with pytest.raises(Tampered):
        verify_note(Note(TEXT, (Signature(KEY.name, KEY.key_id, value),)), [KEY], verify)


def test_a_log_that_changes_its_key_signs_with_both():
    new = VerifierKey(KEY.name, ED25519, OTHER.public_key)
    note = signed(TEXT, (KEY, SIGNER), (new, OTHER))
    assert verify_note(note, [KEY, new], verify) == [KEY.name]
    assert verify_note(note, [KEY], verify) == verify_note(note, [new], verify) == [KEY.name]


def test_the_same_key_twice():
    note = signed(TEXT, (KEY, SIGNER), (KEY, SIGNER))
    with pytest.raises(Tampered):
        verify_note(note, [KEY], verify)
    assert verify_note(WHOLE, [KEY, KEY], verify) == [KEY.name]  # known twice is not signed twice


@pytest.mark.parametrize("algorithm", [0x02, COSIGNATURE, 0x06, 0xFF])
def test_a_known_key_of_another_algorithm_is_not_passed_over(algorithm):
    key = VerifierKey("example.com/log", algorithm, SIGNER.public_key)
    with pytest.raises(CannotVerify):
        verify_note(signed(TEXT, (key, SIGNER)), [key], verify)
    assert verify_note(WHOLE, [key, KEY], verify) == [KEY.name]  # it has not signed


# -- verifier keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE_KEY,
        "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop",  # as the example
        # Of the tests of transparency-dev/formats: base64 with a plus sign, and a witness's.
        "TEST+7997405c+AQcC+FTVKf0jlTdHDY3rbevmnKxxPjigCXlVtGe6RIr6",
        "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    ],
)
def test_published_keys(text):
    key = VerifierKey.parse(text)
    assert key.encode() == text
    assert key.algorithm in (ED25519, COSIGNATURE)


def test_the_algorithm_is_part_of_the_key_id():
    assert KEY.key_id != VerifierKey(KEY.name, COSIGNATURE, KEY.public_key).key_id


@given(names, st.sampled_from([ED25519, COSIGNATURE]), st.binary(min_size=32, max_size=32))
def test_a_key_survives_its_encoding(name, algorithm, public_key):
    key = VerifierKey(name, algorithm, public_key)
    assert VerifierKey.parse(key.encode()) == key


def vkey(name, algorithm, public_key):
    """The text of a key, its hash right, its parts whatever they are."""
    return VerifierKey(name, algorithm, public_key).encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "++",
        "name",
        "name+00000000",
        "name+00000000+",
        EXAMPLE_KEY.replace("c74f20a3", "c74f20a4"),
        EXAMPLE_KEY.replace("c74f20a3", "C74F20A3"),
        EXAMPLE_KEY.replace("c74f20a3", "0c74f20a3"),
        EXAMPLE_KEY.replace("PeterNeumann", "PeterNeuman"),
        EXAMPLE_KEY.replace("PeterNeumann", "Peter\udcffNeumann"),
        EXAMPLE_KEY + "=",
        EXAMPLE_KEY + "\n",
        " " + EXAMPLE_KEY,
        EXAMPLE_KEY[:-1],
        vkey("na me", ED25519, bytes(32)),
        vkey("na\x01me", ED25519, bytes(32)),
        vkey("", ED25519, bytes(32)),
        vkey("name", ED25519, bytes(31)),
        vkey("name", ED25519, bytes(33)),
        vkey("name", COSIGNATURE, b""),
    ],
)
def test_what_is_no_key(text):
    with pytest.raises(Tampered):
        VerifierKey.parse(text)


@pytest.mark.parametrize("algorithm", [0x00, 0x02, 0x03, 0x05, 0x06, 0xFF])
def test_a_key_of_an_unknown_algorithm_is_not_called_tampered(algorithm):
    with pytest.raises(CannotVerify):
        VerifierKey.parse(vkey("name", algorithm, bytes(32)))


@given(st.text(max_size=80) | st.builds("{}+{}+{}".format, st.text(max_size=5), st.text(max_size=8), st.text()))
def test_any_text_into_a_key(text):
    with contextlib.suppress(StrongroomError):
        assert VerifierKey.parse(text).encode() == text


@given(st.text(max_size=80), st.binary(max_size=80))
def test_any_text_into_a_signature_line(name, data):
    for line in (name, f"— {name} {base64.b64encode(data).decode()}"):
        with contextlib.suppress(StrongroomError):
            assert Signature.decode(line).encode() == line + "\n"
