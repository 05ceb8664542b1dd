"""What a leaker does to a whole model without changing what it computes, undone (spec/mark.md, section 4).

A transformer computes the same in a turned residual stream, with units and heads in another order, and with any
invertible map between two matrices that are multiplied. So a matrix W of n rows of d elements, d the residual stream,
leaves as M W diag(g) R: R one rotation for the whole model, g a norm that was folded in, M made of blocks that mix a
unit, a rotary plane or a head, in any order. R is known from the embedding, whose rows are words; what is left is
least squares against the original.

How much is fitted: R has d² / 2 degrees of freedom, and the embedding tens of times as many elements; g has d of n d
elements; M has s of each d, s the rows that are mixed (1, 2, or those of a head: 64 of 576 in the smallest models, 128
of 4,096 in others). A mark loses that share of its strength and no more. All are functions of the suspect and the
original alone, and what is chosen is chosen by how well it fits the original, never by anybody's score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.align import cosine

Matrix = NDArray[np.float32]
Index = NDArray[np.int64]

LIKENESS = 0.25  # share of a matrix's energy that has to be explained, above what chance explains
_SURE = 0.9  # share that no other way of reading a matrix will better
_GRAM = 0.7  # cosine of the inner products of some rows: those of unrelated rows are about 0
_SIMPLE = 0.03  # share that a mixture of more rows has to explain more than one of fewer
_SAMPLED = 64  # rows of the original by which a mixture is told from another
_COLUMNS = 256  # enough of them to tell rows apart
_HEADS = (64, 128, 32, 96, 80, 256)  # sizes of heads, where nothing is known of them
_FLOOR = 1.0  # times a mean column's energy: columns below it are not made as large as the others
_LOUD = 10.0  # times the noise of the column in the middle: columns beyond it say nothing
_AUDIBLE = 1e-3  # of a column's energy; a stamp and layer 1 together are a fifteenth of it
_ATTENTION = 3  # times as many rows as the residual stream is wide: no matrix with heads has more
_NARROW = 4  # times as long as it is wide is a factor of an adapter
_ROUNDS = 6
_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Turn:
    """The residual stream of a suspect beside that of the original: an orthogonal matrix, or None for the same, and the
    share of the embedding that it explains."""

    width: int
    matrix: Matrix | None = None
    what: str = ""
    share: float = 0.0

    def back(self, rows: Matrix) -> Matrix:
        """float32 (n, width): rows of a suspect, as they were in the original's residual stream."""
        if self.matrix is None:
            return rows
        turned: Matrix = rows @ self.matrix.T
        return turned


def facing(array: Matrix, width: int) -> list[tuple[bool, Matrix]]:
    """`array` (two dimensions or more) as rows of `width` elements along the residual stream, in each way that it can
    be: as it lies, and (True) with its last two dimensions swapped."""
    swaps = [(False, array), (True, array.swapaxes(-1, -2))] if array.ndim > 1 else []
    return [(swapped, each.reshape(-1, width)) for swapped, each in swaps if each.shape[-1] == width]


def same_rows(original: Matrix, suspect: Matrix) -> bool:
    """Whether some rows are the same but for a rotation: it leaves their inner products as they are."""
    a, b = (_sane(rows) @ _sane(rows).T for rows in (original, suspect))
    apart = ~np.eye(len(a), dtype=bool)
    # Less their means: rows with something in common are alike in any two models.
    x, y = a[apart] - a[apart].mean(), b[apart] - b[apart].mean()
    return len(a) >= 16 and cosine(x, y) >= _GRAM


def turn(pieces: Iterable[tuple[Matrix, Matrix]], width: int) -> Turn | None:
    """How the residual stream was turned, from rows of the original's embedding and the same of the suspect's
    (orthogonal Procrustes); None where no rotation makes them alike."""
    along = np.zeros((width, width))
    sizes = np.zeros(2)
    for original, suspect in pieces:
        a, b = _sane(original), _sane(suspect)
        along += a.T @ b
        sizes += float(np.square(a, dtype=np.float64).sum()), float(np.square(b, dtype=np.float64).sum())
    size = float(np.sqrt(sizes.prod()))
    if not 0 < size < np.inf:
        return None
    left, strengths, right = np.linalg.svd(along)
    share = float(strengths.sum() / size) ** 2
    if share < LIKENESS:
        return None
    if np.trace(along) > 0 and 1 - share > 0.7 * (1 - float(np.trace(along) / size) ** 2):
        return Turn(width, share=share)  # it explains little that would not be explained without it
    found = np.asarray(left @ right, np.float32)
    near = np.rint(found)
    if (np.abs(near).sum(axis=0) == 1).all() and (np.abs(near).sum(axis=1) == 1).all():
        return Turn(width, near, "residual stream permuted", share)
    return Turn(width, found, "residual stream rotated", share)


@dataclass(frozen=True, eq=False)
class Mixture:
    """How rows of the original lie in a suspect's, both along the same residual stream."""

    ours: Index  # (groups, s): rows of the original
    theirs: Index  # (groups, s): rows of the suspect that hold what those hold, −1 for none
    weights: Matrix  # (groups, s, as many as there are): of the suspect's rows, made orthonormal
    factors: Matrix  # (d,): what each column was multiplied by; NaN where nothing can be seen any more
    share: float  # of the original's energy that is explained, less what chance explains
    found: tuple[str, ...]  # what was done, in words
    rest: Matrix | None = None  # what the suspect has lost, as the original has it: nothing is seen there

    def apply(self, rows: Matrix) -> Matrix:
        """float32 of the original's shape: the suspect's rows unmixed, NaN where there are none."""
        out = np.full((self.ours.size, rows.shape[1]), np.nan, np.float32)
        there = self.theirs[:, 0] >= 0
        out[self.ours[there]] = _made(self.weights[there], _bases(_sane(rows), self.theirs[there])) / self.factors
        return out if self.rest is None else out + self.rest


@dataclass(frozen=True, eq=False)
class Undone:
    """What brings one tensor of a suspect into the form of the original's, whatever the dimensions of both."""

    turn: Turn
    shape: tuple[int, ...]
    swapped: bool
    their_shape: tuple[int, ...]
    their_swapped: bool
    share: float
    mixture: Mixture | None = None  # None: rows are whole, and `turn.back` of some of them is all there is
    rows: Index | None = None  # then, where each row of the original is, −1 for none; None: in its place
    in_place: bool = False

    def apply(self, suspect: Matrix) -> Matrix:
        """float32: as rows of the original's last dimension, NaN where there is nothing."""
        array = suspect.reshape(self.their_shape)
        array = array.swapaxes(-1, -2) if self.their_swapped else array
        rows = self.turn.back(array.reshape(-1, self.turn.width))
        rows = self.mixture.apply(rows) if self.mixture is not None else rows
        if self.rows is not None:
            rows = np.where((self.rows >= 0)[:, None], rows[np.maximum(self.rows, 0)], np.float32(np.nan))
        if self.swapped:
            *first, a, b = self.shape
            rows = rows.reshape(*first, b, a).swapaxes(-1, -2)
        return np.ascontiguousarray(rows.reshape(-1, self.shape[-1]))

    @property
    def found(self) -> tuple[str, ...]:
        """What was done to the tensor, in words."""
        mixed = self.mixture.found if self.mixture is not None else ()
        moved = "rows permuted" if self.rows is not None else ""
        return tuple(each for each in (self.turn.what, moved, *mixed) if each)


def undo(
    original: Matrix, suspect: Matrix, known: Turn, heads: Sequence[int] = (), norms: Sequence[Matrix] = ()
) -> Undone | None:
    """How a suspect's tensor comes from an original one, both of two dimensions or more; None where it does not.
    `heads` and `norms` as in `unmix`."""
    best: Undone | None = None
    for swapped, ours in facing(original, known.width):
        for their_swapped, theirs in facing(suspect, known.width):
            if best is not None and best.share > _SURE:  # of square matrices either way may be right
                break
            found = unmix(ours, known.back(theirs), heads, norms)
            if found is not None and (best is None or found.share > best.share):
                best = Undone(known, original.shape, swapped, suspect.shape, their_swapped, found.share, found)
    return best


def refactored(original: Matrix, suspect: Matrix) -> Undone | None:
    """How one factor of an adapter's product comes from an original one, where another was factored, to the same rank
    or another: its rows span what the original's do, or, where ranks were cut off, a part of it. None where they do
    not, and of matrices that are not narrow."""
    if original.ndim != 2 or suspect.ndim != 2:
        return None
    narrow, width = min(original.shape), max(original.shape)
    if width not in suspect.shape:
        return None
    swapped, turned = original.shape[1] == narrow, suspect.shape[1] != width
    if suspect.shape == original.shape:
        turned = swapped
    a, b = _sane(original.T if swapped else original), _sane(suspect.T if turned else suspect)
    if _NARROW * max(len(a), len(b)) > width or not (a.any() and b.any()):
        return None
    ours, theirs = np.arange(len(a))[None, :], np.arange(len(b))[None, :]
    bases = _bases(b, theirs)
    rest, found = None, ["factored again"]
    if len(b) < len(a):
        found.append("ranks cut off")
        inverse = np.linalg.pinv(a.astype(np.float64))
        mixed = bases[0] @ inverse  # how the suspect's rows are made of the original's
        held = float(np.square(mixed @ a).sum() / np.square(bases[0], dtype=np.float64).sum())
        share = _beyond(held, len(a), width)
        back = np.linalg.pinv(mixed)
        weights = np.asarray(back[None], np.float32)
        rest = np.asarray(a - back @ (mixed @ a), np.float32)
    else:
        weights = np.asarray(a[None] @ bases.transpose(0, 2, 1), np.float32)
        held = float(np.square(weights, dtype=np.float64).sum() / np.square(a, dtype=np.float64).sum())
        share = _beyond(held, len(b), width)
    if share < LIKENESS:
        return None
    mixture = Mixture(ours, theirs, weights, np.ones(width, np.float32), share, tuple(found), rest)
    return Undone(Turn(width), original.shape, swapped, suspect.shape, turned, share, mixture)


def profile(rows: Matrix) -> Matrix:
    """float32 (d,): where along the residual stream a matrix is strong, which changes little when rows are mixed."""
    found = np.log(np.square(_sane(rows)).sum(axis=0) + 1e-30)
    return np.asarray(found - found.mean(), np.float32)


def unmix(original: Matrix, rows: Matrix, heads: Sequence[int] = (), norms: Sequence[Matrix] = ()) -> Mixture | None:
    """How `original` (n, d) lies in a suspect's `rows` (m, d), which are along the same residual stream already; None
    where it does not seem to. `heads`: how many rows a head may have; `norms` (d,): what may have been folded in."""
    original, rows = _sane(original), _sane(rows)
    if not (original.any() and rows.any()):
        return None
    # No few columns decide; and those that were made small are not made large, for they are noise by now.
    column = np.square(rows).mean(axis=0)
    white = (1 / np.sqrt(column + _FLOOR * column.mean() + 1e-30)).astype(np.float32)
    starts = (np.ones(original.shape[1], np.float32), _ratio(original, rows), *norms)
    best: tuple[float, str, Index, Index, Matrix] | None = None
    for name, ours, theirs in _groupings(original, rows, heads):
        if best is not None and best[0] > 1 - _SIMPLE:
            break
        pick = ours[:: max(1, ours.size // _SAMPLED)]
        here = pick if name == "in place" else theirs
        width = _seen(original, ours).shape[1]
        bases = _bases(_seen(rows * white, ours), here)
        for factors in starts:
            held = _energies(_seen(original * (factors * white), ours), bases, pick)
            most = np.diag(held) if name == "in place" else held.max(axis=1)
            share = _beyond(float(most.mean()), ours.shape[1], width)
            if best is None or share > best[0] + (_SIMPLE if ours.shape[1] > best[2].shape[1] else 0):
                best = (share, name, ours, theirs, factors)
    if best is None or best[0] < LIKENESS:
        return None
    _, name, ours, theirs, factors = best
    if name != "in place":
        theirs = _matched(original * (factors * white), rows * white, ours, theirs)
    return _fitted(original, rows, ours, theirs, factors)


def _groupings(original: Matrix, rows: Matrix, heads: Sequence[int]) -> Iterator[tuple[str, Index, Index]]:
    """Which rows may have been mixed with which: of the original, and of the suspect."""
    n, m, width = len(original), len(rows), original.shape[1]
    if n == m:
        yield "in place", np.arange(n)[:, None], np.arange(m)[:, None]
    yield "units", np.arange(n)[:, None], np.arange(m)[:, None]
    sizes = [size for size in heads or _HEADS if not (n % size or m % size or size % 2) and size <= width // 2]
    if max(n, m) > _ATTENTION * width or not sizes:
        return
    # A plane is a row of each half of a head (transformers), or each two rows (llama.cpp).
    pairs = [np.arange(count).reshape(-1, 2) for count in (n, m)]
    for size in sizes:
        yield "planes", _planes(n, size), _planes(m, size)
        yield "planes", _planes(n, size), pairs[1]
        yield "planes", pairs[0], _planes(m, size)
    yield "planes", pairs[0], pairs[1]
    for size in sizes:
        yield "heads", np.arange(n).reshape(-1, size), np.arange(m).reshape(-1, size)


def _planes(n: int, size: int) -> Index:
    return np.arange(n).reshape(-1, 2, size // 2).transpose(0, 2, 1).reshape(-1, 2)


def _bases(rows: Matrix, groups: Index) -> Matrix:
    """float32 (groups, s, d): an orthonormal base of what each group of rows spans."""
    picked = rows[groups]
    if groups.shape[1] == 1:
        size = np.linalg.norm(picked, axis=2, keepdims=True)
        unit: Matrix = picked / np.maximum(size, np.float32(1e-30))
        return unit
    # Cholesky rather than QR: it is no slower on a busy machine, and what little noise changes it changes little.
    exact = picked.astype(np.float64)
    gram = exact @ exact.transpose(0, 2, 1)
    gram += (1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] + 1e-30) * np.eye(groups.shape[1])
    return np.asarray(np.linalg.solve(np.linalg.cholesky(gram), exact), np.float32)


def _made(weights: Matrix, bases: Matrix) -> Matrix:
    made: Matrix = weights * bases if bases.shape[1] == 1 else weights @ bases
    return made


def _energies(original: Matrix, bases: Matrix, ours: Index) -> Matrix:
    """float32 (ours, theirs): the share of each group of the original that each base holds."""
    picked = original[ours]
    count, size, width = picked.shape
    along = np.square(picked.reshape(-1, width) @ bases.reshape(-1, width).T)
    power = np.square(picked).sum(axis=(1, 2))[:, None]
    held: Matrix = along.reshape(count, size, len(bases), size).sum(axis=(1, 3)) / np.maximum(power, 1e-30)
    return held


def _seen(rows: Matrix, groups: Index) -> Matrix:
    """Enough of the columns to tell groups apart."""
    step = max(1, rows.shape[1] // max(_COLUMNS, 8 * groups.shape[1]))
    return np.ascontiguousarray(rows[:, ::step])


def _beyond(share: float, size: int, width: int) -> float:
    """A share that is explained, less what any `size` rows of `width` elements explain of any other."""
    return (share - size / width) / (1 - size / width)


def _matched(original: Matrix, rows: Matrix, ours: Index, theirs: Index) -> Index:
    """Of the suspect's groups the one that holds each of the original's, −1 where none does."""
    a, bases = _seen(original, ours), _bases(_seen(rows, ours), theirs)
    first, held = np.zeros(len(ours), np.int64), np.zeros(len(ours))
    step = max(1, _CHUNK // ours.shape[1])
    for at in range(0, len(ours), step):
        found = _energies(a, bases, ours[at : at + step])
        first[at : at + step], held[at : at + step] = found.argmax(axis=1), found.max(axis=1)
    order = np.full(ours.shape, -1, np.int64)
    free = np.ones(len(theirs), bool)
    for k in np.argsort(-held):
        if free[first[k]]:  # the most alike have the first choice
            order[k], free[first[k]] = theirs[first[k]], False
    return order


def _fitted(original: Matrix, rows: Matrix, ours: Index, theirs: Index, factors: Matrix) -> Mixture:
    """The least squares: what of the suspect's groups makes the original's, and what each column was multiplied by
    unless that explains little. Noise is as strong in every column of the suspect's, so it is fitted there."""
    there = theirs[:, 0] >= 0
    wanted, bases = original[ours[there]], _bases(rows, theirs[there])
    power = np.square(wanted).sum(axis=(0, 1), dtype=np.float64)
    flat = np.ones_like(factors)

    def fit(factors: Matrix) -> tuple[Matrix, Matrix, float]:
        weights = np.asarray((wanted * factors) @ bases.transpose(0, 2, 1), np.float32)
        made = _made(weights, bases)
        held = np.square(weights, dtype=np.float64).sum() / max(float((power * np.square(factors)).sum()), 1e-30)
        return weights, made, _beyond(float(held), ours.shape[1], original.shape[1])

    plain, scaled = fit(flat), fit(factors)
    for _ in range(_ROUNDS):  # either is known the better, the better the other is
        along = (scaled[1] * wanted).sum(axis=(0, 1), dtype=np.float64)
        factors = np.divide(along, power, out=np.ones_like(along), where=power > 0).astype(np.float32)
        scaled = fit(factors)
    folded = 1 - scaled[2] < 0.8 * (1 - plain[2]) and scaled[2] > plain[2] + 1e-4
    weights, made, share = scaled if folded else plain
    factors = np.asarray(np.where(factors != 0, factors, np.nan) if folded else flat, np.float32)
    noise = np.nan_to_num(np.square(made / factors - wanted).mean(axis=(0, 1)), nan=np.inf)
    relative = noise / np.maximum(power / max(1, wanted.shape[0] * wanted.shape[1]), 1e-30)
    # A mark is never as strong as `_AUDIBLE`: where there is no other noise, it is what is heard.
    loud = (noise > _LOUD * np.median(noise)) & (relative > np.maximum(_LOUD * np.median(relative), _AUDIBLE))
    factors = np.asarray(np.where(loud, np.nan, factors), np.float32)
    every = np.zeros((len(ours), *weights.shape[1:]), np.float32)
    every[there] = weights
    return Mixture(ours, theirs, every, factors, share, _words(rows, theirs[there], weights, folded=folded))


def _words(rows: Matrix, theirs: Index, weights: Matrix, *, folded: bool) -> tuple[str, ...]:
    size = theirs.shape[1]
    said = ["rotary planes turned"] if size == 2 else ["heads mixed"] if size > 2 else []
    if (np.diff(theirs[:, 0]) < 0).any():
        said.append("units permuted" if size == 1 else "heads permuted")
    if size == 1:
        scales = np.abs(weights[:, 0, 0]) / np.maximum(np.linalg.norm(rows[theirs[:, 0]], axis=1), 1e-30)
        low, high = np.quantile(scales, (0.1, 0.9))
        said += ["units rescaled"] if high > 1.2 * low else []
    return (*said, "norms folded") if folded else tuple(said)


def _ratio(original: Matrix, rows: Matrix) -> Matrix:
    """float32 (d,): what each column was multiplied by, as its norm says, which no order of the rows changes."""
    mine, theirs = np.linalg.norm(original, axis=0), np.linalg.norm(rows, axis=0)
    ratio = np.where((mine > 0) & (theirs > 0), theirs / np.maximum(mine, 1e-30), 1)
    return np.asarray(ratio / np.maximum(np.sqrt(np.square(ratio).mean()), 1e-30), np.float32)


def _sane(matrix: Matrix) -> Matrix:
    return matrix if np.isfinite(matrix).all() else np.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
