"""Whose stamp a leak carries: a matched filter and its bound (spec/mark.md, section 7)."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.elements import ulps, values
from strongroom.marking.estimate import residual
from strongroom.marking.stamp import Stamp, stampable

_BLOCK = 1 << 17  # elements at a time: what is worked on stays in the cache
_SHORT, _ROW = 64, 2048
_CUT = 4.0


class MatchedFilter:
    """Scores of some holders' stamps, gathered from one tensor after another. Thread-safe."""

    def __init__(self, stamps: Sequence[Stamp]) -> None:
        self._stamps = list(stamps)
        self._along = np.zeros(len(self._stamps))
        self._power = 0.0
        self._lock = threading.Lock()

    def add(self, tag: bytes, first: int, dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> None:
        """Take in elements of the tensor of this tag and type, from `first` on: the original's integers, and the leak's
        aligned values (NaN where it has none), both as rows, or flat."""
        if not self._stamps:
            return
        width = bits.shape[-1] if bits.ndim > 1 and bits.shape[-1] >= _SHORT else _ROW
        flat, found = bits.reshape(-1), leak.reshape(-1)
        step = max(1, _BLOCK // width) * width
        whole = flat.size // width * width
        cuts = [*range(0, whole, step), whole]
        if flat.size - whole >= _SHORT:
            cuts.append(flat.size)  # what is left is a shorter row
        for at, end in itertools.pairwise(cuts):
            piece, seen = flat[at:end], found[at:end]
            if not np.isfinite(seen).any():
                continue
            r = filtered(dtype, _rows(piece, width), _rows(seen, width))
            along = np.empty(len(self._stamps))
            for k, stamp in enumerate(self._stamps):
                along[k] = np.dot(r, stamp.chips(tag, first + at, r.size).astype(np.float32))
            with self._lock:
                self._power += float(np.dot(r, r))
                self._along += along

    def scores(self) -> NDArray[np.float64]:
        """float64: z of each stamp, in their order."""
        return self._along / math.sqrt(2 * self._power) if self._power > 0 else np.zeros(len(self._stamps))


def bound(z: float) -> float:
    """log10 of the bound on an innocent scoring `z` or more, under any attack (Hoeffding)."""
    return min(0.0, -(max(z, 0.0) ** 2) / 2 / math.log(10))


def filtered(dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32, flat: r of the page, from rows of the original's integers and of the leak."""
    original = values(bits, dtype)
    u = ulps(original) * np.sign(original)
    x = residual(original, leak, u)
    n = max(1, x.shape[1])
    # In the row's own scale: r is a ratio, and squares of small weights are below what float32 holds.
    scale = np.maximum(np.abs(u).max(axis=1, keepdims=True), np.float32(1e-35))
    u, x = u / scale, x / scale
    deviation = np.sqrt(np.einsum("ij,ij->i", x, x) / n)[:, None] * np.float32(_CUT)
    np.clip(x, -deviation, deviation, out=x)
    power = np.einsum("ij,ij->i", x, x)[:, None] / n
    v = np.maximum(power - 2 * np.einsum("ij,ij->i", u, u)[:, None] / n, power / 10)
    with np.errstate(all="ignore"):
        r = x * u / (v + 2 * u * u)
    r[~np.isfinite(r) | ~stampable(bits, dtype)] = 0
    return np.asarray(r, np.float32).reshape(-1)


def _rows(flat: NDArray[Any], width: int) -> NDArray[Any]:
    return flat.reshape(-1, width) if flat.size % width == 0 else flat.reshape(1, -1)
