"""Variants: A and B are what the specification says, and their midpoint is the original, bit for bit."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.crypto.keys import keystream
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


def test_positions_have_signs_of_their_own():
    marker, layout = marker_for((0, SIZE, "BF16"))
    plain = np.ones(layout.marked // 2, ml_dtypes.bfloat16).tobytes()
    assert marker.variants(0, memoryview(plain))[0] != marker.variants(1, memoryview(plain))[0]
