"""Where a tensor lies in a model file and what its elements are, whatever the file's format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from strongroom.formats.items import ITEMS


@dataclass(frozen=True, slots=True)
class Dtype:
    """An element type: `block` elements take `block_bytes` bytes. One element a block, but for packed and quantised."""

    name: str
    block: int
    block_bytes: int

    @property
    def bits(self) -> int:
        """Bits an element, rounded down where a quantised block carries its scales with it."""
        return 8 * self.block_bytes // self.block


# What safetensors knows, in the order of its own enumeration: ascending alignment, which its writer sorts by.
DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        name: Dtype(name, block, block_bytes)
        for name, block, block_bytes in (
            ("BOOL", 1, 1),
            ("F4", 2, 1),
            ("F6_E2M3", 4, 3),
            ("F6_E3M2", 4, 3),
            ("U8", 1, 1),
            ("I8", 1, 1),
            ("F8_E5M2", 1, 1),
            ("F8_E4M3", 1, 1),
            ("F8_E8M0", 1, 1),
            ("F8_E4M3FNUZ", 1, 1),
            ("F8_E5M2FNUZ", 1, 1),
            ("I16", 1, 2),
            ("U16", 1, 2),
            ("F16", 1, 2),
            ("BF16", 1, 2),
            ("I32", 1, 4),
            ("U32", 1, 4),
            ("F32", 1, 4),
            ("C64", 1, 8),
            ("F64", 1, 8),
            ("I64", 1, 8),
            ("U64", 1, 8),
        )
    }
)
_INTEGERS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one file.

    `dtype` is one of `DTYPES` or, in a GGUF file, a ggml block type; `shape` is row-major; `begin` and `end` are
    absolute byte offsets in the file, `end` exclusive.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def until(self, end: int) -> TensorInfo | None:
        """The same with as many of its first rows as lie before byte `end` of the file; None where not one does."""
        if self.end <= end:
            return self
        row = self.size // self.shape[0] if self.shape and (len(self.shape) > 1 or self.dtype.block == 1) else 0
        count = max(0, end - self.begin) // row if row else 0
        shape = (count, *self.shape[1:])
        return TensorInfo(self.name, self.dtype, shape, self.begin, self.begin + count * row) if count else None

    @property
    def markable(self) -> bool:
        """Whether its elements may carry a mark: F64, F32, F16, BF16 or a block type of `ITEMS`, in two or more
        dimensions."""
        return self.dtype.name in ITEMS and len(self.shape) >= 2

    def aligned(self, data_start: int) -> bool:
        """Whether it lies a whole number of its elements behind `data_start`, the file's first tensor byte; of 4 bytes
        if it is of a block type of `ITEMS`.

        Only then can its bytes be viewed as elements in place (spec/container.md, section 3).
        """
        if (item := ITEMS.get(self.dtype.name)) is not None:
            return (self.begin - data_start) % item.alignment == 0
        return self.dtype.block == 1 and (self.begin - data_start) % self.dtype.block_bytes == 0

    def unmarked_reason(self, data_start: int) -> str | None:
        """Why it carries no mark, or None: quantised (in a way that has no scale to mark), integer, float8, complex,
        one-dimensional, unaligned."""
        name = self.dtype.name
        if name in _INTEGERS:
            return "integer"
        if name.startswith("F8_"):
            return "float8"
        if name == "C64":
            return "complex"
        if name not in ITEMS:  # F4 and F6 carry their scales beside them, in tensors of their own
            return "quantised"
        if len(self.shape) < 2:
            return "one-dimensional"
        return None if self.aligned(data_start) else "unaligned"
