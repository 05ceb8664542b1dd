"""Any bytes into the parser of NumPy's arrays: only Strongroom's errors come out, and what it accepts lies inside."""

from __future__ import annotations

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.npy import MAGIC, parse_npy


def seeds() -> dict[str, bytes]:
    """Small files, one for each thing the format can say."""

    def file(text: str, data: int, *, wide: bool = False) -> bytes:
        length = len(text).to_bytes(4 if wide else 2, "little")
        return MAGIC + (b"\x02\x00" if wide else b"\x01\x00") + length + text.encode() + bytes(data)

    return {
        "plain": file("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", 24),
        "fortran": file("{'descr': '<f2', 'fortran_order': True, 'shape': (2, 3), }\n", 12),
        "wide": file("{'descr': '|V2', 'fortran_order': False, 'shape': (), }\n", 2, wide=True),
        "object": file("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", 8),
        "structure": file("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }\n", 4),
        "nested": file("(" * 200, 0),
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    try:
        info = parse_npy("a", lambda offset, size: data[offset : offset + size], len(data))
    except StrongroomError:
        return
    if not 0 <= info.begin <= info.end <= len(data):
        raise AssertionError(info)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
