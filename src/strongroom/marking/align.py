"""How a suspect's matrix became what it is, undone (spec/mark.md, section 4): transposed, permuted, rescaled, cut.

Functions of the suspect and the original alone: nothing here knows a code word or a stamp, so nothing found here can
make an innocent more likely to be named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strongroom.formats.gguf import LLAMA_NAMES

Matrix = NDArray[np.float32]
Index = NDArray[np.int64]

ALIKE = 0.3  # cosine: an unrelated matrix of 4,096 elements is beyond it about once in 10^80
_CERTAIN = 0.5
_FEW = 64  # rows: of so few it is not enough that they are alike
_STEADY = 0.3  # the least cosine of the differences along two rows: of white rows as of themselves, of ramps none
_LARGEST = 8192  # rows or columns that a permutation is looked for in
_ROUNDS = 12
_GAIN = 0.01  # in cosine, that a round has to bring
_WORTH = 0.95  # of the residual that has to be left for a rescaling to be taken as one
_PASSES = 3
_PEAKS = 12


@dataclass(frozen=True, eq=False)
class Fit:
    """Where each row and column of the original is in the suspect's matrix: −1 where it is not; None where all are in
    place."""

    transposed: bool = False
    rows: Index | None = None
    columns: Index | None = None

    def apply(self, suspect: Matrix) -> Matrix:
        """float32 of the original's shape: the suspect's elements in the original's places, NaN where there is none."""
        found = suspect.T if self.transposed else suspect
        if self.rows is not None:
            found = _picked(found, self.rows)
        if self.columns is not None:
            found = _picked(found.T, self.columns).T
        return np.ascontiguousarray(found)

    @property
    def in_place(self) -> bool:
        return not self.transposed and self.rows is None and self.columns is None

    @property
    def found(self) -> tuple[str, ...]:
        """What was done to the matrix, in words."""
        names = ["transposed"] if self.transposed else []
        for what, index in (("rows", self.rows), ("columns", self.columns)):
            if index is not None:
                if (index < 0).any():
                    names.append(f"{what} missing")
                kept = index[index >= 0]
                if len(kept) and (np.diff(kept) < 0).any():
                    names.append(f"{what} permuted")
        return tuple(names)


def _picked(matrix: Matrix, index: Index) -> Matrix:
    out = matrix[np.maximum(index, 0)]
    out[index < 0] = np.nan
    return out


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of all elements that both have; 0 where one has none."""
    x, y = a.reshape(-1), b.reshape(-1)
    with np.errstate(all="ignore"):
        along, size = float(np.dot(x, y)), float(np.linalg.norm(x)) * float(np.linalg.norm(y))
        if not (math.isfinite(along) and 1e-30 < size < math.inf):  # odd numbers, or very large or small ones
            good = np.isfinite(x) & np.isfinite(y)
            x, y = x[good].astype(np.float64), y[good].astype(np.float64)
            along, size = float(np.dot(x, y)), float(np.linalg.norm(x) * np.linalg.norm(y))
    return along / size if 0 < size < math.inf else 0.0


def solve(original: Matrix, suspect: Matrix) -> Fit | None:
    """How `suspect` comes from `original`, both with two dimensions; None where it does not seem to."""
    original, suspect = (np.nan_to_num(each, nan=0.0, posinf=0.0, neginf=0.0) for each in (original, suspect))
    for transposed in (False, True):
        turned = suspect.T if transposed else suspect
        if turned.shape == original.shape and cosine(original, turned) >= ALIKE:
            return Fit(transposed)
    for transposed in (False, True):
        turned = suspect.T if transposed else suspect
        fit = _cut(original, turned) or _permuted(original, turned)
        if fit is not None:
            return Fit(transposed, fit.rows, fit.columns)
    return None


def _cut(original: Matrix, suspect: Matrix) -> Fit | None:
    """One side in place, on the other some are missing or moved."""
    if suspect.shape[1] == original.shape[1]:
        rows = _assigned(original, suspect)
        return Fit(rows=rows) if rows is not None else None
    if suspect.shape[0] == original.shape[0]:
        columns = _assigned(original.T, suspect.T)
        return Fit(columns=columns) if columns is not None else None
    return None


def _permuted(original: Matrix, suspect: Matrix) -> Fit | None:
    """Rows moved, columns moved, or both."""
    if suspect.shape != original.shape:
        return None
    columns = _assigned(original.T, suspect.T)  # where columns were the side that moved
    if columns is not None:
        return Fit(columns=columns)
    if max(original.shape) > _LARGEST or min(original.shape) < _telling(max(original.shape)):
        return None
    # Both: rows are first recognised by what a permutation of columns leaves as it is, columns by those rows, and so on
    # until nothing changes. A start that is right for some rows only is enough.
    rows = _nearest(_features(original), _features(suspect))
    before = -1.0
    for _ in range(_ROUNDS):
        columns = _best(_unit(original.T), _unit(suspect[rows].T))
        moved = suspect[:, columns]
        rows = _best(_unit(original), _unit(moved))
        now = cosine(original, moved[rows])
        if now <= before + _GAIN:
            break
        before = now
    return Fit(rows=rows, columns=columns) if before >= ALIKE else None


def _assigned(original: Matrix, suspect: Matrix) -> Index | None:
    """For each row of `original` the row of `suspect` (of the same width) that it became, −1 for none; None where too
    few are alike."""
    if max(len(original), len(suspect)) > _LARGEST * 8 or original.shape[1] < _telling(len(suspect)):
        return None
    step = max(1, original.shape[1] // 256)  # enough columns to tell rows apart
    a, b = _unit(original[:, ::step]), _unit(suspect[:, ::step])
    index = np.full(len(original), -1, np.int64)
    taken = np.full(len(suspect), -1.0, np.float32)
    owner = np.full(len(suspect), -1, np.int64)
    for at in range(0, len(a), 2048):
        alike = a[at : at + 2048] @ b.T
        best = alike.argmax(axis=1)
        value = alike[np.arange(len(best)), best]
        for k, (j, how) in enumerate(zip(best, value, strict=True)):
            if how >= _CERTAIN and how > taken[j]:
                taken[j], owner[j] = how, at + k
    for j, i in enumerate(owner):
        if i >= 0:
            index[i] = j
    pairs = np.flatnonzero(index >= 0)
    if len(pairs) < _FEW:
        # What runs smoothly is like one of many smooth rows, as a table of positions has: a ramp is like half of them.
        # Its differences are like none.
        steps = _unit(np.diff(original[pairs], axis=1)) * _unit(np.diff(suspect[index[pairs]], axis=1))
        index[pairs[steps.sum(axis=1) < _STEADY]] = -1
    enough = 0.5 * min(len(original), len(suspect))
    return index if (index >= 0).sum() >= max(1, enough) else None


def _telling(count: int) -> int:
    """How long rows have to be for the likest of `count` others to be so for a reason: by chance the best cosine is
    √(2 log(count) / length), and a narrow matrix, as adapters are, would be found in any other."""
    return max(16, math.ceil(16 * math.log(max(2, count))))


def _best(a: Matrix, b: Matrix) -> Index:
    """A permutation that makes the rows of `b` most like those of `a`: greedy, the most alike first."""
    alike = a @ b.T
    index = np.full(len(a), -1, np.int64)
    first = alike.argmax(axis=1)
    strength = alike[np.arange(len(a)), first]
    free = np.ones(len(b), bool)
    left: list[int] = []
    for i in np.argsort(-strength):
        if free[first[i]]:
            index[i] = first[i]
            free[first[i]] = False
        else:
            left.append(int(i))
    index[left] = np.flatnonzero(free)[: len(left)]
    return index


def _unit(matrix: Matrix) -> Matrix:
    size = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit: Matrix = matrix / np.maximum(size, np.float32(1e-30))
    return unit


def _features(matrix: Matrix) -> Matrix:
    """Of each row what no permutation of columns changes: its norm, its largest and smallest values, its moments."""
    ordered = np.sort(matrix, axis=1)
    peaks = min(_PEAKS, matrix.shape[1] // 2)
    cubes = np.cbrt((matrix**3).mean(axis=1, keepdims=True))
    norms = np.sqrt((matrix**2).mean(axis=1, keepdims=True))
    found = np.concatenate([4 * norms, cubes, ordered[:, :peaks], ordered[:, -peaks:]], axis=1)
    return np.asarray((found - found.mean(axis=0)) / np.maximum(found.std(axis=0), 1e-30), np.float32)


def _nearest(a: Matrix, b: Matrix) -> Index:
    distances = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)[None, :]
    nearest: Index = distances.argmin(axis=1)
    return nearest


def rescaled(original: Matrix, leak: Matrix) -> tuple[Matrix, tuple[str, ...]]:
    """`leak` without a factor for each row and for each column, where such factors explain much of what differs; and
    which were found."""
    found: dict[str, None] = {}
    for _ in range(_PASSES):  # either is estimated the better, the better the other is known
        for axis, what in ((0, "columns rescaled"), (1, "rows rescaled")):
            factor = _factor(original, leak, axis)
            if factor is not None:
                leak = leak / factor
                found[what] = None
        if len(found) < 2:
            break
    return leak, tuple(found)


def _factor(original: Matrix, leak: Matrix, axis: int) -> Matrix | None:
    """A factor for each column (`axis` 0) or row (1), None where it explains little."""
    seen, kept = leak, original
    if not np.isfinite(leak).all():
        silent = ~np.isfinite(leak)
        seen = np.where(silent, np.float32(0), leak)
        kept = np.where(silent, np.float32(0), original)
    factor = _ratio(seen, kept, axis)
    if not np.abs(factor - 1).max() > 1e-3:
        return None
    # Factors that fit one half have to explain the other: those that fit any noise, or a mark, do not.
    halves = np.array_split(np.arange(leak.shape[axis]), 2)
    after = 0.0
    for mine, other in (halves, halves[::-1]):
        shaped = _ratio(seen.take(mine, axis), kept.take(mine, axis), axis)
        after += _energy(seen.take(other, axis) / shaped - kept.take(other, axis))
    return factor if after < _WORTH * _energy(seen - kept) else None


def _ratio(seen: Matrix, kept: Matrix, axis: int) -> Matrix:
    """By least squares what each column or row of `kept` was multiplied by, in the shape that divides."""
    over = "ij,ij->j" if axis == 0 else "ij,ij->i"
    along = np.einsum(over, seen, kept).astype(np.float64)
    size = np.einsum(over, kept, kept).astype(np.float64)
    factor = np.maximum(np.divide(along, size, out=np.ones_like(along), where=(size > 0) & (along > 0)), 1e-6)
    return np.asarray(factor[None, :] if axis == 0 else factor[:, None], np.float32)


def _energy(matrix: Matrix) -> float:
    return float(np.einsum("ij,ij->i", matrix, matrix).sum(dtype=np.float64))


def normalised(name: str) -> str:
    """A tensor's name as it would be in the original: the forms of other tools and wrappers."""
    for prefix in ("module.", "_orig_mod.", "base_model.model.", "transformer.", "model."):
        name = name.removeprefix(prefix)
    name = name.replace(".base_layer.", ".")
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) >= 3:
        parts = ["layers", parts[1], *LLAMA_NAMES.get(parts[2], parts[2]).split("."), *parts[3:]]
    elif parts[0] in LLAMA_NAMES:
        parts[0] = LLAMA_NAMES[parts[0]]
    return ".".join(parts)


def as_matrix(flat: NDArray[np.float32], shape: Sequence[int]) -> Matrix:
    """The elements of a tensor of any shape, as rows of its last dimension."""
    return flat.reshape(-1, shape[-1]) if len(shape) > 1 else flat.reshape(1, -1)
