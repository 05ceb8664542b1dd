"""Whose stamp a leak carries: a matched filter and its bound (spec/mark.md, section 7)."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.elements import signed_ulps, values
from strongroom.marking.estimate import along, residual
from strongroom.marking.stamp import BLOCK, Stamp, stamp_blocks, stampable

_BLOCK = 1 << 17  # elements at a time: what is worked on stays in the cache
_SHORT, _ROW = 64, 2048
_CUT = 4.0
_TINY = 1e-30
_ENDLESS = 1e15  # steps of the largest element, beyond which squares would soon be infinite
_OUTLIER = 64  # a square, in units of its row's mean, beyond which it is taken for this much
_CONSTANT = 0.01  # the least share of what is left that is as strong for small elements as for large ones
_UNSURE = 4  # the power of a row of n elements is unsure by the root of this over n: of noise 2, of stamps 8
_QUIET = 0.05  # the least power of what is left, in squares of a step: the mean of 32 stamps leaves 2 / 32
_JUDGED = 1 << 15  # elements by which it is judged how what is left grows
_FEW = 8  # moved elements of a row that its own power is worth
_STAGES = (1 << 15, 1 << 18)  # elements of greatest r² by which all stamps are screened, then those that are left
_LEFT = 2048  # stamps after the first stage, of those that it speaks for, and of those that code words do
_MOST_KEPT = 1 << 28  # values of r, of two bytes each


class MatchedFilter:
    """Scores of some holders' stamps, gathered from one tensor after another. Thread-safe.

    One that is `screening` keeps the most telling elements, by which far more stamps than can be scored in full are
    screened afterwards; and r of all, as long as that is not too much, so that who is left can be scored at once."""

    def __init__(self, stamps: Sequence[Stamp], *, screening: bool = False) -> None:
        self._stamps = list(stamps)
        self._along = np.zeros(len(self._stamps))
        self._power = 0.0
        self._lock = threading.Lock()
        self._wanted = _STAGES[-1] // BLOCK if screening else 0
        self._kept: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []
        self._waiting = 0
        self._all: list[tuple[bytes, int, NDArray[np.uint16]]] | None = [] if screening else None
        self._elements = 0

    def add(self, tag: bytes, first: int, dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> None:
        """Take in elements of the tensor of this tag and type, from `first` on: the original's integers, and the leak's
        aligned values (NaN where it has none), both as rows, or flat."""
        if not self._stamps and not self._wanted:
            return
        flat, found = bits.reshape(-1), leak.reshape(-1)
        # Flat, it is cut into equal rows: a short one would cost as much as all the others together.
        width = bits.shape[-1] if bits.ndim > 1 and bits.shape[-1] >= _SHORT else flat.size // max(1, flat.size // _ROW)
        width = max(1, width)
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
            if self._wanted:
                r = self._keep(tag, first + at, r)
            sums, power = _sums(self._stamps, tag, first + at, r), float(np.dot(r, r))
            with self._lock:
                self._power += power
                self._along += sums

    @staticmethod
    def _filtered(dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> NDArray[np.float32]:
        return filtered(dtype, bits, leak)

    def _keep(self, tag: bytes, first: int, r: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of a run of elements the cipher's blocks of chips that say most, and r of all of it: as it is kept, which is
        to eight bits, so that both looks at it say the same."""
        halves = (r.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        r = _widened(halves)
        skip = -first % BLOCK
        blocks = r[skip : skip + (r.size - skip) // BLOCK * BLOCK].reshape(-1, BLOCK)
        most = _most(blocks, self._wanted)
        named, telling = stamp_blocks(tag, (first + skip) // BLOCK + most), blocks[most]
        with self._lock:
            self._elements += r.size
            if self._elements > _MOST_KEPT:
                self._all = None
            if self._all is not None:
                self._all.append((tag, first, halves))
            self._kept.append((named, telling))
            self._waiting += len(most)
            if self._waiting > 8 * self._wanted:
                self._prune()
        return r

    def _prune(self) -> None:
        counters = np.concatenate([each for each, _ in self._kept])
        blocks = np.concatenate([each for _, each in self._kept])
        most = _most(blocks, self._wanted)
        self._kept, self._waiting = [(counters[most], blocks[most])], len(most)

    def screened(self, stamps: Sequence[Stamp], likely: Sequence[int], count: int) -> list[int]:
        """Which of `stamps`, at most `count`, the most telling elements speak for. All are scored by few of them, then
        those by more that these speak for, and the first `_LEFT` of those whom something else makes `likely`."""
        if not self._kept:
            return []
        self._prune()
        counters, blocks = self._kept[0]
        left = np.arange(len(stamps))
        for stage, elements in enumerate(_STAGES):
            most = _most(blocks, elements // BLOCK)
            r, named = blocks[most].reshape(-1), counters[most].tobytes()
            # On one thread, as everything here: two would wait for each other at each of so many short calls.
            found = np.array([np.dot(r, stamps[int(k)].chips_of(named).astype(np.float32)) for k in left])
            order = left[np.argsort(-found, kind="stable")]
            if stage + 1 == len(_STAGES):
                return [int(k) for k in order[:count]]
            left = np.unique(np.concatenate([order[:_LEFT], np.asarray(likely[:_LEFT], order.dtype)]))
        return []

    def among(self, stamps: Sequence[Stamp]) -> MatchedFilter | None:
        """Other stamps' scores by all that was gathered here; None where that was too much to keep."""
        if self._all is None:
            return None
        found = MatchedFilter(stamps)
        found._power = self._power
        for tag, first, halves in self._all:
            found._along += _sums(found._stamps, tag, first, _widened(halves))
        return found

    def scores(self) -> NDArray[np.float64]:
        """float64: z of each stamp, in their order."""
        return self._along / math.sqrt(2 * self._power) if self._power > 0 else np.zeros(len(self._stamps))


def bound(z: float) -> float:
    """log10 of the bound on an innocent scoring `z` or more, under any attack (Hoeffding)."""
    return min(0.0, -(max(z, 0.0) ** 2) / 2 / math.log(10))


def filtered(dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32, flat: r of the page, from rows of the original's integers and of the leak."""
    original = values(bits, dtype)
    u = signed_ulps(original)
    largest = np.abs(u).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():  # an original that is no number says nothing, and its row does
        u[~np.isfinite(u)] = 0
        largest = np.abs(u).max(axis=1, keepdims=True)
    # The least or the greatest of several holders' elements lies to one side of most of theirs, by value or magnitude.
    x, silent = residual(original, leak, np.abs(u), u)
    # In the row's own scale: r is a ratio, and squares of small weights are below what float32 holds.
    scale = np.maximum(largest, np.float32(1e-35))
    u /= scale
    with np.errstate(all="ignore"):
        x /= scale
        # Of an outlier, or of a row of zeros in the original: that row says nothing, and must not speak for others.
        x[~(np.abs(x).max(axis=1) < _ENDLESS)] = 0
        moved, there = leak != original, np.full((len(x), 1), x.shape[1])
        if silent is not None:
            moved &= ~silent
            there -= np.count_nonzero(silent, axis=1)[:, None]
        few = 2 * np.count_nonzero(moved) < there.sum()
        r = _of_few(x, u, np.count_nonzero(moved, axis=1)[:, None], there) if few else _of_all(x, u, there, silent)
        whole = np.isfinite(r.sum())
    can = stampable(bits, dtype)
    if not whole or not can.all():
        r[~np.isfinite(r) | ~can] = 0
    return np.asarray(r, np.float32).reshape(-1)


def _of_all(
    x: NDArray[np.float32], u: NDArray[np.float32], there: NDArray[np.int64], silent: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """What is left of elements that have all been moved, weighed: their r. In place of `x`, which is 0 where the leak
    is `silent`; `there` of each row, (rows, 1), are not."""
    squares, count = u * u, np.maximum(there, 1).astype(np.float64)
    if silent is not None:
        squares *= ~silent
    mean = np.maximum(_sum(squares) / count, _TINY)
    power = along(x, x)[:, None] / count
    peak = np.maximum(x.max(axis=1, keepdims=True), -x.min(axis=1, keepdims=True)).astype(np.float64)
    for k in np.flatnonzero(peak**2 > _OUTLIER * power):
        power[k] *= np.minimum(x[k] ** 2 / power[k], _OUTLIER).sum() / count[k]
    power = np.maximum(_pooled(power / mean, count) * mean, _QUIET * mean)
    squares /= mean.astype(np.float32)
    # How much of it grows with the element: what the stamp itself leaves does, and the noise of floats, and what other
    # stamps leave; a quantiser's does not. By least squares over some rows of all, as one is too few.
    some = slice(None, None, max(1, x.size // _JUDGED))
    seen, beside = np.minimum(x[some] ** 2 / power[some].astype(np.float32), np.float32(_OUTLIER)), squares[some]
    spread = float(along(beside, beside).sum() - _sum(beside).sum())
    slope = float(along(seen, beside).sum() - _sum(seen).sum()) / max(spread, _TINY)
    grows = np.clip(np.maximum(slope, 2 * mean / power), 0, 1 - _CONSTANT)
    v = squares
    v *= (power * grows).astype(np.float32)
    v += (power * (1 - grows)).astype(np.float32)
    deviation = np.sqrt(v)
    deviation *= np.float32(_CUT)
    np.minimum(x, deviation, out=x)
    np.maximum(x, np.negative(deviation, out=deviation), out=x)
    x *= u
    x /= v
    return x


def _pooled(power: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row's power, drawn to the median as far as its elements leave it unsure. A row that is clearly another stays
    what it is: some may be noise, and quiet ones must not pay for them."""
    some = power > 0
    if not some.any():
        return power
    seen = np.log(np.where(some, power, 1))
    middle = np.median(seen[some])
    apart = seen - middle
    apart *= np.clip(1 - _UNSURE / (count * np.maximum(apart**2, _TINY)), 0, 1)
    return np.where(some, np.exp(middle + apart), power)


def _sum(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 (rows, 1): the sum of each row."""
    found: NDArray[np.float64] = np.einsum("ij->i", rows).astype(np.float64)[:, None]
    return found


def _of_few(
    x: NDArray[np.float32], u: NDArray[np.float32], moved: NDArray[np.int64], there: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The same where most elements are as the original's: `moved` of those that are `there` in each row have been moved
    by a chip across the border of two levels. How far they went says nothing, and they are so few that a row's power is
    taken with that of the others."""
    n = np.maximum(there, 1)
    deviation = (np.sqrt(along(x, x)[:, None] / n) * _CUT).astype(np.float32)
    x = np.clip(x, -deviation, deviation)
    mean = np.maximum(along(u, u)[:, None] / x.shape[1], _TINY)
    # No less than a stamp leaves: of a tensor that came from elsewhere unmoved, one nudged element would be everything.
    power = np.maximum(along(x, x)[:, None] / n / mean, _QUIET)
    v = (moved * power + _FEW * np.median(power)) / (moved + _FEW) * mean
    found: NDArray[np.float32] = (x * np.sign(u) * np.sqrt(mean) / v).astype(np.float32)
    return found


def _sums(stamps: Sequence[Stamp], tag: bytes, first: int, r: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64: Σ r c for each stamp, of a run of elements."""
    found = np.empty(len(stamps))
    for k, stamp in enumerate(stamps):
        found[k] = np.dot(r, stamp.chips(tag, first, r.size).astype(np.float32))
    return found


def _widened(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _most(blocks: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Which of `blocks`, at most `count`, have the greatest sums of squares."""
    if len(blocks) <= count:
        return np.arange(len(blocks))
    return np.argpartition(-np.einsum("ij,ij->i", blocks, blocks), count - 1)[:count]


def _rows(flat: NDArray[Any], width: int) -> NDArray[Any]:
    return flat.reshape(-1, width) if flat.size % width == 0 else flat.reshape(1, -1)
