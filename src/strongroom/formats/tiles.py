"""Tiles and entry bundles (C2SP tlog-tiles): a log as files of at most 256 hashes or entries each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered, Truncated, UsageError
from strongroom.formats.merkle import Node, inclusion_proof, node_hash, verify_inclusion

WIDTH = 256
_PATH = re.compile(
    r"tile/(entries|0|[1-9]|[1-5][0-9]|6[0-3])/((?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?", re.ASCII
)


@dataclass(frozen=True)
class Tile:
    """A tile of hashes at `level` (of 256^level entries each), or, with level None, a bundle of entries. `width`: how
    many of the 256 places are filled."""

    level: int | None
    index: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        """Its name: the index in groups of three digits, all but the last marked with an x."""
        digits = f"{self.index:03}"
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        groups = [digits[at : at + 3] for at in range(0, len(digits), 3)]
        name = "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])
        level = "entries" if self.level is None else self.level
        return f"tile/{level}/{name}" + (f".p/{self.width}" if self.width < WIDTH else "")

    @classmethod
    def parse(cls, path: str) -> Tile:
        """The reverse; Tampered ``tile.path`` for all but the one path of a tile."""
        match = _PATH.fullmatch(path)
        if match is not None:
            index = int(re.sub("[x/]", "", match[2]))
            level = None if match[1] == "entries" else int(match[1])
            tile = cls(level, index, int(match[3]) if match[3] else WIDTH)
            if tile.path == path and index * WIDTH < LIMITS.log_size:
                return tile
        raise Tampered("tile.path", f"{path!r:.80} is not the path of a tile")


def all_tiles(size: int) -> Iterator[Tile]:
    """Every tile and bundle of a log of `size` entries, partial ones at the right edge included. UsageError
    ``log.range``."""
    yield from new_tiles(0, size)


def new_tiles(old: int, new: int) -> Iterator[Tile]:
    """What has to be written when a log of `old` entries has become one of `new`. UsageError ``log.range``."""
    if not 0 <= old <= new < LIMITS.log_size:
        raise UsageError("log.range", f"a log of {new} entries does not extend one of {old}")
    for level in (None, *range(8)):
        before, after = old >> 8 * (level or 0), new >> 8 * (level or 0)
        if not after:
            return
        if before == after:
            continue
        for index in range(before // WIDTH, -(-after // WIDTH)):
            yield Tile(level, index, min(WIDTH, after - index * WIDTH))


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    """Each entry behind its length in 2 bytes, big-endian; LimitExceeded ``tile.too_many``, ``tile.too_large``."""
    if len(entries) > WIDTH:
        raise LimitExceeded("tile.too_many", f"an entry bundle has at most {WIDTH} entries, not {len(entries)}")
    if any(len(entry) > LIMITS.entry for entry in entries):
        raise LimitExceeded("tile.too_large", f"an entry has at most {LIMITS.entry} bytes")
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def decode_bundle(data: bytes) -> list[bytes]:
    """The reverse; Truncated ``tile.truncated``, LimitExceeded ``tile.too_many`` beyond 256 entries."""
    entries: list[bytes] = []
    at = 0
    if len(data) > WIDTH * (LIMITS.entry + 2):
        raise LimitExceeded("tile.too_large", f"an entry bundle of {len(data)} bytes")
    while at < len(data):
        begin = at + 2
        at = begin + int.from_bytes(data[at:begin], "big")
        if at > len(data) or begin > len(data):
            raise Truncated("tile.truncated", "an entry bundle ends within an entry")
        if len(entries) == WIDTH:
            raise LimitExceeded("tile.too_many", f"an entry bundle has more than {WIDTH} entries")
        entries.append(data[begin:at])
    return entries


def verify_leaves(first: int, leaves: Sequence[bytes], size: int, root: bytes, stored: Node) -> None:
    """Tampered ``log.inclusion`` unless `leaves` are the hashes of the tree from the index `first` on.

    They are those of whole tiles, the last of which may end with the log. `stored` gives nodes of levels that are a
    multiple of 8, as tiles have them.
    """
    known = {(0, index): leaf for index, leaf in enumerate(leaves, first)}

    def node(level: int, position: int) -> bytes:
        if (level, position) not in known:
            if level % 8:
                value = node_hash(node(level - 1, 2 * position), node(level - 1, 2 * position + 1))
            else:
                value = stored(level, position)
            known[level, position] = value
        return known[level, position]

    # The path of one leaf to the root has the hashes of all others in its tile.
    for index in range(first, first + len(leaves), WIDTH):
        verify_inclusion(known[0, index], index, size, inclusion_proof(index, size, node), root)
