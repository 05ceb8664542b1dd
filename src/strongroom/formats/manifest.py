"""The manifest (spec/container.md, section 10): public, signed, pins every pack and the index by hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import Tampered
from strongroom.formats.suites import FORMAT, Suite, check_format

PAYLOAD_TYPE = "application/vnd.strongroom.manifest.v1+json"
COMMON, MARKED = 0, 1
TAG_BYTES = 16
_DIGITS = re.compile(r"[0-9a-f]*", re.ASCII).fullmatch
_PACK = {"id", "first", "count", "digest"}


@dataclass(frozen=True)
class PackEntry:
    """One pack: `count` segments of one kind from number `first`; `digest` is H of its trailer."""

    id: bytes
    kind: int
    first: int
    count: int
    digest: bytes

    @property
    def name(self) -> str:
        """The object's name in the store."""
        return pack_name(self.id)

    @property
    def end(self) -> int:
        return self.first + self.count


def pack_name(pack_id: bytes) -> str:
    """Where a pack is in the store."""
    text = pack_id.hex()
    return f"packs/{text[:2]}/{text}"


def version_prefix(version: bytes) -> str:
    """Where a version's manifests and indexes are in the store."""
    return f"versions/{version.hex()}/"


@dataclass(frozen=True)
class Manifest:
    """What the room signs of one revision of one version."""

    suite: Suite
    room: bytes
    version: bytes
    revision: int
    common_bytes: int
    common_segment: int
    common_packs: tuple[PackEntry, ...]
    positions: int
    marked_segment: int
    marked_packs: tuple[PackEntry, ...]
    index_bytes: int
    index_digest: bytes

    @property
    def name(self) -> str:
        return f"{version_prefix(self.version)}{self.revision}.manifest"

    @property
    def index_name(self) -> str:
        return f"{version_prefix(self.version)}{self.revision}.index"

    @property
    def packs(self) -> tuple[PackEntry, ...]:
        return self.common_packs + self.marked_packs

    @property
    def common_count(self) -> int:
        return -(-self.common_bytes // self.common_segment)

    def body_bytes(self, pack: PackEntry) -> int:
        """Size of the body of `pack`: its segments with their tags."""
        if pack.kind == MARKED:
            return 2 * pack.count * (self.marked_segment + TAG_BYTES)
        plain = min(self.common_bytes, pack.end * self.common_segment) - pack.first * self.common_segment
        return plain + pack.count * TAG_BYTES

    def encode(self) -> bytes:
        """The payload: canonical JSON."""
        return canonical.encode(
            {
                "format": FORMAT,
                "suite": int(self.suite),
                "room": self.room.hex(),
                "version": self.version.hex(),
                "revision": self.revision,
                "common": {
                    "bytes": self.common_bytes,
                    "segment": self.common_segment,
                    "packs": _packs_json(self.common_packs),
                },
                "marked": {
                    "positions": self.positions,
                    "segment": self.marked_segment,
                    "packs": _packs_json(self.marked_packs),
                },
                "index": {"bytes": self.index_bytes, "digest": self.index_digest.hex()},
            }
        )

    def digest(self) -> bytes:
        """SHA-256 of the payload: the manifest digest that custodian and bundles remember."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.encode()).digest()

    @classmethod
    def decode(cls, payload: bytes) -> Manifest:
        """Parse and check a payload; Tampered unless it holds together (section 12, step 3)."""
        value = canonical.decode_typed(payload, what="the manifest")
        try:
            check_format(value["format"], "the manifest")  # first: another format may have other members
            _members(value, {"format", "suite", "room", "version", "revision", "common", "marked", "index"})
            _members(value["common"], {"bytes", "segment", "packs"})
            _members(value["marked"], {"positions", "segment", "packs"})
            _members(value["index"], {"bytes", "digest"})
            suite = Suite.of(value["suite"])
            manifest = cls(
                suite=suite,
                room=_hex(value["room"], 16),
                version=_hex(value["version"], 16),
                revision=_natural(value["revision"], 1, 2**32 - 1),
                common_bytes=_natural(value["common"]["bytes"], 0, LIMITS.image),
                common_segment=_natural(value["common"]["segment"], 64, LIMITS.segment_max),
                common_packs=_packs(value["common"]["packs"], COMMON),
                positions=_natural(value["marked"]["positions"], 0, LIMITS.positions),
                marked_segment=_natural(value["marked"]["segment"], LIMITS.marked_segment_min, LIMITS.segment_max),
                marked_packs=_packs(value["marked"]["packs"], MARKED),
                index_bytes=_natural(value["index"]["bytes"], 1, LIMITS.index),
                index_digest=_hex(value["index"]["digest"], 32),
            )
            _contiguous(manifest.common_packs, manifest.common_count)
            _contiguous(manifest.marked_packs, manifest.positions)
            if len({pack.id for pack in manifest.packs}) != len(manifest.packs):
                raise ValueError("a pack is listed twice")
        except (ValueError, TypeError, KeyError) as error:
            raise Tampered("manifest.malformed", f"the manifest does not hold together: {error}") from None
        manifest.__dict__["_digest"] = hashlib.sha256(payload).digest()  # canonical: it would be encoded so again
        return manifest


def _packs_json(packs: Sequence[PackEntry]) -> list[dict[str, Any]]:
    return [
        {"id": pack.id.hex(), "first": pack.first, "count": pack.count, "digest": pack.digest.hex()} for pack in packs
    ]


def _packs(value: Any, kind: int) -> tuple[PackEntry, ...]:
    if not isinstance(value, list):
        raise TypeError("packs are not a list")
    for item in value:
        _members(item, _PACK)
    return tuple(
        PackEntry(
            _hex(item["id"], 32),
            kind,
            _natural(item["first"], 0, 2**53),
            _natural(item["count"], 1, 2**32 - 1),
            _hex(item["digest"], 32),
        )
        for item in value
    )


def _contiguous(packs: Sequence[PackEntry], total: int) -> None:
    """No gap, no overlap: else a segment could be read from two places, or from none."""
    at = 0
    for pack in packs:
        if pack.first != at:
            raise ValueError("packs have a gap or overlap")
        at = pack.end
    if at != total:
        raise ValueError("packs do not cover all segments")


def _members(value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != expected:
        raise ValueError(f"expected exactly the members {sorted(expected)}")


def _natural(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not a number from {least} to {most}")
    return value


def _hex(value: Any, size: int) -> bytes:
    if not isinstance(value, str) or not _DIGITS(value) or len(value) != 2 * size:
        raise ValueError(f"not {size} bytes in hexadecimal")
    return bytes.fromhex(value)
