"""The personal stamp: one for each holder, the same on every machine, and never out of the normal numbers."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.marking.elements import SCALE, STEPS, integers, ulps, values
from strongroom.marking.stamp import Stamp, stamp_blocks, stampable, tensor_tag

ROOT = bytes(range(32))
TAG = tensor_tag(4096)


def test_chips_are_reproducible():
    chips = Stamp(ROOT, "user/ana").chips(TAG, 0, 4096)
    digest = "bbd33354d98157460deb663be564eb4bf277e9c125f985b95a18c7d747113cfb"
    assert hashlib.sha256(chips.tobytes()).hexdigest() == digest


@given(st.integers(0, 5000), st.integers(1, 300))
def test_any_range_of_chips_is_that_of_the_whole(first, count):
    stamp = Stamp(ROOT, "user/ana")
    assert (stamp.chips(TAG, first, count) == stamp.chips(TAG, 0, first + count)[first:]).all()


def test_scattered_blocks_have_the_chips_of_their_places():
    stamp = Stamp(ROOT, "user/ana")
    whole = stamp.chips(TAG, 0, 16 * 1000).reshape(-1, 16)
    numbers = np.array([0, 7, 999, 3, 500])
    assert (stamp.chips_of(stamp_blocks(TAG, numbers).tobytes()).reshape(-1, 16) == whole[numbers]).all()


def test_chips_are_a_centred_binomial():
    chips = Stamp(ROOT, "user/ana").chips(TAG, 0, 1 << 20)
    assert abs(chips.mean()) < 0.01
    assert chips.astype(float).var() == pytest.approx(2, abs=0.02)
    assert (chips.min(), chips.max()) == (-4, 4)


def test_holders_tensors_and_roots_have_chips_of_their_own():
    others = [
        Stamp(ROOT, "user/ben").chips(TAG, 0, 65536),
        Stamp(ROOT[::-1], "user/ana").chips(TAG, 0, 65536),
        Stamp(ROOT, "user/ana").chips(tensor_tag(8192), 0, 65536),
    ]
    mine = Stamp(ROOT, "user/ana").chips(TAG, 0, 65536).astype(float)
    for other in others:
        assert abs(np.corrcoef(mine, other.astype(float))[0, 1]) < 0.03


def test_each_tensor_of_a_version_has_a_tag_of_its_own():
    assert len({tensor_tag(begin) for begin in range(0, 64_000, 64)}) == 1000


@pytest.mark.parametrize("dtype", STEPS)
@given(data=st.data())
def test_a_stamp_over_a_variant_stays_within_the_normal_numbers(dtype, data):
    """Of any bits at all: sign, infinities, NaN and denormal numbers are as they were."""
    step = STEPS[dtype]
    size = 8 * step.integer.itemsize
    edges = [0, step.least, 2 * step.least, step.most, step.most + 1, step.sign_bit - 1]
    near = st.sampled_from(edges).flatmap(lambda edge: st.integers(max(0, edge - 20 * step.q), edge + 20 * step.q))
    found = data.draw(st.lists(st.one_of(near, st.integers(0, 2**size - 1)), min_size=64, max_size=64))
    original = np.array([each % 2**size for each in found], step.integer)
    for moved in (0, 1, -1):
        given = original.copy()
        can = stampable(original, dtype)
        given[can] += np.array(moved * step.q, np.int64).astype(step.integer)
        copy = given.copy()
        Stamp(ROOT, "user/ana").apply(dtype, TAG, 0, original, copy)
        assert (copy[~can] == given[~can]).all()
        assert ((copy ^ original) & step.integer.type(step.sign_bit) == 0).all()
        magnitudes = step.magnitudes(copy[can])
        assert (magnitudes >= step.least).all()
        assert (magnitudes <= step.most).all()


@given(fields=st.lists(st.integers(0, 2**16 - 1), min_size=64, max_size=64), moved=st.sampled_from([0, 1, -1]))
def test_a_stamp_over_a_variant_leaves_scales_numbers_of_their_sign(fields, moved):
    """Of blocks with two fields, which both have the chip of the block."""
    data = bytearray(20 * 32)
    original = integers("Q4_1", data, 0, 0, 32)
    original[:] = np.array(fields, "<u2").reshape(32, 2)
    q = SCALE.sizes(original).astype(int)
    can = SCALE.stampable(original)
    rest = bytes(data)
    copy = bytearray(data)
    view = integers("Q4_1", copy, 0, 0, 32)
    view[can] = (original.astype(int) + moved * q)[can]
    Stamp(ROOT, "user/ana").apply("Q4_1", TAG, 5, original, view)
    assert bytes(data) == rest, "the original is only read"
    change = view.astype(int) - original
    chips = Stamp(ROOT, "user/ana").chips(TAG, 5, 32).astype(int)[:, None]
    assert (change == np.where(can, q * (chips + moved), 0)).all()
    assert ((view ^ original) & 0x8000 == 0).all()
    assert ((view & 0x7FFF)[can] > 0).all()
    assert ((view & 0x7FFF)[can] < 0x7C00).all()
    assert all(copy[20 * k + 4 : 20 * k + 20] == bytes(16) for k in range(32)), "nothing but the scales"


@pytest.mark.parametrize("dtype", STEPS)
def test_a_chip_is_so_many_bf16_units_of_the_element(dtype):
    rng = np.random.default_rng(1)
    step = STEPS[dtype]
    numbers = rng.normal(0, 0.05, 4096)
    original = {
        "BF16": lambda: (numbers.astype(np.float32).view(np.uint32) >> 16).astype("<u2"),
        "F16": lambda: numbers.astype("<f2").view("<u2"),
        "F32": lambda: numbers.astype("<f4").view("<u4"),
        "F64": lambda: numbers.astype("<f8").view("<u8"),
    }[dtype]()
    copy = original.copy()
    stamp = Stamp(ROOT, "user/ana")
    stamp.apply(dtype, TAG, 0, original, copy)
    moved = np.abs(values(copy, dtype)) - np.abs(values(original, dtype))
    units = moved / np.maximum(ulps(values(original, dtype)), 1e-30)
    can = stampable(original, dtype)
    assert can.mean() > 0.99
    # Where the exponent stays, it is exactly that; across a power of two the unit changes by a factor of two.
    same = can & ((copy ^ original) < (1 << 20 if step.integer.itemsize > 2 else 1 << 6))
    chips = stamp.chips(TAG, 0, 4096)
    assert np.mean(np.abs(units[same] - chips[same]) < 1e-2) > 0.95
