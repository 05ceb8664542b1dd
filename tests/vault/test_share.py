"""The marked share, as it is typed."""

from __future__ import annotations

from fractions import Fraction

import pytest

from strongroom.errors import UsageError
from strongroom.vault.put import parse_share


@pytest.mark.parametrize(
    ("text", "share"),
    [("1/8", (1, 8)), ("0.125", (1, 8)), ("0", (0, 1)), ("0.0", (0, 1)), ("1/2", (1, 2)), ("2/6", (1, 3))],
)
def test_fractions_and_decimals(text: str, share: tuple[int, int]) -> None:
    assert parse_share(text) == Fraction(*share)


@pytest.mark.parametrize(
    "text",
    # Fraction() takes 10 s for the first, does not end for the second, and reads the Arabic digits.
    [
        *("1e10000000", "1e-999999999", "1e-7", "\u0661/\u0668", "0.0000001", "1/999999999", "0/0", "1/0", "-1/8"),
        *("-0", "0.50001", "1", "nan", "inf", "1_0/8_0", " 1/8", "1/8\n", "", "1/8/8", "0.5/1", "1" * 5000),
    ],
)
def test_everything_else_is_refused_at_once(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_share(text)
    assert caught.value.code == "put.share"
    assert len(caught.value.message) < 120
