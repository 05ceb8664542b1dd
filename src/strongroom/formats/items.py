"""Where in a tensor the numbers are that carry a mark (spec/container.md, section 3): elements, or blocks' scales."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Item(NamedTuple):
    """An element of a markable type: `bytes` in all, from one to the next, that hold `weights` weights. What is marked
    of it are `fields` numbers of `width` bytes from byte `at`."""

    bytes: int
    width: int
    weights: int = 1
    at: int = 0
    fields: int = 1

    @property
    def is_block(self) -> bool:
        return self.weights > 1

    @property
    def alignment(self) -> int:
        """What a tensor's first byte has to be a multiple of: then no segment cuts what is marked."""
        return 4 if self.is_block else self.width

    def within(self, low: int, high: int) -> tuple[int, int]:
        """The elements, from and to, whose marked numbers begin in bytes `low` to `high` of a tensor, or of tensors of
        one type that touch each other."""
        return -(-(low - self.at) // self.bytes), -(-(high - self.at) // self.bytes)


def _block(weights: int, size: int, at: int = 0, fields: int = 1) -> Item:
    return Item(size, 2, weights, at, fields)


# Not ternary ones, TQ1_0 and TQ2_0: a tensor of them has one scale in all its blocks, so the commonest is the original.
ITEMS: Mapping[str, Item] = MappingProxyType(
    {
        "BF16": Item(2, 2),
        "F16": Item(2, 2),
        "F32": Item(4, 4),
        "F64": Item(8, 8),
        "Q4_0": _block(32, 18),
        "Q4_1": _block(32, 20, fields=2),
        "Q5_0": _block(32, 22),
        "Q5_1": _block(32, 24, fields=2),
        "Q8_0": _block(32, 34),
        "Q2_K": _block(256, 84, 80, fields=2),
        "Q3_K": _block(256, 110, 108),
        "Q4_K": _block(256, 144, fields=2),
        "Q5_K": _block(256, 176, fields=2),
        "Q6_K": _block(256, 210, 208),
        "IQ2_XXS": _block(256, 66),
        "IQ2_XS": _block(256, 74),
        "IQ2_S": _block(256, 82),
        "IQ3_XXS": _block(256, 98),
        "IQ3_S": _block(256, 110),
        "IQ1_S": _block(256, 50),
        "IQ4_NL": _block(32, 18),
        "IQ4_XS": _block(256, 136),
    }
)
