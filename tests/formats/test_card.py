"""The card of a room, as clients are given it: one spelling, and anything else raises our errors alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core import canonical
from strongroom.errors import CannotVerify, StrongroomError, Tampered
from strongroom.formats.card import Card, Witnesses
from strongroom.formats.note import COSIGNATURE, VerifierKey

PEM = "-----BEGIN CERTIFICATE-----\nMAoDAQ==\n-----END CERTIFICATE-----\n"
WITNESSES = Witnesses(((VerifierKey("w.example", COSIGNATURE, bytes(range(32))), "https://w.example"),), 1)
CARD = Card("https://room.example:8443", bytes(16), bytes(32), bytes(range(32)), PEM, WITNESSES)


def test_survives_its_encoding():
    assert Card.decode(CARD.encode()) == CARD


@pytest.mark.parametrize("number", [0, -1, True, "1", None, 1.5, [1]])
def test_with_no_number_of_a_format(number):
    value = json.dumps({**json.loads(CARD.encode()), "format": number}, sort_keys=True, separators=(",", ":"))
    with pytest.raises(Tampered):
        Card.decode(value.encode())


def test_of_a_later_format():
    with pytest.raises(CannotVerify) as caught:
        Card.decode(canonical.encode({**json.loads(CARD.encode()), "format": 2}))
    assert caught.value.code == "format.unknown"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(member=st.sampled_from(["ca", "format", "log", "room", "signer", "url", "witnesses", "other"]), value=JSON)
def test_with_any_member(member, value):
    data = canonical.encode({**json.loads(CARD.encode()), member: value})
    try:
        found = Card.decode(data)
    except StrongroomError:
        return
    assert found.encode() == data


@given(st.binary(max_size=200))
def test_of_any_bytes(data):
    with pytest.raises(StrongroomError):
        Card.decode(data)
