"""The header of a NumPy array file, read through a callback and never trusted: no pickle in it is ever loaded.

Source: numpy.lib.format, versions 1 to 3.
"""

from __future__ import annotations

import ast
import math
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from strongroom.errors import UsageError
from strongroom.formats.tensors import DTYPES, TensorInfo

MAGIC = b"\x93NUMPY"
_HEADER_MAX = 10_000  # bytes; numpy itself believes no longer one
_DIMENSIONS_MAX = 64
# Of what numpy calls them; "V2" is how arrays of ml_dtypes' bfloat16 are saved, and nothing else that weights are.
_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "<f2": "F16",
        "<f4": "F32",
        "<f8": "F64",
        "<V2": "BF16",
        "|V2": "BF16",
        "|i1": "I8",
        "|u1": "U8",
        "<i2": "I16",
        "<u2": "U16",
        "<i4": "I32",
        "<u4": "U32",
        "<i8": "I64",
    }
)


def parse_npy(name: str, read: Callable[[int, int], bytes], size: int) -> TensorInfo:
    """The array in `size` bytes, of which ``read(offset, count)`` returns some; `name` is what it is to be called. One
    in Fortran's order is its own transpose here. Offsets are those of `read`.

    UsageError ``npy.malformed``, ``npy.unsupported`` (objects, structures, big-endian numbers).
    """
    start = read(0, 12)
    if not start.startswith(MAGIC) or len(start) < 12:
        _malformed(name, "it does not begin as an array of NumPy's does")
    major = start[6]
    if major not in (1, 2, 3):
        _malformed(name, f"its format has the version {major}")
    wide = major > 1
    (length,) = struct.unpack("<I", start[8:12]) if wide else struct.unpack("<H", start[8:10])
    begin = (12 if wide else 10) + length
    if length > _HEADER_MAX or begin > size:
        _malformed(name, "its header is longer than one is")
    order, dtype, shape = _described(name, read(begin - length, length))
    if dtype not in _TYPES:
        raise UsageError(
            "npy.unsupported",
            f"{name!r:.200} has elements of {dtype!r:.40}, which are no numbers of a kind that weights are made of",
            hint="save it as little-endian floats, with allow_pickle=False",
        )
    kind = DTYPES[_TYPES[dtype]]
    end = begin + math.prod(shape) * kind.block_bytes
    if end > size:
        _malformed(name, f"it is said to have {math.prod(shape)} elements, which is more than there are")
    return TensorInfo(name, kind, tuple(reversed(shape)) if order else shape, begin, end)


def _described(name: str, header: bytes) -> tuple[bool, str, tuple[int, ...]]:
    """Fortran's order, the type, the shape."""
    try:
        value: Any = ast.literal_eval(header.decode("utf-8").strip())
        order, dtype, shape = value["fortran_order"], value["descr"], value["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError, UnicodeDecodeError):
        _malformed(name, "its header can't be read")
    if not isinstance(order, bool) or not isinstance(shape, tuple) or len(shape) > _DIMENSIONS_MAX:
        _malformed(name, "its header says nothing that makes sense")
    if not all(type(each) is int and 0 <= each < 1 << 48 for each in shape):
        _malformed(name, "its shape is none")
    return order, dtype if isinstance(dtype, str) else "a structure", shape


def _malformed(name: str, what: str) -> NoReturn:
    raise UsageError("npy.malformed", f"{name!r:.200}: {what}", hint="it is damaged, or no array: leave it out")
