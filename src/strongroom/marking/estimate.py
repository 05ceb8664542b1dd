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
from strongroom.marking.elements import step_of, ulps, values
from strongroom.marking.mark import Marker

_BATCH = 64  # positions at a time: what is worked on stays in the cache
_LEAST = 64  # elements of a position in one tensor: fewer say nothing after a fit of two numbers
_LEAST_BLOCKS = 16  # each of which has the noise of 32 weights or more
_PRUNED = 0.02
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

    def add(self, begin: int, dtype: str, bits: NDArray[Any], leak: NDArray[np.float32]) -> None:
        """Take in one tensor: the image's byte where it begins, its type, the original's integers, and the leak's
        aligned values; both flat and of one length. An element that is absent from the leak is NaN. Of blocks, both are
        what `scales` makes of them."""
        item, length = ITEMS[dtype], self._layout.marked
        end = begin + bits.size * item.bytes
        starts = self._layout.marked_starts
        whole = range(int(np.searchsorted(starts, begin)), int(np.searchsorted(starts + length, end, "right")))
        size = length // item.bytes  # of blocks some positions have one more, which is left out
        for first in range(whole.start, whole.stop, _BATCH):
            count = min(_BATCH, whole.stop - first)
            at = -((begin + item.at - starts[first : first + count]) // item.bytes)
            index = at[:, None] + np.arange(size)
            signs = self._marker.signs(first, count)[:, :size]
            self._take(slice(first, first + count), dtype, bits[index], leak[index], signs)
        for position, skipped in self._crossing(begin, end, whole):
            start = int(starts[position])
            low, high = max(start, begin), min(start + length, end)
            # The signs of a position are counted from its first element on, which another tensor may hold.
            cut = slice(*item.within(low - begin, high - begin))
            signs = self._marker.signs(position, 1)[:, skipped : skipped + cut.stop - cut.start]
            self._take(slice(position, position + 1), dtype, bits[None, cut], leak[None, cut], signs)

    def _crossing(self, begin: int, end: int, whole: range) -> Iterator[tuple[int, int]]:
        """Positions that lie in this tensor in part, and how many of their elements lie before it."""
        starts, length = self._layout.marked_starts, self._layout.marked
        for position in (whole.start - 1, whole.stop):
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
    ) -> None:
        if bits.shape[1] < (_LEAST_BLOCKS if ITEMS[dtype].is_block else _LEAST):
            return
        original = values(bits, dtype)
        d = np.where(step_of(dtype).markable(bits), np.copysign(ulps(original), original), np.float32(0))
        d[signs == 0] *= -1
        x = residual(original, leak)
        n, power, n_unit, information = (np.zeros(len(x)) for _ in range(4))
        xd, dd, xx = (np.einsum("ij,ij->i", a, b, dtype=np.float64) for a, b in ((x, d), (d, d), (x, x)))
        usable = (dd > _TINY) & (xx > _TINY)
        rho = np.clip(np.divide(xd, dd, out=np.zeros_like(xd), where=usable), -1, 1)
        v = np.maximum(xx - rho**2 * dd, xx / 10) / x.shape[1]
        np.divide(xd, v, out=n, where=usable)
        np.divide(dd, v, out=information, where=usable)
        power[:] = np.einsum("ij,ij->i", (x * d) ** 2, np.ones_like(x), dtype=np.float64)
        np.divide(xd**2, power, out=n_unit, where=usable & (power > 0))
        with self._lock:
            self._n[at] += n
            self._information[at] += information
            # Of a position that is seen in two parts, each part is a sum of signs of its own.
            self._square[at] += n_unit
            self._sums[at] += usable

    def done(self) -> Estimates:
        return Estimates(self._n, self._information, self._square, self._sums)


def residual(
    original: NDArray[np.float32], leak: NDArray[np.float32], *more: NDArray[np.float32]
) -> NDArray[np.float32]:
    """float32 (rows, elements): leak − original, less what a shift and a scale of the row explain, and `more` of the
    same shape; 0 where the leak says nothing."""
    with np.errstate(all="ignore"):
        x = leak - original
        clean = bool(np.isfinite(x.sum()))
    if clean and len(more) <= 1 and np.count_nonzero(leak) > (1 - _PRUNED) * leak.size:
        return _fitted(original, x, *more)
    silent = ~np.isfinite(leak) | ~np.isfinite(original)
    zero = leak == 0
    pruned = zero.mean(axis=1) > _PRUNED
    if pruned.any():
        silent |= zero & pruned[:, None]
    x[silent] = 0
    keep = ~silent
    # Least squares, one column after another, each freed of those before it.
    columns: list[NDArray[np.float32]] = []
    for given in (np.ones_like(original), original, *more):
        column = np.where(keep, given, np.float32(0))
        column /= np.maximum(np.abs(column).max(axis=1, keepdims=True), np.float32(1e-30))  # so that nothing overflows
        for before in columns:
            column -= _along(column, before)
        columns.append(column)
    for column in columns:
        x -= _along(x, column)
    return x


def _fitted(
    w: NDArray[np.float32], x: NDArray[np.float32], u: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The same where nothing is silent, in few passes: least squares of the rows of `x`, in place, for (1, w, u)."""
    columns = [w] if u is None else [w, u]
    n = w.shape[1]
    means = [each.mean(axis=1, dtype=np.float64) for each in columns]
    mean = x.mean(axis=1, dtype=np.float64)
    size = len(columns)
    gram, along = np.empty((len(w), size, size)), np.empty((len(w), size, 1))
    for i, one in enumerate(columns):
        along[:, i, 0] = np.einsum("ij,ij->i", x, one) / n - mean * means[i]
        for j in range(i + 1):
            gram[:, i, j] = gram[:, j, i] = np.einsum("ij,ij->i", one, columns[j]) / n - means[i] * means[j]
    # A ridge so small that it says nothing where a row can be fitted, and keeps one that can't from being infinite.
    for i in range(size):
        gram[:, i, i] = gram[:, i, i] * (1 + 1e-6) + 1e-30
    slopes = np.linalg.solve(gram, along)[:, :, 0]
    x -= (mean - sum(slopes[:, i] * means[i] for i in range(size)))[:, None].astype(np.float32)
    for i, one in enumerate(columns):
        x -= slopes[:, i].astype(np.float32)[:, None] * one
    return x


def _along(x: NDArray[np.float32], column: NDArray[np.float32]) -> NDArray[np.float32]:
    """What of each row of `x` lies along the same row of `column`."""
    size = np.einsum("ij,ij->i", column, column)[:, None]
    part: NDArray[np.float32] = np.einsum("ij,ij->i", x, column)[:, None] / np.maximum(size, np.float32(1e-12))
    return part * column
