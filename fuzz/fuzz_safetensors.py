"""Any bytes into the safetensors parser: only Strongroom's errors come out, and what it accepts it accepts alike.

Besides "no other exception", an accepted header must tile the file exactly.
"""

from __future__ import annotations

import json

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.safetensors import encode_header, header_bytes_needed, parse_header


def seeds() -> dict[str, bytes]:
    """Small files, one for each thing the format can say."""

    def raw(document: object, data: int = 0) -> bytes:
        text = json.dumps(document).encode()
        return len(text).to_bytes(8, "little") + text + bytes(data)

    plain = encode_header([("w", "F32", (2, 2)), ("b", "BF16", (3,)), ("s", "F64", ())], {"format": "pt"})
    return {
        "plain": plain + bytes(30),
        "empty": raw({}),
        "scalar": encode_header([("s", "F64", ())], {}) + bytes(8),
        "zero": encode_header([("z", "F16", (0, 9)), ("y", "I64", (1,))], {}) + bytes(8),
        "packed": encode_header([("p", "F4", (2,)), ("q", "F6_E2M3", (4,))], {}) + bytes(4),
        "unknown-field": raw({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": [[{}]]}}, 1),
        "surrogates": raw({"\U0001f600": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, 1),
        "huge-shape": raw({"w": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 0]}}),
        "overlap": raw({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}, 4),
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    try:
        needed = header_bytes_needed(data[:8], len(data))
        header = parse_header(data[:needed], len(data))
    except StrongroomError:
        return
    position = header.data_start
    for tensor in header.tensors.values():
        if tensor.begin != position:
            raise AssertionError(tensor)
        position = tensor.end
    if position != len(data):
        raise AssertionError(position)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
