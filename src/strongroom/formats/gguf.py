"""The header of a GGUF file (versions 2 and 3, little-endian), read through a callback and never trusted.

Source: ggml's docs/gguf.md. A count, a length or an offset in the file is only believed once the file is known to have
room for what it announces, so that no header makes its reader allocate or loop beyond its own size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NoReturn

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, UsageError
from strongroom.formats.tensors import Dtype, TensorInfo

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_ALIGNMENT_MAX = 1 << 20
_CHUNK = 1 << 20
_NAME_MAX = 65_535  # what the format allows a key; ggml itself stops at 63 for tensors
_ARRAY_DEPTH = 4
_ITEMS_MAX = LIMITS.gguf_metadata // 8  # values in all arrays together: a string takes eight bytes at least
_PAIRS_MAX = 65_536  # real files have some dozens
_DIMENSION_MAX = 2**48
_PRODUCT_END = 2**60  # of the dimensions that are not 0; times eight bytes it is the first that int64 has not

GgufValue = int | float | bool | str | bytes | tuple["GgufValue", ...]

# By ggml's type number; those that are missing were withdrawn by ggml.
# F32, F16, BF16, F64 and the integers have the same names in safetensors.
GGML_TYPES: Mapping[int, Dtype] = MappingProxyType(
    {
        0: Dtype("F32", 1, 4),
        1: Dtype("F16", 1, 2),
        2: Dtype("Q4_0", 32, 18),
        3: Dtype("Q4_1", 32, 20),
        6: Dtype("Q5_0", 32, 22),
        7: Dtype("Q5_1", 32, 24),
        8: Dtype("Q8_0", 32, 34),
        9: Dtype("Q8_1", 32, 40),
        10: Dtype("Q2_K", 256, 84),
        11: Dtype("Q3_K", 256, 110),
        12: Dtype("Q4_K", 256, 144),
        13: Dtype("Q5_K", 256, 176),
        14: Dtype("Q6_K", 256, 210),
        15: Dtype("Q8_K", 256, 292),
        16: Dtype("IQ2_XXS", 256, 66),
        17: Dtype("IQ2_XS", 256, 74),
        18: Dtype("IQ3_XXS", 256, 98),
        19: Dtype("IQ1_S", 256, 50),
        20: Dtype("IQ4_NL", 32, 18),
        21: Dtype("IQ3_S", 256, 110),
        22: Dtype("IQ2_S", 256, 82),
        23: Dtype("IQ4_XS", 256, 136),
        24: Dtype("I8", 1, 1),
        25: Dtype("I16", 1, 2),
        26: Dtype("I32", 1, 4),
        27: Dtype("I64", 1, 8),
        28: Dtype("F64", 1, 8),
        29: Dtype("IQ1_M", 256, 56),
        30: Dtype("BF16", 1, 2),
        34: Dtype("TQ1_0", 256, 54),
        35: Dtype("TQ2_0", 256, 66),
        39: Dtype("MXFP4", 32, 17),
        40: Dtype("NVFP4", 64, 36),
        41: Dtype("Q1_0", 128, 18),
    }
)
# What llama.cpp calls tensors of LLaMA-shaped models, and what transformers does; of a layer, or of the whole model.
LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "embed_tokens",
        "output": "lm_head",
        "output_norm": "norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
)
# Value type number: struct code. 7 is BOOL, 8 STRING, 9 ARRAY.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What precedes the tensors' bytes.

    `metadata` maps keys to int, float, bool, str or (nested) tuples of them; a string that is not UTF-8, as in some
    tokenizers, is given as bytes. `tensors` are in the order of their bytes, shapes row-major (the file has them
    reversed). `data_start` is the offset of the data section, a multiple of `alignment`,
    or the file's end where there is no tensor. `entries` says at which byte the type's number of each tensor is (u32;
    its offset, u64, follows), `file_type` where that of the whole file is (u32), 0 if it has none.
    """

    version: int
    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_start: int
    entries: Mapping[str, int]
    file_type: int


def parse_header(read: Callable[[int, int], bytes], file_size: int, *, torn: bool = False) -> GgufHeader:
    """Read the header of a file of `file_size` bytes, of which ``read(offset, size)`` returns `size` bytes. Of one that
    may be `torn`, tensors and rows of them that lie behind its end are left out.

    UsageError ``gguf.malformed`` (evidence: ``reason``, and ``tensor`` or ``key`` where one is at fault); LimitExceeded
    ``gguf.limit`` for what may be well-formed and is beyond `LIMITS`. What `read` raises passes through.
    """
    cursor = _Cursor(read, file_size)
    if cursor.take(4) != MAGIC:
        _refuse("not_gguf", "it does not begin with 'GGUF'")
    version = cursor.u32()
    if version not in (2, 3):
        # A big-endian file has its version's bytes the other way round; read on as little-endian, all is nonsense.
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
            _refuse("big_endian", "it is big-endian; little-endian is what is read", hint="convert it to little-endian")
        _refuse("unknown_version", f"its version is {version}; versions 2 and 3 are known")
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    # An entry takes 24 bytes and a pair 13 at least: a count beyond that is a loop without end.
    if tensor_count * 24 + pair_count * 13 > cursor.left:
        _refuse("count_out_of_range", f"{tensor_count} tensors and {pair_count} keys do not fit {file_size} bytes")
    if tensor_count > LIMITS.gguf_tensors:
        raise LimitExceeded("gguf.limit", f"{tensor_count} tensors in one file; at most {LIMITS.gguf_tensors}")
    # Of thirteen bytes each, millions of them would become a gigabyte of objects.
    if pair_count > _PAIRS_MAX:
        raise LimitExceeded("gguf.limit", f"{pair_count} keys in one file; at most {_PAIRS_MAX}")
    metadata = _metadata(cursor, pair_count)
    entries: dict[str, int] = {}
    alignment = _alignment(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    tensors = [_tensor(cursor, entries) for _ in range(tensor_count)]
    data_start = cursor.offset + -cursor.offset % alignment
    if not tensors:
        data_start = min(data_start, file_size)  # nothing follows, not even the padding
    placed = _placed(tensors, data_start, alignment, file_size, torn=torn)
    if torn:
        placed = {name: kept for name, info in placed.items() if (kept := info.until(file_size)) is not None}
    return GgufHeader(version, metadata, placed, alignment, data_start, entries, cursor.file_type)


def _refuse(reason: str, what: str, *, hint: str = "", **evidence: str) -> NoReturn:
    # Names come from the file: repr keeps their control characters out of the terminal, the cut keeps them short.
    evidence = {kind: name[:200] for kind, name in evidence.items()}
    where = "".join(f" ({kind} {name!r})" for kind, name in evidence.items())
    raise UsageError(
        "gguf.malformed",
        f"not a valid GGUF file: {what}{where}",
        hint=hint or "fetch the file again and compare its checksum with the publisher's",
        reason=reason,
        **evidence,
    )


class _Cursor:
    """Reads forward in chunks; knows how far the file, and what may be read as header, goes."""

    def __init__(self, read: Callable[[int, int], bytes], file_size: int) -> None:
        self._read = read
        self._file_size = file_size
        self._end = min(file_size, LIMITS.gguf_metadata)
        self._buffer = b""
        self._start = 0  # of the buffer in the file
        self.offset = 0
        self.items = 0  # values in arrays so far
        self.file_type = 0  # where it is, once it was met

    @property
    def left(self) -> int:
        return self._file_size - self.offset

    def need(self, size: int) -> None:
        """Refuse unless the header may hold `size` more bytes."""
        if size > self.left:
            _refuse("truncated", f"it ends inside its header: {size} bytes wanted at byte {self.offset}")
        if self.offset + size > self._end:
            raise LimitExceeded("gguf.limit", f"a header beyond {self._end} bytes")

    def take(self, size: int) -> bytes:
        self.need(size)
        begin = self.offset - self._start
        if begin + size > len(self._buffer):
            wanted = min(max(size, _CHUNK), self._file_size - self.offset)
            self._buffer, self._start, begin = self._read(self.offset, wanted), self.offset, 0
            if len(self._buffer) < wanted:
                _refuse("truncated", f"it ends inside its header, at byte {self.offset + len(self._buffer)}")
        self.offset += size
        return self._buffer[begin : begin + size]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def name(self, what: str) -> str:
        size = self.u64()
        if size > _NAME_MAX:
            _refuse("name_too_long", f"a {what} of {size} bytes; at most {_NAME_MAX}")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            _refuse("not_utf8", f"a {what} is not UTF-8")

    def text(self) -> str | bytes:
        raw = self.take(self.u64())
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw


def _metadata(cursor: _Cursor, count: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for _ in range(count):
        key = cursor.name("key")
        # Of two values for one key, each reader may take another: a second chat template, a second alignment.
        if key in metadata:
            _refuse("duplicate_key", "a key occurs twice", key=key)
        kind = cursor.u32()
        if key == "general.file_type" and kind == _UINT32:
            cursor.file_type = cursor.offset
        metadata[key] = _value(cursor, kind, key, 0)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str, depth: int) -> GgufValue:
    if kind in _SCALARS:
        return _scalars(cursor, kind, 1, key)[0]
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        _refuse("unknown_value_type", f"value type {kind} is unknown", key=key)
    # Arrays of arrays nest as deep as the file likes, a dozen bytes a level: without a bound the stack overflows.
    if depth >= _ARRAY_DEPTH:
        _refuse("too_deep", f"arrays nest deeper than {_ARRAY_DEPTH}", key=key)
    item_kind, count = cursor.u32(), cursor.u64()
    width = struct.calcsize(_SCALARS[item_kind]) if item_kind in _SCALARS else 12 if item_kind == _ARRAY else 8
    cursor.need(count * width)
    cursor.items += count
    if cursor.items > _ITEMS_MAX:
        raise LimitExceeded("gguf.limit", f"more than {_ITEMS_MAX} values in arrays", key=key[:200])
    if item_kind in _SCALARS:
        return _scalars(cursor, item_kind, count, key)
    return tuple(_value(cursor, item_kind, key, depth + 1) for _ in range(count))


def _scalars(cursor: _Cursor, kind: int, count: int, key: str) -> tuple[GgufValue, ...]:
    layout = f"<{count}{_SCALARS[kind]}"
    values = struct.unpack(layout, cursor.take(struct.calcsize(layout)))
    if kind != _BOOL:
        return values
    if any(value > 1 for value in values):
        _refuse("bad_bool", "a boolean is neither 0 nor 1", key=key)
    return tuple(value == 1 for value in values)


def _alignment(value: GgufValue) -> int:
    # Zero divides by zero, and other than a power of two two readers round to two different places.
    if type(value) is not int or not 0 < value <= _ALIGNMENT_MAX or value & (value - 1):
        _refuse("bad_alignment", f"general.alignment is {str(value)[:40]!r}, not a power of two up to {_ALIGNMENT_MAX}")
    return value


def _tensor(cursor: _Cursor, entries: dict[str, int]) -> TensorInfo:
    """One entry of the file, its offsets still relative to the data section; where its type is, is put in `entries`."""
    name = cursor.name("tensor's name")
    dims = cursor.u32()
    if dims > LIMITS.tensor_dims:
        _refuse("too_many_dimensions", f"{dims} dimensions; at most {LIMITS.tensor_dims}", tensor=name)
    shape = tuple(reversed([cursor.u64() for _ in range(dims)]))
    entries[name] = cursor.offset
    number, offset = cursor.u32(), cursor.u64()
    if number not in GGML_TYPES:
        _refuse("unknown_type", f"ggml type {number} is unknown or withdrawn", tensor=name)
    dtype = GGML_TYPES[number]
    # In 64-bit arithmetic the product wraps to a small number, and a reader allocates too little. Zeros don't count:
    # they make the size nothing, but not the strides that a reader computes from the rest.
    if any(n > _DIMENSION_MAX for n in shape) or math.prod(n for n in shape if n) >= _PRODUCT_END:
        _refuse("overflow", "no array has so many elements along its dimensions", tensor=name)
    elements = math.prod(shape)
    # Blocks run along rows; a row that ends inside a block has no size.
    if (shape[-1] if shape else 1) % dtype.block:
        _refuse("part_of_a_block", f"rows of {dtype.name} are not whole blocks of {dtype.block} elements", tensor=name)
    return TensorInfo(name, dtype, shape, offset, offset + elements // dtype.block * dtype.block_bytes)


def _placed(
    tensors: list[TensorInfo], data_start: int, alignment: int, file_size: int, *, torn: bool
) -> dict[str, TensorInfo]:
    """The tensors by name in the order of their bytes, offsets absolute; each in the file and apart from the others."""
    placed: dict[str, TensorInfo] = {}
    for info in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if info.name in placed:
            _refuse("duplicate_tensor", "two tensors have one name", tensor=info.name)
        if info.begin % alignment:
            _refuse("unaligned", f"it begins at byte {info.begin} of the data, off the alignment", tensor=info.name)
        begin, end = data_start + info.begin, data_start + info.end
        if end > file_size and not torn:
            _refuse("out_of_range", f"it ends at byte {end} of {file_size}", tensor=info.name)
        placed[info.name] = TensorInfo(info.name, info.dtype, info.shape, begin, end)
    for before, after in pairwise(placed.values()):
        # Two names for the same bytes: a mark or a change made through one silently changes the other.
        if after.begin < before.end:
            _refuse(
                "overlap", f"it begins at byte {after.begin}, the one before ends at {before.end}", tensor=after.name
            )
    return placed
