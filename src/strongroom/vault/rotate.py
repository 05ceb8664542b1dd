"""Rotate: a version is re-encrypted under a new version key. Marks and code words stay, the old keys open nothing
new."""

from __future__ import annotations

from collections.abc import Callable

from strongroom.crypto.keys import random_key
from strongroom.crypto.segments import SegmentCipher, VersionKeys
from strongroom.formats.index import Index
from strongroom.formats.manifest import COMMON, MARKED, Manifest
from strongroom.storage.image import SealedImage
from strongroom.vault.journal import Journal
from strongroom.vault.packing import PackWriter
from strongroom.vault.put import Progress, store_index
from strongroom.vault.record import VersionRecord


def next_revision(record: VersionRecord) -> VersionRecord:
    """The same version with a new version key; its mark root, and so its code words, unchanged."""
    return VersionRecord(
        version=record.version,
        revision=record.revision + 1,
        version_key=random_key(),
        mark_root=record.mark_root,
        colluders=record.colluders,
        name=record.name,
        number=record.number,
    )


def reencrypt(
    old: SealedImage, old_record: VersionRecord, journal: Journal, *, workers: int, progress: Progress
) -> Manifest:
    """Write packs and index of the next revision; returns its manifest. The old revision stays as it is."""
    record, layout, suite = journal.record, old.layout, old.manifest.suite
    old_keys = VersionKeys.of(old_record.version_key, layout.positions)
    keys = VersionKeys.of(record.version_key, layout.positions)
    writer = PackWriter(
        old.blobs,
        suite,
        SegmentCipher(suite, record.version, record.revision, layout.digest(suite)),
        keys,
        layout,
        workers=workers,
        done={key: entry for key, (entry, _) in journal.packs.items()},
        journal=journal.add,
    )

    def common(number: int, size: int) -> Callable[[], tuple[memoryview, ...]]:
        def opened() -> tuple[memoryview, ...]:
            plain = memoryview(bytearray(size))
            old.read_common(number, plain, old.scratch())
            return (plain,)

        return opened

    def marked(first: int, count: int) -> Callable[[], tuple[memoryview, ...]]:
        def opened() -> tuple[memoryview, ...]:
            plain = tuple(memoryview(bytearray(count * layout.marked)) for _ in (0, 1))
            scratch = old.scratch()
            for k in range(count):
                for variant in (0, 1):
                    out = plain[variant][k * layout.marked : (k + 1) * layout.marked]
                    old.read_marked(first + k, variant, old_keys.variant_key(first + k, variant), out, scratch)
            return plain

        return opened

    try:
        done = 0
        for number, stripe in enumerate(layout.stripes):
            first, size = int(layout.first_positions[number]), layout.common_segment(number).bytes
            if not writer.skips(COMMON, number):
                writer.add(COMMON, number, 1, common(number, size), "")
            if stripe and not writer.skips(MARKED, first):
                writer.add(MARKED, first, stripe, marked(first, stripe), "")
            done += size + stripe * layout.marked
            progress(done, layout.image)
        common_packs, marked_packs = writer.finish()
    except BaseException:
        writer.abort()
        raise
    index = Index(layout, old.index.sha256, old.index.report)
    return store_index(old.blobs, index, record, old.manifest.room, suite, keys.common, common_packs, marked_packs)
