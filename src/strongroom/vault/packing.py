"""Packs on their way into the store: segments are sealed by all cores into pack buffers, and whole packs are written.

Memory stays flat: at most two packs of each kind are in memory. A pack is journalled once it is durable, so that a put
or a
rotation that was killed goes on with the next one; a pack that was not whole is never completed, and its replacement
gets
a fresh identifier, and so a fresh key and nonces (spec/container.md, section 6).
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.core.limits import LIMITS
from strongroom.crypto.keys import commitment
from strongroom.crypto.segments import COMMON as KIND_COMMON
from strongroom.crypto.segments import VARIANT_A, SegmentCipher, VersionKeys, pack_key
from strongroom.formats.layout import Layout
from strongroom.formats.manifest import COMMON, MARKED, TAG_BYTES, PackEntry
from strongroom.formats.pack import Trailer
from strongroom.formats.suites import Suite
from strongroom.storage.blobs import Blobs

PACK_BODY = LIMITS.pack_body
_BUFFERS = 2  # packs of one kind in memory: one fills while one is written


@dataclass
class _Open:
    """A pack that is being filled."""

    id: bytes
    kind: int
    ordinal: int
    first: int
    count: int
    buffer: bytearray
    body: memoryview  # the part of the buffer that the pack fills
    missing: int
    last: int
    aead: AESGCM  # of a common pack; marked segments bring their own keys
    commit: bytes
    digests: list[bytes] = field(default_factory=list)
    records: list[tuple[bytes, bytes, bytes, bytes]] = field(default_factory=list)
    progress: str = ""


class PackWriter:
    """Takes the segments of one revision in the order of the image; `finish` returns the packs for the manifest.

    `done` maps (kind, ordinal) to packs that an earlier attempt made durable: their segments are skipped. `journal` is
    called, from a worker, with each pack that has become durable, its ordinal and the progress mark it ended at.
    """

    def __init__(
        self,
        blobs: Blobs,
        suite: Suite,
        cipher: SegmentCipher,
        keys: VersionKeys,
        layout: Layout,
        *,
        workers: int,
        done: Mapping[tuple[int, int], PackEntry],
        journal: Callable[[PackEntry, int, str], None],
    ) -> None:
        self._blobs, self._suite, self._cipher, self._keys, self._layout = blobs, suite, cipher, keys, layout
        self._ranges = {kind: pack_ranges(layout, kind) for kind in (COMMON, MARKED)}
        self._starts = {kind: [first for first, _ in ranges] for kind, ranges in self._ranges.items()}
        self._finished: dict[tuple[int, int], PackEntry] = dict(done)
        self._done = frozenset(done)
        self._journal = journal
        self._open: dict[tuple[int, int], _Open] = {}
        self._sealers = ThreadPoolExecutor(workers, "strongroom-seal")
        self._writers = ThreadPoolExecutor(_BUFFERS, "strongroom-write")
        self._slots = {kind: threading.Semaphore(_BUFFERS) for kind in (COMMON, MARKED)}
        self._spare: dict[int, list[bytearray]] = {COMMON: [], MARKED: []}
        self._queue = threading.Semaphore(4 * workers)
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._error: BaseException | None = None

    # -- for the one thread that feeds it ------------------------------------------------------------------------

    def skips(self, kind: int, number: int) -> bool:
        """Whether an earlier attempt already stored the pack that segment `number` belongs to."""
        return (kind, self._ordinal(kind, number)) in self._done

    def ends_pack(self, kind: int, end: int) -> int | None:
        """The ordinal of the pack whose last segment is the one before number `end`, if there is one."""
        ordinal = self._ordinal(kind, end - 1)
        first, count = self._ranges[kind][ordinal]
        return ordinal if first + count == end else None

    def add(
        self,
        kind: int,
        number: int,
        count: int,
        seal: Callable[[], tuple[memoryview, ...]],
        progress: str,
        sealed: Callable[[], None] = lambda: None,
    ) -> None:
        """Queue `count` segments from `number`, all of one pack: one common segment, or a stripe of marked ones. On a
        worker, `seal` gives their plaintext: one memory (common), or one for each variant (marked). `sealed` is called
        once nothing reads that memory any more.

        `progress` is kept with the pack if the last of them ends it.
        """
        pack = self._pack_for(kind, number)
        if self.ends_pack(kind, number + count) is not None:
            pack.progress = progress
        self._wait(self._queue)
        future = self._sealers.submit(self._seal, pack, number, count, seal)
        future.add_done_callback(lambda _: sealed())
        future.add_done_callback(self._sealed)

    def finish(self) -> tuple[list[PackEntry], list[PackEntry]]:
        """Wait until every pack is durable; raises the first failure."""
        self._sealers.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        self._raise()
        ordered = [self._finished[key] for key in sorted(self._finished)]
        return [p for p in ordered if p.kind == COMMON], [p for p in ordered if p.kind == MARKED]

    def abort(self) -> None:
        """Stop without writing more; what is durable stays journalled."""
        self._failed.set()
        self._sealers.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown(wait=True, cancel_futures=True)

    # -- inside --------------------------------------------------------------------------------------------------

    def _wait(self, semaphore: threading.Semaphore) -> None:
        while not semaphore.acquire(timeout=0.2):
            self._raise()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _ordinal(self, kind: int, number: int) -> int:
        return bisect_right(self._starts[kind], number) - 1

    def _pack_for(self, kind: int, number: int) -> _Open:
        ordinal = self._ordinal(kind, number)
        pack = self._open.get((kind, ordinal))
        if pack is None:
            self._wait(self._slots[kind])
            pack = self._new_pack(kind, ordinal, *self._ranges[kind][ordinal])
            self._open[kind, ordinal] = pack
        return pack

    def _new_pack(self, kind: int, ordinal: int, first: int, count: int) -> _Open:
        layout, pack_id = self._layout, os.urandom(32)
        key = pack_key(self._keys.common, pack_id)
        last, size = layout.marked, 2 * count * (layout.marked + TAG_BYTES)
        if kind == COMMON:
            last = min(layout.common, layout.common_bytes - (first + count - 1) * layout.common)
            size = (count - 1) * layout.common + last + count * TAG_BYTES
        buffer = self._buffer(kind)
        body = memoryview(buffer)[:size]
        pack = _Open(pack_id, kind, ordinal, first, count, buffer, body, count, last, AESGCM(key), commitment(key))
        pack.digests = [b""] * count
        pack.records = [(b"", b"", b"", b"")] * count
        return pack

    def _buffer(self, kind: int) -> bytearray:
        """Memory for any pack of `kind`: that of one written before, since new memory costs as much as sealing does."""
        with self._lock:
            if self._spare[kind]:
                return self._spare[kind].pop()
        layout = self._layout
        each = 2 * (layout.marked + TAG_BYTES) if kind == MARKED else layout.common + TAG_BYTES
        return bytearray(each * max(count for _, count in self._ranges[kind]))

    def _seal(self, pack: _Open, number: int, count: int, seal: Callable[[], tuple[memoryview, ...]]) -> None:
        if self._failed.is_set():
            return
        plain = seal()
        if pack.kind == MARKED:
            self._seal_marked(pack, number, count, plain)
        else:
            at = number - pack.first
            start = at * (self._layout.common + TAG_BYTES)
            out = pack.body[start : start + len(plain[0]) + TAG_BYTES]
            nonce = number.to_bytes(12, "little")
            pack.digests[at] = self._cipher.seal_into(pack.aead, nonce, KIND_COMMON, number, plain[0], out)
        with self._lock:
            pack.missing -= count
            whole = pack.missing == 0
        if whole:
            self._writers.submit(self._write, pack).add_done_callback(self._record_failure)

    def _seal_marked(self, pack: _Open, first: int, count: int, plain: tuple[memoryview, ...]) -> None:
        size = self._layout.marked
        nonce, body, seal_into = pack.id[:12], pack.body, self._cipher.seal_into
        at = 2 * (first - pack.first) * (size + TAG_BYTES)
        for k in range(count):
            digests, commits = [], []
            for variant in (0, 1):
                key = self._keys.variant_key(first + k, variant)
                piece, out = plain[variant][k * size : (k + 1) * size], body[at : at + size + TAG_BYTES]
                digests.append(seal_into(AESGCM(key), nonce, VARIANT_A + variant, first + k, piece, out))
                commits.append(commitment(key))
                at += size + TAG_BYTES
            pack.records[first + k - pack.first] = (digests[0], digests[1], commits[0], commits[1])

    def _write(self, pack: _Open) -> None:
        if self._failed.is_set():
            return
        layout = self._layout
        if pack.kind == MARKED:
            trailer = Trailer.marked(self._suite, pack.first, layout.marked, pack.id, pack.records)
        else:
            trailer = Trailer.common(
                self._suite, pack.first, layout.common, pack.last, pack.id, pack.commit, pack.digests
            )
        data = trailer.encode()
        entry = PackEntry(pack.id, pack.kind, pack.first, pack.count, self._suite.digest(data))
        self._blobs.write(entry.name, [pack.body, data])
        self._journal(entry, pack.ordinal, pack.progress)
        with self._lock:
            self._finished[pack.kind, pack.ordinal] = entry
            del self._open[pack.kind, pack.ordinal]
            self._spare[pack.kind].append(pack.buffer)
        self._slots[pack.kind].release()

    def _sealed(self, future: Future[None]) -> None:
        self._queue.release()
        self._record_failure(future)

    def _record_failure(self, future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and self._error is None:
            self._error = error
            self._failed.set()


def pack_ranges(layout: Layout, kind: int) -> list[tuple[int, int]]:
    """(first, count) of each pack of `kind` that a writer makes: about `PACK_BODY` bytes, and no stripe in two
    packs."""
    if kind == COMMON:
        per_pack, total = max(1, PACK_BODY // (layout.common + TAG_BYTES)), len(layout.stripes)
        return [(first, min(per_pack, total - first)) for first in range(0, total, per_pack)]
    per_pack = max(1, PACK_BODY // (2 * (layout.marked + TAG_BYTES)))
    ranges: list[tuple[int, int]] = []
    first = count = 0
    for stripe in layout.stripes:
        if count and count + stripe > per_pack:
            ranges.append((first, count))
            first, count = first + count, 0
        count += stripe
    return [*ranges, (first, count)] if count else ranges
