"""The image in memory: whole, or any range of it, decrypted straight to where it is wanted, on all cores.

What makes it fast, measured in docs/reference/bench.md: every segment is one contiguous stretch of the destination;
it is copied once into a scratch buffer that stays in the cache, hashed and decrypted there in one go; the destination
is
fresh anonymous memory with huge pages, and each core works on stretches of its own, so that no two fault the same page.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from strongroom.core.limits import MIB
from strongroom.core.settings import Settings
from strongroom.errors import LimitExceeded, Tampered, Truncated, UsageError
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.layout import Layout, Segment
from strongroom.storage.blobs import Blobs
from strongroom.storage.image import SealedImage

_STRETCH = 8 * MIB  # of the destination that one core fills before it takes the next
_KEPT = 2  # scratch buffers, of as much as the largest segment each
_FAR_READERS = 16  # concurrent requests to a store that is far away
_ROTATIONS = 5  # that one read may meet
_GONE = ("manifest.missing", "index.missing", "pack.missing")  # what is said of a revision that was rotated

# Of a version that was rotated since the bundle was released: its store, and the bundle that opens it as it is now;
# else None.
Again: TypeAlias = Callable[[KeyBundle], tuple[Blobs, KeyBundle] | None]


class _Revision(NamedTuple):
    """One revision of the version, and what opens it."""

    sealed: SealedImage
    bundle: KeyBundle


class ImageReader:
    """Reads one version as one holder. Thread-safe."""

    def __init__(
        self,
        blobs: Blobs,
        bundle: KeyBundle,
        *,
        workers: int = 0,
        sealed: SealedImage | None = None,
        again: Again | None = None,
    ) -> None:
        """`sealed`: the image, where it is open already; `again` is asked for another release where the store no longer
        has what `bundle` opens."""
        self._again, self._renewing = again, threading.Lock()
        self._revision = _Revision(sealed, bundle) if sealed is not None else self._opened(blobs, bundle)
        self._scratches: list[memoryview] = []  # that nobody uses
        self._workers = workers or (Settings.from_environment().workers if blobs.near else _FAR_READERS)

    @property
    def bundle(self) -> KeyBundle:
        return self._revision.bundle

    @property
    def layout(self) -> Layout:
        return self._revision.sealed.layout

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
        self._read(0, _flat(out))

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end` of the image: only the segments that they touch are fetched.

        UsageError ``read.range`` beyond the image, LimitExceeded ``read.memory``.
        """
        self._check_range(begin, end)
        try:
            out = memoryview(bytearray(end - begin))
        except MemoryError:
            raise _no_memory(end - begin) from None
        self._read(begin, out)
        return out

    def read_range(self, begin: int, out: memoryview) -> None:
        """Bytes of the image from `begin` into `out`. On any failure `out` is wiped.

        UsageError ``read.range`` beyond the image (where nothing would be written, and `out` kept what it held before),
        ``read.buffer`` if `out` is not writable and contiguous.
        """
        if out.readonly:
            raise UsageError("read.buffer", "the buffer must be writable")
        flat = _flat(out)
        self._check_range(begin, begin + len(flat))
        self._read(begin, flat)

    # -- inside --------------------------------------------------------------------------------------------------

    def _check_range(self, begin: int, end: int) -> None:
        if not 0 <= begin <= end <= self.layout.image:
            raise UsageError("read.range", f"bytes {begin} to {end} of an image that has {self.layout.image}")

    def _read(self, begin: int, out: memoryview) -> None:
        if not len(out):
            return
        window = _Window(begin, begin + len(out), out)
        first, end = self.layout.stripes_touched(begin, begin + len(out))
        per_stretch = max(1, _STRETCH // self.layout.common)
        stretches = [range(at, min(at + per_stretch, end)) for at in range(first, end, per_stretch)]
        for _ in range(_ROTATIONS):
            agenda, revision = _Agenda(stretches, max(1, self._workers // 4)), self._revision
            try:
                self._work(agenda, window, revision, self._workers if len(stretches) > 1 else 1)
                return
            except Truncated as error:
                wipe(out)
                self._renew(revision, error)
            except MemoryError:
                wipe(out)
                raise _no_memory(len(out)) from None
            except BaseException:
                wipe(out)
                raise
        raise Truncated(
            "read.rotated",
            f"{self.bundle.ref} was rotated {_ROTATIONS} times while it was read",
            hint="load it again once nobody rotates it",
        )

    def _opened(self, blobs: Blobs, bundle: KeyBundle) -> _Revision:
        """The revision of `bundle`, or of the one that is released when that was rotated."""
        for _ in range(_ROTATIONS):
            try:
                return _Revision(SealedImage.open(blobs, bundle), bundle)
            except Truncated as error:
                blobs, bundle = self._released(bundle, error)
        return _Revision(SealedImage.open(blobs, bundle), bundle)

    def _renew(self, before: _Revision, error: Truncated) -> None:
        """Go on with the revision that took the place of `before`; `error` if there is none. What it opens to has to be
        the very same bytes: some of them may be read already."""
        with self._renewing:
            if self._revision is not before:  # another thread has met it, too
                return
            now = self._opened(*self._released(before.bundle, error))
            if _opens_to(now) != _opens_to(before):
                raise Tampered(
                    "read.other",
                    f"what was released of {before.bundle.ref} after it was rotated opens to other weights",
                    hint="load it again, and tell whoever runs the room",
                )
            self._revision = now

    def _released(self, bundle: KeyBundle, error: Truncated) -> tuple[Blobs, KeyBundle]:
        found = self._again(bundle) if self._again is not None and error.code in _GONE else None
        if found is None:
            raise error
        return found

    def _work(self, agenda: _Agenda, window: _Window, revision: _Revision, workers: int) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            scratch = None
            while not failures:
                scratch = scratch or self._borrow(revision)
                with agenda.task() as (marked, numbers):
                    for number in numbers:
                        (_stripe if marked else _common)(revision, number, window, scratch)
                    if not numbers:
                        if len(self._scratches) < _KEPT:
                            self._scratches.append(scratch)
                        return

        abreast(run, workers, failures)

    def _borrow(self, revision: _Revision) -> memoryview:
        """A scratch buffer that an earlier read has done with, or a new one: it holds ciphertext only, and making one
        takes longer than reading a header into it."""
        try:
            return self._scratches.pop()
        except IndexError:
            return revision.sealed.scratch()


def _opens_to(revision: _Revision) -> tuple[object, ...]:
    """What says which bytes a holder gets: rotating leaves all of it as it is."""
    sealed, bundle = revision
    layout = sealed.layout.digest(bundle.suite)
    return bundle.version, bundle.holder, bundle.word, bundle.suite, layout, sealed.index.sha256


def _common(revision: _Revision, number: int, window: _Window, scratch: memoryview) -> None:
    segment = revision.sealed.layout.common_segment(number)
    target = window.target(segment)
    if target is not None:
        revision.sealed.read_common(number, target, scratch)
        window.clip(segment, target)


def _stripe(revision: _Revision, number: int, window: _Window, scratch: memoryview) -> None:
    """The marked segments after common segment `number`: in one go if the window holds them all."""
    (sealed, bundle), layout = revision, revision.sealed.layout
    count = layout.stripes[number]
    start = layout.common_segment(number).end
    end = start + count * layout.marked
    if window.begin <= start and end <= window.end:
        stripe = window.out[start - window.begin : end - window.begin]
        sealed.read_stripe(int(layout.first_positions[number]), [(bundle, stripe)], scratch)
        return
    for segment in layout.stripe(number):
        target = window.target(segment)
        if target is not None:
            variant, key = bundle.variant(segment.index), bundle.variant_key(segment.index)
            sealed.read_marked(segment.index, variant, key, target, scratch)
            window.clip(segment, target)


class _Window(NamedTuple):
    """The part of the image, from `begin` to `end`, that `out` is to hold."""

    begin: int
    end: int
    out: memoryview

    def target(self, segment: Segment) -> memoryview | None:
        """Where to decrypt `segment`: in place, or aside if only a part of it is wanted; None if nothing of it is."""
        if self.begin <= segment.start and segment.end <= self.end:
            return self.out[segment.start - self.begin : segment.end - self.begin]
        if segment.end <= self.begin or segment.start >= self.end:
            return None
        return memoryview(bytearray(segment.bytes))

    def clip(self, segment: Segment, target: memoryview) -> None:
        """Move the wanted part of a segment that was decrypted aside to its place."""
        low, high = max(self.begin, segment.start), min(self.end, segment.end)
        if high - low < segment.bytes:
            self.out[low - self.begin : high - self.begin] = target[low - segment.start : high - segment.start]


class _Agenda:
    """What is left to read. Common segments are large: all threads share them. Marked ones are small, so that reading
    them is
    mostly Python; threads that do it at the same time would wait for each other, so only `abreast` may."""

    def __init__(self, stretches: list[range], abreast: int) -> None:
        self._common, self._marked = iter(stretches), iter(stretches)
        self._lock = threading.Lock()
        self._abreast = threading.Semaphore(abreast)

    @contextlib.contextmanager
    def task(self) -> Iterator[tuple[bool, range]]:
        """(marked or common, numbers of common segments); no numbers when nothing is left for this thread."""
        if self._abreast.acquire(blocking=False):
            try:
                numbers = self._next(self._marked)
                if numbers:
                    yield True, numbers
                    return
            finally:
                self._abreast.release()
        yield False, self._next(self._common)

    def _next(self, stretches: Iterator[range]) -> range:
        with self._lock:
            return next(stretches, range(0))


def abreast(run: Callable[[], None], workers: int, failures: list[BaseException]) -> None:
    """`run` on `workers` threads, this one included; raises the first failure once all of them have ended.

    `run` returns when nothing is left to do, and soon after `failures` is no longer empty. No thread outlives this
    call: a buffer that is wiped after it stays so. Where the machine gives no more threads, those that there are do it.
    """

    def guarded() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            failures.append(error)

    threads: list[threading.Thread] = []
    try:
        for _ in range(workers - 1):
            threads.append(threading.Thread(target=guarded, name="strongroom-read"))
            try:
                threads[-1].start()
            except RuntimeError:  # the limit of threads is reached
                threads.pop()
                break
        guarded()
        _join(threads, failures)
    except BaseException as error:
        failures.append(error)  # tells the others to stop
        raise
    finally:
        # One that has not begun to run yet sees the failure before it does anything.
        _join(threads, failures)
    if failures:
        raise failures[0]


def _join(threads: list[threading.Thread], failures: list[BaseException]) -> None:
    interrupt: KeyboardInterrupt | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:  # raised below: until then the thread still writes to the buffer
                interrupt = error
                failures.append(error)
    if interrupt is not None:
        raise interrupt


def anonymous(size: int) -> memoryview:
    """Memory that is zero until written, takes no room until then, and is backed by no file.

    LimitExceeded ``read.memory`` if the machine, or this process's limit, does not give that much.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError, OverflowError):
        raise _no_memory(size) from None
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTDUMP):
        with contextlib.suppress(OSError):  # a kernel without it; the memory is as good
            memory.madvise(advice)
    return memoryview(memory)


def _no_memory(size: int) -> LimitExceeded:
    return LimitExceeded(
        "read.memory",
        f"there is no memory for {size} bytes of weights",
        hint="read single tensors, or give the process more memory",
        bytes=size,
    )


def _flat(out: memoryview) -> memoryview:
    """`out` as bytes, whatever its items are."""
    if not out.nbytes:
        return memoryview(b"")
    try:
        return out.cast("B")
    except TypeError:
        raise UsageError("read.buffer", "the buffer must be one contiguous stretch of memory") from None


def wipe(out: memoryview) -> None:
    """Overwrite what may be unverified or half-written."""
    flat = out.cast("B")
    for at in range(0, len(flat), MIB):
        piece = flat[at : at + MIB]
        piece[:] = bytes(len(piece))
