"""The index (spec/container.md, section 8): the layout, the digests of the original files, and a report for people."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from strongroom.core import canonical
from strongroom.errors import Tampered
from strongroom.formats.layout import Layout

_BLOCK = 4096


@dataclass(frozen=True)
class Index:
    """What the index box holds. `sha256`: hexadecimal, of each original file, in the order of `layout.files`."""

    layout: Layout
    sha256: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Length, canonical JSON, and zeros up to a multiple of 4096: its size says little about its content."""
        text = canonical.encode({"layout": self.layout.to_json(), "sha256": self.sha256, "report": self.report})
        plain = len(text).to_bytes(8, "little") + text
        return plain + bytes(-len(plain) % _BLOCK)

    @classmethod
    def decode(cls, plain: bytes) -> Index:
        """The reverse; Tampered when it does not hold together."""
        size = int.from_bytes(plain[:8], "little")
        if len(plain) < _BLOCK or len(plain) != -(-(8 + size) // _BLOCK) * _BLOCK or any(plain[8 + size :]):
            raise Tampered("index.malformed", "the index is not padded as the format says")
        value = canonical.decode_typed(plain[8 : 8 + size], what="the index")
        if not isinstance(value, dict) or set(value) != {"layout", "sha256", "report"}:
            raise Tampered("index.malformed", "the index does not have exactly layout, sha256 and report")
        layout, digests = Layout.from_json(value["layout"]), value["sha256"]
        hexes = isinstance(digests, list) and all(
            isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text, re.ASCII) for text in digests
        )
        if not hexes or len(digests) != len(layout.files) or not isinstance(value["report"], dict):
            raise Tampered("index.malformed", "the index does not have one digest for each file")
        try:
            canonical.encode(value["report"])  # of which anything may be part, but nothing that has no canonical form
        except (ValueError, TypeError):
            raise Tampered("json.malformed", "the report in the index is not canonical JSON") from None
        return cls(layout, tuple(digests), value["report"])

    @staticmethod
    def context(version: bytes, revision: int) -> str:
        """The purpose that the sealed box of this index is bound to."""
        return f"index {version.hex()} {revision}"
