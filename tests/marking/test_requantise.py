"""A quantiser's rounding is taken out of a leak, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from strongroom.marking.quantiser import blocks, packed, unpacked
from strongroom.marking.requantise import coarse, unrounded
from strongroom.marking.scales import dequantised

Array = NDArray[np.float32]


def weights(size: int = 1 << 16, seed: int = 1) -> Array:
    return (np.random.default_rng(seed).standard_normal(size) * 0.02).astype(np.float32)


def rounded(a: Array, group: int, bits: int = 4) -> Array:
    parts = a.reshape(-1, group)
    top = 2 ** (bits - 1) - 1
    scale = np.abs(parts).max(axis=1, keepdims=True) / np.float32(top)
    return (np.round(parts / scale) * scale).reshape(-1).astype(np.float32)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("first", [0, 96, 1000])
def test_rounding_alone_leaves_nothing(group: int, first: int) -> None:
    w = weights()
    leak = rounded(w, group)
    found = unrounded(w[first:], leak[first:], first)
    edge = -first % 128
    inside = slice(edge, edge + (w.size - first - edge) // 128 * 128)
    assert np.allclose(found[inside], w[first:][inside], rtol=0, atol=1e-9)


@pytest.mark.parametrize("group", [32, 128])
def test_what_was_moved_across_a_border_is_left(group: int) -> None:
    w, chips = weights(), np.random.default_rng(2).integers(-4, 5, 1 << 16)
    moved = (w * (1 + chips / 256)).astype(np.float32)
    found = unrounded(w, rounded(moved, group), 0) - w
    plain = rounded(moved, group) - w
    signal = chips * np.abs(w) * np.sign(w)
    # As correlated with the chips as before, with a fraction of the noise.
    assert np.count_nonzero(found) < w.size / 10
    assert np.corrcoef(found, signal)[0, 1] > 1.3 * np.corrcoef(plain, signal)[0, 1]


def test_what_is_absent_does_not_undo_it() -> None:
    w = weights()
    leak = rounded(w, 128)
    leak[::128] = np.nan
    found = unrounded(w, leak, 0)
    assert np.isnan(found[::128]).all()
    there = np.isfinite(leak)
    assert np.allclose(found[there], w[there], rtol=0, atol=1e-9)


def even(a: Array, levels: int, *, lowest: bool) -> Array:
    """Rounded in groups of 32 as Q5_0 does (to multiples of a step), or as Q5_1 and Q4_K do (with a lowest level)."""
    parts = a.reshape(-1, 32)
    if lowest:
        low = parts.min(axis=1, keepdims=True)
        step = (parts.max(axis=1, keepdims=True) - low) / np.float32(levels - 1)
    else:
        ends = np.take_along_axis(parts, np.abs(parts).argmax(axis=1)[:, None], axis=1)
        low, step = np.float32(0), ends / np.float32(-levels // 2)
    return (
        (
            low
            + np.round((parts - low) / step).clip(*((0, levels - 1) if lowest else (-levels // 2, levels // 2 - 1)))
            * step
        )
        .reshape(-1)
        .astype(np.float32)
    )


def cast(a: Array) -> Array:
    return ((a.view(np.uint32) + 0x8000) >> 16 << 16).view(np.float32)


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("levels", [16, 32])
def test_even_levels_are_known_where_a_group_lacks_some(levels: int, lowest: bool) -> None:
    w, chips = weights(), np.random.default_rng(2).binomial(8, 0.5, 1 << 16) - 4
    signal = (w * (chips / 192)).astype(np.float32)
    plain = even(w + signal, levels, lowest=lowest) - w
    found = unrounded(w, w + plain, 0) - w
    assert np.count_nonzero(found) < w.size / 8
    assert np.corrcoef(found, signal)[0, 1] > 1.2 * np.corrcoef(plain, signal)[0, 1]
    alone = unrounded(w, even(w, levels, lowest=lowest), 0) - w
    assert np.count_nonzero(np.abs(alone) > 1e-7) < 10  # as near to a border as a float can be


def test_levels_that_a_cast_has_moved_are_even() -> None:
    w = cast(weights())
    left = unrounded(w, cast(even(w, 32, lowest=True)), 0) - w
    assert np.count_nonzero(left) < w.size / 100


def test_what_was_rounded_before_it_left_keeps_what_its_levels_say() -> None:
    """No element can cross a border, so that without rounding nothing would be left: all the mark is in the levels."""
    w = even(weights(), 16, lowest=True)
    leak = even(w * (1 + np.random.default_rng(2).integers(-4, 5, w.size) / 256).astype(np.float32), 16, lowest=True)
    assert np.abs(leak - w).mean() > 0
    assert unrounded(w, leak, 0) is leak


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("lowest", [False, True])
def test_one_weight_that_is_no_number_costs_that_weight(odd: float, lowest: bool) -> None:
    w = weights()
    leak = even(w, 16, lowest=lowest)
    w[77] = odd
    found = unrounded(w, leak, 0)
    there = np.arange(w.size) // 32 != 2
    assert np.count_nonzero(np.abs(found[there] - w[there]) > 1e-7) < 10


@pytest.mark.parametrize("lowest", [False, True])
def test_what_is_absent_is_no_level(lowest: bool) -> None:
    w = weights()
    leak = even(w, 32, lowest=lowest)
    leak[::32] = np.nan
    found = unrounded(w, leak, 0)
    assert np.isnan(found[::32]).all()
    assert np.count_nonzero(np.abs(found - w) > 1e-7) < 10


def test_neighbours_that_were_made_equal_are_no_levels() -> None:
    """Else Q(w) would be what the copy says, whatever its marks, and nothing be left of them."""
    w, chips = weights(), np.random.default_rng(2).binomial(8, 0.5, 1 << 16) - 4
    signal = (w * (chips / 192)).astype(np.float32)
    noisy_copy = w + signal + np.abs(w) / 64 * np.random.default_rng(6).standard_normal(w.size)
    parts = np.sort(noisy_copy.reshape(-1, 32), axis=1)
    order = np.argsort(noisy_copy.reshape(-1, 32), axis=1)
    for _ in range(12):  # the two that are closest, of 32, until there are 20
        gaps = np.where(np.diff(parts, axis=1) > 0, np.diff(parts, axis=1), np.inf)
        k = gaps.argmin(axis=1)[:, None]
        low, high = np.take_along_axis(parts, k, axis=1), np.take_along_axis(parts, k + 1, axis=1)
        parts[(parts == low) | (parts == high)] = np.broadcast_to((low + high) / 2, parts.shape)[
            (parts == low) | (parts == high)
        ]
    merged = np.empty_like(parts)
    np.put_along_axis(merged, order, parts, axis=1)
    leak = merged.reshape(-1).astype(np.float32)
    found = np.corrcoef(unrounded(w, leak, 0) - w, signal)[0, 1]
    assert found > 0.95 * np.corrcoef(leak - w, signal)[0, 1] > 0.1


def test_no_leaker_knows_by_which_groups_it_is_judged() -> None:
    w = weights(1 << 19)
    signal = (w * ((np.random.default_rng(2).binomial(8, 0.5, w.size) - 4) / 192)).astype(np.float32)
    leak = rounded(w + signal, 128)
    step = leak.size // 128 // 64 * 128
    for at in range(0, leak.size, step):  # each that an even choice would look at
        leak[at : at + 128] += (0.03 * 0.02 * np.random.default_rng(at).standard_normal(128)).astype(np.float32)
    assert coarse(w, leak, 0)
    assert np.count_nonzero(unrounded(w, leak, 0) == w) > 0.9 * w.size


def noisy(w: Array) -> Array:
    return w + np.random.default_rng(3).standard_normal(w.size).astype(np.float32) * np.float32(1e-4)


def marked(w: Array) -> Array:
    """Few different weights, each a step up or down: the marks of a model that was at four bits before."""
    return (rounded(w, 32) * (1 + np.random.default_rng(4).choice([-1, 1], w.size) / 256)).astype(np.float32)


@pytest.mark.parametrize(
    "leak",
    [
        noisy,
        lambda w: w,
        lambda w: np.where(np.abs(w) < 0.03, np.float32(0), noisy(w)),
        lambda w: rounded(w, 128, 8),
        lambda w: np.full_like(w, np.nan),
        np.zeros_like,
    ],
)
def test_what_is_no_quantiser_is_left_alone(leak: object) -> None:
    w = weights()
    found = leak(w)  # type: ignore[operator]
    assert unrounded(w, found, 0) is found or np.array_equal(unrounded(w, found, 0), found, equal_nan=True)


def test_a_mark_is_not_taken_for_rounding() -> None:
    w = rounded(weights(), 32)
    leak = marked(weights())
    assert np.array_equal(unrounded(w, leak, 0), leak)


@pytest.mark.parametrize("size", [0, 1, 31, 127])
def test_what_is_too_short_is_left_alone(size: int) -> None:
    w = weights(size)
    assert np.array_equal(unrounded(w, w + 1, 5), w + 1)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("first", [0, 7, 96, 1000])
def test_what_was_rounded_is_seen_at_a_glance(group: int, first: int) -> None:
    w = weights()
    assert coarse(w[first:], rounded(w, group)[first:], first)
    assert not coarse(w[first:], noisy(w)[first:], first)
    assert not coarse(w[:3], w[:3], first)


def in_form(w: Array, form: str, group: int) -> Array:
    if form == "int4":
        codes, scales = packed(w.reshape(-1, group), 4, "F32")
        return unpacked(codes, scales.view("<f4"), 4).reshape(-1)
    return dequantised(blocks(w.reshape(-1, group), "Q4_0").tobytes(), "Q4_0")


@pytest.mark.parametrize(("form", "group"), [("int4", 128), ("int4", 64), ("int4", 32), ("q4_0", 32)])
@pytest.mark.parametrize("first", [0, 1000])
def test_the_mean_of_copies_in_a_form_is_known_by_it(form: str, group: int, first: int) -> None:
    """The levels of a mean are those of its holders and all that lies between them, an element's own among them: by
    those alone half of what a mark did would be taken for rounding."""
    w, rng = weights(1 << 17), np.random.default_rng(4)
    chips = rng.integers(-4, 5, (8, w.size))
    copies = [in_form((w * (1 + each / 256)).astype(np.float32), form, group) for each in chips]
    leak = np.mean(copies, axis=0).astype(np.float32)
    found = unrounded(w[first:], leak[first:], first) - w[first:]
    signal = (chips[0] * w)[first:]
    plain = np.corrcoef((leak - w)[first:], signal)[0, 1]
    assert np.corrcoef(found, signal)[0, 1] > 1.4 * plain > 0
    assert 0.8 < np.mean(np.abs(found) < 1e-6) < 0.95
