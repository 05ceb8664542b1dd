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
_FORMS = (("int4", 128), ("int4", 64), ("int4", 32), ("q4_0", 32))  # of copies, and the elements of their groups
_OURS = 0.33  # the same for a form of ours, which has nothing in common with another quantiser's rounding
_CAST = np.float32(2.0**-8)
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
    for form, group in _FORMS:
        if (found := _reformed(original, leak, first, form, group)) is not None:
            return found
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


def _reformed(
    original: NDArray[np.float32], leak: NDArray[np.float32], first: int, form: str, group: int
) -> NDArray[np.float32] | None:
    """As `unrounded`, where Q is the quantiser of a form in which copies leave, and a factor for each group that fits
    the leak; None where the leak is not of that form."""
    skip = -first % group
    count = (leak.size - skip) // group
    if count <= 0:
        return None
    cut = slice(skip, skip + count * group)
    w, seen = original[cut].reshape(-1, group), leak[cut].reshape(-1, group)
    step = max(1, count // _JUDGED)
    if _left(w[::step], seen[::step], form)[1] >= _OURS:
        return None
    rest, share = _left(w, seen, form)
    if share >= _OURS:
        return None
    found = leak.copy()
    found[cut] = (w + rest).reshape(-1)
    return found


def _left(w: NDArray[np.float32], seen: NDArray[np.float32], form: str) -> tuple[NDArray[np.float32], float]:
    """What is left of a leak without what the original is in a form, times the factor that most elements of a group
    have in common; and its share of what is left without the original."""
    with np.errstate(all="ignore"):
        steps = _steps(w, form)
        near = _on_grid(w, steps)
        ratios = np.sort(seen / near, axis=1)  # what is no number comes last
        middle = np.count_nonzero(~np.isnan(ratios), axis=1)[:, None] // 2
        factor = np.take_along_axis(ratios, np.minimum(middle, w.shape[1] - 1), axis=1)
        factor = np.where((factor > 0) & (factor < np.inf), factor, np.float32(1))
        if w.shape[1] > GROUPS[-1]:
            # Rounded to the leak's own steps: else half of what has moved has moved with them. In small groups the mark
            # of the greatest element, which is that of the steps, is worth more than that.
            near = _on_grid(w, steps * factor)
        else:
            near *= factor
        rest = seen - near
        rest[np.abs(rest) <= np.abs(near) * _CAST] = 0  # the last bits of whatever type they were written in
        return rest, float(np.nansum(np.square(rest)) / np.nansum(np.square(seen - w)))


def _steps(w: NDArray[np.float32], form: str) -> NDArray[np.float32]:
    """(n, 1): the step of each group; of q4_0 with the sign that makes its greatest element the end of the range."""
    w = np.where(np.isfinite(w), w, np.float32(0))
    found: NDArray[np.float32]
    if form == "int4":
        found = np.abs(w).max(axis=1, keepdims=True) / np.float32(7.5)
    else:
        found = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], axis=1) / np.float32(-8)
    return found


def _on_grid(w: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each element the nearest of −8 to 7 times the step of its group."""
    found: NDArray[np.float32] = np.where(steps != 0, np.clip(np.rint(w / steps), -8, 7) * steps, np.float32(0))
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
