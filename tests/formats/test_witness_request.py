"""What a log sends to a witness: the specification's example, and one spelling."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, StrongroomError, Tampered
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.note import Note
from strongroom.formats.witness import AddCheckpoint

# The example of C2SP tlog-witness.
EXAMPLE = """\
old 20852014
PlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=
jrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=
5+pKlUdi2LeF/BcMHBn+Ku6yhPGNCswZZD1X/6QgPd8=
/6WVhPs2CwSsb5rYBH5cjHV/wSmA79abXAwhXw3Kj/0=

example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
— example.com/behind-the-sofa opLqBQsREYCgu6xQkYQwJr9fo45a62DN9EdmHXnZdXNqlcVGlCum2Wks+49/V6267UEjw6QUXTS5Rovnzv++qbSzm9Q=
""".encode()  # noqa: E501 - one line each in the specification
NOTE = EXAMPLE.partition(b"\n\n")[2]


def test_the_example_of_the_specification():
    request = AddCheckpoint.decode(EXAMPLE)
    assert request.old == 20852014
    assert [value[:4].hex() for value in request.proof] == ["3e544d0a", "8eb2590e", "e7ea4a95", "ffa59584"]
    assert Checkpoint.decode(Note.decode(request.note).text).size == 20852163
    assert request.encode() == EXAMPLE


@given(st.integers(0, LIMITS.log_size - 1), st.lists(st.binary(min_size=32, max_size=32), max_size=63))
def test_a_request_survives_its_encoding(old, proof):
    request = AddCheckpoint(old, tuple(proof), NOTE)
    assert AddCheckpoint.decode(request.encode()) == request


OLD = b"old 20852014\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OLD, b""),
        (OLD, b"\n" + OLD),
        (OLD, OLD + b"\n"),
        (OLD, OLD + OLD),
        (OLD, b"20852014\n"),
        (OLD, b"old20852014\n"),
        (OLD, b"old  20852014\n"),
        (OLD, b"old 20852014 \n"),
        (OLD, b"old\t20852014\n"),
        (OLD, b"Old 20852014\n"),
        (OLD, b"old 020852014\n"),
        (OLD, b"old 00\n"),
        (OLD, b"old -1\n"),
        (OLD, b"old +1\n"),
        (OLD, b"old 1.0\n"),
        (OLD, b"old \n"),
        (OLD, b"old\n"),
        (OLD, b"old 1\r\n"),
        (OLD, "old \u0661\n".encode()),
        (OLD, b"old %d\n" % LIMITS.log_size),
        (OLD, b"old " + b"9" * 5000 + b"\n"),
        (b"PlRNCrwH", b"PlRNCrw"),
        (b"PlRNCrwH", b"PlRNCrwHAAAA"),
        (b"PlRNCrwH", b" PlRNCrwH"),
        (b"PlRNCrwH", b"PlRN-rwH"),
        (b"DDpkaw=\n", b"DDpkax=\n"),  # stray bits
        (b"DDpkaw=\n", b"DDpkaw\n"),
        (b"DDpkaw=\n", b"DDpkaw=\r\n"),
        (b"Kj/0=\n\n", b"Kj/0=\n"),
        (b"Kj/0=\n\n", b"Kj/0=\n\n\n"),
        (b"\n20852163\n", b"\n020852163\n"),
        (NOTE, b""),
        (NOTE, NOTE[:-1]),
        (NOTE, NOTE + b"\n"),
        (NOTE, NOTE.partition(b"\n\n")[0] + b"\n"),  # unsigned
        (NOTE, b"hello\n\n" + NOTE.partition(b"\n\n")[2]),  # a note, but no checkpoint
    ],
)
def test_what_is_no_request(old, new):
    assert EXAMPLE.count(old) == 1
    with pytest.raises(Tampered):
        AddCheckpoint.decode(EXAMPLE.replace(old, new))


def test_limits_of_a_request():
    longest = AddCheckpoint(1, (bytes(32),) * LIMITS.proof_hashes, NOTE)
    assert AddCheckpoint.decode(longest.encode()) == longest
    with pytest.raises(LimitExceeded):
        AddCheckpoint.decode(AddCheckpoint(1, (bytes(32),) * (LIMITS.proof_hashes + 1), NOTE).encode())
    with pytest.raises(LimitExceeded):
        AddCheckpoint.decode(EXAMPLE + bytes(LIMITS.note))


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: EXAMPLE[:58] + data))
def test_any_bytes_into_a_request(data):
    with contextlib.suppress(StrongroomError):
        assert AddCheckpoint.decode(data).encode() == data


@given(st.data())
def test_an_altered_request_is_refused_or_has_one_spelling(data):
    altered = bytearray(EXAMPLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(altered) - 1))
        altered[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(StrongroomError):
        assert AddCheckpoint.decode(bytes(altered)).encode() == altered
