"""Plaintext copies, as the custodian writes them: the holder's variants, and the holder's stamp over all of it
(spec/release.md, section 4; spec/mark.md, section 2).

Nothing of a copy is kept: its entry in the log is enough to write it again."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from strongroom.crypto.copying import CopyCipher, copying_key
from strongroom.errors import Conflict, Denied, IntegrityError, NotFound, StrongroomError
from strongroom.formats.copybundle import PIECE, CopiedFile, CopyBundle
from strongroom.formats.entry import Entry
from strongroom.formats.items import ITEMS
from strongroom.formats.merkle import leaf_hash
from strongroom.marking.code import Code
from strongroom.marking.elements import integers
from strongroom.marking.stamp import Stamp, tensor_tag
from strongroom.vault.forms import Plan, planned
from strongroom.vault.kept import Kept
from strongroom.vault.opened import opened, there
from strongroom.vault.originals import Originals
from strongroom.vault.quantised import Quantised

if TYPE_CHECKING:
    from strongroom.vault.record import VersionRecord
    from strongroom.vault.release import Bundles
    from strongroom.vault.vault import Vault

_NAME = re.compile(r"copies/(0|[1-9][0-9]{0,18})/(0|[1-9][0-9]{0,18})", re.ASCII)
_OPEN = 4  # copies that are kept opened


class Copy:
    """One holder's plaintext copy of one version: any range of it."""

    def __init__(self, originals: Originals, record: VersionRecord, holder: str) -> None:
        self._originals = originals
        self._word = Code(record.code_key, originals.layout.positions, record.colluders).word(holder)
        self._stamp = Stamp(record.stamp_key, holder)
        self._stamped = [each for each in originals.tensors() if each.stamped]
        self._begins = [each.begin for each in self._stamped]

    @property
    def image(self) -> int:
        return self._originals.layout.image

    @property
    def marked(self) -> bool:
        """Whether there is anything in it that says whose it is."""
        return self._originals.carries_marks

    @property
    def files(self) -> tuple[CopiedFile, ...]:
        return tuple(CopiedFile(each.path, each.offset, each.bytes) for each in self._originals.layout.files)

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end` of the image, marked and stamped. `begin` is a multiple of 8: no element is cut."""
        copy = memoryview(bytearray(end - begin))
        # Stretch by stretch: each is stamped while the cache still has it.
        for start, given, original in self._originals.read_given(begin, end, self._word, copy):
            self._apply(start, given, original)
        return copy

    def _apply(self, start: int, given: memoryview, original: memoryview) -> None:
        """Stamp what is `given` from byte `start` of the image on."""
        end = start + len(given)
        for each in self._stamped[max(0, bisect_right(self._begins, start) - 1) :]:
            if each.begin >= end:
                break
            low, high = max(each.begin, start), min(each.end, end)
            if low >= high:
                continue
            dtype = each.info.dtype.name
            # What is marked of an element is never cut: neither by a piece nor by a segment.
            first, stop = ITEMS[dtype].within(low - each.begin, high - each.begin)
            here = [integers(dtype, data, each.begin - start, first, stop) for data in (original, given)]
            self._stamp.apply(dtype, tensor_tag(each.begin), first, *here)


class _Opened(NamedTuple):
    """A copy that is being taken: secret, all of it."""

    copy: Copy | Quantised
    record: VersionRecord
    entry: Entry
    leaf: bytes
    key: bytes


class Copies:
    """The copies that the log's releases allow, piece by piece, to whoever has their key."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._open: Kept[int, _Opened] = Kept(_OPEN)
        self._plans: Kept[tuple[bytes, str], tuple[Originals, Plan]] = Kept(_OPEN)  # by manifest and form

    def bundle(self, entry: bytes, index: int) -> CopyBundle:
        """What the holder of the release `entry` needs to take the copy."""
        found = self._opened(index, entry)
        record = found.record
        return CopyBundle(
            room=self._vault.id,
            version=record.version,
            revision=record.revision,
            manifest_digest=record.manifest_digest,
            signer=self._vault.keys.signer.public_key,
            ref=found.entry.ref,
            holder=found.entry.body["holder"],
            key=found.key,
            piece=PIECE,
            image=found.copy.image,
            files=found.copy.files,
            marked=found.copy.marked,
        )

    def unfit(self, found: Bundles | StrongroomError, form: str | None) -> StrongroomError | None:
        """Why a version can't leave in `form`, if it can't: for those only who may have a copy of it."""
        if form is not None and not isinstance(found, StrongroomError):
            ref = f"{found.record.name}@{found.record.number}"
            try:
                opened(self._vault, ref, lambda _, record: self._planned(record, form))
            except StrongroomError as error:
                return error
        return None

    def read(self, name: str) -> bytes:
        """The encrypted piece that is called `name`: ``copies/ENTRY/NUMBER``.

        NotFound ``copy.missing``; Denied ``copy.ended`` once the lease, the holder or the version is revoked; Conflict
        ``copy.revision`` once the version was rotated.
        """
        matched = _NAME.fullmatch(name)
        if matched is None:
            raise NotFound("copy.missing", f"there is no copy {name!r:.80}")
        index, number = int(matched[1]), int(matched[2])
        found = self._opened(index)
        self._check(index, found)
        copy, cipher = found.copy, CopyCipher(found.key, found.leaf, found.copy.image)
        if number * PIECE >= copy.image:
            raise NotFound("copy.missing", f"the copy of entry {index} has no piece {number}")
        try:
            piece = copy.read(number * PIECE, min((number + 1) * PIECE, copy.image))
        except (IntegrityError, NotFound):
            self._check(index, found)  # what it was made of is gone with a rotation, or a shred, and not damaged
            raise
        return cipher.seal(number, piece)

    @staticmethod
    def is_one(name: str) -> bool:
        """Whether an object of this name is a piece of a copy."""
        return name.startswith("copies/")

    def forget(self) -> None:
        """Let go of what is kept opened."""
        self._open.forget()
        self._plans.forget()

    def _opened(self, index: int, entry: bytes | None = None) -> _Opened:
        keep, kept = self._open.opening(), self._open.get(index)
        if kept is not None:
            return kept
        ledger = self._vault.custodian.ledger
        if entry is None:
            if index >= ledger.checkpoint()[0].size:
                raise NotFound("copy.missing", f"the log has no entry {index}")
            entry = ledger.proven(index, index + 1)[0]
        found = Entry.decode(entry)
        if found.type != "release" or found.body["action"] != "copy":
            raise NotFound("copy.missing", f"entry {index} of the log releases no copy")
        leaf = leaf_hash(entry)
        record, copy = opened(self._vault, found.ref, lambda _, record: (record, self._written(found, record)))
        key = copying_key(self._vault.keys.copy_key, leaf, PIECE, formed="form" in found.body)
        kept = _Opened(copy, record, found, leaf, key)
        keep(index, kept)
        return kept

    def _written(self, entry: Entry, record: VersionRecord) -> Copy | Quantised:
        if (record.revision, record.manifest_digest.hex()) != (entry.body["revision"], entry.body["manifest"]):
            raise _rotated()
        holder, form = entry.body["holder"], entry.body.get("form")
        if form is None:
            return Copy(Originals(self._vault.image(record), record), record, holder)
        originals, plan = self._planned(record, form)
        return Quantised(Copy(originals, record, holder), plan)

    def _planned(self, record: VersionRecord, form: str) -> tuple[Originals, Plan]:
        """How a version leaves in `form`: found out before its release is recorded, and used after. A plan is of one
        manifest, which pins every byte that it was made of: of a version that was rotated meanwhile it is no plan."""
        key = record.manifest_digest, form
        keep, kept = self._plans.opening(), self._plans.get(key)
        if kept is None:
            originals = Originals(self._vault.image(record), record)
            kept = originals, planned(originals, form)
            keep(key, kept)
        return kept

    def _check(self, index: int, found: _Opened) -> None:
        """What was revoked since the release ends the copy, too, and what is kept of it, whoever has revoked it."""
        entry = found.entry
        with self._vault.db.reading() as tx:  # first: what was rotated is so in the log, too, when that is looked at
            kept = there(tx, found.record)
        with self._vault.custodian.ledger.view() as state:
            version, holder = state.versions.get(entry.ref), state.principals.get(entry.body["holder"])
            rotated = version is not None and version.revision != entry.body["revision"]
            gone = version is None or version.shredded or not (kept or rotated)
            lease = state.leases.get(entry.body["lease"] or "")
            revoked = lease is not None and bool(lease.ended)
            ended = gone or (version is not None and version.frozen) or holder is None or not holder.active or revoked
        if rotated or ended:
            self._open.drop(index)
        if not kept and not rotated:
            self._vault.custodian.forget()  # shredded, which the log may not say: all that is kept of it goes
        if rotated and not ended:
            raise _rotated()
        if ended:
            raise Denied(
                "copy.ended",
                # No names: whoever reads has shown no more than a pass.
                "this copy was revoked before all of it was taken",
                hint="strongroom log tail shows who revoked it",
            )


def _rotated() -> Conflict:
    return Conflict("copy.revision", "the version was rotated since this copy was released", hint="take the copy again")
