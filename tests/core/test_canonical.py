"""Canonical JSON: one form for a value, and nothing else is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core import canonical
from strongroom.errors import StrongroomError, Tampered

values = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.MAX_INTEGER, canonical.MAX_INTEGER) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_a_value_survives_and_has_one_form(value):
    data = canonical.encode(value)
    assert canonical.decode(data) == value
    assert json.loads(data) == value
    assert canonical.encode(canonical.decode(data)) == data


ascii_keys = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.MAX_INTEGER, canonical.MAX_INTEGER) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(max_codepoint=127)), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(ascii_keys)
def test_the_quick_way_gives_the_same_bytes(value):
    assert canonical.encode_typed(value) == canonical.encode(value)


@pytest.mark.parametrize("way", [canonical.encode, canonical.encode_typed])
@pytest.mark.parametrize("value", ["\ud800", {"a": ["b", "\udfff"]}, {1: 2}, {"a": object()}])
def test_what_has_no_form_is_refused_either_way(way, value):
    with pytest.raises((TypeError, ValueError)):
        way(value)


def test_keys_are_in_the_order_of_utf16():
    # RFC 8785, section 3.2.3: U+10000 is D800 DC00 in UTF-16, and so sorts before U+E000
    assert canonical.encode({"\ue000": 1, "\U00010000": 2, "a": 3}) == '{"a":3,"\U00010000":2,"\ue000":1}'.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a":1,"a":1}',
        b'{"a": 1}',
        b'{"b":1,"a":2}',
        b"1.0",
        b"1e3",
        b"NaN",
        b"-0",
        b"9007199254740992",
        b'"\\u0061"',
        b'"\\ud800"',
        b"\xff",
        b"[1,]",
        b"[1,9007199254740992]",
        b"[-9007199254740992,1]",
        b"[" * (canonical.MAX_DEPTH + 1) + b"1" + b"]" * (canonical.MAX_DEPTH + 1),
        b"[" * 100_000,
        b"9" * 10_000,
        b" 1",
        b"\xef\xbb\xbf1",
    ],
)
def test_what_is_not_canonical_is_refused(data):
    with pytest.raises(Tampered):
        canonical.decode(data)


def test_the_deepest_value_is_read():
    data = b"[" * canonical.MAX_DEPTH + b"1" + b"]" * canonical.MAX_DEPTH
    assert canonical.encode(canonical.decode(data)) == data


@given(st.binary(max_size=100))
def test_any_bytes_raise_only_ours(data):
    try:
        canonical.decode(data)
    except StrongroomError:
        return
