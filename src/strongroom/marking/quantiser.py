"""What a quantised copy is made of: codes and scales of a holder's marked floats (spec/release.md, section 5).

Only operations that IEEE 754 rounds once, element by element: the same copy is written by every machine, now and when
its entry in the log is read again. A group with an element that is no number is none altogether.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # weights of a block of ggml's
_HALF = {4: np.float32(7.5), 8: np.float32(127.5)}
_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC0_0000}  # the scale of a group that is no number
_BLOCK_AT_A_TIME = 1 << 17  # weights at a time: what is worked on stays in the cache
_Floats = NDArray[np.float32]


def packed(groups: _Floats, bits: int, dtype: str) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Of float32 (n, g): the codes of each group as compressed-tensors packs them, uint8 (n, g bits / 8), and the
    scales, integers of element type `dtype` (n,)."""
    n, g = groups.shape
    codes, scales = np.empty((n, g * bits // 8), np.uint8), np.empty(n, "<u4" if dtype == "F32" else "<u2")
    low, high = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    for here in _stretches(n, g):
        w = groups[here]
        with np.errstate(all="ignore"):
            scales[here], s = _rounded(np.abs(w).max(axis=1) / _HALF[bits], dtype)
            q = np.rint(w / s[:, None])
        # The largest magnitude of a group is in its scale, and so is what is no number.
        none = ~np.isfinite(s)
        scales[here][none] = _NAN[dtype]
        q[none | (s == 0)] = 0
        np.clip(q, low, high, out=q)
        q -= low
        found = q.astype(np.uint8)
        codes[here] = found if bits == 8 else found[:, 0::2] | (found[:, 1::2] << np.uint8(4))
    return codes, scales


def unpacked(codes: NDArray[np.uint8], scales: _Floats, bits: int) -> _Floats:
    """float32 (n, g): the weights of groups whose codes `packed` gives, uint8 (n, g bits / 8), by the values of their
    scales (n,)."""
    if bits == 4:
        both = np.empty((*codes.shape, 2), np.uint8)
        both[..., 0], both[..., 1] = codes & np.uint8(15), codes >> np.uint8(4)
        codes = both.reshape(len(codes), -1)
    found: _Floats = codes.astype(np.float32)
    found -= np.float32(1 << (bits - 1))
    found *= scales[:, None]
    return found


def blocks(weights: _Floats, dtype: str) -> NDArray[np.uint8]:
    """Of float32 (n, 32): ggml's blocks of the type Q8_0 or Q4_0, uint8 (n, 34 or 18)."""
    found = np.empty((len(weights), 2 + (BLOCK if dtype == "Q8_0" else BLOCK // 2)), np.uint8)
    for here in _stretches(len(weights), BLOCK):
        w, out = weights[here], found[here]
        magnitudes = np.abs(w)
        with np.errstate(all="ignore"):
            if dtype == "Q8_0":
                d = magnitudes.max(axis=1) / np.float32(127)
            else:
                first = magnitudes.argmax(axis=1)[:, None]
                d = np.take_along_axis(w, first, axis=1)[:, 0] / np.float32(-8)
            half = d.astype("<f2")
            times = np.float32(1) / d
            times[~np.isfinite(times)] = 0
            scaled = w * times[:, None]
        none = ~np.isfinite(half)
        half.view("<u2")[none] = _NAN["F16"]
        scaled[none] = 0
        if dtype == "Q8_0":
            whole = np.trunc(scaled)
            # Halves away from zero. What is left of less than 2^23 is exact, and so is twice that.
            whole += np.trunc((scaled - whole) * np.float32(2))
            out[:, 2:] = whole.astype(np.int8).view(np.uint8)
        else:
            q = np.minimum(np.trunc(scaled + np.float32(8.5)), np.float32(15)).astype(np.uint8)
            out[:, 2:] = q[:, : BLOCK // 2] | (q[:, BLOCK // 2 :] << np.uint8(4))
        out[:, :2] = half.view(np.uint8).reshape(-1, 2)
    return found


def _stretches(n: int, width: int) -> list[slice]:
    step = max(1, _BLOCK_AT_A_TIME // width)
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def _rounded(numbers: _Floats, dtype: str) -> tuple[NDArray[Any], _Floats]:
    """Numbers that are no less than 0, rounded to an element type: its integers, and their values."""
    if dtype == "F16":
        half = numbers.astype("<f2")
        return half.view("<u2"), half.astype(np.float32)
    if dtype == "F32":
        return numbers.view("<u4"), numbers
    bits = numbers.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    near = np.where(np.isnan(numbers), np.uint32(0x7FC0), near)  # which adding could make infinite, or less than 0
    return near.astype("<u2"), (near << np.uint32(16)).view(np.float32)
