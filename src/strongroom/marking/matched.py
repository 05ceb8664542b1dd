"""Whose stamp a leak carries: a matched filter and its bound (spec/mark.md, section 7)."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.elements import ulps, values
from strongroom.marking.estimate import residual
from strongroom.marking.stamp import BLOCK, Stamp, stamp_blocks, stampable

_BLOCK = 1 << 17  # elements at a time: what is worked on stays in the cache
_SHORT, _ROW = 64, 2048
_CUT = 4.0
_TINY = 1e-30
_OUTLIER = 64  # a square, in units of its row's mean, beyond which it is taken for this much
_CONSTANT = 0.01  # the least share of what is left that is as strong for small elements as for large ones
_QUIET = 0.05  # the least power of what is left, in squares of a step: the mean of 32 stamps leaves 2 / 32
_FEW = 8  # moved elements of a row that its own power is worth
_MANY = 256  # stamps that a thread screens at a time


class MatchedFilter:
    """Scores of some holders' stamps, gathered from one tensor after another. Thread-safe.

    With `sample` it also keeps the most telling elements, that many at most, by which far more stamps than can be
    scored in full are screened afterwards."""

    def __init__(self, stamps: Sequence[Stamp], *, sample: int = 0) -> None:
        self._stamps = list(stamps)
        self._along = np.zeros(len(self._stamps))
        self._power = 0.0
        self._lock = threading.Lock()
        self._wanted = sample // BLOCK
        self._kept: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []
        self._waiting = 0

    def add(self, tag: bytes, first: int, dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> None:
        """Take in elements of the tensor of this tag and type, from `first` on: the original's integers, and the leak's
        aligned values (NaN where it has none), both as rows, or flat."""
        if not self._stamps and not self._wanted:
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
            r = self._filtered(dtype, _rows(piece, width), _rows(seen, width))
            along = np.empty(len(self._stamps))
            for k, stamp in enumerate(self._stamps):
                along[k] = np.dot(r, stamp.chips(tag, first + at, r.size).astype(np.float32))
            with self._lock:
                self._power += float(np.dot(r, r))
                self._along += along
                if self._wanted:
                    self._keep(tag, first + at, r)

    @staticmethod
    def _filtered(dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> NDArray[np.float32]:
        return filtered(dtype, bits, leak)

    def _keep(self, tag: bytes, first: int, r: NDArray[np.float32]) -> None:
        """Of a run of elements the cipher's blocks of chips that say most."""
        skip = -first % BLOCK
        blocks = r[skip : skip + (r.size - skip) // BLOCK * BLOCK].reshape(-1, BLOCK)
        if not len(blocks):
            return
        most = np.argsort(-np.einsum("ij,ij->i", blocks, blocks))[: self._wanted]
        self._kept.append((stamp_blocks(tag, (first + skip) // BLOCK + most), blocks[most]))
        self._waiting += len(most)
        if self._waiting > 8 * self._wanted:
            self._prune()

    def _prune(self) -> None:
        counters = np.concatenate([each for each, _ in self._kept])
        blocks = np.concatenate([each for _, each in self._kept])
        most = np.argsort(-np.einsum("ij,ij->i", blocks, blocks))[: self._wanted]
        self._kept, self._waiting = [(counters[most], blocks[most])], len(most)

    def screened(self, stamps: Sequence[Stamp], *, workers: int = 1) -> NDArray[np.float64]:
        """float64: z of each of `stamps`, by the sample alone."""
        if not self._kept:
            return np.zeros(len(stamps))
        self._prune()
        counters, blocks = self._kept[0]
        r, found, named = blocks.reshape(-1), np.zeros(len(stamps)), counters.tobytes()

        def score(first: int) -> None:
            for k in range(first, min(first + _MANY, len(stamps))):
                found[k] = np.dot(r, stamps[k].chips_of(named).astype(np.float32))

        with ThreadPoolExecutor(max(1, workers), "strongroom-trace") as pool:
            list(pool.map(score, range(0, len(stamps), _MANY)))
        power = float(np.dot(r, r))
        return found / math.sqrt(2 * power) if power > 0 else found

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
    with np.errstate(all="ignore"):
        moved = np.count_nonzero(leak != original, axis=1)[:, None]
    x = residual(original, leak, u)
    # In the row's own scale: r is a ratio, and squares of small weights are below what float32 holds.
    scale = np.maximum(np.abs(u).max(axis=1, keepdims=True), np.float32(1e-35))
    u, x = u / scale, x / scale
    with np.errstate(all="ignore"):
        r = _of_few(x, u, moved) if 2 * moved.sum() < x.size else _of_all(x, u)
    r[~np.isfinite(r) | ~stampable(bits, dtype)] = 0
    return np.asarray(r, np.float32).reshape(-1)


def _of_all(x: NDArray[np.float32], u: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of elements that have all been moved, weighed: their r."""
    squares, count = u * u, np.full((len(x), 1), max(1, x.shape[1]))
    if np.count_nonzero(x) < x.size:  # where the leak says nothing
        squares *= x != 0
        count = np.maximum(np.count_nonzero(x, axis=1), 1)[:, None]
    mean = np.maximum(squares.sum(axis=1, keepdims=True) / count, np.float32(_TINY))
    power = np.maximum(np.einsum("ij,ij->i", x, x)[:, None] / count, _QUIET * mean)
    squares /= mean
    seen = np.minimum(x * x / power, np.float32(_OUTLIER))
    power = np.maximum(power * seen.sum(axis=1, keepdims=True) / count, _QUIET * mean)
    # How much of it grows with the element: what the stamp itself leaves does, and the noise of floats, and what other
    # stamps leave; a quantiser's does not. By least squares over all rows, as one is too few.
    spread = float(np.einsum("ij,ij->", squares, squares) - squares.sum())
    slope = float(np.einsum("ij,ij->", seen, squares) - seen.sum()) / max(spread, _TINY)
    grows = np.clip(np.maximum(slope, 2 * mean / power), 0, 1 - _CONSTANT).astype(np.float32)
    v = power.astype(np.float32) * (1 - grows + grows * squares)
    deviation = np.sqrt(v) * np.float32(_CUT)
    found: NDArray[np.float32] = np.clip(x, -deviation, deviation) * u / v
    return found


def _of_few(x: NDArray[np.float32], u: NDArray[np.float32], moved: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same where most elements are as the original's: `moved` of each row are those that a chip has moved across
    the border of two levels. How far they went says nothing, and they are so few that a row's power is taken with that
    of the others."""
    n = max(1, x.shape[1])
    deviation = np.sqrt(np.einsum("ij,ij->i", x, x) / n)[:, None] * np.float32(_CUT)
    x = np.clip(x, -deviation, deviation)
    mean = np.maximum(np.einsum("ij,ij->i", u, u)[:, None] / n, np.float32(_TINY))
    power = np.einsum("ij,ij->i", x, x)[:, None] / n / mean
    v = (moved * power + _FEW * np.median(power)) / (moved + _FEW) * mean
    found: NDArray[np.float32] = (x * np.sign(u) * np.sqrt(mean) / v).astype(np.float32)
    return found


def _rows(flat: NDArray[Any], width: int) -> NDArray[Any]:
    return flat.reshape(-1, width) if flat.size % width == 0 else flat.reshape(1, -1)
