"""A quantiser's rounding, taken out of a leak (spec/mark.md, section 5).

Most of what a file quantised to few bits differs by is rounding, which the original rounded alike does not differ by:
what is left are the few elements that a mark moved across the border of two levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUPS = (128, 64, 32)  # elements that share their levels, in the usual quantisers
_LEVELS = 20  # more levels than this in a group, on the average, are no quantiser's of few bits
_JUDGED = 64  # groups by which that is judged
_LESS = 0.25  # of what is left of it otherwise, what may be left where a quantiser is taken to have been at work


def coarse(leak: NDArray[np.float32], first: int) -> bool:
    """Whether `unrounded` may find levels: a few of the smallest groups tell, as a larger group has no fewer levels
    than its parts."""
    group = GROUPS[-1]
    skip = -first % group
    count = (leak.size - skip) // group
    seen = leak[skip : skip + max(0, count) * group].reshape(-1, group)[:: max(1, count // _JUDGED)]
    return count > 0 and bool(_levels(_there(seen)).mean() <= _LEVELS + 2)


def unrounded(original: NDArray[np.float32], leak: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The leak as it would be without rounding: original + leak − Q(original), where Q rounds to the levels that the
    leak itself has in each group; the leak as it is where it has no levels.

    Both flat and of one length, of a run of elements of which the first is the tensor's element `first`."""
    for group in GROUPS:
        skip = -first % group
        count = (leak.size - skip) // group
        cut = slice(skip, skip + count * group)
        seen = leak[cut].reshape(-1, group)
        if count > 0 and _levels(_there(seen[:: max(1, count // _JUDGED)])).mean() <= _LEVELS:
            break
    else:
        return leak
    w = original[cut].reshape(-1, group)
    # An element that is absent must not undo this for its group, let alone for others: it stays absent.
    there = _there(seen)
    with np.errstate(all="ignore"):
        plain, rounded = seen - w, seen - _nearest(np.sort(there, axis=1), w)
    taken = np.isfinite(w).all(axis=1) & (_levels(there) <= _LEVELS)
    rounded[~taken] = plain[~taken]
    with np.errstate(all="ignore"):
        if not np.nansum(np.square(rounded)) < _LESS * np.nansum(np.square(plain)):
            return leak
    found = leak.copy()
    found[cut] = (w + rounded).reshape(-1)
    return found


def _there(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same with zeros in the places of what is absent: one more level, which most groups have."""
    return np.where(np.isfinite(groups), groups, np.float32(0))


def _levels(groups: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many different values each group has: a zero, as pruning leaves them, says nothing."""
    ordered = np.sort(groups, axis=1)
    new = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] != 0)
    counted = new.sum(axis=1) + 1
    there = np.count_nonzero(groups, axis=1)
    found: NDArray[np.int64] = counted * groups.shape[1] // np.maximum(there, 1)
    return found


def _nearest(levels: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row of sorted `levels` those nearest to the elements of the same row of `w`."""
    most = np.maximum(np.abs(levels).max(axis=1, keepdims=True), np.abs(w).max(axis=1, keepdims=True))
    # One search for all rows: each in an interval of its own.
    shift = np.arange(len(levels), dtype=np.float64)[:, None] * 4
    scale = np.where(most > 0, most, 1).astype(np.float64)
    at = np.searchsorted((levels / scale + shift).reshape(-1), (w / scale + shift).reshape(-1)).reshape(w.shape)
    begin = np.arange(len(levels))[:, None] * levels.shape[1]
    above = np.clip(at - begin, 0, levels.shape[1] - 1)
    below = np.maximum(above - 1, 0)
    high, low = np.take_along_axis(levels, above, axis=1), np.take_along_axis(levels, below, axis=1)
    return np.where(high - w < w - low, high, low)
