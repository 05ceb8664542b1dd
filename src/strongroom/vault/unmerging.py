"""An adapter that was merged into weights (spec/mark.md, section 4): what a suspect adds to a version of the room is
split into factors like the adapter's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from strongroom.formats.tensors import DTYPES, TensorInfo
from strongroom.marking.align import ALIKE, as_matrix, cosine, normalised
from strongroom.vault.comparison import Comparison
from strongroom.vault.originals import Originals, Placed
from strongroom.vault.suspect import Suspect, SuspectTensor, numbers_of, weights_of

_FACTOR = re.compile(r"(.+)\.lora(?:_A|_down|\.down)((?:\.[^.]+)?\.weight)", re.ASCII)
_OTHER = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
Matrix = NDArray[np.float32]


class Unmerged(Suspect):
    """Factors that a suspect's weights come to, under the names of the adapter's tensors."""

    def __init__(self, found: Mapping[str, tuple[SuspectTensor, Matrix]]) -> None:
        self.tensors = {name: tensor for name, (tensor, _) in found.items()}
        self._values = {name: values.reshape(-1) for name, (_, values) in found.items()}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Matrix:
        """As `Suspect.read`."""
        return self._values[name][begin:end]


def is_adapter(originals: Originals) -> bool:
    """Whether a version has factors that could have been merged into other weights."""
    return next(_pairs(originals), None) is not None


def unmerged(adapter: Originals, base: Comparison) -> Unmerged | None:
    """The factors of `adapter` as they are in the suspect of `base`, which is compared with other weights of the room:
    with D what it adds to them, B⁺ D for A, and D A⁺ for B. None where the first of them is not like the adapter's."""
    found: dict[str, tuple[SuspectTensor, Matrix]] = {}
    for target, first, second in _pairs(adapter):
        added = base.added(target)
        if added is None:
            continue
        difference, partner = added
        a, b = _read(adapter, first), _read(adapter, second)
        if difference.shape != (len(b), a.shape[1]):
            difference = difference.T
        if difference.shape != (len(b), a.shape[1]) or len(a) != b.shape[1] or not (a.any() and b.any()):
            continue
        mine = np.asarray(np.linalg.pinv(b) @ difference, np.float32)
        if not found and cosine(a, mine) < ALIKE:
            return None
        theirs = np.asarray(difference @ np.linalg.pinv(a), np.float32)
        for each, values in ((first, mine), (second, theirs)):
            found[each.info.name] = SuspectTensor(_info(each), partner.file), values
    return Unmerged(found) if found else None


def _pairs(originals: Originals) -> Iterator[tuple[str, Placed, Placed]]:
    """The name of the weights that each pair of factors is for, and both."""
    named = {each.info.name: each for each in originals.tensors() if each.marked and len(each.info.shape) == 2}
    for name, each in named.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        for ours, others in _OTHER.items():
            other = named.get(name.replace(f".{ours}", f".{others}"))
            if other is not None and other is not each:
                yield normalised(f"{match[1]}.weight"), each, other
                break


def _read(originals: Originals, each: Placed) -> Matrix:
    # Zero for what is no weight: of such a matrix nobody can take the inverse.
    found = np.nan_to_num(weights_of(numbers_of(originals.read(each.begin, each.end), each.info.dtype)), nan=0.0)
    return as_matrix(found, each.info.shape)


def _info(each: Placed) -> TensorInfo:
    info = each.info
    dtype = info.dtype if info.dtype.block == 1 else DTYPES["F32"]
    return TensorInfo(info.name, dtype, info.shape, 0, info.elements * dtype.block_bytes)
