"""Authorities: one spelling each, and names that can't be taken for one another."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import UsageError
from strongroom.formats.authority import (
    NONCE,
    OIDC,
    X509,
    Authority,
    audience_name,
    key_name,
    oidc_subject,
    spiffe_subject,
    subject,
    svid_message,
)

PROVIDER = Authority(OIDC, "https://id.example", "room", NONCE, ("ES256", "RS256"))
DOMAIN = Authority(X509, "example.org", bundle="PEM")


@pytest.mark.parametrize("authority", [PROVIDER, DOMAIN])
def test_has_one_spelling(authority):
    text = authority.encode()
    assert Authority.decode(text) == authority
    for other in (text.replace(":", ": ", 1), text + "\n", text[:-1] + ',"more":1}', text.replace('"kind"', '"Kind"')):
        with pytest.raises(UsageError):
            Authority.decode(other)


@given(st.text() | st.sampled_from([PROVIDER.encode(), DOMAIN.encode()]), st.data())
def test_anything_else_is_refused(text, data):
    if text:
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.characters()) + text[at + 1 :]
    try:
        found = Authority.decode(text)
    except UsageError:
        return
    assert found.encode() == text


def test_what_is_too_long_for_the_log():
    with pytest.raises(UsageError):
        Authority(X509, "example.org", bundle="x" * 40_000).encode()


def test_the_names_are_those_of_the_specification():
    room, key = bytes(range(16)), bytes(range(32))
    assert subject(OIDC, "https://id.example", "ana") == (
        hashlib.sha256(b'strongroom/1 subject\x00["oidc","https://id.example","ana"]').hexdigest()
    )
    digest = hashlib.sha256(b"strongroom/1 login\x00" + room + key).digest()
    assert len(key_name(room, key)) == 43
    assert audience_name(room, key) == f"strongroom:{key_name(room, key)}"
    import base64

    assert base64.urlsafe_b64decode(key_name(room, key) + "=") == digest
    assert svid_message(room, "ab" * 32) == b"strongroom/1 svid\x00" + room + b"\xab" * 32


def test_a_subject_is_whose_it_is():
    names = {
        oidc_subject("https://id.example#ana"),
        oidc_subject("https://id.example/#ana"),
        oidc_subject("https://id.example#ANA"),
        oidc_subject("https://id.example#a#na"),
        spiffe_subject("spiffe://id.example/ana"),
        subject(X509, "https://id.example", "ana"),
    }
    assert len(names) == 6


@pytest.mark.parametrize(
    "text", ["", "ana", "#ana", "https://id.example", "https://id.example#", "http://id.example#ana"]
)
def test_a_subject_that_is_none(text):
    with pytest.raises(UsageError):
        oidc_subject(text)


@pytest.mark.parametrize(
    "text",
    ["", "spiffe://", "spiffe://a", "spiffe://a/", "spiffe://a//b", "spiffe://a/./b", "https://a/b", "spiffe://A/b"],
)
def test_a_workload_that_is_none(text):
    with pytest.raises(UsageError):
        spiffe_subject(text)
