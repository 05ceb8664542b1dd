"""The numbers that a mark lives in: the integers of an element type, their values, and one step of them.

Spec/mark.md, sections 2 and 5. A step is one bf16 unit in the last place, relative to the element, whatever its type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


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


STEPS = {
    "BF16": Step(np.dtype("<u2"), 1, 0x0080, 0x7F7F),
    "F16": Step(np.dtype("<u2"), 8, 0x0400, 0x7BFF),
    "F32": Step(np.dtype("<u4"), 1 << 16, 0x0080_0000, 0x7F7F_FFFF),
    "F64": Step(np.dtype("<u8"), 1 << 45, 0x0010_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF),
}
_EXPONENT = np.uint32(0x7F80_0000)
_ULP = np.float32(2.0**-7)


def values(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """float32 of the same shape: the values of integers of element type `dtype`."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    floats = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    with np.errstate(over="ignore"):  # an F64 beyond float32 is infinite, and says nothing
        return bits.view(floats[dtype]).astype(np.float32)


def ulps(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 of the same shape: one bf16 unit in the last place of each number, 0 for those below normal."""
    exponents = (numbers.view(np.uint32) & _EXPONENT).view(np.float32)
    steps: NDArray[np.float32] = exponents * _ULP
    return steps
