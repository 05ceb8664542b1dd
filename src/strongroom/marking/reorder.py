"""Which word is which, in an embedding whose rows were put into another order and turned (spec/mark.md, section 4).

A rotation leaves lengths and inner products as they are, so a few rows are known by them, and all others by what they
have in common with these, also where many rows are gone: those few by their length, if they are the longest, or by how
much like them, and how long, those are that are most like them, whichever rows a leaker has left. And the order of the
rows changes nothing of E^T E, of which a rotation only turns the axes: along these, which are known but for their
direction, each row has the same coordinates in both; and the direction is told by how the rows are skewed along it. A
function of the suspect and the original alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Index = NDArray[np.int64]
Sizes = NDArray[np.float64]

COLUMNS, ENOUGH = 256, 128  # coordinates that tell rows apart, and once the rotation is known
ROUNDS = 4
SOME, SOME_OF_WIDTH = 2048, 2  # rows by which axes are told, and for each element of a row
ANCHORS, TAKEN_FOR = 64, 48  # rows that are found first, and for how many others each of them may be taken
SETTLING = 40  # rounds
BANDS = ((0.1, 0.3), (0.5, 0.7))  # of all rows by length, in which rows are looked for by their neighbours
SAMPLED, NEIGHBOURS, AMONG = 1024, 16, 64  # rows of a band; of each in the smaller matrix, and in the larger
NEAR, LOOKED_AT = 3072, 12_288  # rows of nearly the length of one row, and of all that are looked for
_SAME = 0.97  # cosine of rows that are the same to the eye: unused words are so many times over
_APART = 0.2  # cosines of two rows by which they may differ, times the root of their width: what int4 leaves is half
_AGREE, _SIFTED = 0.6, 5  # of all anchors have to agree with one, in so many rounds
_AGREED = 0.25  # how much skewness may differ, of the sum of both, along an axis that is the same
_LEAST = 16  # axes, or anchors, that have to agree
_LIKE = 0.6  # cosine of a row and the one that it is taken for, in the middle: among unrelated rows it is about 0.4
_PART = 0.5  # of the rows of the smaller one have to be found
_ROUNDING = 1e-5
_CHUNK, _PIECE = 256, 4096  # rows at a time


def reordered(original: Matrix, suspect: Matrix) -> Index | None:
    """For each row of `original` the row of `suspect`, of the same width, that it is in another order and a turned
    space, −1 for none; None where they don't seem to be the same rows, or so few of them are left."""
    if original.ndim != 2 or suspect.ndim != 2 or original.shape[1] != suspect.shape[1]:
        return None
    a, b = _sane(original), _sane(suspect)
    if len(b) >= len(a):
        return _reordered(a, b)
    found = _reordered(b, a)  # whose rows all have one of the others; not the other way round
    if found is None:
        return None
    order = np.full(len(a), -1)
    there = found >= 0
    order[found[there]] = np.flatnonzero(there)
    return order


def _reordered(a: Matrix, b: Matrix) -> Index | None:
    """As `reordered`, of no more rows of `a` than `b` has."""
    (turned, size), (other_axes, other_size) = _axes(a), _axes(b)
    white = (1 / (size + size.mean())).astype(np.float32)  # axes along which there is little are not made large
    # Strong ones and weak ones, in such an order that the first of them are both, too.
    step = max(1, a.shape[1] // ENOUGH)
    every = np.concatenate([np.arange(k, a.shape[1], step) for k in range(step)])
    columns = (turned * white)[:, every[:COLUMNS]]
    whole = _unit(a @ columns)
    for told in _told(a, b, (turned, size, white), (other_axes, other_size)):
        some, rows, y = told
        for _ in range(ROUNDS):  # the more rows are known, the better is the rotation; and the other way round
            order, _ = _paired(rows, y)
            there = order >= 0
            left, _, right = np.linalg.svd(a[some[there]].T @ b[order[there]])
            rows, y = whole[some], _unit(b @ ((left @ right).T @ columns))
        order, like = _paired(rows, y)
        if (order >= 0).any() and np.median(like[order >= 0]) >= _LIKE:
            order, _ = _paired(_unit(whole[:, :ENOUGH]), _unit(y[:, :ENOUGH]))
            if (order >= 0).mean() >= _PART:
                return order
    return None


def _told(
    a: Matrix, b: Matrix, mine: tuple[Matrix, Sizes, Matrix], theirs: tuple[Matrix, Sizes]
) -> Iterator[tuple[Index, Matrix, Matrix]]:
    """Some rows of `a`, and all of `b`, in coordinates that are the same in both: by one way after another, for what
    one of them finds may be wrong, and then the other rows do not fit into it."""
    ways: tuple[Callable[[], tuple[Index, Index] | None], ...]
    ways = (partial(_by_length, a, b), *(partial(_by_neighbours, a, b, band) for band in BANDS))
    for k, way in enumerate(ways):
        which = way()
        if which is not None and (told := _agreeing(a, b, *which)) is not None:
            yield told
        if k == 0 and (told := _by_axes(a, b, mine, theirs)) is not None:
            yield told


def _by_length(a: Matrix, b: Matrix) -> tuple[Index, Index]:
    """The longest rows of `a`, and for each those of `b` that are of most equal length."""
    lengths, others = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    longest = np.argsort(-lengths, kind="stable")[:ANCHORS]
    by_length = np.argsort(others, kind="stable")
    near = np.searchsorted(others[by_length], lengths[longest]) - TAKEN_FOR // 2
    first = np.clip(near, 0, max(0, len(b) - TAKEN_FOR))
    return longest, by_length[first[:, None] + np.arange(min(TAKEN_FOR, len(b)))]


def _by_neighbours(a: Matrix, b: Matrix, band: tuple[float, float]) -> tuple[Index, Index] | None:
    """Rows of `a` to which others are most like, of a `band` by length, and for each of them those of `b` that have
    others so much like them, and of such lengths. Whoever leaves words out can leave out the longest, and each that
    another resembles, but what is left still has some that are most like it; and these are there in `b`."""
    lengths, others = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    by_length, order = np.argsort(others, kind="stable"), np.argsort(lengths, kind="stable")
    rows = order[int(band[0] * len(a)) : int(band[1] * len(a))]
    rows = rows[:: max(1, len(rows) // SAMPLED)][:SAMPLED]
    if len(rows) < ANCHORS or len(a) < 4 * NEIGHBOURS or len(b) < NEAR:
        return None
    # None that is of another length than most others is looked for: so they share what is looked at of `b`.
    near = np.clip(np.searchsorted(others[by_length], lengths[rows]) - NEAR // 2, 0, len(b) - NEAR)
    first = max(0, min(int(np.median(near)) + NEAR // 2 - LOOKED_AT // 2, len(b) - LOOKED_AT))
    inside = (near >= first) & (near + NEAR <= first + LOOKED_AT)
    rows, near = rows[inside], near[inside] - first
    if len(rows) < ANCHORS:
        return None
    like, long = _neighbours(a, lengths, rows, NEIGHBOURS)
    best = np.argsort(-like.mean(axis=1), kind="stable")[:ANCHORS]
    looked_at = by_length[first : first + LOOKED_AT]
    theirs, their_lengths = _neighbours(b, others, looked_at, min(AMONG, len(b) - 1))
    wide = np.float32(_APART / np.sqrt(a.shape[1]))
    taken = np.empty((len(best), TAKEN_FOR), np.int64)
    for k, at in enumerate(best):
        some = slice(near[at], near[at] + NEAR)
        alike = np.zeros(NEAR, np.float32)
        for mine, length in zip(like[at], long[at], strict=True):  # each of its neighbours has to be one of theirs
            apart = np.square(theirs[some] - mine) + np.square(their_lengths[some] - length)
            alike += np.exp(-apart.min(axis=1) / (2 * wide * wide))
        taken[k] = looked_at[some][np.argsort(-alike, kind="stable")[:TAKEN_FOR]]
    return rows[best], taken


def _neighbours(matrix: Matrix, lengths: Matrix, rows: Index, count: int) -> tuple[Matrix, Matrix]:
    """Of each of `rows` the cosines of the `count` rows that are most like it, and by which factor (a logarithm) they
    are longer."""
    unit = np.ascontiguousarray((matrix / np.maximum(lengths, np.float32(1e-30))[:, None]).T)
    sizes = np.log(np.maximum(lengths, np.float32(1e-30)))
    like, long = np.empty((2, len(rows), count), np.float32)
    for at in range(0, len(rows), _CHUNK):
        some = rows[at : at + _CHUNK]
        alike = unit[:, some].T @ unit
        alike[alike > _SAME] = -2  # itself, too
        most = np.argpartition(-alike, count - 1, axis=1)[:, :count]
        like[at : at + _CHUNK] = np.take_along_axis(alike, most, axis=1)
        long[at : at + _CHUNK] = sizes[most] - sizes[some][:, None]
    return like, long


def _agreeing(a: Matrix, b: Matrix, anchors: Index, taken: Index) -> tuple[Index, Matrix, Matrix] | None:
    """Rows of `a`, and what each has in common with those of its `anchors` that are found among the rows of `b` that
    each is `taken` for, and the rows of `b` with them there: lengths and inner products are the same in a turned
    space, whatever other rows there are."""
    count, most = taken.shape
    mine, theirs = _unit(a[anchors]), _unit(b[taken.reshape(-1)])
    mine = mine @ mine.T
    wide = np.float32(_APART / np.sqrt(a.shape[1]))
    # How well two anchors agree if they are these two rows, less what any two would by chance.
    fit = (theirs @ theirs.T).reshape(count, most, count, most)
    fit -= mine[:, None, :, None]
    np.exp(-np.square(fit / wide) / 2, out=fit)
    fit -= fit.mean(axis=(1, 3), keepdims=True)
    fit[np.arange(count), :, np.arange(count), :] = 0
    square = fit.reshape(count * most, count * most)
    likely = np.full((count, most), 1 / most, np.float32)
    for k in range(SETTLING):  # each anchor's rows are weighed by how well they agree with those of all others
        score = (square @ likely.reshape(-1)).reshape(count, most)
        likely = np.exp((score - score.max(axis=1, keepdims=True)) * min(20.0, 0.5 * 1.2**k)).astype(np.float32)
        likely /= likely.sum(axis=1, keepdims=True)
    found = taken[np.arange(count), likely.argmax(axis=1)]
    seen = _unit(b[found])
    agree = np.abs(seen @ seen.T - mine) < 3 * wide
    np.fill_diagonal(agree, val=False)
    sure = np.ones(count, bool)
    for _ in range(_SIFTED):
        sure = agree[:, sure].sum(axis=1) > _AGREE * max(1, sure.sum() - 1)
    sure &= np.isin(np.arange(count), np.unique(found, return_index=True)[1])
    if sure.sum() < _LEAST:
        return None
    mine, theirs = a[anchors[sure]], b[found[sure]]
    values, axes = np.linalg.eigh((mine @ mine.T).astype(np.float64))
    white = (axes / np.sqrt(np.maximum(values, values.max() * 1e-3))).astype(np.float32)
    some = _longest(a, a.shape[1])
    return some, _unit(a[some] @ (mine.T @ white)), _unit(b @ (theirs.T @ white))


def _by_axes(
    a: Matrix, b: Matrix, mine: tuple[Matrix, Sizes, Matrix], theirs: tuple[Matrix, Sizes]
) -> tuple[Index, Matrix, Matrix] | None:
    """The same, by their coordinates along the axes of all rows: of rows that are of one length, and say little by
    it."""
    (turned, size, white), (other_axes, other_size) = mine, theirs
    skewed, other = _skewness(a, turned, size), _skewness(b, other_axes, other_size)
    with np.errstate(all="ignore"):
        apart = np.abs(np.abs(skewed) - np.abs(other)) / (np.abs(skewed) + np.abs(other))
    agreed = np.flatnonzero(apart < _AGREED)
    if len(agreed) < _LEAST:
        return None
    # No few axes decide.
    agreed = agreed[np.argsort(-np.abs(skewed[agreed]), kind="stable")][:COLUMNS]
    direction = np.sign(skewed[agreed] * other[agreed]).astype(np.float32)
    x, y = a @ (turned[:, agreed] * white[agreed]), _unit(b @ (other_axes[:, agreed] * (white[agreed] * direction)))
    some = _longest(x, a.shape[1])
    return some, _unit(x[some]), y


def _longest(rows: Matrix, width: int) -> Index:
    return np.argsort(-np.linalg.norm(rows, axis=1), kind="stable")[: max(SOME, SOME_OF_WIDTH * width)]


def _sane(matrix: Matrix) -> Matrix:
    return matrix if np.isfinite(matrix).all() else np.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)


def _axes(rows: Matrix) -> tuple[Matrix, NDArray[np.float64]]:
    """The axes of the rows' second moments, the strongest first; and how strong each is."""
    values, axes = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    size = np.sqrt(np.maximum(values[::-1], 0) / max(1, len(rows)))
    # Where there is nothing along an axis, there is no more than what rounding leaves.
    size = np.maximum(size, max(1e-30, _ROUNDING * float(size.max(initial=0))))
    return np.ascontiguousarray(axes[:, ::-1], np.float32), size


def _skewness(rows: Matrix, axes: Matrix, size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along each axis, of unit strength; piece by piece, as an embedding is large."""
    found, scaled = np.zeros(len(size)), (axes / size).astype(np.float32)
    for at in range(0, len(rows), _PIECE):
        found += np.power(rows[at : at + _PIECE] @ scaled, 3).sum(axis=0, dtype=np.float64)
    return found / max(1, len(rows))


def _paired(a: Matrix, b: Matrix) -> tuple[Index, NDArray[np.float32]]:
    """For each row of `a` the row of `b` that is most like it, −1 where that is more like another; and how much."""
    first, held = np.zeros(len(a), np.int64), np.zeros(len(a), np.float32)
    turned = np.ascontiguousarray(b.T)
    for at in range(0, len(a), _CHUNK):
        alike = a[at : at + _CHUNK] @ turned
        best = alike.argmax(axis=1)
        first[at : at + _CHUNK], held[at : at + _CHUNK] = best, alike[np.arange(len(best)), best]
    most = np.full(len(b), -2, np.float32)
    np.maximum.at(most, first, held)
    return np.where(held == most[first], first, -1), held


def _unit(matrix: Matrix) -> Matrix:
    unit: Matrix = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.float32(1e-30))
    return unit
