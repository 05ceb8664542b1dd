"""What is read out of a leak, and what of it is left out: fits by chance, and marks, which are noise to stamps."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.formats.layout import Layout, Run
from strongroom.marking.elements import values
from strongroom.marking.estimate import Estimator, beyond_chance, residual
from strongroom.marking.mark import Marker
from strongroom.marking.matched import MatchedFilter
from strongroom.marking.requantise import unrounded
from strongroom.marking.stamp import Stamp, tensor_tag

ROWS, WIDTH = 512, 512
TAG = tensor_tag(0)
STAMP = Stamp(bytes(range(32)), "user/h0")


@pytest.fixture
def original():
    """bf16 integers."""
    rng = np.random.default_rng(5)
    return (rng.normal(0, 0.02, ROWS * WIDTH).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture
def marker():
    files = Layout.place([("m", "opaque", ROWS * WIDTH * 2, 0)])
    layout = Layout.plan(files, [Run(0, ROWS * WIDTH * 2, "BF16")], share=Fraction(1, 2), positions=128)
    return Marker(bytes(range(32)), layout)


def copied(bits, marker=None):
    """What leaves: the stamp, and on top of it the marks of some word."""
    copy = bits.copy()
    STAMP.apply("BF16", TAG, 0, bits, copy)
    found = values(copy, "BF16")
    if marker is not None:
        marked, image, starts = bits.copy(), bits.tobytes(), marker._layout.marked_starts
        word = np.random.default_rng(1).integers(0, 2, len(starts))
        for position, start in enumerate(starts):
            here = slice(int(start), int(start) + marker._layout.marked)
            variants = marker.variants(position, memoryview(image[here]))
            marked[here.start // 2 : here.stop // 2] = np.frombuffer(variants[word[position]], "<u2")
        found += values(marked, "BF16") - values(bits, "BF16")
    return found


def freed(bits, leak, marker):
    return Estimator(marker._layout, marker).add(0, "BF16", bits, leak)


def score(bits, leak):
    found = MatchedFilter([STAMP])
    found.add(TAG, 0, "BF16", bits.reshape(-1, WIDTH), leak.reshape(-1, WIDTH))
    return float(found.scores()[0])


def test_marks_that_were_found_are_taken_out_of_what_a_stamp_is_read_from(original, marker):
    leak = copied(original, marker)
    plain = score(original, copied(original))
    assert score(original, leak) < 0.93 * plain  # a half is marked, by half the power of a stamp
    found = freed(original, leak, marker)
    assert score(original, found) > 0.97 * plain
    assert found is not leak
    assert np.array_equal(leak, copied(original, marker))  # which is left as it was given


def test_half_a_mark_is_taken_out_as_half(original, marker):
    """Of two holders whose variants differ there is none, of two that agree all of it."""
    leak = (copied(original) + copied(original, marker)) / 2
    assert score(original, freed(original, leak, marker)) > 0.97 * score(original, copied(original))


def test_what_has_no_marks_is_left_as_it_is(original, marker):
    leak = copied(original)
    found = freed(original, leak, marker)
    assert np.mean(found != leak) < 0.01  # by chance a position in ten thousand
    nothing = np.full_like(leak, np.nan)
    assert freed(original, nothing, marker) is nothing


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("pruned", [False, True])
def test_what_is_absent_or_pruned_is_left_out_of_what_a_position_says(original, marker, share, pruned):
    word = np.random.default_rng(1).integers(0, 2, len(marker._layout.marked_starts))
    leak = copied(original, marker) - copied(original) + values(original, "BF16")
    if pruned:
        leak[np.abs(leak) < np.quantile(np.abs(leak), share)] = 0
    else:
        leak[np.random.default_rng(4).random(leak.size) < share] = np.nan
    estimator = Estimator(marker._layout, marker)
    found = estimator.add(0, "BF16", original, leak)
    said = estimator.done()
    assert np.median(np.abs(said.n / said.information)) == pytest.approx(1, abs=0.05)
    assert (np.sign(said.n) == 1 - 2 * word).all()
    left = found[np.isfinite(found) & (found != 0)] - values(original, "BF16")[np.isfinite(found) & (found != 0)]
    marks = (leak - values(original, "BF16"))[np.isfinite(leak) & (leak != 0)]
    assert np.square(left).sum() < 0.05 * np.square(marks).sum()


def test_a_tensor_within_a_position_counts_once(original, marker):
    """And so does a part of one: of both, the mark is taken out once."""
    start = int(marker._layout.marked_starts[3])
    leak, w = copied(original, marker) - copied(original) + values(original, "BF16"), values(original, "BF16")
    first, stop = start // 2 + 100, start // 2 + marker._layout.marked // 2 - 100
    estimator = Estimator(marker._layout, marker)
    found = estimator.add(first * 2, "BF16", original[first:stop], leak[first:stop])
    said = estimator.done()
    assert said.used == 1
    assert said.n[3] ** 2 / said.information[3] ** 2 == pytest.approx(1, abs=0.05)
    assert estimator._sums[3] == 1
    assert np.square(found - w[first:stop]).sum() < 0.01 * np.square(leak[first:stop] - w[first:stop]).sum()


def test_what_is_not_there_gets_no_mark(original, marker):
    """Neither what is absent or pruned, nor what rounding has left as it was: it would look as if it had been moved."""
    leak = copied(original, marker)
    leak[::3], leak[1::3] = np.nan, 0
    found = freed(original, leak, marker)
    assert np.isnan(found[::3]).all()
    assert not found[1::3].any()
    assert np.any(found[2::3] != leak[2::3])
    w, parts = values(original, "BF16"), copied(original, marker).reshape(-1, 32)
    step = np.abs(parts).max(axis=1, keepdims=True) / 7
    few = unrounded(w, (np.round(parts / step) * step).reshape(-1).astype(np.float32), 0)
    assert np.mean(few == w) > 0.9
    assert np.array_equal(freed(original, few, marker) == w, few == w)


def test_a_shift_and_a_scale_are_taken_out_and_chance_is_not(original):
    w = values(original, "BF16").reshape(-1, WIDTH)
    noise = np.random.default_rng(3).normal(0, 1e-4, w.shape).astype(np.float32)
    x, silent = residual(w, (w + noise).astype(np.float32))
    assert silent is None
    assert np.mean(np.abs(x - noise).max(axis=1) < 1e-7) > 0.9
    x, _ = residual(w, (1.01 * (w + noise) + 3e-4).astype(np.float32))
    assert np.abs(x / 1.01 - noise).mean() < 0.1 * np.abs(noise).mean()


@given(st.floats(0, 1e77), st.floats(0, 1e77), st.integers(0, 1 << 20), st.integers(1, 4))
def test_what_is_beyond_chance_is_a_share(explained, power, n, columns):
    part = beyond_chance(np.array([explained]), np.array([power]), n, columns)
    assert part.shape == (1,)
    assert 0 <= part[0] <= 1
    if explained >= power:
        assert part[0] == 1 or explained < 1e-29


def several(bits, count):
    """(count, elements): the copies of several holders, of whom the first has `STAMP`."""
    found = []
    for k in range(count):
        copy = bits.copy()
        Stamp(bytes(range(32)), f"user/h{k}").apply("BF16", TAG, 0, bits, copy)
        found.append(values(copy, "BF16"))
    return np.stack(found)


@pytest.mark.parametrize("by", [lambda copies: copies, np.abs])
@pytest.mark.parametrize("chosen", [np.argmin, np.argmax])
def test_the_least_of_several_costs_a_stamp_no_more_than_it_must(original, by, chosen):
    """All elements lie to one side of most holders', by what they are or by how large: that is no stamp's doing."""
    copies = several(original, 32)
    leak = np.take_along_axis(copies, chosen(by(copies), axis=0)[None], axis=0)[0]
    picked = np.take_along_axis(copies, np.random.default_rng(7).integers(0, 32, (1, leak.size)), axis=0)[0]
    assert score(original, leak) > 1.5 * score(original, picked)  # of each element the least says more than any one


def test_a_tensor_that_came_as_it_was_and_was_nudged_does_not_drown_the_others(original):
    """Whoever knows the base of a fine-tune changes a few of its frozen weights by the least that there is: next to no
    noise, and not all that a stamp is read from."""
    rng = np.random.default_rng(8)
    frozen = values(original, "BF16").copy()
    nudged = rng.random(frozen.size) < 0.002
    frozen[nudged] = np.nextafter(frozen[nudged], np.float32(np.inf), dtype=np.float32)
    found = MatchedFilter([STAMP])
    found.add(TAG, 0, "BF16", original.reshape(-1, WIDTH), copied(original).reshape(-1, WIDTH))
    found.add(tensor_tag(1 << 30), 0, "BF16", original.reshape(-1, WIDTH), frozen.reshape(-1, WIDTH))
    assert found.scores()[0] > 0.95 * score(original, copied(original))


def test_rows_of_noise_do_not_cost_the_quiet_ones(original):
    rng = np.random.default_rng(9)
    leak = copied(original).reshape(-1, WIDTH)
    leak[::5] += rng.normal(0, 0.02, leak[::5].shape).astype(np.float32)
    assert score(original, leak) > 0.99 * np.sqrt(0.8) * score(original, copied(original))


def test_of_a_tenth_of_the_elements_a_tenth_of_what_they_say_is_left(original):
    """Rows have fifty elements then, of which a fit would take three, and whose power is anything."""
    leak = copied(original)
    leak[np.abs(leak) < np.quantile(np.abs(leak), 0.9)] = 0
    assert score(original, leak) > 0.99 * np.sqrt(ROWS * WIDTH / 10)
