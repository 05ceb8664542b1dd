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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.align import cosine

Matrix = NDArray[np.float32]
Index = NDArray[np.int64]

LIKENESS = 0.25  # share of a matrix's energy that has to be explained, above what chance explains
_GRAM = 0.7  # cosine of the inner products of some rows: those of unrelated rows are about 0
_STILL = 0.999  # cosine from which a rotation is none
_SIMPLE = 0.03  # share that a mixture of more rows has to explain more than one of fewer
_SAMPLED = 64  # rows of the original by which a mixture is told from another
_COLUMNS = 256  # enough of them to tell rows apart
_HEADS = (64, 128, 32, 96, 80, 256)  # sizes of heads, where nothing is known of them
_ATTENTION = 3  # times as many rows as the residual stream is wide: no matrix with heads has more
_ROUNDS = 6
_CHUNK = 2048


@dataclass(frozen=True, eq=False)
class Turn:
    """The residual stream of a suspect beside that of the original: an orthogonal matrix, or None for the same."""

    width: int
    matrix: Matrix | None = None
    what: str = ""

    def back(self, rows: Matrix) -> Matrix:
        """float32 (n, width): rows of a suspect, as they were in the original's residual stream."""
        if self.matrix is None:
            return rows
        turned: Matrix = rows @ self.matrix.T
        return turned


def facing(array: Matrix, width: int) -> list[Matrix]:
    """`array` (two dimensions or more) as rows of `width` elements along the residual stream, in each way that it can
    be: as it lies, and with its last two dimensions swapped."""
    found = []
    for turned in (array, array.swapaxes(-1, -2)):
        if turned.shape[-1] == width:
            found.append(turned.reshape(-1, width))
    return found


def same_rows(original: Matrix, suspect: Matrix) -> bool:
    """Whether some rows are the same but for a rotation: it leaves their inner products as they are."""
    a, b = _sane(original) @ _sane(original).T, _sane(suspect) @ _sane(suspect).T
    apart = ~np.eye(len(a), dtype=bool)
    # Less their means: rows with something in common are alike in any two models.
    x, y = a[apart] - a[apart].mean(), b[apart] - b[apart].mean()
    return len(a) >= 16 and cosine(x, y) >= _GRAM


def turn(pieces: Iterable[tuple[Matrix, Matrix]], width: int) -> Turn | None:
    """How the residual stream was turned, from rows of the original's embedding and the same of the suspect's
    (orthogonal Procrustes); None where no rotation makes them alike."""
    along = np.zeros((width, width))
    sizes = np.zeros(2)
    trace = 0.0
    for original, suspect in pieces:
        a, b = _sane(original), _sane(suspect)
        along += a.T @ b
        sizes += float(np.square(a, dtype=np.float64).sum()), float(np.square(b, dtype=np.float64).sum())
    size = float(np.sqrt(sizes.prod()))
    if not 0 < size < np.inf:
        return None
    left, strengths, right = np.linalg.svd(along)
    trace = float(np.trace(along)) / size
    if strengths.sum() / size < LIKENESS**0.5:
        return None
    if trace >= _STILL or trace**2 >= (strengths.sum() / size) ** 2 - 0.001:
        return Turn(width)
    found = np.asarray(left @ right, np.float32)
    near = np.rint(found)
    if (np.abs(near).sum(axis=0) == 1).all() and (np.abs(near).sum(axis=1) == 1).all():
        return Turn(width, near, "residual stream permuted")
    return Turn(width, found, "residual stream rotated")


@dataclass(frozen=True, eq=False)
class Mixture:
    """How rows of the original lie in a suspect's, both along the same residual stream."""

    what: str
    ours: Index  # (groups, s): rows of the original
    theirs: Index  # (groups, s): rows of the suspect that hold what those hold, −1 for none
    weights: Matrix  # (groups, s, s): of the suspect's rows, made orthonormal
    factors: Matrix | None  # (width,): what each column was multiplied by
    share: float  # of the original's energy that is explained, less what chance explains

    def apply(self, rows: Matrix) -> Matrix:
        """float32 of the original's shape: the suspect's rows unmixed, NaN where there are none."""
        rows = rows / self.factors if self.factors is not None else rows
        out = np.full((self.ours.size, rows.shape[1]), np.nan, np.float32)
        there = self.theirs[:, 0] >= 0
        out[self.ours[there]] = self.weights[there] @ _bases(_sane(rows), self.theirs[there])
        return out

    @property
    def found(self) -> tuple[str, ...]:
        """What was done, in words."""
        first = self.theirs[self.theirs[:, 0] >= 0, 0]
        size = self.ours.shape[1]
        names = {1: "", 2: "rotary planes turned"}
        said = [names.get(size, "heads mixed")]
        if (np.diff(first) < 0).any():
            said.append("units permuted" if size == 1 else "heads permuted")
        if size == 1:
            lengths = np.abs(self.weights[self.theirs[:, 0] >= 0, 0, 0])
            said.append("units rescaled" if self.what == "rescaled" and lengths.size else "")
        if self.factors is not None:
            said.append("norms folded")
        return tuple(each for each in said if each)


def unmix(original: Matrix, rows: Matrix, heads: Sequence[int] = ()) -> Mixture | None:
    """How `original` (n, d) lies in a suspect's `rows` (m, d), which are along the same residual stream already; None
    where it does not seem to. `heads`: how many rows a head may have."""
    original, rows = _sane(original), _sane(rows)
    flat = np.ones(original.shape[1], np.float32)
    best: tuple[float, int, str, Index, Index, Matrix] | None = None
    for name, ours, theirs in _groupings(original, rows, heads):
        size = ours.shape[1]
        if best is not None and best[0] > 1 - _SIMPLE:
            break
        pick = ours[:: max(1, ours.size // _SAMPLED)]
        for factors in (flat, _ratio(original, rows)):
            share = _shares(original, rows / factors, pick, theirs, aligned=name == "in place")
            if best is None or share > best[0] + (_SIMPLE if size > best[1] else 0):
                best = (share, size, name, ours, theirs, factors)
    if best is None or best[0] < LIKENESS:
        return None
    _, _, name, ours, theirs, factors = best
    order = theirs if name == "in place" else _matched(original, rows / factors, ours, theirs)
    plain = _fitted(name, original, rows, ours, order, None)
    scaled = _fitted(name, original, rows, ours, order, factors)
    return scaled if 1 - scaled.share < 0.9 * (1 - plain.share) else plain


def _groupings(original: Matrix, rows: Matrix, heads: Sequence[int]) -> Iterable[tuple[str, Index, Index]]:
    """Which rows may have been mixed with which: of the original, and of the suspect."""
    n, m, width = len(original), len(rows), original.shape[1]
    every = [np.arange(count)[:, None] for count in (n, m)]
    if n == m:
        yield "in place", every[0], every[1]
    yield "units", every[0], every[1]
    if max(n, m) > _ATTENTION * width:
        return
    planes = [size for size in heads or _HEADS if not n % size and not m % size]
    pairs = [(np.arange(count).reshape(-1, 2)) for count in (n, m) if not count % 2]
    for size in heads or _HEADS:
        if not n % size and not m % size and not size % 2:
            # Halves beside each other (transformers), or each pair beside each other (llama.cpp).
            yield "planes", _planes(n, size), _planes(m, size)
            yield "planes", _planes(n, size), pairs[1]
            yield "planes", pairs[0], _planes(m, size)
    if planes:
        yield "planes", pairs[0], pairs[1]
    for size in heads or _HEADS:
        if not n % size and not m % size and size <= width // 2:
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
    base: Matrix = np.linalg.qr(picked.transpose(0, 2, 1)).Q.transpose(0, 2, 1)
    return np.ascontiguousarray(base)


def _energies(original: Matrix, bases: Matrix, ours: Index) -> Matrix:
    """float32 (ours, theirs): the share of each group of the original that each base holds."""
    picked = original[ours]
    count, size, width = picked.shape
    along = np.square(picked.reshape(-1, width) @ bases.reshape(-1, width).T)
    power = np.square(picked).sum(axis=(1, 2))[:, None]
    held: Matrix = along.reshape(count, size, len(bases), size).sum(axis=(1, 3)) / np.maximum(power, 1e-30)
    return held


def _seen(original: Matrix, rows: Matrix, size: int) -> tuple[Matrix, Matrix]:
    """Both at enough of their columns."""
    step = max(1, original.shape[1] // max(_COLUMNS, 8 * size))
    return np.ascontiguousarray(original[:, ::step]), np.ascontiguousarray(rows[:, ::step])


def _shares(original: Matrix, rows: Matrix, pick: Index, theirs: Index, *, aligned: bool) -> float:
    """The share of some groups of the original that is found in the best of the suspect's, less what chance finds."""
    size = pick.shape[1]
    a, b = _seen(original, rows, size)
    if aligned:
        held = np.diag(_energies(a, _bases(b, pick), pick))
        return float(held.mean())
    held = _energies(a, _bases(b, theirs), pick).max(axis=1)
    return _beyond(float(held.mean()), size, a.shape[1])


def _beyond(share: float, size: int, width: int) -> float:
    return (share - size / width) / (1 - size / width)


def _matched(original: Matrix, rows: Matrix, ours: Index, theirs: Index) -> Index:
    """Of the suspect's groups the one that holds each of the original's, −1 where none does."""
    a, b = _seen(original, rows, ours.shape[1])
    bases = _bases(b, theirs)
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


def _fitted(name: str, original: Matrix, rows: Matrix, ours: Index, theirs: Index, factors: Matrix | None) -> Mixture:
    """The least squares: what of the suspect's groups makes the original's, and what each column was multiplied by."""
    there = theirs[:, 0] >= 0
    wanted = original[ours[there]]
    weights = np.zeros((len(ours), ours.shape[1], ours.shape[1]), np.float32)
    for _ in range(_ROUNDS if factors is not None else 1):  # either is known the better, the better the other is
        bases = _bases(rows / factors if factors is not None else rows, theirs[there])
        weights[there] = wanted @ bases.transpose(0, 2, 1)
        made = weights[there] @ bases
        if factors is not None:
            along = np.einsum("gsd,gsd->d", made, wanted, dtype=np.float64)
            size = np.einsum("gsd,gsd->d", wanted, wanted, dtype=np.float64)
            change = np.divide(along, size, out=np.ones_like(along), where=(size > 0) & (along > 0))
            factors = np.asarray(factors * change, np.float32)
    held = float(np.square(weights, dtype=np.float64).sum()) / max(float(np.square(original).sum()), 1e-30)
    share = _beyond(held, ours.shape[1], original.shape[1])
    return Mixture(name, ours, theirs, weights, factors, share)


def _ratio(original: Matrix, rows: Matrix) -> Matrix:
    """float32 (d,): what each column was multiplied by, as its norm says, which no order of the rows changes."""
    mine, theirs = np.linalg.norm(original, axis=0), np.linalg.norm(rows, axis=0)
    return np.asarray(np.where((mine > 0) & (theirs > 0), theirs / np.maximum(mine, 1e-30), 1), np.float32)


def _sane(matrix: Matrix) -> Matrix:
    return np.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
