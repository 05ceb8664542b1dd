"""A block for one number: the scale that fits a leak best."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marking.test_mark import BLOCKS, blocks
from strongroom.formats.items import ITEMS
from strongroom.marking.elements import values
from strongroom.marking.scales import dequantised, numbers, scales

pytest.importorskip("gguf")


@pytest.mark.parametrize("dtype", BLOCKS)
def test_of_the_original_itself_it_is_the_scale_and_of_what_was_scaled_as_a_whole_that_much_more(dtype):
    data = blocks(dtype, 64).tobytes()
    w = numbers(data, dtype)
    bits, same = scales(data, dtype, w)
    _, more = scales(data, dtype, w * np.float32(1.01))
    there = np.isfinite(same)
    assert there.mean() > 0.9
    assert np.allclose(same[there], values(bits, dtype)[there], rtol=1e-5)
    assert np.allclose(more[there], 1.01 * same[there], rtol=1e-5)


def test_noise_across_the_block_is_projected_out():
    data = blocks("Q8_0", 4096).tobytes()
    w = numbers(data, "Q8_0").reshape(-1, 32)
    noise = np.random.default_rng(1).normal(0, 0.1, w.shape) * np.abs(w).mean(axis=1, keepdims=True)
    bits, seen = scales(data, "Q8_0", (w + noise).astype(np.float32).reshape(-1))
    relative = seen / values(bits, "Q8_0") - 1
    # Thirty-two weights with a tenth of noise each: a sixth of that is left.
    assert 0.005 < relative.std() < 0.03


def test_what_is_absent_or_pruned_says_nothing():
    data = blocks("Q4_0", 512).tobytes()
    w = numbers(data, "Q4_0")
    leak = w.copy()
    leak[::3] = np.nan
    cut = np.quantile(np.abs(w), 0.4)
    leak[np.abs(w) < cut] = 0
    leak[-32:] = np.nan
    bits, seen = scales(data, "Q4_0", leak)
    there = np.isfinite(seen)
    assert there.mean() > 0.5
    assert not there[-1]
    assert np.allclose(seen[there], values(bits, "Q4_0")[there], rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BLOCKS), st.binary(min_size=1, max_size=400), st.data())
def test_any_blocks_and_any_leak_give_numbers_or_nothing(dtype, seed, data):
    item, count = ITEMS[dtype], 8
    plain = (seed * (item.bytes * count // len(seed) + 1))[: item.bytes * count]
    w = dequantised(plain, dtype)
    assert w.shape == (item.weights * count,)
    pool = [0.0, -1.0, 1e9, float("nan"), float("inf"), 1e-40]
    few = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=5))
    bits, seen = scales(plain, dtype, np.resize(np.array(few, np.float32), w.size))
    assert bits.shape == seen.shape == (count,)
    assert seen.dtype == np.float32


def test_floats_are_what_they_are():
    leak = np.arange(8, dtype=np.float32)
    bits, seen = scales(np.arange(8, dtype="<u2").tobytes(), "BF16", leak)
    assert seen is leak
    assert bits.tolist() == list(range(8))
