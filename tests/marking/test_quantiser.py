"""Codes, scales and blocks are those that the specification has, and ggml's own, bit for bit."""

from __future__ import annotations

import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from bench import ggml

from strongroom.marking.quantiser import blocks, packed, unpacked

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def reseeded(monkeypatch):
    """The same numbers in each test, in whatever order they run."""
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(7))


def hard(width):
    """Rows of all sizes; zeros, ties, equal magnitudes of both signs, one element alone, and numbers below normal."""
    w = RNG.normal(0, 1, (2000, width)) * 10.0 ** RNG.integers(-12, 5, (2000, 1))
    w = w.astype(np.float32)
    w[:200] = (w[:200].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # bf16, most of it
    w[200] = 0
    w[201, 1:] = 0
    w[202] = np.resize([1, -1], width)
    w[203] = np.resize([-1, 1], width)
    w[204] = np.resize(np.arange(-16, 17) / 2, width)
    w[205] = np.resize(np.arange(-254, 255, 2) / 254 * 127 + 0.5, width)
    w[206] *= np.float32(1e-36) / np.abs(w[206]).max()
    w[207] = np.float32(6e-8)
    return w


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_are_ggmls(kind):
    w = hard(32)
    found = blocks(w, kind)
    assert found.tobytes() == ggml.quantize(w, kind).tobytes()
    assert found.tobytes() == gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind]).tobytes()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_what_is_too_small_for_ggml_to_invert_is_nothing(kind):
    w = np.full((1, 32), 1e-41, np.float32)
    assert not gguf.quants.dequantize(blocks(w, kind), gguf.GGMLQuantizationType[kind]).any()


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 96)])
@pytest.mark.parametrize(("dtype", "numpy"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32)])
def test_codes_and_scales_are_those_of_the_specification(bits, group, dtype, numpy):
    """Element by element, in float64 and by another library's rounding."""
    w = hard(group)
    with np.errstate(over="ignore"):
        w = w[np.isfinite(w.astype(numpy).astype(np.float32)).all(axis=1)]
    codes, scales = packed(w, bits, dtype)
    s = (np.abs(w).max(axis=1) / np.float32({4: 7.5, 8: 127.5}[bits])).astype(numpy)
    assert scales.tobytes() == s.tobytes()
    s = s.astype(np.float32)[:, None]
    with np.errstate(all="ignore"):
        # To float32 first, as the one operation rounds: then to an integer.
        expected = np.rint((w.astype(np.float64) / s).astype(np.float32))
    expected = np.where(s == 0, 0, np.clip(expected, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)).astype(int)
    words = codes.reshape(len(w), -1).view("<u4").astype(np.int64)
    found = ((words[:, :, None] >> np.arange(0, 32, bits)) & (2**bits - 1)).reshape(w.shape) - 2 ** (bits - 1)
    assert (found == expected).all()
    assert (unpacked(codes, s[:, 0], bits) == (expected * s).astype(np.float32)).all()
