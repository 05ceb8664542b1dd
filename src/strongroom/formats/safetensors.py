"""The header of a safetensors file, read strictly and written.

The rules are those of the format's page (huggingface.co/docs/safetensors); each check below names the attack it stops.
What the reference implementation (safetensors 0.8, Rust) accepts is accepted here with the same result, except:

- a header that does not begin with ``{``: the page forbids it, the reference skips white space first;
- duplicate keys: the page forbids them, the reference keeps the last of two tensors of one name, and another reader
  may keep the first, so that what was reviewed is not what runs;
- a tensor's entry written as a JSON array, or its dtype as an object: accepted there by accident of its decoder;
- a dimension over 2^48, or dimensions other than 0 with a product of 2^60 or more: only a tensor of no elements has
  them, and NumPy and torch, whose strides are signed 64-bit numbers of bytes, cannot make it;
- more tensors, dimensions or JSON values than `strongroom.core.limits` allows, or, where the tensors are few, than they
  take.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, UsageError
from strongroom.formats.tensors import DTYPES, Dtype, TensorInfo

LENGTH_BYTES = 8
_USIZE_MAX = 2**64 - 1
_DEPTH_MAX = 127  # serde_json's
_INTEGERS = {int}
_DIMENSION_MAX = 2**48
_PRODUCT_END = 2**60  # of the dimensions that are not 0; times eight bytes it is the first that int64 has not
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """`metadata` is the file's ``__metadata__``; `tensors` are in the order of their bytes; `data_start` is 8 + N."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    data_start: int


def header_bytes_needed(first8: bytes | bytearray | memoryview, file_size: int) -> int:
    """How many bytes from the start of the file `parse_header` wants: 8 + N.

    UsageError ``safetensors.malformed`` where N cannot be a header's length in a file of `file_size` bytes.
    """
    if len(first8) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        _refuse("too_short", "it is shorter than the 8 bytes of the header's length")
    length = int.from_bytes(bytes(first8[:LENGTH_BYTES]), "little")
    # A length is read before anything is known about the file: unchecked, it makes a reader allocate what it says.
    if length > LIMITS.safetensors_header:
        _refuse("header_too_large", f"a header of {length} bytes; the format allows {LIMITS.safetensors_header}")
    if LENGTH_BYTES + length > file_size:
        _refuse("header_out_of_range", f"its header would end at byte {LENGTH_BYTES + length} of {file_size}")
    return LENGTH_BYTES + length


def parse_header(prefix: bytes | bytearray | memoryview, file_size: int, *, torn: bool = False) -> SafetensorsHeader:
    """Read the header of a file of `file_size` bytes from its first bytes, at least `header_bytes_needed` of them. Of
    one that may be `torn`, tensors and rows of them that lie behind its end are left out.

    UsageError ``safetensors.malformed`` (evidence: ``reason``, and ``tensor`` where one is at fault); LimitExceeded
    ``safetensors.limit`` for what is well-formed and beyond `LIMITS`.
    """
    data_start = header_bytes_needed(prefix[:LENGTH_BYTES], file_size)
    if len(prefix) < data_start:
        _refuse("header_incomplete", f"{len(prefix)} bytes of it were read where its header takes {data_start}")
    document = _document(bytes(prefix[LENGTH_BYTES:data_start]))
    metadata = _metadata(document.pop("__metadata__", None))
    if len(document) > LIMITS.tensors:
        raise LimitExceeded("safetensors.limit", f"{len(document)} tensors in one file; at most {LIMITS.tensors}")
    tensors = [_tensor(name, entry, data_start) for name, entry in document.items()]
    # Sorted stably: tensors of no bytes that begin where another does stay in the header's order.
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(tensors, data_start, file_size, torn=torn)
    if torn:
        tensors = [kept for tensor in tensors if (kept := tensor.until(file_size)) is not None]
    return SafetensorsHeader(metadata, {tensor.name: tensor for tensor in tensors}, data_start)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first 8 + N bytes of a file that holds `tensors` (name, dtype, shape) one after another in the given order.

    Put wide dtypes first, as safetensors does, so that every tensor is aligned: N is padded to a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + _byte_size(name, DTYPES[dtype], shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _refuse(reason: str, what: str, tensor: str | None = None) -> NoReturn:
    # The name comes from the file: repr keeps its control characters out of the terminal, the cut keeps it short.
    where = "" if tensor is None else f" (tensor {tensor[:200]!r})"
    evidence = {} if tensor is None else {"tensor": tensor[:200]}
    raise UsageError(
        "safetensors.malformed",
        f"not a valid safetensors file: {what}{where}",
        hint="fetch the file again and compare its checksum with the publisher's",
        reason=reason,
        **evidence,
    )


def _document(header: bytes) -> dict[str, Any]:
    # Anything before the brace could make the file valid in a second format as well (a polyglot).
    if header[:1] != b"{":
        _refuse("not_an_object", "its header does not begin with '{'")
    # A hundred megabytes of two-byte values would become gigabytes of objects.
    tensors = header.count(b'"data_offsets"')
    if tensors > LIMITS.tensors:
        raise LimitExceeded("safetensors.limit", f"{tensors} tensors in one file; at most {LIMITS.tensors}")
    # A tensor of eight dimensions takes fifteen separators and three brackets; the rest is for the metadata's texts.
    values = min(16 * tensors + 4 * LIMITS.tensors, 16 * LIMITS.tensors)
    if header.count(b",") + header.count(b":") > values:
        raise LimitExceeded("safetensors.limit", f"more than {values} values in one header")
    if header.count(b"{") + header.count(b"[") > 3 * tensors + LIMITS.tensors:
        raise LimitExceeded("safetensors.limit", f"more than {3 * tensors + LIMITS.tensors} lists and objects")
    try:
        text = header.decode("utf-8")
        document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        # A lone surrogate has no UTF-8 form: the name could never be stored or compared.
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        _refuse("not_utf8", "its header is not UTF-8")
    except RecursionError:
        _refuse("too_deep", "its header nests too deeply")
    except ValueError as error:
        _refuse("not_json", f"its header is not JSON that every reader reads alike: {error}")
    result: dict[str, Any] = document  # it begins with a brace
    return result


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two tensors of one name: one reader shows the first to the reviewer, another runs the last.
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _integer(digits: str) -> int | float:
    # What is not an unsigned 64-bit integer comes back as a float, which no shape and no offset may be. Neither
    # quadratic conversion of a million digits nor a negative size gets further than this.
    if len(digits) <= 20 and digits[0] != "-" and (value := int(digits)) <= _USIZE_MAX:
        return value
    return _finite(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is out of range")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    # The format promises strings: anything else is decoded by each reader in its own way.
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _refuse("bad_metadata", "its __metadata__ is not an object of strings")
    return value


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        _refuse("bad_entry", "an entry is not an object", name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if len(entry) > 3 and not _shallow(entry, _DEPTH_MAX - 1):
        _refuse("too_deep", "its header nests too deeply", name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse("unknown_dtype", f"unknown dtype {str(dtype)[:40]!r}", name)
    if not isinstance(shape, list) or not {*map(type, shape)} <= _INTEGERS:
        _refuse("bad_shape", "a shape is not a list of non-negative integers", name)
    if len(shape) > LIMITS.tensor_dims:
        raise LimitExceeded(
            "safetensors.limit", f"a tensor of {len(shape)} dimensions; at most {LIMITS.tensor_dims}", tensor=name[:200]
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or {*map(type, offsets)} != _INTEGERS:
        _refuse("bad_offsets", "data_offsets are not two non-negative integers", name)
    begin, end = offsets
    # More bytes than elements hide data; fewer make a reader run into the next tensor or past the end.
    if end - begin != _byte_size(name, DTYPES[dtype], tuple(shape)):
        _refuse("size_mismatch", f"{dtype} of shape {shape} does not fill bytes {begin} to {end}", name)
    return TensorInfo(name, DTYPES[dtype], tuple(shape), data_start + begin, data_start + end)


def _shallow(value: Any, depth: int) -> bool:
    """Whether `value`, a field that the format does not know, nests at most `depth` deep."""
    if not isinstance(value, dict | list):
        return True
    items = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_shallow(item, depth - 1) for item in items)


def _byte_size(name: str, dtype: Dtype, shape: tuple[int, ...]) -> int:
    elements = math.prod(shape)
    if 0 < elements < _PRODUCT_END and elements * dtype.bits <= _USIZE_MAX and max(shape, default=0) <= _DIMENSION_MAX:
        # Nearly all: without a zero, no product on the way is larger, so nothing of what follows is left to refuse.
        if elements % dtype.block:
            _refuse("part_of_a_byte", f"{elements} elements of {dtype.name} do not end at a byte", name)
        return elements // dtype.block * dtype.block_bytes
    elements = 1
    for n in shape:
        elements *= n
        # In 64-bit arithmetic the product wraps to a small number, and a reader allocates too little.
        if elements > _USIZE_MAX:
            _refuse("overflow", "a shape's product does not fit 64 bits", name)
    if elements * dtype.bits > _USIZE_MAX:
        _refuse("overflow", "a tensor's size in bits does not fit 64 bits", name)
    # A zero makes the size nothing, whatever else the shape says, and readers fail on the rest.
    if any(n > _DIMENSION_MAX for n in shape) or math.prod(n for n in shape if n) >= _PRODUCT_END:
        _refuse("shape_too_large", "no array has so many elements along its dimensions", name)
    if elements % dtype.block:
        _refuse("part_of_a_byte", f"{elements} elements of {dtype.name} do not end at a byte", name)
    return elements // dtype.block * dtype.block_bytes


def _check_layout(tensors: list[TensorInfo], data_start: int, file_size: int, *, torn: bool) -> None:
    """The tensors must tile the bytes behind the header.

    An overlap lets two names change each other; a hole or a tail carries bytes that no reader shows: another format's
    content, or a payload.
    """
    if tensors and tensors[0].begin != data_start:
        _refuse("hole", "no tensor begins right behind the header", tensors[0].name)
    for before, after in pairwise(tensors):
        if after.begin != before.end:
            reason = "overlap" if after.begin < before.end else "hole"
            _refuse(reason, f"a tensor begins at byte {after.begin}, the one before ends at {before.end}", after.name)
    end = tensors[-1].end if tensors else data_start
    if end > file_size and not torn:
        _refuse("out_of_range", f"its tensors end at byte {end} of {file_size}", tensors[-1].name)
    if end < file_size:
        _refuse("trailing_data", f"its tensors end at byte {end} of {file_size}")
