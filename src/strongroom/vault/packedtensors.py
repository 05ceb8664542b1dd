"""Tensors of a found model that compressed-tensors has packed, put together again (spec/release.md, section 5, *Reading
one back*): codes, scales and a shape that fit each other are a tensor; any others stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from strongroom.formats.tensors import Dtype, TensorInfo
from strongroom.marking.elements import STEPS

_PACKED = ("_packed", "_scale", "_shape")
_WIDTHS = (4, 8)  # bits of a code
LARGEST = 1 << 20  # elements of a group: whatever is read of a tensor, its groups are


@dataclass(frozen=True)
class Packing:
    """Of how many bits the codes are, how many of them have a scale, and the tensors that they and the scales are."""

    bits: int
    group: int
    codes: TensorInfo
    scales: TensorInfo


def put_together(
    tensors: Mapping[str, TensorInfo], shape_of: Callable[[str], tuple[int, ...]]
) -> Iterator[tuple[tuple[str, str, str], TensorInfo, Packing]]:
    """Each tensor that three of `tensors` are, and by which names: of the codes, the scales and the shape. `shape_of`
    reads what a tensor of two integers says; it is as little believed as all else."""
    for name, codes in tensors.items():
        stem = name.removesuffix(_PACKED[0])
        three = (name, stem + _PACKED[1], stem + _PACKED[2])
        scales, shape = (tensors.get(each) for each in three[1:])
        if stem == name or scales is None or shape is None:
            continue
        kinds = (codes.dtype.name, shape.dtype.name, shape.shape)
        if kinds != ("I32", "I64", (2,)) or scales.dtype.name not in STEPS:
            continue
        if len(codes.shape) != 2 or len(scales.shape) != 2 or not codes.elements or not scales.elements:
            continue
        (rows, words), (rows_of_scales, groups) = codes.shape, scales.shape
        said = shape_of(three[2])
        for bits in _WIDTHS:
            columns = words * 32 // bits
            whole = columns % groups == 0 and columns // groups * bits % 8 == 0 and columns // groups <= LARGEST
            if said == (rows, columns) and rows_of_scales == rows and whole:
                info = TensorInfo(stem, Dtype(f"I{bits} packed", 32 // bits, 4), said, codes.begin, codes.end)
                yield three, info, Packing(bits, columns // groups, codes, scales)
