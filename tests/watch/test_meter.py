"""The bound is never below what it bounds, and adds up; the estimate refuses what is no log-probability."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import UsageError
from strongroom.watch import meter
from strongroom.watch.effective import effective_bits


@given(tokens=st.integers(0, 300), vocabulary=st.integers(1, 300_000), logprobs=st.integers(0, 5))
def test_the_bound_is_that_of_the_specification(tokens, vocabulary, logprobs):
    """Against whole numbers: 2 to the bound is at least V to the number of tokens, and less by one it is not."""
    found = meter.bound(tokens, vocabulary, logprobs=logprobs) - tokens * logprobs * 24
    values = vocabulary ** (tokens * (1 + logprobs))
    assert 2**found >= values
    assert found <= (values - 1).bit_length() + 1


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "logprobs", "bits"),
    [
        (1, 2, 0, 1),
        (100, 65_536, 0, 1600),
        (100, 65_536, 5, 100 * 16 + 100 * 5 * (16 + 24)),
        (1, 49_152, 0, 16),
        (1000, 49_152, 0, 15_585),  # 1000 · 15.58496…
        (0, 49_152, 5, 0),
    ],
)
def test_known_bounds(tokens, vocabulary, logprobs, bits):
    assert meter.bound(tokens, vocabulary, logprobs=logprobs) == bits


@given(parts=st.lists(st.integers(0, 4096), max_size=20), vocabulary=st.integers(2, 300_000))
def test_in_instalments_an_answer_is_no_cheaper(parts, vocabulary):
    assert sum(meter.bound(part, vocabulary) for part in parts) >= meter.bound(sum(parts), vocabulary)


def test_embeddings():
    assert meter.embeddings(256) == 2048
    assert meter.embeddings(100, count=3) == 2400


def test_the_effective_size():
    assert effective_bits(134_515_008) == 134_515_008 * 4 // 16
    assert effective_bits(10**12, bits_per_parameter=8, compression=100) == 8 * 10**10
    assert effective_bits(1) == 1
    for wrong in ({"parameters": 0}, {"parameters": 5, "compression": 0}, {"parameters": 5, "bits_per_parameter": 0}):
        with pytest.raises(UsageError):
            effective_bits(**wrong)
