"""Whose copy wrote a text (spec/mark.md, section 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from strongroom.core.progress import Progress
from strongroom.marking.elements import STEPS
from strongroom.marking.gradient import GradientEstimator, GradientFilter
from strongroom.marking.stamp import Stamp, tensor_tag
from strongroom.vault.comparison import Compared, Gathered
from strongroom.vault.generator import Generator, Leaning
from strongroom.vault.opened import opened
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.suspect import PIECE
from strongroom.vault.text import Text
from strongroom.vault.trace import Trace, traced

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault


class Echo:
    """What a text says of a version, gathered as `Comparison` gathers what weights say."""

    whole = True  # as with `Comparison`
    stopped = False  # there is nothing to align

    def __init__(self, originals: Originals, leaning: Leaning) -> None:
        self._originals, self._gradient = originals, leaning.gradient
        self._placed = [each for each in originals.tensors() if each.begin in self._gradient]
        self.common = math.exp(min(0.0, leaning.log_likelihood / max(1, leaning.tokens)))
        self.tensors: list[Compared] = []  # none of them is compared with another

    def gather(
        self,
        stamps: Sequence[Stamp],
        *,
        everything: bool,  # noqa: ARG002 - as with `Comparison`
        progress: Progress,  # noqa: ARG002 - the model took the time
        screening: bool = False,
    ) -> Gathered:
        """All that the text says, whether or not it is asked for `everything`: the gradient is there already."""
        layout, marker = self._originals.layout, self._originals.marker
        found = Gathered(GradientEstimator(layout, marker), GradientFilter(stamps, screening=screening))
        found.elements = sum(self._add(each, found) for each in self._placed)
        return found

    def _add(self, each: Placed, found: Gathered) -> int:
        dtype, gradient = each.info.dtype.name, self._gradient[each.begin]
        item, size = STEPS[dtype].integer.itemsize, each.info.elements
        width = max(1, each.info.shape[-1])
        step = max(1, PIECE // width) * width
        for first in range(0, size, step):
            count = min(step, size - first)
            begin = each.begin + first * item
            bits = np.frombuffer(self._originals.read(begin, begin + count * item), STEPS[dtype].integer)
            found.estimator.add(begin, dtype, bits, gradient[first : first + count])
            if each.stamped:
                found.matched.add(tensor_tag(each.begin), first, dtype, bits, gradient[first : first + count])
        return size


def trace_text(
    vault: Vault, text: Text, name: str, files: list[dict[str, Any]], *, weights: str, progress: Progress
) -> Trace:
    """Score everybody by what `text` says of the original of `weights`, and name whose copy wrote it if that can be
    said with a false accusation bounded as in `trace`. `name` and `files` are what the report calls it.

    UsageError ``text.*``; NotFound; what reading the room raises.
    """
    record, originals = opened(vault, weights, lambda _, record: (record, Originals(vault.image(record), record)))
    leaning = Generator(originals).lean(text, progress)
    echo = Echo(originals, leaning)
    blank = Trace({"name": name, "tensors": 0, "bytes": text.bytes, "files": files})
    found = traced(vault, blank, record, originals, echo, versions=1, named=True, progress=progress)
    if not found.marked:
        found.verdict = "not-named"
    found.text = {
        "pieces": len(text.pieces),
        "left_out": leaning.left_out,
        "tokens": leaning.tokens,
        "temperature": round(leaning.temperature, 4),
        "log_likelihood": round(leaning.log_likelihood / max(1, leaning.tokens), 4),
    }
    return found
