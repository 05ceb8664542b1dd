"""Rotate: a version is re-encrypted under a new version key. Marks and code words stay, the old keys open nothing
new."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, select, update
from sqlalchemy.engine import Connection

from strongroom.core.ids import parse_id
from strongroom.core.progress import Progress
from strongroom.crypto.keys import random_key
from strongroom.crypto.segments import SegmentCipher, VersionKeys
from strongroom.errors import BackendError, Conflict, StrongroomError
from strongroom.formats.index import Index
from strongroom.formats.manifest import COMMON, MARKED, Manifest
from strongroom.formats.statement import Voice
from strongroom.ledger.log import Draft
from strongroom.policy import acts
from strongroom.policy.state import State
from strongroom.storage.db import versions
from strongroom.storage.image import SealedImage
from strongroom.vault import packing
from strongroom.vault.journal import Journal, forget_all, locked
from strongroom.vault.opened import opened
from strongroom.vault.packing import PackWriter
from strongroom.vault.put import store_index
from strongroom.vault.record import VersionRecord
from strongroom.vault.versions import measured, object_names

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault


def rotate(vault: Vault, ref: str, *, by: Voice, progress: Progress) -> dict[str, Any]:
    """Re-encrypt a version under a new version key. Bundles of the old revision stop opening anything."""
    row = vault.find(ref)
    # One at a time: two would write their manifests to the same name, and the slower one over the faster one's.
    with locked(vault.folder / "locks" / f"rotate-{parse_id(row.version_id).hex()}") as mine:
        if not mine:
            raise Conflict("rotate.busy", f"{row.name}@{row.number} is being rotated", hint="wait for it to end")
        return _rotate(vault, f"{row.name}@{row.number}", by, progress)


def _rotate(vault: Vault, ref: str, by: Voice, progress: Progress) -> dict[str, Any]:
    row, old_record, old = opened(vault, ref, lambda row, record: (row, record, vault.image(record)))
    fingerprint = f"rotate {row.version_id} {row.revision} {packing.PACK_BODY}"
    job = vault.journal(fingerprint, row.name, by.by, start=next_revision(old_record))
    with job as journal, _or_raced(vault, row, journal):
        manifest = reencrypt(old, old_record, journal, workers=vault.workers, progress=progress)
        vault.sign(manifest, vault.keys.signer)
        record = replace(journal.record, manifest_digest=manifest.digest())
        statement = by.say("rotate", {"ref": ref})

        def decide(tx: Connection, state: State, at: int) -> Draft:
            body = {"revision": record.revision, "manifest": manifest.digest().hex()}
            entry = acts.rotate(vault.custodian.rules, state, statement, at, body)
            changed = tx.execute(
                update(versions)
                .where(
                    versions.c.version_id == row.version_id,
                    versions.c.revision == row.revision,
                    versions.c.state == "active",
                )
                .values(record=record.seal(vault.keys.current(tx)), **measured(manifest))
            )
            if changed.rowcount != 1:
                raise _raced(row)
            # With other rotations of it that were left unfinished: their keys open what this one replaced.
            forget_all(tx, row.version_id)
            return Draft(entry)

        receipt = vault.keys.sealing(lambda: vault.custodian.decide(decide, writes=True))
    # Never what the new revision needs as well, whatever the journal was made to say.
    for name in object_names(old.manifest) - object_names(manifest):
        vault.blobs.delete(name)
    digest = f"sha256:{manifest.digest().hex()}"
    return {"ref": ref, "revision": record.revision, "digest": digest, "entry": receipt.index}


@contextlib.contextmanager
def _or_raced(vault: Vault, row: Row[Any], journal: Journal | None = None) -> Iterator[None]:
    """An error is Conflict ``rotate.raced`` if the version of `row` was rotated or shredded meanwhile. The journal goes
    then: its keys open the same weights, which must not outlive a shred."""
    try:
        yield
    except StrongroomError as error:
        found = _state(vault, row)
        if found == ("active", row.revision):
            raise
        with contextlib.suppress(BackendError):  # what is left of it goes with the next shred or fsck
            if journal is not None:
                journal.forget(shredded=found[0] == "shredded")
        raise _raced(row) from error


def _state(vault: Vault, row: Row[Any]) -> tuple[str, int]:
    """State and revision of the version of `row` now; as it was where the database can't say."""
    query = select(versions.c.state, versions.c.revision).where(versions.c.version_id == row.version_id)
    try:
        with vault.db.reading() as tx:
            found = tx.execute(query).one_or_none()
    except BackendError:
        return "active", row.revision
    return (str(found.state), found.revision) if found is not None else ("missing", 0)


def _raced(row: Row[Any]) -> Conflict:
    ref = f"{row.name}@{row.number}"
    return Conflict("rotate.raced", f"{ref} was rotated or shredded by somebody else meanwhile", hint="strongroom ls")


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
