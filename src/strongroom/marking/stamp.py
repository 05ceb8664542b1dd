"""The personal stamp of a plaintext copy (spec/mark.md, section 2; layer 2 of the mark).

Spread spectrum in integers: each element of each large tensor moves by a chip between −4 and 4 bf16 units in the last
place, which the version's stamp key, the holder and the tensor's place draw. Nothing of a copy has to be kept to write
it again, or to look for it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.crypto.keys import derive, keystream, scattered_keystream
from strongroom.marking.elements import step_of

_LEAST, _LEAST_OF_ADAPTER = 16_384, 256  # elements: a smaller tensor carries no stamp
_ADAPTER = re.compile(r"(?:^|\.)lora(?:_embedding)?(?:_[ABab]|[_.]up|[_.]down)(?:\.|$)")  # part of one, by its name
BLOCK = 16  # elements whose chips are one block of the cipher
_CACHED = 1 << 17  # elements at a time: what is worked on stays in the cache


def large_enough(name: str, elements: int) -> bool:
    """Whether a tensor carries a stamp by its size. Adapters are all small tensors, and all that leaves of them."""
    return elements >= (_LEAST_OF_ADAPTER if of_adapter(name) else _LEAST)


def of_adapter(name: str) -> bool:
    """Whether a tensor is part of an adapter, by its name."""
    return _ADAPTER.search(name) is not None


def tensor_tag(begin: int) -> bytes:
    """The 8 bytes that make a tensor's chips its own: the byte of the image where it begins.

    Not its content: whoever may put weights could then have an innocent's chips drawn for a tensor of theirs, and equal
    tensors would have equal chips, which no bound on sums of independent ones allows."""
    return begin.to_bytes(8, "big")


def stamp_blocks(tag: bytes, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """uint8 (n, 16): what names blocks of 16 elements, by their numbers, of the tensor of this tag."""
    named = np.empty((len(numbers), BLOCK), np.uint8)
    named[:, :8] = np.frombuffer(tag, np.uint8)
    named[:, 8:] = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
    return named


def stampable(bits: NDArray[Any], dtype: str) -> NDArray[np.bool_]:
    """Bool of the same shape: which original elements (integers of type `dtype`) a stamp moves."""
    return step_of(dtype).stampable(bits)


class Stamp:
    """The stamp of one holder on one version."""

    def __init__(self, stamp_key: bytes, holder: str) -> None:
        self._key = derive(stamp_key, "holder", holder.encode())

    def chips(self, tag: bytes, first: int, count: int) -> NDArray[np.int8]:
        """int8 (count,): the chips of elements `first` and on, of the tensor of this tag."""
        skip = first % 16
        stream = keystream(self._key, skip + count, offset=first - skip, nonce=tag)
        ones = np.bitwise_count(np.frombuffer(stream, np.uint8, offset=skip))
        ones -= np.uint8(4)
        return ones.view(np.int8)

    def chips_of(self, blocks: bytes) -> NDArray[np.int8]:
        """int8 (16 n,): the chips of the n blocks of 16 elements that `stamp_blocks` has named, wherever they are."""
        ones = np.bitwise_count(np.frombuffer(scattered_keystream(self._key, blocks), np.uint8))
        ones -= np.uint8(4)
        return ones.view(np.int8)

    def apply(self, dtype: str, tag: bytes, first: int, original: NDArray[Any], copy: NDArray[Any]) -> None:
        """Stamp `copy` in place: integers of a run of elements of a tensor, from its element `first` on, as `integers`
        gives them; `original` has the same elements without any mark, and is `copy` itself where that has none."""
        step = step_of(dtype)
        signed = f"<i{step.integer.itemsize}"
        at = 0
        while at < len(copy):
            # Up to a multiple of BLOCK, so that only the first block of chips is drawn in part.
            end = min(len(copy), at + _CACHED - (first + at) % BLOCK)
            chips, here = self.chips(tag, first + at, end - at), original[at:end]
            if copy.ndim > 1:  # the fields of a block have the chip of the block
                chips = np.repeat(chips[:, None], copy.shape[1], axis=1)
            chips *= stampable(here, dtype).view(np.int8)
            moves = chips.astype(signed)
            if step.q > 1:
                moves *= np.asarray(step.sizes(here)).astype(signed)
            # Magnitudes move, whatever the sign: its bit is never reached.
            copy[at:end] += moves.view(step.integer)
            at = end
