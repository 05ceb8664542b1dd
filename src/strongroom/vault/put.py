"""Put: a model goes into the room. One pass over the source, flat memory, and nothing visible until all of it is
durable."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from strongroom.core import canonical
from strongroom.core.progress import Progress
from strongroom.crypto.sealing import seal
from strongroom.crypto.segments import SegmentCipher, VersionKeys
from strongroom.errors import Conflict, UsageError
from strongroom.formats.index import Index
from strongroom.formats.layout import FileEntry, Layout, Run, markable_bytes
from strongroom.formats.manifest import COMMON, MARKED, Manifest, PackEntry
from strongroom.formats.suites import Suite
from strongroom.marking.mark import Marker
from strongroom.storage.blobs import Blobs
from strongroom.vault import packing
from strongroom.vault.journal import Journal
from strongroom.vault.packing import PackWriter
from strongroom.vault.record import VersionRecord
from strongroom.vault.source import ModelSource, ReadInto, SourceFile


@dataclass(frozen=True)
class Plan:
    """What will be written for a source: decided before the first byte is read."""

    source: ModelSource
    layout: Layout
    share: Fraction
    positions: int
    suite: Suite
    unmarked: dict[str, int]

    @classmethod
    def of(cls, source: ModelSource, *, share: Fraction | None, positions: int, suite: Suite) -> Plan:
        """`share`: of the markable bytes, how much is stored in two variants; None: what a model of this size takes."""
        files = Layout.place([(file.path, file.kind, file.size, file.data_start) for file in source.files])
        runs = _runs(source, files)
        if share is None:
            share = Layout.default_share(markable_bytes(runs), positions)
        planned = Layout.plan(files, runs, share=share, positions=positions)
        layout = Layout.from_json(planned.to_json())  # never write what no reader would accept
        unmarked = {reason: tally.bytes for reason, tally in source.unmarked_reasons.items()}
        return cls(source, layout, share, positions, suite, unmarked)

    def fingerprint(self, name: str) -> str:
        """Names this job: the same source, unchanged, put again under the same name continues it.

        By a release that fills packs otherwise it is another job: its packs would not fit between the others.
        """
        stats = [[file.path, *self.source.identity(file)] for file in self.source.files]
        value = [name, int(self.suite), packing.PACK_BODY, self.layout.to_json(), stats]
        return hashlib.sha256(canonical.encode(_as_text(value))).hexdigest()


def _as_text(value: Any) -> Any:
    # Times in nanoseconds are beyond canonical JSON's integers.
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    return value


def _runs(source: ModelSource, files: tuple[FileEntry, ...]) -> list[Run]:
    """Where in the image the tensors lie that carry marks."""
    return [
        Run(entry.offset + tensor.begin, entry.offset + tensor.end, tensor.dtype.name)
        for file, entry in zip(source.files, files, strict=True)
        for tensor in file.tensors
        if tensor.size and tensor.unmarked_reason(file.data_start) is None
    ]


class ImageStream:
    """Reads the image in order, once, from the source's files, and hashes each file on the way."""

    def __init__(self, source: ModelSource, layout: Layout, stack: ExitStack) -> None:
        self._source, self._layout, self._stack = source, layout, stack
        self._files: Iterator[tuple[SourceFile, FileEntry]] = iter(zip(source.files, layout.files, strict=True))
        self._current: FileEntry | None = None
        self._read: ReadInto | None = None
        self._hash = hashlib.sha256()
        self._at = 0
        self.digests: list[str] = []
        # One size serves them all: of odd layouts, where stripes have many, no more is kept than was in use at once.
        self._most = max(layout.common, layout.marked * max(layout.stripes, default=0))
        self._spare: deque[memoryview] = deque()

    def give_back(self, buffer: memoryview) -> None:
        """Let `read` use that memory again: new memory costs about as much as sealing what is in it."""
        self._spare.append(memoryview(buffer.obj))

    def _buffer(self, size: int) -> memoryview:
        """Memory with anything in it."""
        with suppress(IndexError):
            return self._spare.pop()[:size]
        return memoryview(bytearray(self._most))[:size]

    def read(self, size: int) -> memoryview:
        """The next `size` bytes of the image; Conflict when a file has become shorter since it was scanned."""
        buffer = self._buffer(size)
        done = 0
        while done < size:
            entry = self._entry()
            if entry is None or self._at < entry.offset:  # the gap before a file: zeros
                stop = self._layout.image if entry is None else entry.offset
                step = min(size - done, stop - self._at)
                buffer[done : done + step] = bytes(step)
            else:
                piece = buffer[done : done + min(size - done, entry.end - self._at)]
                step = self._read(self._at - entry.offset, piece) if self._read is not None else 0
                if step == 0:
                    raise Conflict(
                        "source.changed", f"{entry.path} became shorter while it was read", hint="put it again"
                    )
                self._hash.update(piece[:step])
            done += step
            self._at += step
        return buffer

    def finish(self) -> None:
        """Account for empty files at the end; then `digests` has one entry a file."""
        self._entry()

    def _entry(self) -> FileEntry | None:
        """The file that byte `_at` lies in or before; finishes files that end there."""
        while self._current is None or self._at >= self._current.end:
            if self._current is not None:
                self.digests.append(self._hash.hexdigest())
                self._current = None
                self._stack.pop_all().close()
            following = next(self._files, None)
            if following is None:
                return None
            file, self._current = following
            self._read = self._stack.enter_context(self._source.reading(file))
            self._hash = hashlib.sha256()
        return self._current

    def digest(self) -> bytes:
        """Of everything read so far: equal digests mean equal bytes."""
        return hashlib.sha256("".join([*self.digests, self._hash.copy().hexdigest()]).encode()).digest()


def put(
    plan: Plan, journal: Journal, blobs: Blobs, room: bytes, *, workers: int, progress: Progress
) -> tuple[Manifest, Index]:
    """Write packs and index of `plan`; returns the manifest for the vault to sign and the index that it pins.

    Conflict("source.changed") when the source changed under us, or since the attempt that is being continued: then
    nothing
    of that attempt can be kept.
    """
    record, layout, suite = journal.record, plan.layout, plan.suite
    keys = VersionKeys.of(record.version_key, layout.positions)
    cipher = SegmentCipher(suite, record.version, record.revision, layout.digest(suite))
    marker = Marker(record.mark_key, layout)
    writer = PackWriter(
        blobs,
        suite,
        cipher,
        keys,
        layout,
        workers=workers,
        done={key: entry for key, (entry, _) in journal.packs.items()},
        journal=journal.add,
    )
    with ExitStack() as stack:
        stream = ImageStream(plan.source, layout, stack)
        try:
            _feed(stream, plan, journal, writer, marker, progress)
            plan.source.check_unchanged(stream.digests)
            common, marked = writer.finish()
        except BaseException:
            writer.abort()
            raise
    report: dict[str, Any] = {
        "share": [plan.share.numerator, plan.share.denominator],
        "positions_wanted": plan.positions,
        "unmarked": plan.unmarked,
    }
    index = Index(layout, tuple(stream.digests), report)
    return store_index(blobs, index, record, room, suite, keys.common, common, marked), index


def _feed(
    stream: ImageStream, plan: Plan, journal: Journal, writer: PackWriter, marker: Marker, progress: Progress
) -> None:
    layout = plan.layout
    done = 0
    for number, stripe in enumerate(layout.stripes):
        first = int(layout.first_positions[number])
        for kind, begin, count, size in (
            (COMMON, number, 1, layout.common_segment(number).bytes),
            (MARKED, first, stripe, stripe * layout.marked),
        ):
            if not count:
                continue
            plain = stream.read(size)
            ordinal = writer.ends_pack(kind, begin + count)
            mark = "" if ordinal is None else journal.mark(stream.digest())
            if not writer.skips(kind, begin):
                sealing = _sealing(kind, begin, plain, marker)
                writer.add(kind, begin, count, sealing, mark, partial(stream.give_back, plain))
            elif ordinal is not None and mark != journal.packs[kind, ordinal][1]:
                raise Conflict(
                    "source.changed",
                    "the source is not the one that the interrupted put had begun to store",
                    hint="put it again: it starts from the beginning",
                )
            done += size
        progress(done, layout.image)
    stream.finish()


def _sealing(kind: int, number: int, plain: memoryview, marker: Marker) -> Callable[[], tuple[memoryview, ...]]:
    if kind == COMMON:
        return lambda: (plain,)
    return lambda: marker.variants(number, plain)


def store_index(
    blobs: Blobs,
    index: Index,
    record: VersionRecord,
    room: bytes,
    suite: Suite,
    common_key: bytes,
    common: list[PackEntry],
    marked: list[PackEntry],
) -> Manifest:
    """Write the index box and return the manifest that pins it and all packs."""
    layout = index.layout
    box = seal(common_key, index.encode(), Index.context(record.version, record.revision))
    manifest = Manifest(
        suite=suite,
        room=room,
        version=record.version,
        revision=record.revision,
        common_bytes=layout.common_bytes,
        common_segment=layout.common,
        common_packs=tuple(common),
        positions=layout.positions,
        marked_segment=layout.marked,
        marked_packs=tuple(marked),
        index_bytes=len(box),
        index_digest=suite.digest(box),
    )
    # An interrupted attempt may have left an index that nothing refers to yet.
    blobs.delete(manifest.index_name)
    blobs.write(manifest.index_name, [box])
    return manifest


def parse_share(text: str) -> Fraction | None:
    """1/8, 0.125, 0, or None for "auto"; UsageError outside [0, 1/2] (each marked byte is stored twice), or closer to 0
    than 2^-20."""
    if text == "auto":
        return None
    share = Fraction(-1)
    # Fraction itself reads exponents too, and computes a billion digits for 1e-999999999.
    if re.fullmatch(r"[0-9]{1,9}(/[0-9]{1,9}|\.[0-9]{1,9})?", text, re.ASCII):
        with suppress(ZeroDivisionError):
            share = Fraction(text)
    near = share.limit_denominator(1 << 20)
    if not 0 <= share <= Fraction(1, 2) or (share and not near):
        raise UsageError(
            "put.share",
            f"the marked share {text[:40]!r} is not auto, nor a fraction from 0 to 1/2",
            hint="without --share it is what a model of this size takes; else a fraction: --share 1/4",
        )
    return near
