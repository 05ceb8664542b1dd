"""Any bytes into the GGUF parser: only Strongroom's errors come out, and accepted tensors lie apart inside the file.

python fuzz/fuzz_gguf.py --seeds CORPUS      write the seed corpus
python fuzz/fuzz_gguf.py CORPUS -max_total_time=60
"""

from __future__ import annotations

import struct

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.gguf import parse_header


def seeds() -> dict[str, bytes]:
    """Small files, one for each thing the format can say."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
        return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)

    def file(pairs: list[bytes], tensors: list[bytes], data: int, version: int = 3) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
        return head + bytes(-len(head) % 32 + data)

    words = text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    nested = text("n") + struct.pack("<IIQIQBIQ", 9, 9, 2, 0, 1, 7, 7, 0)
    align = text("general.alignment") + struct.pack("<II", 4, 32)
    scalars = [text(str(kind)) + struct.pack("<I", kind) + bytes(8) for kind in (10, 11, 12)]
    return {
        "plain": file([align, words], [tensor("w", [4, 2], 0, 0), tensor("q", [32, 1], 2, 32)], 50),
        "version2": file([words], [tensor("w", [4, 2], 1, 0)], 16, 2),
        "nested": file([nested, *scalars], [], 0),
        "bf16": file([], [tensor("w", [2, 2, 2], 30, 0)], 16),
        "scalar": file([], [tensor("s", [], 0, 0)], 4),
        "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "overlap": file([], [tensor("w", [16], 0, 0), tensor("v", [4], 0, 32)], 64),
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    try:
        header = parse_header(lambda offset, size: data[offset : offset + size], len(data))
    except StrongroomError:
        return
    position = header.data_start
    for tensor in header.tensors.values():
        if tensor.begin < position or tensor.end < tensor.begin:
            raise AssertionError(tensor)
        position = tensor.end
    if position > len(data):
        raise AssertionError(position)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
