"""How much work a suspect may be to align (spec/mark.md, section 4): counted, so that it ends at the same place
on every machine, in proportion to the version, and for all versions together to the suspect."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import inf, prod

STOPPED = "alignment stopped at its budget"  # what a report says then, among the transformations
_OF_EACH = 6  # full attempts at each tensor of the version
_OF_ALL = 4  # on average over all of them
_OF_TRACE, _OF_ELEMENT = 10**14, 1 << 15  # of all versions together: products, and for each element of the suspect
_PASSES = 64  # products that one look over an element counts as
_ROUNDS, _STARTS = 6, 12  # of a permutation that is not found, and of a disguise: times that all rows meet all others
_COLUMNS = 256  # by which rows are told from one another
_LOOKS, _LOOKS_OF_EACH = 100_000, 64  # at two tensors: however many there are, and for each of them


class Effort:
    """What may be done to find tensors of these shapes among so many of a suspect, and `until` when. `stopped`: whether
    something was left undone."""

    def __init__(self, shapes: Sequence[Sequence[int]], suspects: int, until: float = inf) -> None:
        costs = [full(shape) for shape in shapes]
        self._each = [_OF_EACH * cost for cost in costs]
        self._all = _OF_ALL * sum(costs)
        self.spent = 0
        self._looks = _LOOKS + _LOOKS_OF_EACH * (len(shapes) + suspects)
        self._until = until
        self.stopped = False

    def limit(self, most: int, until: float = inf) -> None:
        """Let attempts cost no more than this from now on, and end at `until`, as `Patience` has it."""
        self._all, self._until = min(self._all, most), until

    def look(self) -> bool:
        """Whether there may be one more look at two tensors: at some elements, or at what is known of all of them."""
        self._looks -= 1
        return self._enough(self._looks)

    def attempt(self, k: int, cost: int) -> bool:
        """Whether there may be an attempt at tensor `k` that costs so much."""
        if self._enough(min(self._each[k], self._all) - cost):
            self._each[k] -= cost
            self._all -= cost
            self.spent += cost
            return True
        return False

    def _enough(self, left: int) -> bool:
        enough = left >= 0 and (self._until == inf or time.monotonic() < self._until)
        self.stopped = self.stopped or not enough
        return enough


class Patience:
    """How long one trace may align, in seconds, whatever work that is: products of small matrices take many times as
    long as those of large ones, and whoever made the suspect has chosen. None: for as long as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self._until = inf if seconds is None else time.monotonic() + seconds

    def until(self, parts: int) -> float:
        """When what is next has to end, of so many parts that are left."""
        if self._until == inf:
            return inf
        now = time.monotonic()
        return now + max(0.0, self._until - now) / max(1, parts)


class Purse:
    """What attempts may cost in one trace, of all its versions together: a suspect of so many elements is compared with
    so many of them. Each gets as much as all that come after it; what it leaves is theirs."""

    def __init__(self, elements: int, versions: int) -> None:
        self._left, self._versions = _OF_TRACE + _OF_ELEMENT * elements, versions

    def share(self) -> int:
        """What the next version may cost."""
        share = self._left // max(1, self._versions)
        self._versions -= 1
        return share

    def spend(self, cost: int) -> None:
        """Take away what it did cost."""
        self._left = max(0, self._left - cost)


def seen(elements: int) -> int:
    """The cost of a look over so many elements."""
    return _PASSES * elements


def permuted(original: Sequence[int], suspect: Sequence[int]) -> int:
    """The cost of looking for a permutation that makes one matrix of the other, or a part of it."""
    (n, d), (m, _) = _matrix(original), _matrix(suspect)
    size = seen(prod(original) + prod(suspect))
    if prod(original) == prod(suspect):
        return size + _ROUNDS * n * d * max(m, d)
    return size + (n + d) * m * _COLUMNS


def disguised(original: Sequence[int], suspect: Sequence[int]) -> int:
    """The cost of looking for a disguise of one tensor in the other."""
    return seen(prod(original) + prod(suspect)) + _STARTS * prod(suspect) * max(_matrix(original))


def reordered(original: Sequence[int], suspect: Sequence[int]) -> int:
    """The cost of looking for the rows of an embedding among those of another, turned and in another order."""
    from strongroom.marking import reorder  # not before: it takes NumPy along

    (n, d), (m, _) = _matrix(original), _matrix(suspect)
    few, many = min(n, m), max(n, m)
    some = reorder.ROUNDS * max(reorder.SOME, reorder.SOME_OF_WIDTH * d)
    anchors = (reorder.ANCHORS * reorder.TAKEN_FOR) ** 2 * (d + reorder.SETTLING + _PASSES)
    bands = len(reorder.BANDS) if many >= reorder.NEAR else 0
    # Those who are looked at in either, with all others; and each that is looked for with those of its length.
    looked_at = reorder.SAMPLED * few + min(many, reorder.LOOKED_AT) * many
    scored = reorder.ANCHORS * reorder.NEAR * reorder.NEIGHBOURS * reorder.AMONG
    neighbours = bands * (looked_at * (d + _PASSES) + seen(scored))
    some *= 2 + bands  # once for each way that tells some rows
    return (
        seen(n * d + m * d)
        + 4 * (n + m) * d * d
        + (few + some) * many * reorder.COLUMNS
        + (1 + bands) * anchors
        + neighbours
    )


def full(shape: Sequence[int]) -> int:
    """The cost of one attempt at a tensor, by either way."""
    return permuted(shape, shape) + disguised(shape, shape)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    width = shape[-1] if shape else 1
    return prod(shape) // max(1, width), width
