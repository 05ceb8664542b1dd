"""The numbers that a mark lives in: the integers of an element type, their values, and one step of them.

Spec/container.md, sections 3 and 7; spec/mark.md, sections 2 and 5. A step is one bf16 unit in the last place, relative
to the element, whatever its type. Of a block of quantised weights its scale fields are what is marked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strongroom.formats.items import ITEMS

PRUNED = 0.02  # the share of zeros from which on a leak's zeros say nothing


class Step(NamedTuple):
    """How one element type is marked: unsigned integer type, step q, and the least and greatest normal magnitude."""

    integer: Any
    q: int
    least: int
    most: int

    @property
    def sign_bit(self) -> int:
        return 1 << (8 * int(self.integer.itemsize) - 1)

    def magnitudes(self, bits: NDArray[Any]) -> NDArray[Any]:
        """The integers without their sign bit."""
        kept: NDArray[Any] = bits & self.integer.type(self.sign_bit - 1)
        return kept

    def markable(self, bits: NDArray[Any]) -> NDArray[np.bool_]:
        """Bool of the same shape: which elements can move by a step and stay normal numbers."""
        number, magnitude = self.integer.type, self.magnitudes(bits)
        can: NDArray[np.bool_] = (magnitude >= number(self.least + self.q)) & (magnitude <= number(self.most - self.q))
        return can

    def stampable(self, bits: NDArray[Any]) -> NDArray[np.bool_]:
        """Bool of the same shape: which original elements a stamp moves."""
        # Twice the least normal magnitude, and half an octave below the greatest: a chip and a step of layer 1 together
        # never carry into the sign, and never leave the normal numbers.
        octave, magnitude = self.integer.type(self.least), self.magnitudes(bits)
        magnitude -= 2 * octave  # what is less than that wraps round, and is far too large: one comparison says both
        can: NDArray[np.bool_] = magnitude < self.integer.type(self.most + 1) - 3 * octave
        return can

    def sizes(self, bits: NDArray[Any]) -> NDArray[Any] | Any:  # noqa: ARG002 - the same for all elements
        """q, of each element where it is not the same for all."""
        return self.integer.type(self.q)


class ScaleStep(Step):
    """How the scale field of a block is marked. It is often denormal, which F16 weights worth a mark are not: there a
    step is smaller, and still one bf16 unit of the value."""

    def markable(self, bits: NDArray[Any]) -> NDArray[np.bool_]:
        return self._between(bits, self.most - self.q)

    def stampable(self, bits: NDArray[Any]) -> NDArray[np.bool_]:
        return self._between(bits, self.most - 0x0400)

    def sizes(self, bits: NDArray[Any]) -> NDArray[Any]:
        magnitude, one = self.magnitudes(bits), self.integer.type
        # 1, 2, 4 and 8: doubled at each power of two up to the least normal number.
        doublings = np.zeros_like(magnitude)
        for power in (0x0100, 0x0200, 0x0400):
            doublings += magnitude >= one(power)
        sizes: NDArray[Any] = np.left_shift(one(1), doublings)
        return sizes

    def _between(self, bits: NDArray[Any], most: int) -> NDArray[np.bool_]:
        magnitude, one = self.magnitudes(bits), self.integer.type
        can: NDArray[np.bool_] = (magnitude >= one(self.least)) & (magnitude <= one(most))
        return can


STEPS = {
    "BF16": Step(np.dtype("<u2"), 1, 0x0080, 0x7F7F),
    "F16": Step(np.dtype("<u2"), 8, 0x0400, 0x7BFF),
    "F32": Step(np.dtype("<u4"), 1 << 16, 0x0080_0000, 0x7F7F_FFFF),
    "F64": Step(np.dtype("<u8"), 1 << 45, 0x0010_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF),
}
SCALE = ScaleStep(np.dtype("<u2"), 8, 0x0080, 0x7BFF)
_EXPONENT = np.uint32(0x7F80_0000)
_SIGNED_EXPONENT = np.uint32(0xFF80_0000)
_ULP = np.float32(2.0**-7)


def step_of(dtype: str) -> Step:
    """How elements of a markable type are marked."""
    return STEPS.get(dtype, SCALE)


def integers(dtype: str, data: Any, begin: int, first: int, stop: int) -> NDArray[Any]:
    """Elements `first` to `stop` of a tensor that begins at byte `begin` of `data` (less than 0 if before it): unsigned
    integers (n,), of a block type its scale fields (n, fields). A view, which writes where `data` can be written."""
    item, integer = ITEMS[dtype], step_of(dtype).integer
    if not item.is_block:
        return np.frombuffer(data, integer, stop - first, begin + first * item.bytes)
    if first >= stop:
        return np.empty((0, item.fields), integer)
    at = begin + first * item.bytes + item.at
    return np.ndarray((stop - first, item.fields), integer, data, at, (item.bytes, item.width))


def values(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """float32 of the same shape: the values of integers of element type `dtype`, or of a block's scale fields."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    floats = {"F32": "<f4", "F64": "<f8"}
    with np.errstate(over="ignore"):  # an F64 beyond float32 is infinite, and says nothing
        return bits.view(floats.get(dtype, "<f2")).astype(np.float32)


def ulps(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 of the same shape: one bf16 unit in the last place of each number, 0 for those below normal."""
    exponents = (numbers.view(np.uint32) & _EXPONENT).view(np.float32)
    steps: NDArray[np.float32] = exponents * _ULP
    return steps


def signed_ulps(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same with the sign of each number: which way its magnitude grows."""
    steps: NDArray[np.float32] = (numbers.view(np.uint32) & _SIGNED_EXPONENT).view(np.float32)
    steps *= _ULP
    return steps
