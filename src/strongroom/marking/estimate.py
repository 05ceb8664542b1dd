"""What a leak says of each position of the code word (spec/mark.md, section 5)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.formats.items import ITEMS
from strongroom.formats.layout import Layout
from strongroom.marking.elements import PRUNED, signed_ulps, step_of, values
from strongroom.marking.mark import Marker

_BATCH = 1 << 17  # elements at a time: what is worked on stays in the cache
_LEAST = 64  # elements of a position in one tensor: fewer say nothing after a fit of two numbers
_LEAST_BLOCKS = 16  # each of which has the noise of 32 weights or more; or elements, of those that a row is left
_ONE_THREAD = 8192
_EACH = 7  # to see whether most elements have moved, each seventh column is looked at
_PLAIN = 16  # squares of its deviation: an estimate of a mark below that is not taken out of what stamps are read from
_CHANCE = 3  # times what chance alone explains of a row: as much of a fit is left in
_LEAST_STEP = np.float32(1e-35)
_TINY = 1e-60


@dataclass(frozen=True)
class Estimates:
    """float64 (m,) each: `n` is N_i and `information` is I_i of the page; `square` is N_i² / V_i, summed over the
    `sums` parts in which a position was seen (one, but for those that cross from one tensor into the next)."""

    n: NDArray[np.float64]
    information: NDArray[np.float64]
    square: NDArray[np.float64]
    sums: NDArray[np.float64]

    @property
    def used(self) -> int:
        """How many positions say anything."""
        return int(np.count_nonzero(self.information))


class Estimator:
    """Gathers the estimates of one version's positions from one tensor after another. Thread-safe."""

    def __init__(self, layout: Layout, marker: Marker) -> None:
        self._layout, self._marker = layout, marker
        self._n, self._information, self._square, self._sums = (np.zeros(layout.positions) for _ in range(4))
        self._lock = threading.Lock()

    def add(self, begin: int, dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take in one tensor: the image's byte where it begins, its type, the original's integers, and the leak's
        aligned values; both flat and of one length. An element that is absent from the leak is NaN. Of blocks, both are
        what `scales` makes of them. Returns float32 (n,), the leak without the marks that were found in it, which are
        noise to a stamp (section 7): the given array itself if none was."""
        item, length = ITEMS[dtype], self._layout.marked
        freed = leak
        end = begin + bits.size * item.bytes
        starts = self._layout.marked_starts
        whole = range(int(np.searchsorted(starts, begin)), int(np.searchsorted(starts + length, end, "right")))
        size = length // item.bytes  # of blocks some positions have one more, which is left out
        batch = max(1, _BATCH // size)
        for first in range(whole.start, whole.stop, batch):
            count = min(batch, whole.stop - first)
            at = -((begin + item.at - starts[first : first + count]) // item.bytes)
            signs = self._marker.signs(first, count)[:, :size]
            if at[-1] - at[0] == (count - 1) * size:  # of one stripe: nothing has to be gathered
                here: Any = slice(int(at[0]), int(at[0]) + count * size)
                rows, seen = bits[here].reshape(count, size), leak[here].reshape(count, size)
            else:
                here = at[:, None] + np.arange(size)
                rows, seen = bits[here], leak[here]
            marks = self._take(slice(first, first + count), dtype, rows, seen, signs)
            freed = _less(freed, leak, here, marks)
        for position, skipped in self._crossing(begin, end, whole):
            start = int(starts[position])
            low, high = max(start, begin), min(start + length, end)
            # The signs of a position are counted from its first element on, which another tensor may hold.
            cut = slice(*item.within(low - begin, high - begin))
            signs = self._marker.signs(position, 1)[:, skipped : skipped + cut.stop - cut.start]
            marks = self._take(slice(position, position + 1), dtype, bits[None, cut], leak[None, cut], signs)
            freed = _less(freed, leak, cut, marks)
        return freed

    def _crossing(self, begin: int, end: int, whole: range) -> Iterator[tuple[int, int]]:
        """Positions that lie in this tensor in part, and how many of their elements lie before it."""
        starts, length = self._layout.marked_starts, self._layout.marked
        for position in {whole.start - 1, whole.stop}:  # one, of a tensor within one: twice it would count twice
            if 0 <= position < self._layout.positions and position not in whole:
                start = int(starts[position])
                if start < end and start + length > begin:
                    yield position, self._marker.elements_before(position, begin)

    def _take(
        self,
        at: slice,
        dtype: str,
        bits: NDArray[Any],
        leak: NDArray[np.float32],
        signs: NDArray[np.uint8],
    ) -> NDArray[np.float32] | None:
        """Take in rows, one a position; what was found of their marks, in the leak's units, if anything was."""
        if bits.shape[1] < (_LEAST_BLOCKS if ITEMS[dtype].is_block else _LEAST):
            return None
        original = values(bits, dtype)
        d = signed_ulps(original)
        d *= signs.astype(np.float32) * 2 - 1
        can = step_of(dtype).markable(bits)
        if not can.all():
            d[~can] = 0
        x, silent = residual(original, leak)
        count: NDArray[np.int64] | int = x.shape[1]
        if silent is not None:
            d[silent] = 0
            count = x.shape[1] - np.count_nonzero(silent, axis=1)
        n, n_unit, information = (np.zeros(len(x)) for _ in range(3))
        # Steps in the row's own scale, which is a power of two: squares of small weights are below what float32 holds.
        scale = np.maximum(np.abs(d).max(axis=1, keepdims=True), _LEAST_STEP)
        with np.errstate(over="ignore", invalid="ignore"):
            d /= scale
            x /= scale
            xd, dd, xx = along(x, d), along(d, d), along(x, x)
        # A row with an outlier that single precision can't square says nothing.
        usable = (dd > _TINY) & (xx > _TINY) & np.isfinite(xx) & np.isfinite(xd) & (count >= _LEAST_BLOCKS)
        rho = np.clip(np.divide(xd, dd, out=np.zeros_like(xd), where=usable), -1, 1)
        v = np.maximum(xx - rho**2 * dd, xx / 10) / np.maximum(count, 1)
        np.divide(xd, v, out=n, where=usable)
        np.divide(dd, v, out=information, where=usable)
        plain = usable & (rho**2 * dd > _PLAIN * v)
        with np.errstate(over="ignore", invalid="ignore"):
            x *= d
            power = along(x, x)
        usable &= np.isfinite(power)
        np.divide(xd**2, power, out=n_unit, where=usable & (power > 0))
        with self._lock:
            self._n[at] += n
            self._information[at] += information
            # Of a position that is seen in two parts, each part is a sum of signs of its own.
            self._square[at] += n_unit
            self._sums[at] += usable
        if not plain.any():
            return None
        d *= scale * np.where(plain, rho, 0).astype(np.float32)[:, None]
        moved = leak[:, ::_EACH] != original[:, ::_EACH]
        there = moved.size
        if silent is not None:
            moved &= ~silent[:, ::_EACH]
            there -= np.count_nonzero(silent[:, ::_EACH])
        if 2 * np.count_nonzero(moved) < there:  # rounding was taken out: what is as it was has no mark
            d *= leak != original
        return d

    def done(self) -> Estimates:
        return Estimates(self._n, self._information, self._square, self._sums)


def _less(
    freed: NDArray[np.float32], leak: NDArray[np.float32], here: Any, marks: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """`freed` without `marks` as well, if there are any: a copy of `leak`, once one is needed."""
    if marks is None:
        return freed
    if freed is leak:
        freed = leak.copy()
    freed[here] -= marks.reshape(freed[here].shape)
    return freed


def residual(
    original: NDArray[np.float32], leak: NDArray[np.float32], *units: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """x, float32 (rows, n): leak − original, less as much of what a shift, a scale and `units` (of that shape) explain
    of a row as is beyond chance; 0 where the leak says nothing. And silent, bool (rows, n): where that is, if anywhere.
    """
    with np.errstate(all="ignore"):
        x = leak - original
        clean = bool(np.isfinite(x.sum()))
    zero = leak == 0
    few = PRUNED * leak.shape[1]
    pruned = np.count_nonzero(zero, axis=1) > few if np.count_nonzero(zero) > few else np.zeros(len(leak), np.bool_)
    if clean and not pruned.any():
        return _fitted(original, x, *units), None
    silent = ~np.isfinite(leak) | ~np.isfinite(original)
    silent |= zero & pruned[:, None]
    x[silent] = 0
    keep = ~silent
    # Least squares, one column after another, each freed of those before it.
    columns: list[NDArray[np.float32]] = []
    for given in (np.ones_like(original), original, *units):
        column = np.where(keep, given, np.float32(0))
        column /= np.maximum(np.abs(column).max(axis=1, keepdims=True), np.float32(1e-30))  # so that nothing overflows
        for before in columns:
            column -= _projected(column, before)
        columns.append(column)
    with np.errstate(all="ignore"):
        fit = sum((_projected(x, column) for column in columns), np.zeros_like(x))
        part = beyond_chance(along(fit, fit), along(x, x), np.count_nonzero(keep, axis=1), len(columns))
        fit *= part.astype(np.float32)[:, None]
        x -= fit
    return x, silent


def beyond_chance(
    explained: NDArray[np.float64], power: NDArray[np.float64], n: NDArray[np.int64] | int, columns: int
) -> NDArray[np.float64]:
    """float64 (rows,), from 0 to 1: the share of a fit that is taken out, of one that explains so much of the power of
    a row: 1 less three times what chance would explain. A fit by chance takes its part of a stamp out of the large
    elements, and puts it on the small ones, which say as much for all that they are small."""
    left = np.maximum(power - explained, 0) / np.maximum(n - columns, 1)
    return np.asarray(np.clip(1 - _CHANCE * columns * left / np.maximum(explained, _TINY), 0, 1))


def along(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 (rows,): the inner products of the rows of two matrices, added up in single precision."""
    # A longer vector the BLAS would divide among threads of its own.
    inner = np.vecdot(one, other) if one.shape[1] <= _ONE_THREAD else np.einsum("ij,ij->i", one, other)
    found: NDArray[np.float64] = inner.astype(np.float64)
    return found


def _fitted(w: NDArray[np.float32], x: NDArray[np.float32], *units: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same where nothing is silent, in few passes: what least squares of (1, w, units) explain beyond chance is
    taken out of the rows of `x`, in place."""
    columns = [w, *units]
    n = w.shape[1]
    sums = [np.einsum("ij->i", each).astype(np.float64) for each in (*columns, x)]
    gram = [
        [along(one, other) - sums[i] * sums[j] / n for j, other in enumerate(columns[: i + 1])]
        for i, one in enumerate(columns)
    ]
    right_hand = [along(x, one) - sums[-1] * sums[i] / n for i, one in enumerate(columns)]
    slopes = _solved(gram, right_hand)
    with np.errstate(all="ignore"):
        explained = sums[-1] ** 2 / n + sum(slope * each for slope, each in zip(slopes, right_hand, strict=True))
        part = beyond_chance(explained, along(x, x), n, len(columns) + 1)
        rows: Any = np.flatnonzero(part)  # few, but for a leak whose rows really were shifted or scaled
        if rows.size == len(x):
            rows = slice(None)
        slopes = [slope * part for slope in slopes]
        shift = sums[-1] / n * part - sum(slope * each for slope, each in zip(slopes, sums, strict=False)) / n
        x[rows] -= shift[rows, None].astype(np.float32)
        for slope, one in zip(slopes, columns, strict=True):
            x[rows] -= slope[rows, None].astype(np.float32) * one[rows]
    return x


def _solved(gram: list[list[NDArray[np.float64]]], right_hand: list[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The solutions of many small systems, whose matrices are symmetric: the lower halves `gram`, one array an element
    (Cholesky, without roots)."""
    size = len(right_hand)
    for i in range(size):
        # A ridge so small that it says nothing where a row can be fitted, and keeps one that can't from being infinite.
        gram[i][i] = gram[i][i] * (1 + 1e-6) + 1e-30
    lower: list[list[NDArray[np.float64]]] = []
    pivots: list[NDArray[np.float64]] = []
    known: list[NDArray[np.float64]] = []
    for i in range(size):
        row: list[NDArray[np.float64]] = []
        for j in range(i):
            row.append((gram[i][j] - sum(row[k] * lower[j][k] * pivots[k] for k in range(j))) / pivots[j])
        pivots.append(np.maximum(gram[i][i] - sum(row[k] ** 2 * pivots[k] for k in range(i)), 1e-30))
        known.append(right_hand[i] - sum(row[k] * known[k] for k in range(i)))
        lower.append(row)
    found = [each / pivot for each, pivot in zip(known, pivots, strict=True)]
    for i in reversed(range(size)):
        for k in range(i + 1, size):
            found[i] = found[i] - lower[k][i] * found[k]
    return found


def _projected(x: NDArray[np.float32], column: NDArray[np.float32]) -> NDArray[np.float32]:
    """What of each row of `x` lies along the same row of `column`."""
    size = np.einsum("ij,ij->i", column, column)[:, None]
    part: NDArray[np.float32] = np.einsum("ij,ij->i", x, column)[:, None] / np.maximum(size, np.float32(1e-12))
    return part * column
