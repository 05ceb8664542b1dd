"""The image in memory: whole, or any range of it, decrypted straight to where it is wanted, on all cores.

What makes it fast, measured in docs/reference/bench.md: every segment is one contiguous stretch of the destination;
it is copied once into a scratch buffer that stays in the cache, hashed and decrypted there in one go; the destination
is
fresh anonymous memory with huge pages, and each core works on stretches of its own, so that no two fault the same page.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from strongroom.core.limits import MIB
from strongroom.core.settings import Settings
from strongroom.errors import UsageError
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.layout import Layout, Segment
from strongroom.storage.blobs import Blobs
from strongroom.storage.image import SealedImage

Item = TypeVar("Item")
_STRETCH = 8 * MIB  # of the destination that one core fills before it takes the next
_FAR_READERS = 16  # concurrent requests to a store that is far away


class ImageReader:
    """Reads one version as one holder. Thread-safe."""

    def __init__(self, blobs: Blobs, bundle: KeyBundle, *, workers: int = 0) -> None:
        self.bundle = bundle
        self._sealed = SealedImage.open(blobs, bundle)
        self._workers = workers or (Settings.from_environment().workers if blobs.near else _FAR_READERS)

    @property
    def layout(self) -> Layout:
        return self._sealed.layout

    def read_all(self) -> memoryview:
        """The whole image in fresh memory of its own, which is freed with the last view of it."""
        if self.layout.image == 0:
            return memoryview(b"")
        view = anonymous(self.layout.image)
        self.read_into(view)
        return view

    def read_into(self, out: memoryview) -> None:
        """The whole image into `out`, which must have exactly its size. On any failure `out` is wiped."""
        if out.nbytes != self.layout.image or out.readonly:
            raise UsageError(
                "read.buffer", f"the buffer has {out.nbytes} bytes, the image {self.layout.image}; it must be writable"
            )
        per_stretch = max(1, _STRETCH // max(1, self.layout.common))
        count = len(self.layout.stripes)
        pending = iter(range(0, count, per_stretch))
        try:
            self._on_all_cores(
                pending, lambda first, scratch: self._stretch(first, min(first + per_stretch, count), out, scratch)
            )
        except BaseException:
            wipe(out)
            raise

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end` of the image: only the segments that they touch are fetched."""
        out = memoryview(bytearray(end - begin))
        self.read_range(begin, out)
        return out

    def read_range(self, begin: int, out: memoryview) -> None:
        """Bytes of the image from `begin` into `out`. On any failure `out` is wiped."""
        segments = self.layout.segments(begin, begin + len(out))
        try:
            if len(segments) < 4:
                scratch = self._sealed.scratch()
                for segment in segments:
                    self._clipped(segment, begin, out, scratch)
            else:
                self._on_all_cores(iter(segments), lambda segment, scratch: self._clipped(segment, begin, out, scratch))
        except BaseException:
            wipe(out)
            raise

    # -- inside --------------------------------------------------------------------------------------------------

    def _stretch(self, first: int, end: int, out: memoryview, scratch: memoryview) -> None:
        """Common segments `first` to `end` and the stripes after them."""
        layout, sealed = self.layout, self._sealed
        for number in range(first, end):
            segment = layout.common_segment(number)
            sealed.read_common(number, out[segment.start : segment.end], scratch)
            position, count = int(layout.first_positions[number]), layout.stripes[number]
            if not count:
                continue
            stripe = out[segment.end : segment.end + count * layout.marked]
            sealed.read_stripe(position, self.bundle, stripe, scratch)

    def _clipped(self, segment: Segment, begin: int, out: memoryview, scratch: memoryview) -> None:
        """The part of `segment` that lies in `out`, which holds the image from `begin`."""
        inside = segment.start >= begin and segment.end <= begin + len(out)
        target = out[segment.start - begin : segment.end - begin] if inside else memoryview(bytearray(segment.bytes))
        if segment.marked:
            variant = self.bundle.variant(segment.index)
            key = self.bundle.variant_key(segment.index)
            self._sealed.read_marked(segment.index, variant, key, target, scratch)
        else:
            self._sealed.read_common(segment.index, target, scratch)
        if not inside:
            low, high = max(begin, segment.start), min(begin + len(out), segment.end)
            out[low - begin : high - begin] = target[low - segment.start : high - segment.start]

    def _on_all_cores(self, pending: Iterator[Item], work: Callable[[Item, memoryview], None]) -> None:
        failures: list[BaseException] = []
        lock = threading.Lock()

        def run() -> None:
            scratch = self._sealed.scratch()
            while not failures:
                with lock:
                    item = next(pending, None)
                if item is None:
                    return
                try:
                    work(item, scratch)
                except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                    failures.append(error)

        threads = [threading.Thread(target=run, name="strongroom-read") for _ in range(self._workers - 1)]
        for thread in threads:
            thread.start()
        run()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def anonymous(size: int) -> memoryview:
    """Memory that is zero until written, takes no room until then, and is backed by no file."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memoryview(memory)


def wipe(out: memoryview) -> None:
    """Overwrite what may be unverified or half-written."""
    flat = out.cast("B")
    for at in range(0, len(flat), MIB):
        piece = flat[at : at + MIB]
        piece[:] = bytes(len(piece))
