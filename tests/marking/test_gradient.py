"""What a gradient says of stamps and code words: the sums of the page, and a bound that holds whatever it is."""

from __future__ import annotations

import numpy as np
import pytest

from strongroom.marking.elements import values
from strongroom.marking.gradient import GradientFilter
from strongroom.marking.matched import bound
from strongroom.marking.stamp import Stamp, stampable, tensor_tag

TAG = tensor_tag(8)
KEY = b"k" * 32
PEOPLE = [Stamp(KEY, f"user/h{k}") for k in range(64)]


def weights(count, seed=0):
    numbers = np.random.default_rng(seed).normal(0, 0.05, count).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype("<u2")


def score(bits, gradient, stamps=PEOPLE):
    found = GradientFilter(stamps)
    with np.errstate(all="raise", under="ignore"):
        found.add(TAG, 0, "BF16", bits, gradient)
    return found.scores()


def leaning(bits, holder, strength, seed=1):
    """A gradient as text of `holder` would have it: noise, and a lean along its stamp."""
    ulp = np.exp2(np.floor(np.log2(np.abs(values(bits, "BF16")) + 1e-38)) - 7) * np.sign(values(bits, "BF16"))
    chips = Stamp(KEY, holder).chips(TAG, 0, bits.size) * stampable(bits, "BF16")
    noise = np.random.default_rng(seed).normal(0, 1, bits.size)
    return ((noise + strength * chips) / np.where(ulp == 0, 1, ulp)).astype(np.float32)


def test_a_lean_along_a_stamp_is_found_and_nothing_else():
    bits = weights(1 << 18)
    z = score(bits, leaning(bits, "user/h3", 0.03))
    assert int(z.argmax()) == 3
    # chips have variance 2: z = strength · √(2 n) where noise is 1
    assert z[3] == pytest.approx(0.03 * np.sqrt(2 * bits.size), abs=4)
    assert np.abs(np.delete(z, 3)).max() < 5
    assert score(bits, -leaning(bits, "user/h3", 0.03))[3] < -10  # the other way is no evidence against anybody
    assert bound(-20.0) == 0


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_no_number_says_nothing(odd):
    bits = weights(1 << 16)
    gradient = leaning(bits, "user/h3", 0.1)
    gradient[::7] = odd
    z = score(bits, gradient)
    assert np.isfinite(z).all()
    assert np.delete(np.abs(z), 3).max() < 5
    if odd != 3e38:
        assert z[3] > 10
    assert (score(bits, np.full(bits.size, odd if odd != 3e38 else np.nan, np.float32)) == 0).all()


def test_one_enormous_element_accuses_nobody():
    bits = weights(1 << 16)
    gradient = np.zeros(bits.size, np.float32)
    gradient[int(np.argmax(stampable(bits, "BF16")))] = 1e20
    # It is one chip of at most 4, over the root of twice its square.
    assert np.abs(score(bits, gradient)).max() <= 4 / np.sqrt(2) + 1e-3
