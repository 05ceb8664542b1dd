"""A quantiser's rounding, taken out of a leak (spec/mark.md, section 5).

Most of what a file quantised to few bits differs by is rounding, which the original rounded alike does not differ by:
what is left are the few elements that a mark moved across the border of two levels.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.elements import ulps

GROUPS = (128, 64, 32)  # elements that share their levels, in the usual quantisers
_LEVELS = 20  # more levels than this in a group, on the average, are no quantiser's of few bits, unless they are even
_JUDGED = 64  # groups by which that is judged
_FORMS = (("int4", 128), ("int4", 64), ("int4", 32), ("q4_0", 32))  # of copies, and the elements of their groups
_OURS = (
    0.33  # what may be left of a leak in a form of ours, with which another quantiser's rounding has little in common
)
_CAST = np.float32(2.0**-8)
_LESS = 0.25  # of what is left of it otherwise, what may be left where a quantiser is taken to have been at work
_LESS_EVEN = 0.5  # the same of even levels, which nothing else leaves
_EVEN = np.float32(0.1)  # of a step: as far as a cast moves a level
_APART = np.float32(0.01)  # of a group's range: what is closer is one level
_REACH = 0.3  # see `_rest`, as of the next
_MOVED = 0.7  # half of what is worked out there: weights with outliers move more of those that say more
SEED = 256  # elements of the original that say which groups are looked at


def coarse(original: NDArray[np.float32], leak: NDArray[np.float32], first: int) -> bool:
    """Whether `unrounded` may find levels: a few of the smallest groups tell, as a larger group has no fewer levels
    than its parts. Flat, as there; of the original the first `SEED` elements are enough."""
    seen = _groups(leak, first, GROUPS[-1])
    some = seen[_chosen(original, len(seen))]
    return len(some) > 0 and bool(_levels(_there(some)).mean() <= _LEVELS + 2)


def unrounded(original: NDArray[np.float32], leak: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The leak as it would be without rounding: original + leak − Q(original), where Q rounds to the levels that the
    leak itself has in each group; the leak as it is where it has no levels.

    Both flat and of one length, of a run of elements of which the first is the tensor's element `first`."""
    for form, group in _FORMS:
        if (found := _reformed(original, leak, first, form, group)) is not None:
            return found
    group = min(GROUPS, key=lambda each: _rest(*_some(original, leak, first, each)).share)
    rest = _rest(_groups(original, first, group), _groups(leak, first, group))
    if not rest.there or rest.share >= _LESS + (_LESS_EVEN - _LESS) * rest.even:
        return leak
    found = leak.copy()
    _groups(found, first, group)[:] = rest.without
    return found


class _Rest(NamedTuple):
    """A leak's groups without a quantiser's rounding; the share of the squares of their differences from the original
    that is left then; the share of groups whose levels are even; and whether enough elements could have moved."""

    without: NDArray[np.float32]
    share: float
    even: float
    there: bool


def _rest(w: NDArray[np.float32], seen: NDArray[np.float32]) -> _Rest:
    if not seen.size:
        return _Rest(seen, 1.0, 0.0, False)
    with np.errstate(all="ignore"):
        number, absent = np.isfinite(w), ~np.isfinite(seen)
        # An element that is absent must not undo this for its group, let alone for others: it stays absent, and is
        # taken for the least that is there, which is a level.
        least = np.where(absent, np.float32(np.inf), seen).min(axis=1, keepdims=True)
        levels = np.where(absent, np.where(np.isfinite(least), least, np.float32(0)), seen)
        rounding = _rounding(np.sort(levels, axis=1), w)
        plain, rest = np.where(number, seen - w, np.float32(np.nan)), seen - rounding.near
        rest[np.abs(rest) <= rounding.blur] = 0
        rest = np.where(rounding.known[:, None], rest, plain)
        steps = np.where(number, ulps(w), np.float32(0))
        # Levels that are not even may be a leaker's own doing, who has made some neighbours equal: then Q(w) is what
        # his copy says, and nothing is left of it. They are believed where as many elements have moved as say more than
        # the leak does as it is: of one holder about 4 / 3 for each, and 2 u² / x² for each of all elements.
        odd = rounding.known & ~rounding.even
        moved = np.count_nonzero(np.nan_to_num(rest[odd]))
        if moved * _power(plain[odd]) < _MOVED * rest[odd].size * _power(steps[odd]):
            rest[odd] = plain[odd]
        power = _power(plain)
        share = _power(rest) / power if power > 0 else 1.0
        # An original that lay on even levels itself is moved across no border, and what a mark did to the levels is all
        # that there is. Of eight holders together the leak as it is says less than of one by more than what is left
        # does: that is preferred already where a fifth as much could have moved.
        there = bool(np.count_nonzero(rounding.border < steps) * power >= _REACH * w.size * _power(steps))
        return _Rest(np.where(number, w + rest, seen), share, float(rounding.even.mean()), there)


def _power(x: NDArray[np.float32]) -> float:
    return float(np.nansum(np.square(x)))


class _Rounding(NamedTuple):
    """What of groups of the original a quantiser makes: for each element the level that is nearest, how far it is from
    the border to the next, and what a level is unsure by; for each group whether its levels are known at all, and
    whether they are even."""

    near: NDArray[np.float32]
    border: NDArray[np.float32]
    blur: NDArray[np.float32]
    known: NDArray[np.bool_]
    even: NDArray[np.bool_]


def _rounding(there: NDArray[np.float32], w: NDArray[np.float32]) -> _Rounding:
    """Of sorted rows of the leak, which has all or most of the levels, and the same rows of the original."""
    near, border = _nearest(there, w)
    lowest, step, even = _even(there)
    at = (np.clip(w, there[:, :1], there[:, -1:]) - lowest) / step
    level = np.rint(at)
    on = even[:, None]
    known = np.isfinite(w).all(axis=1) & (even | (_levels(there) <= _LEVELS))
    return _Rounding(
        np.where(on, lowest + step * level, near),
        np.where(on, step * (np.float32(0.5) - np.abs(at - level)), border),
        np.where(on, step * _EVEN, np.float32(0)),
        known,
        even,
    )


def _even(there: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """(n, 1) each: of sorted rows the lowest level and the step of even ones, of which a row may lack some; and (n,)
    whether all of a row lies on them."""
    gaps, span = np.diff(there, axis=1), there[:, -1:] - there[:, :1]
    least = np.where(gaps > span * _APART, gaps, np.float32(np.inf)).min(axis=1, keepdims=True)
    level = np.zeros_like(there)
    np.cumsum(np.rint(gaps / least), axis=1, out=level[:, 1:])
    # A cast has moved each level a little: all of them together say best where they lie.
    centre, mean = level.mean(axis=1, keepdims=True), there.mean(axis=1, keepdims=True)
    off = level - centre
    step = (off * (there - mean)).sum(axis=1, keepdims=True) / np.square(off).sum(axis=1, keepdims=True)
    lowest = mean - centre * step
    far = np.abs(there - lowest - level * step).max(axis=1)
    return lowest, step, (far < _EVEN * step[:, 0]) & (level[:, -1] > 3)  # what has fewer levels is even by chance


def _groups(flat: NDArray[np.float32], first: int, group: int) -> NDArray[np.float32]:
    """(n, group), a view: the whole groups of a run of elements that begins at the tensor's element `first`."""
    skip = -first % group
    count = max(0, (flat.size - skip) // group)
    return flat[skip : skip + count * group].reshape(count, group)


def _some(
    original: NDArray[np.float32], leak: NDArray[np.float32], first: int, group: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The original's and the leak's groups, a few of them, by which it is judged: which, only who has the original to
    the bit knows, so that no leaker makes just these look like something else."""
    w, seen = _groups(original, first, group), _groups(leak, first, group)
    chosen = _chosen(original, len(w))
    return w[chosen], seen[chosen]


def _chosen(original: NDArray[np.float32], count: int) -> Any:
    """Which of `count` groups are looked at."""
    if count <= _JUDGED:
        return slice(None)
    return np.random.default_rng(zlib.crc32(original[:SEED].tobytes())).integers(0, count, _JUDGED)


def _reformed(
    original: NDArray[np.float32], leak: NDArray[np.float32], first: int, form: str, group: int
) -> NDArray[np.float32] | None:
    """As `unrounded`, where Q is the quantiser of a form in which copies leave, and a factor for each group that fits
    the leak; None where the leak is not of that form."""
    w, seen = _groups(original, first, group), _groups(leak, first, group)
    if not len(seen) or _left(*_some(original, leak, first, group), form)[1] >= _OURS:
        return None
    rest, share = _left(w, seen, form)
    if share >= _OURS:
        return None
    found = leak.copy()
    _groups(found, first, group)[:] = w + rest
    return found


def _left(w: NDArray[np.float32], seen: NDArray[np.float32], form: str) -> tuple[NDArray[np.float32], float]:
    """What is left of a leak without what the original is in a form, times the factor that most elements of a group
    have in common; and its share of what is left without the original."""
    with np.errstate(all="ignore"):
        steps = _steps(w, form)
        near = _on_grid(w, steps)
        ratios = np.sort(np.where(near != 0, seen / near, np.float32(np.nan)), axis=1)  # what is no number comes last
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


def _nearest(levels: NDArray[np.float32], w: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each row of sorted `levels` those nearest to the elements of the same row of `w`, and how far the border is at
    which another would be."""
    most = np.maximum(np.abs(levels).max(axis=1, keepdims=True), np.abs(w).max(axis=1, keepdims=True))
    # One search for all rows: each in an interval of its own.
    shift = np.arange(len(levels), dtype=np.float64)[:, None] * 4
    scale = np.where(most > 0, most, 1).astype(np.float64)
    at = np.searchsorted((levels / scale + shift).reshape(-1), (w / scale + shift).reshape(-1)).reshape(w.shape)
    begin = np.arange(len(levels))[:, None] * levels.shape[1]
    above = np.clip(at - begin, 0, levels.shape[1] - 1)
    below = np.maximum(above - 1, 0)
    high, low = np.take_along_axis(levels, above, axis=1), np.take_along_axis(levels, below, axis=1)
    over = (high - w) - (w - low)
    nearest: NDArray[np.float32] = np.where(over < 0, high, low)
    return nearest, np.multiply(np.abs(over), 0.5, dtype=np.float32)
