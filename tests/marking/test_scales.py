"""A block for one number: the scale that fits a leak best."""

import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marking.test_mark import BLOCKS, blocks
from strongroom.errors import UsageError
from strongroom.formats.items import ITEMS
from strongroom.formats.layout import Layout, Run
from strongroom.marking.elements import values
from strongroom.marking.estimate import Estimator
from strongroom.marking.mark import Marker
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


@pytest.mark.parametrize("dtype", BLOCKS)
@pytest.mark.parametrize(("skipped", "low"), [(0, -11), (4, -11), (1740, -16.5)])
def test_every_position_says_which_variant_it_is(dtype, skipped, low):
    """Of a run that begins anywhere, taken in as two tensors and a last block that is not there; also by scales that
    are denormal."""
    item = ITEMS[dtype]
    count = 90_000 // item.bytes
    data = blocks(dtype, count, seed=3, low=low, high=low + 1.5)
    size = skipped + data.size
    image = np.concatenate([np.zeros(skipped, np.uint8), data.reshape(-1), np.zeros(-size % 64, np.uint8)])
    files = Layout.place([("m", "opaque", image.size, 0)])
    layout = Layout.plan(files, [Run(skipped, size, dtype)], share=Fraction(1, 2), positions=64)
    marker = Marker(bytes(range(32)), layout)
    word = np.random.default_rng(1).integers(0, 2, layout.positions)
    given = image.copy()
    for position, start in enumerate(layout.marked_starts):
        here = slice(int(start), int(start) + layout.marked)
        given[here] = np.frombuffer(marker.variants(position, memoryview(image[here].tobytes()))[word[position]], "u1")
    estimator = Estimator(layout, marker)
    middle = count // 3
    for first, stop in ((0, middle), (middle, count - 1)):
        begin, end = (skipped + k * item.bytes for k in (first, stop))
        bits, leak = scales(image[begin:end].tobytes(), dtype, numbers(given[begin:end].tobytes(), dtype))
        estimator.add(begin, dtype, bits, leak)
    found = estimator.done()
    said = found.information > 0
    assert found.used >= layout.positions - 2 > 6  # but for those of which no part has enough blocks
    share = found.n[said] / found.information[said]
    assert (np.sign(share) == 1 - 2 * word[said]).all()
    assert np.median(np.abs(share)) > 0.7


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"Q8_0 takes the gguf package") as caught:
        dequantised(bytes(34), "Q8_0")
    assert "strongroom[trace]" in caught.value.hint
