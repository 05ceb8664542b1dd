"""The path grammar."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.ids import Ref, parse_principal
from strongroom.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name", "number"),
    [
        ("acme/tiny", "acme/tiny", None),
        ("acme/tiny@3", "acme/tiny", 3),
        ("m", "m", None),
        ("a/b/c.d_e-1@10", "a/b/c.d_e-1", 10),
    ],
)
def test_references(text, name, number):
    assert Ref.parse(text) == Ref(name, number)
    assert str(Ref.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "A",
        "a b",
        "../a",
        "a/..",
        "a..b",
        ".a",
        "a@",
        "a@0",
        "a@01",
        "a@-1",
        "a@1@2",
        "a@٣",
        "a\n",
        "é",
        "a" * 65,
        "a@1e3",
    ],
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(UsageError):
        Ref.parse(text)


@given(st.text())
def test_any_text_raises_only_ours(text):
    for parse in (Ref.parse, parse_principal):
        try:
            parse(text)
        except UsageError:
            continue


def test_principals():
    assert parse_principal("user/ana") == "user/ana"
    assert parse_principal("workload/eval-7") == "workload/eval-7"
    for text in ("ana", "admin/ana", "user/", "user/../x", "user/Ana"):
        with pytest.raises(UsageError):
            parse_principal(text)
