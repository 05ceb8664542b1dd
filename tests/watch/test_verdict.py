"""What many runs say together, exactly, and in no more time because there were many."""

from __future__ import annotations

import time
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strongroom.watch.verdict import HONEST, Tally, _tail, upper_bound, verdict


@given(total=st.integers(0, 200), least=st.integers(-1, 201), share=st.integers(0, 1000))
@settings(deadline=None)
def test_the_tail_is_that_of_whole_numbers(total, least, share):
    p = Fraction(share, 1000)
    exact = sum(comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(max(least, 0), total + 1))
    assert _tail(least, total, share / 1000) == pytest.approx(float(exact), abs=1e-11)


@pytest.mark.parametrize(
    "tally",
    [
        Tally(good=10**6, dangerous=10**5),
        Tally(good=10**9, suspicious=3 * 10**7),
        Tally(good=10**9, dangerous=1),
        Tally(good=1, dangerous=10**9),
    ],
)
def test_a_tally_of_a_year_is_judged_as_fast_as_one_of_a_day(tally):
    """A hostile server decides how many tokens are dangerous, and the gateway judges after each answer that is run
    again, between two pieces of somebody's stream."""
    begun = time.process_time()
    found = verdict(tally, 49_152, HONEST["bfloat16"])
    assert time.process_time() - begun < 0.5
    assert tally.dangerous / tally.tokens <= found.bound <= 1


def test_the_bound_of_many_is_a_little_above_their_share():
    assert upper_bound(10**5, 11 * 10**5) == pytest.approx(0.0915487, abs=1e-6)
    assert upper_bound(10**8, 11 * 10**8) == pytest.approx(1 / 11, abs=3e-5)


@pytest.mark.parametrize(("suspicious", "alarm"), [(3_000_000, False), (3_003_500, False), (3_004_500, True)])
def test_arithmetic_that_explains_it_is_no_alarm(suspicious, alarm):
    found = verdict(Tally(good=10**8 - suspicious, suspicious=suspicious), 512, HONEST["bfloat16"])
    assert bool(found.alarm) is alarm
