"""A suspect whose whole model was disguised: its residual stream is turned back, and its tensors are found again
(spec/mark.md, section 4).

The rotation is read from the embedding in pieces, and other tensors are read one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.formats.tensors import TensorInfo
from strongroom.marking.align import cosine, normalised
from strongroom.marking.disguise import LIKENESS, Turn, Undone, facing, profile, same_rows, turn, undo
from strongroom.marking.elements import STEPS
from strongroom.marking.reorder import reordered
from strongroom.vault import effort as costs
from strongroom.vault.effort import Effort, disguised, seen
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.suspect import PIECE, WHOLE, Suspect

Array = NDArray[np.float32]

_NARROW = 64  # no residual stream has fewer elements; by fewer, rows would be found among any others
_TALL = 2  # times as many rows as columns, at least, has an embedding
_ROWS = 32  # rows of the embedding for each element of the residual stream are enough for a rotation
_TRIED = 6  # partners that a tensor is looked for in
_EMBEDDING_LIKE = re.compile(r"emb|wte")  # in a name: such tensors are tried first
_LAYER = re.compile(r"^(.*?\.\d+\.)")


class Reading(NamedTuple):
    """How elements are read: of the original `(placed, first, count)`, and of the suspect `(name, first, end)`, None
    where they can't be; flat float32 both."""

    original: Callable[[Placed, int, int], Array]
    suspect: Callable[[str, int, int], Array | None]
    whole: Callable[[str], Array | None]


class Unmasking:
    """What is known of a suspect's disguise, for one version."""

    def __init__(
        self, originals: Originals, placed: Sequence[Placed], suspect: Suspect, reading: Reading, effort: Effort
    ) -> None:
        self._placed, self._suspect, self._reading, self._effort = placed, suspect, reading, effort
        self._heads = _heads(originals)
        self._norms = {
            each.info.name: each
            for each in originals.tensors()
            if len(each.info.shape) == 1 and each.info.dtype.name in STEPS
        }
        self._profiles: dict[tuple[str, bool], Array] = {}
        self._order: NDArray[np.int64] | None = None  # of the words, where it is another
        self.turn = self._turn()

    @property
    def turned(self) -> bool:
        """Whether the residual stream was rotated, so that no tensor shows anything alone; permuted, it does."""
        return self.turn is not None and self.turn.what == "residual stream rotated"

    # -- the residual stream -------------------------------------------------------------------------------------

    def _turn(self) -> Turn | None:
        """The rotation of the best explained embedding; none at all where no embedding is seen."""
        found: list[Turn] = []
        tall = [each for each in self._placed if _tall(each.info)]
        tall.sort(
            key=lambda each: (not _EMBEDDING_LIKE.search(each.info.name), -each.info.elements / each.info.shape[1] ** 2)
        )
        for each in tall[:2]:
            for name in self._embeddings(each):
                pieces = self._rows(each, name)
                width = each.info.shape[1]
                if pieces is not None and (how := turn(pieces, width)) is not None:
                    found.append(how)
            if found:
                return max(found, key=lambda how: how.share)
        for each in tall[:2]:  # its rows may be in another order
            for name in self._embeddings(each)[:2]:
                if (known := self._reordered(each, name)) is not None:
                    return known
        return Turn(tall[0].info.shape[1]) if tall else None

    def _reordered(self, each: Placed, name: str) -> Turn | None:
        """The rotation of an embedding in which the words are in another order, which is kept."""
        info, theirs = each.info, self._suspect.tensors[name].info
        cost = costs.reordered(info.shape, (max(theirs.shape), min(theirs.shape)))
        if max(info.elements, theirs.elements) > WHOLE or not self._effort.attempt(self._placed.index(each), cost):
            return None
        matrix = self._reading.whole(name)
        if matrix is None:
            return None
        rows = matrix if theirs.shape[1] == info.shape[1] else matrix.T
        self._order = reordered(self._reading.original(each, 0, info.elements).reshape(info.shape), rows)
        if self._order is None:
            return None
        pieces = self._rows(each, name)
        found = turn(pieces, info.shape[1]) if pieces is not None else None
        if found is None:
            self._order = None
        return found

    def _ordered(self, each: Placed, name: str) -> NDArray[np.int64] | None:
        """Where the rows of a vocabulary are in the suspect's, where they are in another order."""
        known, shape = self._order, self._shape(name)
        fits = known is not None and len(known) == each.info.shape[0] and int(known.max()) < max(shape)
        return known if fits else None

    def _embeddings(self, each: Placed) -> list[str]:
        """Tensors of the suspect that may be this embedding, its namesake first."""
        width = each.info.shape[1]
        found = []
        for name, tensor in self._suspect.tensors.items():
            shape = tensor.info.shape
            if len(shape) == 2 and width in shape and max(shape) >= _TALL * width:
                found.append(name)
        wanted = normalised(each.info.name)

        def likely(name: str) -> tuple[bool, bool, int]:
            # No other matrix has as many rows, also where many words are gone.
            rows = max(self._suspect.tensors[name].info.shape)
            return normalised(name) != wanted, not _EMBEDDING_LIKE.search(name), -rows

        return sorted(found, key=likely)[:_TRIED]

    def _rows(self, each: Placed, name: str) -> Iterator[tuple[Array, Array]] | None:
        """Rows of both, piece by piece; None where some of them show that these are not the same rows."""
        width, shape = each.info.shape[1], self._suspect.tensors[name].info.shape
        transposed, order = shape[1] != width, self._ordered(each, name)
        matrix = self._reading.whole(name) if transposed or order is not None else None
        if (transposed or order is not None) and matrix is None:
            return None
        rows = each.info.shape[0] if order is not None else min(each.info.shape[0], max(shape))

        def read(first: int, end: int) -> tuple[Array, Array] | None:
            mine = self._reading.original(each, first * width, (end - first) * width).reshape(-1, width)
            if matrix is not None and order is not None:
                there = order[first:end]
                return mine[there >= 0], (matrix.T if transposed else matrix)[there[there >= 0]]
            if matrix is not None:
                return mine, np.ascontiguousarray(matrix.T[first:end])
            theirs = self._reading.suspect(name, first * width, end * width)
            return (mine, theirs.reshape(-1, width)) if theirs is not None else None

        # From several places: a row that was padded, or is used by no word, says nothing.
        some = [read(at, at + 16) for at in range(0, rows - 16, max(16, rows // 8))]
        there = [pair for pair in some if pair is not None]
        if not there or not same_rows(*(np.concatenate(both) for both in zip(*there, strict=True))):
            return None
        step = max(1, PIECE // width)
        enough = min(rows, _ROWS * width) if order is None else rows  # of which some are gone
        pairs = (read(at, min(at + step, enough)) for at in range(0, enough, step))
        return (pair for pair in pairs if pair is not None and len(pair[0]))

    # -- its tensors ---------------------------------------------------------------------------------------------

    def solve(self, k: int, names: Sequence[str], free: Sequence[str]) -> tuple[str, Undone] | None:
        """Where original tensor `k` is in the suspect, and how: looked for in `names`, then in those of `free` that are
        strong where it is. None where it is not seen, or the effort ends before it is."""
        each = self._placed[k]
        info = each.info
        if self.turn is None or len(info.shape) < 2 or self.turn.width not in info.shape[-2:]:
            return None
        if _vocabulary(info):
            # An embedding and the head that was made of it are alike: the better is taken.
            tried = dict.fromkeys((*names, *free))
            piece = min(PIECE, info.elements)
            cost = seen(2 * piece) + piece * info.shape[1]  # a piece of both, of which one is turned back
            found = [(self._by_rows(each, name), name) for name in tried if self._effort.attempt(k, cost)]
            share, name = max(found, default=(0.0, ""))
            if share >= LIKENESS:
                order = self._ordered(each, name)
                return name, Undone(self.turn, info.shape, False, self._shape(name), False, share, rows=order)
        if info.elements > WHOLE:
            return None
        original = self._reading.original(each, 0, info.elements).reshape(info.shape)
        norms = list(self._near(each, self.turn.width))
        tried = dict.fromkeys(names)

        def partners() -> Iterator[str]:
            yield from tried
            yield from self._alike(original, norms, [name for name in free if name not in tried])

        for name in partners():
            if not self._effort.attempt(k, disguised(info.shape, self._shape(name))):
                break
            undone = self._undone(original, norms, name)
            if undone is not None:
                return name, undone
        return None

    def _by_rows(self, each: Placed, name: str) -> float:
        """The share of some rows of a vocabulary that the same rows of the suspect explain, once they are turned back:
        so large a matrix is never held whole."""
        pieces = (
            self._rows(each, name) if len(self._shape(name)) == 2 and each.info.shape[1] in self._shape(name) else None
        )
        if pieces is None or self._shape(name)[1] != each.info.shape[1] or self.turn is None:
            return 0.0
        mine, theirs = next(pieces, (None, None))
        if mine is None or theirs is None:
            return 0.0
        return max(0.0, cosine(mine, self.turn.back(theirs))) ** 2

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._suspect.tensors[name].info.shape)

    def _undone(self, original: Array, norms: Sequence[Array], name: str) -> Undone | None:
        suspect = self._array(name)
        if suspect is None or self.turn is None:
            return None
        return undo(original, suspect, self.turn, self._heads, norms)

    def _alike(self, original: Array, norms: Sequence[Array], names: Sequence[str]) -> list[str]:
        known = self.turn
        if known is None or not names:
            return []
        mine = []
        for _, rows in facing(original, known.width):
            mine += [profile(rows), *(profile(rows * norm) for norm in norms)]
        found: list[tuple[float, str]] = []
        for name in names:
            shape = self._suspect.tensors[name].info.shape
            if len(shape) < 2 or known.width not in shape[-2:]:
                continue
            if not self._effort.look():
                break
            if (name, False) not in self._profiles and (name, True) not in self._profiles:
                array = self._array(name)
                for swapped, rows in facing(array, known.width) if array is not None else ():
                    self._profiles[name, swapped] = profile(known.back(rows))
            theirs = [self._profiles[key] for key in ((name, False), (name, True)) if key in self._profiles]
            if theirs:
                found.append((min(_apart(a, b) for a in mine for b in theirs), name))
        return [name for _, name in sorted(found)][:_TRIED]

    def _near(self, each: Placed, width: int) -> Iterator[Array]:
        """The norms of a tensor's own layer, one of which may have been folded into it."""
        layer = _LAYER.match(each.info.name)
        for name, norm in self._norms.items():
            other = _LAYER.match(name)
            same = (layer.group(1) if layer else "") == (other.group(1) if other else "")
            if same and norm.info.shape == (width,):
                yield self._reading.original(norm, 0, width)

    def _array(self, name: str) -> Array | None:
        matrix = self._reading.whole(name)
        return matrix.reshape(self._suspect.tensors[name].info.shape) if matrix is not None else None


def _tall(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and info.shape[0] >= _TALL * info.shape[1] >= _TALL * _NARROW


def _vocabulary(info: TensorInfo) -> bool:
    """Whether each row is a word, and has its place: no hidden layer is as wide."""
    return len(info.shape) == 2 and info.shape[0] > 8 * info.shape[1]


def _apart(a: Array, b: Array) -> float:
    return float(np.abs(a - b).mean())


def _heads(originals: Originals) -> tuple[int, ...]:
    """How many rows a head has, as the version's config.json says; empty where it does not."""
    found = originals.config()
    try:
        width = found.get("hidden_size") or found["n_embd"]
        size = found.get("head_dim") or width // (found.get("num_attention_heads") or found["n_head"])
    except (KeyError, TypeError, ZeroDivisionError):
        return ()
    return (size,) if isinstance(size, int) and 2 <= size <= 4096 else ()
