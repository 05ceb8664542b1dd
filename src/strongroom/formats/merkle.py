"""The Merkle tree of a log: RFC 6962 section 2.1 (the same as RFC 9162 section 2.1).

Nodes are named by level and position: (0, i) is leaf i, (l, p) the root of the complete subtree over the 2^l leaves
from p·2^l on. Only complete subtrees have a name; what is incomplete at the right edge is put together from those.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered, Truncated, UsageError

HASH = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
_MOST = LIMITS.log_size

Node = Callable[[int, int], bytes]


def leaf_hash(entry: bytes) -> bytes:
    """Leaves and nodes are told apart by their first byte: else a node could be passed off as an entry."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of the subtree over two others."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """The compact range of a log: `size`, and the roots of its maximal complete subtrees, from left to right.

    UsageError ``log.frontier`` where these don't go together.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if not 0 <= size < _MOST or len(hashes) != size.bit_count():
            raise UsageError("log.frontier", f"{len(hashes)} subtrees don't make a log of {size} entries")
        self.size = size
        self.hashes = list(hashes)

    def copy(self) -> Frontier:
        return Frontier(self.size, self.hashes)

    def nodes(self) -> list[tuple[int, int, bytes]]:
        """Level, position and hash of each subtree."""
        found: list[tuple[int, int, bytes]] = []
        end = 0
        for level in range(self.size.bit_length() - 1, -1, -1):
            if self.size >> level & 1:
                found.append((level, end >> level, self.hashes[len(found)]))
                end += 1 << level
        return found

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """As `extend`, with one leaf hash."""
        return self.extend((leaf,))

    def extend(self, leaves: Iterable[bytes]) -> list[tuple[int, int, bytes]]:
        """Append leaf hashes; level, position and hash of every node that became complete by that, leaves included.

        UsageError ``log.leaf`` for what is no hash, LimitExceeded ``log.full``; nothing is appended then, nor when
        `leaves` itself raises: half an extension would have roots of no log.
        """
        sha256, hashes, size = hashlib.sha256, self.hashes.copy(), self.size
        made: list[tuple[int, int, bytes]] = []
        for leaf in leaves:
            if len(leaf) != HASH:
                raise UsageError("log.leaf", f"a leaf hash has {HASH} bytes, not {len(leaf)}")
            value, level, position = leaf, 0, size
            made.append((0, size, leaf))
            while position & 1:
                value = sha256(b"\x01" + hashes.pop() + value).digest()
                level += 1
                position >>= 1
                made.append((level, position, value))
            hashes.append(value)
            size += 1
        if size >= _MOST:
            raise LimitExceeded("log.full", f"a log has fewer than {_MOST} entries")
        self.hashes, self.size = hashes, size
        return made

    def root(self) -> bytes:
        if not self.hashes:
            return EMPTY_ROOT
        value = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            value = node_hash(left, value)
        return value

    def encode(self) -> bytes:
        """8 bytes of size, big-endian, then the hashes."""
        return self.size.to_bytes(8, "big") + b"".join(self.hashes)

    @classmethod
    def decode(cls, data: bytes) -> Frontier:
        """The reverse; Tampered ``log.frontier``, Truncated ``log.frontier`` where bytes are missing."""
        size = int.from_bytes(data[:8], "big")
        expected = 8 + HASH * size.bit_count()
        if len(data) >= 8 and (size >= _MOST or len(data) > expected):
            raise Tampered("log.frontier", f"these are not the subtrees of a log of {size} entries")
        if len(data) < expected:
            raise Truncated("log.frontier", f"a frontier has {expected} bytes or more, not {len(data)}")
        return cls(size, [data[at : at + HASH] for at in range(8, len(data), HASH)])


def range_hash(begin: int, end: int, node: Node) -> bytes:
    """MTH of the leaves from `begin` to before `end`, where `begin` is a multiple of a power of two that is not less
    than their number: what RFC 6962 calls D[begin:end] wherever it takes one apart. UsageError ``log.range``."""
    if not 0 <= begin < end < _MOST or begin % (1 << (end - begin - 1).bit_length()):
        raise UsageError("log.range", f"the leaves from {begin} to {end} are not a subtree")
    values: list[bytes] = []
    while begin < end:
        level = (end - begin).bit_length() - 1
        values.append(node(level, begin >> level))
        begin += 1 << level
    value = values[-1]
    for left in reversed(values[:-1]):
        value = node_hash(left, value)
    return value


def inclusion_proof(index: int, size: int, node: Node) -> list[bytes]:
    """PATH(index, D[size]), RFC 6962 section 2.1.1: from the leaf's sibling up. UsageError ``log.range``."""
    if not 0 <= index < size < _MOST:
        raise UsageError("log.range", f"there is no entry {index} in a log of {size}")
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        split = begin + _split(end - begin)
        if index < split:
            path.append(range_hash(split, end, node))
            end = split
        else:
            path.append(range_hash(begin, split, node))
            begin = split
    return path[::-1]


def consistency_proof(old: int, new: int, node: Node) -> list[bytes]:
    """PROOF(old, D[new]), RFC 6962 section 2.1.2; empty from the empty log, and between equal sizes."""
    if not 0 <= old <= new < _MOST:
        raise UsageError("log.range", f"a log of {new} entries does not extend one of {old}")
    if old in (0, new):
        return []
    path: list[bytes] = []
    begin, end, whole = 0, new, True
    while old != end:
        split = begin + _split(end - begin)
        if old <= split:
            path.append(range_hash(split, end, node))
            end = split
        else:
            path.append(range_hash(begin, split, node))
            begin, whole = split, False
    if not whole:
        path.append(range_hash(begin, end, node))
    return path[::-1]


def _split(count: int) -> int:
    """The largest power of two smaller than `count`."""
    return 1 << (count - 1).bit_length() - 1


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Tampered ``log.inclusion`` unless `leaf` is at `index` of the tree; steps of RFC 9162 section 2.1.3.2."""
    # Step 1.
    if not 0 <= index < size < _MOST or len(leaf) != HASH or any(len(value) != HASH for value in path):
        raise _not_included(index, size)
    # Step 2 and 3.
    fn, sn, value = index, size - 1, leaf
    # Step 4.
    for sibling in path:
        if sn == 0:
            raise _not_included(index, size)
        if fn & 1 or fn == sn:
            value = node_hash(sibling, value)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            value = node_hash(value, sibling)
        fn, sn = fn >> 1, sn >> 1
    # Step 5.
    if sn or not hmac.compare_digest(value, root):
        raise _not_included(index, size)


def _not_included(index: int, size: int) -> Tampered:
    return Tampered("log.inclusion", f"the proof does not show the entry at {index} of a log of {size}")


def verify_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, path: Sequence[bytes]) -> None:
    """Tampered ``log.consistency`` unless the second tree extends the first; steps of RFC 9162 section 2.1.4.2."""
    wrong = Tampered(
        "log.consistency", f"the proof does not show that the log of {new_size} extends that of {old_size}"
    )
    if not 0 <= old_size <= new_size < _MOST or any(len(value) != HASH for value in path):
        raise wrong
    if old_size in (0, new_size):
        # Both may hold at once: two empty logs have one root, too.
        other = (old_size == new_size and old_root != new_root) or (not old_size and old_root != EMPTY_ROOT)
        if path or other:
            raise wrong
        return
    # Step 1.
    if not path:
        raise wrong
    # Step 2: an old tree that is complete is its own first hash.
    nodes = [old_root, *path] if old_size & (old_size - 1) == 0 else list(path)
    # Step 3 and 4.
    fn, sn = old_size - 1, new_size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    # Step 5.
    first = second = nodes[0]
    # Step 6.
    for value in nodes[1:]:
        if sn == 0:
            raise wrong
        if fn & 1 or fn == sn:
            first, second = node_hash(value, first), node_hash(value, second)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            second = node_hash(second, value)
        fn, sn = fn >> 1, sn >> 1
    # Step 7.
    if sn or not hmac.compare_digest(first, old_root) or not hmac.compare_digest(second, new_root):
        raise wrong
