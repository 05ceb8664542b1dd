"""A suspect beside one version: which tensor is which, and what each element says (spec/mark.md, sections 4 to 7).

Memory stays flat: large tensors that lie as they did are compared in pieces; one that was moved about is read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.core.progress import Progress
from strongroom.errors import LimitExceeded, UsageError
from strongroom.formats.items import ITEMS
from strongroom.marking.align import ALIKE, Fit, as_matrix, cosine, normalised, rescaled, solve
from strongroom.marking.disguise import Turn, Undone, refactored
from strongroom.marking.estimate import Estimator
from strongroom.marking.matched import MatchedFilter
from strongroom.marking.requantise import SEED, coarse, unrounded
from strongroom.marking.scales import numbers, scales
from strongroom.marking.stamp import Stamp, tensor_tag
from strongroom.vault import effort
from strongroom.vault.effort import Effort, Purse
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.suspect import PIECE, WHOLE, Suspect, SuspectTensor, numbers_of, readable, weights_of
from strongroom.vault.unmasking import Reading, Unmasking

SAMPLE = 16_384  # elements of a tensor that are looked at to recognise it
_SAMPLES = 4096  # of them that are kept
_TOLD = 4096  # elements by which an unmarked tensor is known
_TRIED = 4  # partners that a tensor is looked for in, once names and places say nothing
_ROWS, _JUDGED = 128, 1 << 17  # rows, and elements, by which a rescaling is judged
_SAME = 0.9999  # of a sample's energy, explained as it lies: what factors could add is less than what a stamp does
_UNEXPLAINED = 0.98  # cosine below which more than int4 was done to a tensor that is in its place
_BETTER = 0.5  # of what is unexplained, what has to be left for a disguise to be taken as one


@dataclass
class Compared:
    """One tensor of the version: its partner in the suspect, and how alike they are."""

    name: str
    elements: int
    partner: str = ""
    cosine: float = 0.0
    transformations: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "cosine": round(self.cosine, 6)}


@dataclass
class Gathered:
    """What a suspect says: of each position, and of each stamp; and how many elements were compared for it."""

    estimator: Estimator
    matched: MatchedFilter
    elements: int = 0


class Comparison:
    """Finds the partners of a version's tensors, then gathers what they say. `likeness` is known from the first on."""

    whole = False  # whether a look at the marked segments is one at everything

    def __init__(self, originals: Originals, suspect: Suspect, merged: str = "", *, until: float = inf) -> None:
        """`merged`: the version whose weights the suspect was merged into, and taken out of again. What lies as it did
        is looked for `until` then."""
        self.merged = merged
        self._originals, self._suspect = originals, suspect
        placed = [each for each in originals.tensors() if each.marked]
        # Where nothing can be marked there is nothing to align: it is only known again, by what lies as it did.
        self._only_likeness = not placed
        self._placed = placed = placed or [each for each in originals.tensors() if _telling(each)]
        self.tensors = [Compared(each.info.name, each.info.elements) for each in placed]
        self._fits: list[Fit | Undone | None] = [None] * len(placed)
        self._norms: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._samples: dict[tuple[str, int], NDArray[np.float32] | None] = {}
        self._by_name: dict[str, list[str]] = {}
        self._by_elements: dict[int, list[str]] = {}
        for name, tensor in suspect.tensors.items():
            self._by_name.setdefault(normalised(tensor.name), []).append(name)
            self._by_elements.setdefault(tensor.info.elements, []).append(name)
        self._taken: set[str] = set()
        self._effort = Effort([each.info.shape for each in placed], len(suspect.tensors), until)
        self._find()

    @property
    def likeness(self) -> float:
        """The mean cosine of the version's tensors and their partners, weighted by elements; 0 for those without."""
        total = sum(each.elements for each in self.tensors)
        return sum(each.elements * max(0.0, each.cosine) for each in self.tensors) / total if total else 0.0

    @property
    def common(self) -> float:
        """The mean cosine of those that have a partner, weighted by elements."""
        found = [each for each in self.tensors if each.partner]
        total = sum(each.elements for each in found)
        return sum(each.elements * max(0.0, each.cosine) for each in found) / total if total else 0.0

    @property
    def stopped(self) -> bool:
        """Whether the budget has ended the search for partners before all was tried."""
        return self._effort.stopped

    # -- which is which ------------------------------------------------------------------------------------------

    def _find(self) -> None:
        """What lies as it did, whatever it is called."""
        open_ones: list[int] = []
        for k, each in enumerate(self._placed):
            same = [name for name in self._by_name.get(normalised(each.info.name), []) if self._same_size(each, name)]
            if not self._take(k, same):
                open_ones.append(k)
        # Renamed: all of the same size are looked at, in the original's order.
        for k in open_ones:
            self._take(k, self._by_elements.get(self._placed[k].info.elements, []))

    @property
    def explained(self) -> float:
        """The share of the suspect's elements that lie as they did."""
        found = sum(self._suspect.tensors[each.partner].info.elements for each in self.tensors if each.partner)
        theirs = sum(tensor.info.elements for tensor in self._suspect.tensors.values() if len(tensor.info.shape) > 1)
        return found / max(1, theirs)

    def deepen(self, progress: Progress, purse: Purse | None = None, until: float = inf) -> None:
        """Look for the rest among what was transposed, permuted or cut, or disguised, which takes longer, costs no more
        than a share of `purse`, and ends at `until`. `progress` is of the version's bytes that were looked for."""
        if purse is not None:
            self._effort.limit(purse.share(), until)
        if not self._only_likeness and self._unclear():
            self._deepen(progress)
        if purse is not None:
            purse.spend(self._effort.spent)

    def _deepen(self, progress: Progress) -> None:
        reading = Reading(self._original, self._read, self._matrix)
        masks = Unmasking(self._originals, self._placed, self._suspect, reading, self._effort)
        if masks.turned:  # then little can be seen without turning it back
            self._unmask(masks)
        done, total = 0, sum(each.info.size for each in self._placed)
        for k, fit in enumerate(self._fits):
            if fit is None:
                self._solve(k)
            done += self._placed[k].info.size
            progress(done, total)
        self._unmask(masks)

    def _unclear(self) -> list[int]:
        """Tensors that are not found, or are much unlike their partners."""
        return [
            k
            for k, each in enumerate(self.tensors)
            if not isinstance(self._fits[k], Undone) and each.cosine < _UNEXPLAINED
        ]

    def _unmask(self, masks: Unmasking) -> None:
        """Find tensors, or find them better, in a model that was disguised as a whole."""
        for k in self._unclear():
            each, tensor, fit = self._placed[k], self.tensors[k], self._fits[k]
            names = [tensor.partner] if fit is not None else self._by_name.get(normalised(each.info.name), [])
            free = self._by_elements.get(each.info.elements, []) if fit is None else []
            if not self._effort.attempt(k, effort.seen(2 * each.info.elements)):
                continue
            known = self._explained(k)
            if known >= _UNEXPLAINED**2:
                continue
            found = masks.solve(
                k,
                [name for name in names if name not in self._taken or name == tensor.partner],
                [name for name in free if name not in self._taken],
            )
            if found is None or 1 - found[1].share > _BETTER * (1 - known):
                continue
            tensor.partner, self._fits[k], tensor.transformations = found[0], found[1], []
            tensor.cosine = float(np.sqrt(found[1].share))
            self._taken.add(tensor.partner)
            self._note(k)
            tensor.transformations += found[1].found

    def _explained(self, k: int) -> float:
        """The share of a tensor that its partner explains as it was found, but for factors of rows and columns."""
        fit, matrix = self._fits[k], self._matrix(self.tensors[k].partner) if self.tensors[k].partner else None
        if fit is None or matrix is None:
            return 0.0
        original = as_matrix(
            self._original(self._placed[k], 0, self._placed[k].info.elements), self._placed[k].info.shape
        )
        found = fit.apply(matrix) if not fit.in_place else matrix
        if found.size != original.size:
            return 0.0
        return max(0.0, cosine(original, rescaled(original, found.reshape(original.shape))[0])) ** 2

    def _same_size(self, each: Placed, name: str) -> bool:
        return self._suspect.tensors[name].info.elements == each.info.elements

    def _take(self, k: int, names: Sequence[str]) -> bool:
        """Whether one of `names`, element by element as it lies, is tensor `k`."""
        each = self._placed[k]
        if not names:
            return False
        count = min(SAMPLE, each.info.elements)
        first = (each.info.elements - count) // 2 // 256 * 256
        try:
            sample = self._centred(self._original(each, first, count))
        except UsageError:  # a type that this machine can't read: it is not known again, and no other trace fails
            if not self._only_likeness:
                raise
            return False
        best, most = "", ALIKE
        for name in names:
            if name in self._taken:
                continue
            if not self._effort.look():
                break
            seen = self._sampled(name, first, count)
            how = cosine(sample, seen[: sample.size]) if seen is not None else 0.0
            if how > most:
                best, most = name, how
            if most >= _UNEXPLAINED:  # none of the others is more alike than by chance
                break
        if not best:
            return False
        self._taken.add(best)
        self.tensors[k].partner, self.tensors[k].cosine, self._fits[k] = best, most, Fit()
        self._note(k)
        return True

    def _sampled(self, name: str, first: int, count: int) -> NDArray[np.float32] | None:
        """Elements of a suspect's tensor, which are kept: as often as there are others of its size they are wanted."""
        if (name, count) in self._samples:
            return self._samples[name, count]
        found = self._read(name, first, first + count)
        found = self._centred(found) if found is not None else None
        if len(self._samples) < _SAMPLES:
            self._samples[name, count] = found
        return found

    def _centred(self, sample: NDArray[np.float32]) -> NDArray[np.float32]:
        """Integers that are all positive are alike by their mean alone."""
        if not self._only_likeness or not np.isfinite(sample).any():
            return sample
        found: NDArray[np.float32] = sample - np.float32(np.nanmean(sample))
        return found

    def _solve(self, k: int) -> None:
        """Tensor `k` in one that was transposed, permuted or cut."""
        each = self._placed[k]
        if each.info.elements > WHOLE:
            return
        if not self._effort.attempt(k, effort.seen(each.info.elements)):
            return
        original = as_matrix(self._original(each, 0, each.info.elements), each.info.shape)
        free = [name for name in self._by_elements.get(original.size, []) if name not in self._taken]
        names = list(self._by_name.get(normalised(each.info.name), []))
        names += self._alike(original, [name for name in free if name not in names])
        names += [name for name in self._parts(original) if name not in names]
        for name in names:
            if name in self._taken:
                continue
            if not self._effort.attempt(k, effort.permuted(original.shape, self._suspect.tensors[name].info.shape)):
                return
            suspect = self._matrix(name)
            fit, how = _fitted(original, suspect) if suspect is not None else (None, 0.0)
            if fit is not None and how >= ALIKE:
                self._taken.add(name)
                self.tensors[k].partner, self.tensors[k].cosine, self._fits[k] = name, how, fit
                self._note(k)
                self.tensors[k].transformations += fit.found
                return

    def _alike(self, original: NDArray[np.float32], names: Sequence[str]) -> list[str]:
        """Of tensors as large as `original` the few whose sorted norms of rows and columns are most like its own."""
        mine = (_norms(original), _norms(original.T))
        found: list[tuple[float, str]] = []
        for name in names:
            if not self._effort.look():
                break
            if name not in self._norms:
                matrix = self._matrix(name)
                if matrix is None:
                    continue
                self._norms[name] = (_norms(matrix), _norms(matrix.T))
            theirs = self._norms[name]
            found += [(_apart(mine, turned), name) for turned in (theirs, theirs[::-1])]
        return list(dict.fromkeys(name for apart, name in sorted(found) if apart < np.inf))[:_TRIED]

    def _parts(self, original: NDArray[np.float32]) -> list[str]:
        """Tensors that may be some rows or some columns of `original`."""
        found = []
        for name, tensor in self._suspect.tensors.items():
            shape = tensor.info.shape
            if (
                name not in self._taken
                and len(shape) == 2
                and tensor.info.elements < original.size
                and set(shape) & set(original.shape)
            ):
                found.append(name)
        return found[:64]

    def _note(self, k: int) -> None:
        each, partner = self._placed[k], self._suspect.tensors[self.tensors[k].partner]
        if self.merged:
            self.tensors[k].transformations.append(f"merged into {self.merged}")
        if partner.name != each.info.name:
            self.tensors[k].transformations.append("renamed")
        if partner.info.dtype.name != each.info.dtype.name:
            self.tensors[k].transformations.append(f"as {partner.info.dtype.name}")

    def added(self, name: str) -> tuple[NDArray[np.float32], SuspectTensor] | None:
        """What the suspect adds to the matrix of this normalised name, as it lies, and where that is; None where it is
        not found."""
        for k, each in enumerate(self._placed):
            if self._fits[k] is None or normalised(each.info.name) != name or len(each.info.shape) != 2:
                continue
            if each.info.elements > WHOLE:
                return None
            leak = self._aligned(k)(0, each.info.elements)
            if leak is None or leak.size < each.info.elements:
                return None
            difference = leak - self._original(each, 0, each.info.elements)
            found = np.nan_to_num(difference, nan=0.0, posinf=0.0, neginf=0.0).reshape(each.info.shape)
            return found, self._suspect.tensors[self.tensors[k].partner]
        return None

    # -- what they say -------------------------------------------------------------------------------------------

    def gather(
        self,
        stamps: Sequence[Stamp],
        *,
        everything: bool,
        progress: Progress,
        screening: bool = False,
    ) -> Gathered:
        """What the marked segments say, which is about the marked share of all; or `everything`, which says more of
        stamps. `screening`: see `MatchedFilter`."""
        estimator = Estimator(self._originals.layout, self._originals.marker)
        found = Gathered(estimator, MatchedFilter(stamps, screening=screening))
        total = sum(self._placed[k].info.size for k in self._partnered())
        gather = self._all if everything else self._marked
        read = 0
        # On one thread. Two would wait for each other at each of the many short calls, twice as long as they work.
        for k in self._partnered():
            found.elements += gather(k, found)
            read += self._placed[k].info.size
            progress(read, total)
        return found

    def _partnered(self) -> list[int]:
        return [k for k, fit in enumerate(self._fits) if fit is not None]

    def _marked(self, k: int, found: Gathered) -> int:
        """Of tensor `k` what lies in marked segments; how many elements that are."""
        each, layout = self._placed[k], self._originals.layout
        dtype, width = each.info.dtype.name, each.info.shape[-1]
        item = ITEMS[dtype]
        aligned = self._aligned(k)
        tag, factor, count = tensor_tag(each.begin), self._factor(k, aligned), 0
        for number in range(*layout.stripes_touched(each.begin, each.end)):
            # Bytes of the image that are marked, and of this tensor; then its elements that lie in them whole: a block
            # that does so in part can't be compared.
            stripe = layout.common_segment(number).end
            shared_begin = max(each.begin, stripe)
            shared_end = min(each.end, stripe + layout.stripes[number] * layout.marked)
            lead, stop = -((each.begin - shared_begin) // item.bytes), (shared_end - each.begin) // item.bytes
            if lead >= stop:
                continue
            first, end = lead * item.weights, stop * item.weights
            leak = aligned(first, end)
            if leak is None or leak.size < end - first:
                continue
            if factor is not None:
                leak = leak / factor[np.arange(first, end) % width]
            begin, stopped = each.begin + lead * item.bytes, each.begin + stop * item.bytes
            data = self._originals.marked(number)[begin - stripe : stopped - stripe]
            # Blocks are a quantiser's levels themselves: a mark would be taken for rounding.
            if not item.is_block and coarse(numbers(data[: SEED * item.bytes], dtype), leak, first):
                leak = unrounded(numbers(data, dtype), leak, first)
            bits, leak = scales(data, dtype, leak)
            leak = found.estimator.add(begin, dtype, bits, leak)
            if each.stamped:
                found.matched.add(tag, lead, dtype, bits, leak)
            count += end - first
        return count

    def _all(self, k: int, found: Gathered) -> int:
        """All of tensor `k`, piece by piece; how many elements that are."""
        each = self._placed[k]
        dtype, size, width = each.info.dtype.name, each.info.elements, each.info.shape[-1]
        item = ITEMS[dtype]
        aligned, tag = self._aligned(k), tensor_tag(each.begin)
        step = max(1, PIECE // width) * width
        for first in range(0, size, step):
            count = min(step, size - first)
            leak = aligned(first, first + count)
            if leak is None or leak.size < count:
                continue
            lead = first // item.weights
            begin = each.begin + lead * item.bytes
            data = self._originals.read(begin, begin + count // item.weights * item.bytes)
            w = numbers(data, dtype)
            seen, _ = rescaled(w.reshape(-1, width), leak.reshape(-1, width))
            seen = seen.reshape(-1)
            if not item.is_block and coarse(w, seen, first):
                seen = unrounded(w, seen, first)
            bits, seen = scales(data, dtype, seen)
            seen = found.estimator.add(begin, dtype, bits, seen)
            if each.stamped:
                if not item.is_block:
                    bits, seen = bits.reshape(-1, width), seen.reshape(-1, width)
                found.matched.add(tag, lead, dtype, bits, seen)
        return size

    def _aligned(self, k: int) -> Callable[[int, int], NDArray[np.float32] | None]:
        """The leak in the places of tensor `k`, flat: what reads a range of its elements."""
        name, fit = self.tensors[k].partner, self._fits[k]
        if fit is None or fit.in_place:
            return lambda first, end: self._read(name, first, end)
        if isinstance(fit, Undone) and fit.mixture is None and fit.rows is None:
            return partial(self._turned, name, fit.turn)
        matrix = self._matrix(name)
        whole = fit.apply(matrix).reshape(-1) if matrix is not None else None
        return lambda first, end: whole[first:end] if whole is not None else None

    def _turned(self, name: str, turn: Turn, first: int, end: int) -> NDArray[np.float32] | None:
        """Elements of a tensor whose rows only have to be turned back."""
        low = first // turn.width * turn.width
        rows = self._read(name, low, -(-end // turn.width) * turn.width)
        if rows is None or rows.size % turn.width:
            return None
        return turn.back(rows.reshape(-1, turn.width)).reshape(-1)[first - low : end - low]

    def _factor(self, k: int, aligned: Callable[[int, int], NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
        """The factor of each column, if columns were rescaled: judged, and reported, by the first rows of the tensor. A
        factor of rows is taken out position by position."""
        each = self._placed[k]
        width = each.info.shape[-1]
        if self.tensors[k].cosine ** 2 >= _SAME and width <= SAMPLE:  # every column was in the sample
            return None
        count = min(each.info.elements // width, max(_ROWS, _JUDGED // width)) * width
        leak = aligned(0, count)
        if leak is None or leak.size < count:
            return None
        original = self._original(each, 0, count).reshape(-1, width)
        leak = leak.reshape(-1, width)
        if not np.isfinite(leak).any():
            return None
        seen, found = rescaled(original, leak)
        self.tensors[k].transformations += sorted(found)
        if "columns rescaled" not in found:
            return None
        with np.errstate(all="ignore"):
            ratio = np.ones(width, np.float32)
            there = np.isfinite(leak).any(axis=0)  # a column may be lost as a whole
            ratio[there] = np.nanmedian(leak[:, there] / seen[:, there], axis=0)
        return np.where(np.isfinite(ratio) & (ratio > 0), ratio, np.float32(1))

    # -- reading -------------------------------------------------------------------------------------------------

    def _original(self, each: Placed, first: int, count: int) -> NDArray[np.float32]:
        dtype = each.info.dtype
        lead = first // dtype.block
        begin = each.begin + lead * dtype.block_bytes
        end = each.begin - (-(first + count) // dtype.block) * dtype.block_bytes
        found = weights_of(numbers_of(self._originals.read(begin, end), dtype))  # it was put by somebody, too
        return found[first - lead * dtype.block :][:count]

    def _read(self, name: str, begin: int, end: int) -> NDArray[np.float32] | None:
        """Elements of a suspect's tensor; None where they can't be read."""
        block = self._suspect.tensors[name].info.dtype.block
        try:
            low = begin // block * block
            return self._suspect.read(name, low, end)[begin - low : end - low]
        except (UsageError, LimitExceeded):
            return None

    def _matrix(self, name: str) -> NDArray[np.float32] | None:
        info = self._suspect.tensors[name].info
        if info.elements > WHOLE or not info.elements:
            return None
        flat = self._read(name, 0, info.elements)
        return as_matrix(flat[: info.elements], info.shape) if flat is not None else None


def _telling(each: Placed) -> bool:
    """Whether a tensor that is not marked tells one model from another: a matrix, no list of positions."""
    shape = each.info.shape
    return len(shape) > 1 and min(shape) > 1 and each.info.elements >= _TOLD and readable(each.info.dtype)


def _fitted(original: NDArray[np.float32], suspect: NDArray[np.float32]) -> tuple[Fit | Undone | None, float]:
    """How a matrix comes from the original, and how alike they are then."""
    fit = solve(original, suspect)
    how = cosine(original, fit.apply(suspect)) if fit is not None else 0.0
    again = refactored(original, suspect) if how < _UNEXPLAINED else None
    # Some row of M A is like some row of A by chance; and where rows have only moved, any M fits them as well as that.
    if again is not None and 1 - again.share < _BETTER * (1 - how**2):
        # Not by what it is made into, which is the original itself where ranks were cut off.
        cut = again.mixture is not None and again.mixture.rest is not None
        return again, float(np.sqrt(again.share)) if cut else cosine(original, again.apply(suspect))
    return fit, how


def _norms(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sorted norms of the rows, of which a permutation changes nothing, relative to their mean."""
    with np.errstate(all="ignore"):
        norms = np.sort(np.nan_to_num(np.linalg.norm(matrix, axis=1)))
    mean = norms.mean()
    found: NDArray[np.float32] = norms / mean if mean > 0 else norms
    return found


def _apart(mine: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> float:
    """How much two pairs of sorted norms differ; infinitely if they are of matrices of other shapes."""
    pairs = list(zip(mine, theirs, strict=True))
    if any(a.size != b.size for a, b in pairs):
        return np.inf
    return sum(float(np.abs(a - b).mean()) for a, b in pairs)
