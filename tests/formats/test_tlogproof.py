"""Proofs of one entry: one spelling, and nothing accepted that the log's key did not sign."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.crypto.signatures import Signer, verify
from strongroom.errors import LimitExceeded, StrongroomError, Tampered
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.merkle import Frontier, inclusion_proof, leaf_hash
from strongroom.formats.note import ED25519, Note, Signature, VerifierKey
from strongroom.formats.tlogproof import LogProof, decode_hashes, encode_hashes

SIGNER = Signer(b"l" * 32)
KEY = VerifierKey("example.com/log", ED25519, SIGNER.public_key)
LEAVES = [leaf_hash(b"%d" % number) for number in range(11)]
FRONTIER = Frontier()
NODES = {(level, position): value for level, position, value in FRONTIER.extend(LEAVES)}


def note(origin=KEY.name, size=11, root=None, signer=SIGNER, key=KEY):
    text = Checkpoint(origin, size, root or FRONTIER.root()).encode()
    return Note(text, (Signature(key.name, key.key_id, signer.sign(text.encode())),)).encode()


def proof(index=6, extra=None, **checkpoint):
    path = inclusion_proof(index, len(LEAVES), lambda level, position: NODES[level, position])
    return LogProof(index, tuple(path), note(**checkpoint), extra)


WHOLE = proof().encode()


def test_the_form_of_the_specification():
    path = "".join(f"{base64.b64encode(value).decode()}\n" for value in proof().path)
    assert proof().encode() == f"c2sp.org/tlog-proof@v1\nindex 6\n{path}\n".encode() + note()
    extra = proof(extra=b"age-v1.2.1").encode()
    assert extra.startswith(b"c2sp.org/tlog-proof@v1\nextra YWdlLXYxLjIuMQ==\nindex 6\n")


@pytest.mark.parametrize("index", range(len(LEAVES)))
@pytest.mark.parametrize("extra", [None, b"x", b"\n\n"])
def test_a_proof_survives_its_encoding_and_verifies(index, extra):
    made = proof(index, extra)
    again = LogProof.decode(made.encode())
    assert again == made
    assert again.verify(LEAVES[index], KEY, verify) == Checkpoint(KEY.name, len(LEAVES), FRONTIER.root())
    for other in set(LEAVES) - {LEAVES[index]}:
        with pytest.raises(Tampered):
            again.verify(other, KEY, verify)


def test_a_log_of_one_entry_has_an_empty_path():
    frontier = Frontier()
    frontier.append(LEAVES[0])
    alone = LogProof(0, (), note(size=1, root=frontier.root()))
    assert LogProof.decode(alone.encode()).verify(LEAVES[0], KEY, verify).size == 1


def test_nothing_is_the_same_as_an_empty_extra():
    assert proof(extra=b"").encode() == WHOLE
    assert LogProof.decode(WHOLE).extra is None


def test_every_bit_of_a_proof_counts():
    for bit in range(8 * len(WHOLE)):
        flipped = bytearray(WHOLE)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StrongroomError):
            LogProof.decode(bytes(flipped)).verify(LEAVES[6], KEY, verify)
    for size in range(len(WHOLE)):
        with pytest.raises(StrongroomError):
            LogProof.decode(WHOLE[:size]).verify(LEAVES[6], KEY, verify)


def test_a_checkpoint_that_somebody_else_signed():
    other = Signer(b"o" * 32)
    foreign = VerifierKey("example.com/other", ED25519, other.public_key)
    for made in (
        proof(signer=other),  # under the log's name and key id
        proof(signer=other, key=foreign),  # under their own: as good as unsigned
        proof(signer=other, key=foreign, origin=foreign.name),
        proof(origin=foreign.name),  # signed by this key, for another log
    ):
        with pytest.raises(Tampered):
            LogProof.decode(made.encode()).verify(LEAVES[6], KEY, verify)


def test_a_proof_for_another_size():
    """Signed by the log itself. (With a size at which the way up from the entry is the same, as 12 here, only that
    signature says which root belongs to which size.)"""
    for size in (0, 6, 7, 8, 17, 1 << 61):
        with pytest.raises(Tampered):
            LogProof.decode(proof(size=size).encode()).verify(LEAVES[6], KEY, verify)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"@v1", b"@v2"),
        (b"c2sp", b"\nc2sp"),
        (b"index 6\n", b""),
        (b"index 6\n", b"index 06\n"),
        (b"index 6\n", b"index -6\n"),
        (b"index 6\n", b"index +6\n"),
        (b"index 6\n", b"index  6\n"),
        (b"index 6\n", b"index 6 \n"),
        (b"index 6\n", b"index\n"),
        (b"index 6\n", b"6\n"),
        (b"index 6\n", b"index 6\nindex 6\n"),
        (b"index 6\n", b"index %d\n" % (1 << 62)),
        (b"index 6\n", b"index " + b"9" * 5000 + b"\n"),
        (b"index 6\n", "index \u0666\n".encode()),
        (b"index 6\n", b"index 6\r\n"),
        (b"index 6\n", b"index 6\n\n"),
        (b"index 6\n", b"index 6\nAAAA\n"),
        (b"index 6\n", b"index 6\nextra eA==\n"),
        (b"index 6\n", b"extra \nindex 6\n"),
        (b"index 6\n", b"extra\nindex 6\n"),
        (b"index 6\n", b"extra eB==\nindex 6\n"),  # stray bits
        (b"index 6\n", b"extra eA\nindex 6\n"),
        (b"index 6\n", b"extra eA==\nextra eA==\nindex 6\n"),
        (b"index 6\n", b"other eA==\nindex 6\n"),
        (b"\n\nexample", b"\nexample"),
        (b"\n\nexample", b"\n\n\nexample"),
        (b"\n11\n", b"\n011\n"),
    ],
)
def test_what_is_no_proof(old, new):
    assert WHOLE.count(old) == 1
    with pytest.raises(Tampered):
        LogProof.decode(WHOLE.replace(old, new))


def test_a_note_that_is_no_checkpoint():
    text = Note("hello\n", Note.decode(note()).signatures).encode()
    with pytest.raises(Tampered):
        LogProof.decode(LogProof(0, (), text).encode())


def test_limits_of_a_proof():
    longest = LogProof(0, (bytes(32),) * LIMITS.proof_hashes, note())
    assert LogProof.decode(longest.encode()) == longest
    with pytest.raises(LimitExceeded):
        LogProof.decode(LogProof(0, (bytes(32),) * (LIMITS.proof_hashes + 1), note()).encode())
    with pytest.raises(LimitExceeded):
        LogProof.decode(LogProof(0, (), note(), bytes(LIMITS.note)).encode())


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=5))
def test_hashes_survive_their_encoding(values):
    assert decode_hashes(encode_hashes(values)) == tuple(values)


@pytest.mark.parametrize(
    "line",
    ["", "A", "A" * 43, "A" * 43 + "==", "A" * 42 + "B=", "A" * 40, "A" * 48, " " + "A" * 43 + "=", "-" * 43 + "="],
)
def test_what_is_no_hash(line):
    with pytest.raises(Tampered):
        decode_hashes([line])


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: WHOLE[:31] + data))
def test_any_bytes_into_a_proof(data):
    with contextlib.suppress(StrongroomError):
        assert LogProof.decode(data).encode() == data


@given(st.data())
def test_an_altered_proof_is_refused_or_has_one_spelling(data):
    altered = bytearray(proof(extra=b"extra").encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(altered) - 1))
        altered[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(StrongroomError):
        assert LogProof.decode(bytes(altered)).encode() == altered
