"""Checkpoints and cosignatures: the examples of the specifications, and one spelling for each."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.crypto.signatures import Signer, verify
from strongroom.errors import CannotVerify, StrongroomError, Tampered, UsageError
from strongroom.formats.checkpoint import (
    Checkpoint,
    cosignature,
    cosignature_message,
    decode_cosignature,
    read_size,
    verify_cosignature,
)
from strongroom.formats.note import COSIGNATURE, ED25519, Note, Signature, VerifierKey, is_text

# The example of C2SP tlog-cosignature.
EXAMPLE = """\
example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==
""".encode()  # noqa: E501 - one line each in the specification
ROOT = base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=")
LARGEST = (1 << 62) - 1
NOW = 1_790_000_000

WITNESS = Signer(b"w" * 32)
KEY = VerifierKey("witness.example/w1", COSIGNATURE, WITNESS.public_key)
TEXT = Checkpoint("example.com/log", 5, bytes(range(32)), ("an extension",)).encode()

line = st.text(min_size=1, max_size=20).filter(lambda text: is_text(text) and "\n" not in text)


def cosigned(*times, text=TEXT, key=KEY, signer=WITNESS):
    made = [cosignature(key, at, signer.sign(cosignature_message(text, at))) for at in times]
    return Note(text, tuple(made))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_specification():
    note = Note.decode(EXAMPLE)
    checkpoint = Checkpoint.decode(note.text)
    assert checkpoint == Checkpoint("example.com/behind-the-sofa", 20852163, ROOT)
    assert checkpoint.encode() == note.text


@given(line, st.integers(0, LARGEST), st.binary(min_size=32, max_size=32), st.lists(line, max_size=3))
def test_a_checkpoint_survives_its_encoding(origin, size, root, extensions):
    checkpoint = Checkpoint(origin, size, root, tuple(extensions))
    assert Checkpoint.decode(checkpoint.encode()) == checkpoint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n5\n", "\n05\n"),
        ("\n5\n", "\n00\n"),
        ("\n5\n", "\n+5\n"),
        ("\n5\n", "\n-5\n"),
        ("\n5\n", "\n 5\n"),
        ("\n5\n", "\n5 \n"),
        ("\n5\n", "\n5.0\n"),
        ("\n5\n", "\n0x5\n"),
        ("\n5\n", "\n5_0\n"),
        ("\n5\n", "\n\u0665\n"),
        ("\n5\n", "\n\n"),
        ("\n5\n", f"\n{LARGEST + 1}\n"),
        ("\n5\n", f"\n{1 << 64}\n"),
        ("\n5\n", f"\n{'9' * 5000}\n"),
        ("\n5\n", "\n"),
        ("example.com/log\n", "\n"),
        ("example.com/log\n", ""),
        ("example.com/log", "example\r"),
        ("example.com/log", "example\udc80"),
        ("AAECAwQF", "AAECAwQ"),
        ("AAECAwQF", "AAECAwQFBg"),
        ("AAECAwQF", "AAECAwQ-"),
        ("AAECAwQF", "AAEC\tAwQF"),
        ("Hh8=\n", "Hh8\n"),
        ("Hh8=\n", "Hh9=\n"),  # stray bits
        ("Hh8=\n", "Hh8= \n"),
        ("Hh8=\n", "Hh8=\n\n"),
        ("an extension\n", "an extension"),
        ("an extension\n", "an extension\n\n"),
        ("an extension\n", "an extension\n\nanother\n"),
    ],
)
def test_what_is_no_checkpoint(old, new):
    assert TEXT.count(old) == 1
    with pytest.raises(Tampered):
        Checkpoint.decode(TEXT.replace(old, new))


@pytest.mark.parametrize("text", ["", "\n", "\n\n\n", "a\n", "a\n5\n", "a\n5\n\n"])
def test_too_few_lines(text):
    with pytest.raises(Tampered):
        Checkpoint.decode(text)


@given(st.text(max_size=100) | st.lists(st.text(max_size=10), max_size=6).map("\n".join))
def test_any_text_into_a_checkpoint(text):
    with contextlib.suppress(StrongroomError):
        assert Checkpoint.decode(text).encode() == text


@given(st.data())
def test_an_altered_checkpoint_is_refused_or_has_one_spelling(data):
    at = data.draw(st.integers(0, len(TEXT)))
    text = TEXT[:at] + data.draw(st.text(max_size=2)) + TEXT[at + data.draw(st.integers(0, 2)) :]
    with contextlib.suppress(StrongroomError):
        assert Checkpoint.decode(text).encode() == text


@given(st.integers(-1, 1 << 65))
def test_sizes_have_one_spelling(value):
    assert read_size(str(value)) == (value if 0 <= value <= LARGEST else None)
    assert read_size(f"0{value}") is None


# -- cosignatures ------------------------------------------------------------------------------------------------------


def test_the_example_of_a_cosignature():
    """Its time is in the specification's text; the witness's key is not."""
    note = Note.decode(EXAMPLE)
    assert decode_cosignature(note.signatures[1].value)[0] == 1679315147
    message = cosignature_message(note.text, 1679315147)
    assert message == b"cosignature/v1\ntime 1679315147\n" + note.text.encode()
    with pytest.raises(Tampered):
        decode_cosignature(note.signatures[0].value)


def test_a_published_time():
    """Of the tests of transparency-dev/formats."""
    data = "ZGhGuQAAAABm/qTPeyKXD+R2rzyQsxPiP8mXum7qq/iF0u4vanlqJyocWODBt97w9uL+8qT7S5gxEHWWOworDcFiEBYJXORmnFBOBA=="
    signature = Signature.decode(f"— name {data}")
    assert decode_cosignature(signature.value)[0] == 1727964367


def test_a_cosignature_says_when():
    note = Note.decode(cosigned(NOW).encode())
    assert verify_cosignature(note, KEY, verify) == NOW
    assert verify_cosignature(cosigned(NOW, NOW + 9, NOW + 3), KEY, verify) == NOW + 9
    assert verify_cosignature(cosigned(0), KEY, verify) == 0


def test_every_bit_of_a_cosignature_counts():
    """Time and signature: an older sighting is not passed off as a new one."""
    value = cosigned(NOW).signatures[0].value
    for bit in range(8 * len(value)):
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Tampered) as caught:
            verify_cosignature(Note(TEXT, (Signature(KEY.name, KEY.key_id, bytes(flipped)),)), KEY, verify)
        assert caught.value.code == "checkpoint.cosignature"
    for other in (value[:-1], value + b"\x00", value[8:], value[:8], b"x"):
        with pytest.raises(Tampered):
            verify_cosignature(Note(TEXT, (Signature(KEY.name, KEY.key_id, other),)), KEY, verify)


def test_a_cosignature_is_of_one_checkpoint():
    """Of all of its lines, extensions too."""
    note = cosigned(NOW)
    for text in (TEXT.replace("\n5\n", "\n6\n"), TEXT.replace("an extension\n", ""), TEXT + "another\n"):
        with pytest.raises(Tampered):
            verify_cosignature(Note(text, note.signatures), KEY, verify)


def test_a_note_signature_is_no_cosignature():
    """Domain separation: what a key signs as a note is never taken for what it signs as a witness."""
    plain = Signature(KEY.name, KEY.key_id, NOW.to_bytes(8, "big") + WITNESS.sign(TEXT.encode()))
    with pytest.raises(Tampered):
        verify_cosignature(Note(TEXT, (plain,)), KEY, verify)


def test_one_good_cosignature_does_not_excuse_a_bad_one():
    good = cosigned(NOW).signatures[0]
    bad = Signature(KEY.name, KEY.key_id, bytes(72))
    for order in ((good, bad), (bad, good)):
        with pytest.raises(Tampered):
            verify_cosignature(Note(TEXT, order), KEY, verify)


def test_others_are_passed_over():
    other = VerifierKey("witness.example/w2", COSIGNATURE, WITNESS.public_key)
    assert verify_cosignature(cosigned(NOW), other, verify) is None
    same_name = VerifierKey(KEY.name, COSIGNATURE, Signer(b"x" * 32).public_key)
    assert verify_cosignature(cosigned(NOW), same_name, verify) is None
    assert verify_cosignature(Note(TEXT, ()), KEY, verify) is None


def test_a_key_that_is_no_witness():
    plain = VerifierKey(KEY.name, ED25519, WITNESS.public_key)
    assert verify_cosignature(cosigned(NOW), plain, verify) is None  # another key id
    with pytest.raises(CannotVerify):
        verify_cosignature(cosigned(NOW, key=plain), plain, verify)


@pytest.mark.parametrize("seconds", [1 << 63, (1 << 64) - 1])
def test_a_time_beyond_all_clocks_is_refused(seconds):
    value = seconds.to_bytes(8, "big") + WITNESS.sign(cosignature_message(TEXT, seconds))
    with pytest.raises(Tampered):
        verify_cosignature(Note(TEXT, (Signature(KEY.name, KEY.key_id, value),)), KEY, verify)
    with pytest.raises(UsageError):
        cosignature(KEY, seconds, bytes(64))


def test_the_last_time_there_is():
    assert verify_cosignature(cosigned((1 << 63) - 1), KEY, verify) == (1 << 63) - 1


@pytest.mark.parametrize(("seconds", "size"), [(-1, 64), (0, 63), (0, 65), (0, 0)])
def test_what_no_cosignature_is_made_of(seconds, size):
    with pytest.raises(UsageError):
        cosignature(KEY, seconds, bytes(size))


@given(st.binary(max_size=100) | st.binary(min_size=72, max_size=72))
def test_any_bytes_into_a_cosignature(data):
    try:
        seconds, signature = decode_cosignature(data)
    except StrongroomError:
        return
    assert cosignature(KEY, seconds, signature).value == data
