"""Which word is which, in an embedding whose rows were put into another order and turned (spec/mark.md, section 4).

The order of the rows changes nothing of E^T E, and a rotation only turns its axes. So along its axes, which are known
but for their direction, each row has the same coordinates in both; and the direction is told by how the rows are skewed
along it. A function of the suspect and the original alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Index = NDArray[np.int64]

COLUMNS, ENOUGH = 256, 128  # coordinates that tell rows apart, and once the rotation is known
ROUNDS = 4
SOME, SOME_OF_WIDTH = 2048, 2  # rows by which axes are told, and for each element of a row
_AGREED = 0.25  # how much skewness may differ, of the sum of both, along an axis that is the same
_LEAST = 16  # axes that have to agree
_LIKE = 0.6  # cosine of a row and the one that it is taken for, in the middle: among unrelated rows it is about 0.4
_PART = 0.5  # of the rows have to be found
_ROUNDING = 1e-5
_CHUNK, _PIECE = 256, 4096  # rows at a time


def reordered(original: Matrix, suspect: Matrix) -> Index | None:
    """For each row of `original` the row of `suspect`, of the same width, that it is in another order and a turned
    space, −1 for none; None where they don't seem to be the same rows."""
    if original.ndim != 2 or suspect.ndim != 2 or original.shape[1] != suspect.shape[1]:
        return None
    a, b = _sane(original), _sane(suspect)
    (turned, size), (other_axes, other_size) = _axes(a), _axes(b)
    mine, other = _skewness(a, turned, size), _skewness(b, other_axes, other_size)
    with np.errstate(all="ignore"):
        apart = np.abs(np.abs(mine) - np.abs(other)) / (np.abs(mine) + np.abs(other))
    agreed = np.flatnonzero(apart < _AGREED)
    if len(agreed) < _LEAST:
        return None
    agreed = agreed[np.argsort(-np.abs(mine[agreed]), kind="stable")][:COLUMNS]
    # No few axes decide, and those along which there is little are not made large.
    white = (1 / (size + size.mean())).astype(np.float32)
    direction = np.sign(mine[agreed] * other[agreed]).astype(np.float32)
    x, y = a @ (turned[:, agreed] * white[agreed]), _unit(b @ (other_axes[:, agreed] * (white[agreed] * direction)))
    some = np.argsort(-np.linalg.norm(x, axis=1), kind="stable")[: max(SOME, SOME_OF_WIDTH * a.shape[1])]
    # Strong ones and weak ones, in such an order that the first of them are both, too.
    step = max(1, a.shape[1] // ENOUGH)
    every = np.concatenate([np.arange(k, a.shape[1], step) for k in range(step)])
    columns = (turned * white)[:, every[:COLUMNS]]
    rows, whole = _unit(x[some]), _unit(a @ columns)
    for _ in range(ROUNDS):  # the more rows are known, the better is the rotation; and the other way round
        order, _ = _paired(rows, y)
        there = order >= 0
        left, _, right = np.linalg.svd(a[some[there]].T @ b[order[there]])
        rows, y = whole[some], _unit(b @ ((left @ right).T @ columns))
    order, like = _paired(rows, y)
    if not (order >= 0).any() or np.median(like[order >= 0]) < _LIKE:
        return None
    order, _ = _paired(_unit(whole[:, :ENOUGH]), _unit(y[:, :ENOUGH]))
    return order if (order >= 0).mean() >= _PART else None


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
