"""Variants: A and B are what the specification says, and their midpoint is the original, bit for bit."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.crypto.keys import keystream
from strongroom.formats.items import ITEMS
from strongroom.formats.layout import Layout, Run
from strongroom.marking.elements import STEPS
from strongroom.marking.mark import Marker

KEY = bytes(range(32))
SIZE = 64 * 1024


def marker_for(*runs, size=SIZE):
    files = Layout.place([("w", "opaque", size, 0)])
    layout = Layout.plan(files, [Run(*run) for run in runs], share=Fraction(1, 2), positions=16384)
    assert layout.positions > 2
    return Marker(KEY, layout), layout


@pytest.mark.parametrize("dtype", STEPS)
@given(data=st.data())
def test_the_midpoint_is_the_original_for_any_bytes(dtype, data):
    marker, layout = marker_for((0, SIZE, dtype))
    seed = data.draw(st.binary(min_size=1, max_size=64))
    plain = (seed * (layout.marked // len(seed) + 1))[: layout.marked]
    a, b = marker.variants(1, memoryview(plain))
    assert marker.original(1, memoryview(a), memoryview(b)) == plain


@pytest.mark.parametrize("dtype", STEPS)
@given(data=st.data())
def test_variant_a_and_the_signs_say_the_original_or_nothing(dtype, data):
    """Never something else, whatever the bytes: what they say alone is all that a trace reads."""
    marker, layout = marker_for((0, SIZE, dtype))
    step = STEPS[dtype]
    edges = [0, 1, step.least, step.least + step.q, step.most, step.most - step.q, step.most + 1, step.sign_bit]
    steps = st.tuples(st.sampled_from(edges), st.integers(-3, 3))
    near = steps.map(lambda it: (it[0] + it[1] * step.q) % (2 * step.sign_bit))
    seed = data.draw(st.lists(st.one_of(near, st.integers(0, 2 * step.sign_bit - 1)), min_size=1, max_size=16))
    plain = np.resize(np.array(seed, step.integer), layout.marked // step.integer.itemsize).tobytes()
    found = marker.unmarked(1, marker.variants(1, memoryview(plain))[0])
    assert found is None or found == plain


@pytest.mark.parametrize("dtype", STEPS)
def test_of_usual_weights_variant_a_and_the_signs_say_the_original(dtype):
    marker, layout = marker_for((0, SIZE, dtype))
    numpy = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    weights = np.random.default_rng(7).normal(0, 0.02, layout.marked // np.dtype(numpy).itemsize)
    weights[np.abs(weights) < 1e-3] = 0  # pruned: not marked
    plain = weights.astype(numpy).tobytes()
    assert marker.unmarked(2, marker.variants(2, memoryview(plain))[0]) == plain


@pytest.mark.parametrize("dtype", STEPS)
def test_each_element_moves_by_q_or_not_at_all_and_keeps_its_sign(dtype):
    marker, layout = marker_for((0, SIZE, dtype))
    step = STEPS[dtype]
    rng = np.random.default_rng(5)
    plain = rng.bytes(layout.marked)
    a, b = (np.frombuffer(v, step.integer).astype(object) for v in marker.variants(2, memoryview(plain)))
    x = np.frombuffer(plain, step.integer).astype(object)
    top = 1 << (8 * step.integer.itemsize - 1)
    signs = np.unpackbits(
        np.frombuffer(keystream(KEY, 4096, offset=2 * (-(-layout.marked // 256) * 16)), np.uint8), bitorder="little"
    )
    for e in range(len(x)):
        u = x[e] & (top - 1)
        q = step.q if step.least + step.q <= u <= step.most - step.q else 0
        s = 1 if signs[e] else -1
        assert (a[e], b[e]) == (x[e] + s * q, x[e] - s * q)


@pytest.mark.parametrize(
    ("dtype", "numpy"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32), ("F64", np.float64)]
)
def test_values_at_the_edges_stay_finite_and_normal(dtype, numpy):
    marker, layout = marker_for((0, SIZE, dtype))
    info = ml_dtypes.finfo(numpy)
    edges = np.array(
        [0, -0.0, info.tiny, -info.tiny, info.smallest_subnormal, info.max, -info.max, np.inf, -np.inf, np.nan, 1, -1]
    )
    values = np.resize(edges.astype(numpy), layout.marked // np.dtype(numpy).itemsize)
    for variant in marker.variants(0, memoryview(values.tobytes())):
        got = np.frombuffer(variant, numpy)
        finite = np.isfinite(values)
        assert np.array_equal(np.isfinite(got), finite)
        assert np.array_equal(got[~finite].tobytes(), values[~finite].tobytes())
        same = np.abs(values.astype(np.float64)) < float(info.tiny)
        assert np.array_equal(got[same].tobytes(), values[same].tobytes())
        one = np.abs(values.astype(np.float64)) == 1
        change = np.abs(got[one].astype(np.float64) - values[one].astype(np.float64))
        assert np.all((change > 0) & (change <= 2**-7))


def test_a_segment_may_cross_from_one_type_into_another():
    _, layout = marker_for((0, SIZE, "F32"))
    border = int(layout.marked_starts[1]) + 192
    marker, layout = marker_for((0, border, "F32"), (border, SIZE, "BF16"))
    assert layout.marked_starts[1] < border < layout.marked_starts[1] + layout.marked
    plain = np.random.default_rng(1).normal(size=layout.marked // 4).astype(np.float32).tobytes()
    a, b = marker.variants(1, memoryview(plain))
    assert a != b
    assert marker.original(1, memoryview(a), memoryview(b)) == plain


BLOCKS = sorted(dtype for dtype, item in ITEMS.items() if item.is_block)


def blocks(dtype, count, seed=1, low=-16, high=-2):
    """Random blocks whose scales are numbers of either sign from 2^low to 2^high, those below 2^-14 denormal; uint8
    (count, bytes)."""
    rng, item = np.random.default_rng(seed), ITEMS[dtype]
    found = rng.integers(0, 256, (count, item.bytes), dtype=np.uint8)
    scales = rng.choice([-1, 1], (count, item.fields)) * 2.0 ** rng.uniform(low, high, (count, item.fields))
    found[:, item.at : item.at + 2 * item.fields] = scales.astype("<f2").view(np.uint8)
    return found


@pytest.mark.parametrize("dtype", BLOCKS)
def test_all_weights_of_a_block_move_by_one_step_and_nothing_else_does(dtype):
    """As ggml's own arithmetic has them: so a scale is where the page says that it is."""
    gguf = pytest.importorskip("gguf")
    item = ITEMS[dtype]
    count = SIZE // 64 * 64 // item.bytes // 32 * 32
    plain = blocks(dtype, count)
    marker, layout = marker_for((0, plain.size, dtype), size=plain.size)
    first = 1
    start = int(layout.marked_starts[first])
    image = plain.reshape(-1)
    here = image[start : start + layout.marked].tobytes()
    type_ = gguf.GGMLQuantizationType[dtype]
    original = gguf.dequantize(plain.reshape(-1), type_).reshape(count, item.weights).astype(np.float64)
    moved = []
    for variant in marker.variants(first, memoryview(here)):
        changed = image.copy()
        changed[start : start + layout.marked] = np.frombuffer(variant, np.uint8)
        moved.append(gguf.dequantize(changed, type_).reshape(count, item.weights) - original)
    a, b = moved
    low, stop = item.within(start, start + layout.marked)
    assert not a[:low].any()
    assert not a[stop:].any()
    norm = np.linalg.norm(original[low:stop], axis=1)
    there = norm > 0
    assert there.mean() > 0.9
    if item.fields == 1:
        step = np.linalg.norm(a[low:stop], axis=1)[there] / norm[there]
        assert (step > 2**-8.01).all()
        assert (step < 2**-6.99).all()
        # All along the block's own weights: it moves as a whole.
        along = np.abs(np.einsum("ij,ij->i", a[low:stop], original[low:stop]))[there] / norm[there] ** 2
        assert np.allclose(along, step, rtol=1e-4)
    assert (np.abs(a[low:stop]).max(axis=1)[there] > 0).all()
    positive = np.einsum("ij,ij->i", a[low:stop], original[low:stop]) > 0
    assert 0.2 < positive.mean() < 0.8
    # B is the other side, but for where a power of two lies between.
    assert np.median(np.abs(a + b)[low:stop][there].sum(axis=1) / np.abs(a)[low:stop][there].sum(axis=1)) < 1e-5


def test_scales_stay_numbers_of_their_sign():
    """Of half of all 2^16 values that the field of a block can have, in any order."""
    item = ITEMS["Q4_0"]
    plain = np.zeros((1 << 16, item.bytes), np.uint8)
    values = np.random.default_rng(1).permutation(1 << 16).astype("<u2")
    plain[:, :2] = values[:, None].view(np.uint8)
    marker, layout = marker_for((0, plain.size, "Q4_0"), size=plain.size)
    seen = set()
    for number, count in enumerate(layout.stripes):
        if not count:
            continue
        first = int(layout.first_positions[number])
        start, size = int(layout.marked_starts[first]), count * layout.marked
        low, stop = item.within(start, start + size)
        for variant in marker.variants(first, memoryview(plain.reshape(-1)[start : start + size].tobytes())):
            got = np.ndarray((stop - low,), "<u2", variant, low * item.bytes - start, (item.bytes,))
            was = values[low:stop]
            u, moved = was & 0x7FFF, got.astype(int) - was
            q = np.select([u < 0x80, u < 0x100, u < 0x200, u < 0x400, u <= 0x7BF7], [0, 1, 2, 4, 8], 0)
            assert (np.abs(moved) == q).all()
            assert ((got ^ was) & 0x8000 == 0).all()
            assert ((got & 0x7FFF)[u > 0] > 0).all()
            assert ((got & 0x7FFF)[u < 0x7C00] < 0x7C00).all()
            seen |= set(np.unique(q))
    assert seen == {0, 1, 2, 4, 8}


def test_positions_have_signs_of_their_own():
    marker, layout = marker_for((0, SIZE, "BF16"))
    plain = np.ones(layout.marked // 2, ml_dtypes.bfloat16).tobytes()
    assert marker.variants(0, memoryview(plain))[0] != marker.variants(1, memoryview(plain))[0]
