"""Verify: every byte of a version against what the room signed; deep, also that it decrypts to what was put."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row

from strongroom.core.progress import Progress
from strongroom.errors import IntegrityError, NotFound, Rollback, StrongroomError, Truncated
from strongroom.formats.layout import FileEntry, Segment
from strongroom.formats.manifest import MARKED, TAG_BYTES, PackEntry
from strongroom.formats.pack import trailer_bytes
from strongroom.storage.image import SealedImage, sealed_segments
from strongroom.vault.opened import settled
from strongroom.vault.originals import Originals
from strongroom.vault.record import VersionRecord

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `kind` is tampered, missing, truncated, swapped or rollback."""

    kind: str
    message: str
    file: str = ""
    segment: int | None = None
    variant: str = ""
    pack: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "file": self.file,
            "segment": self.segment,
            "variant": self.variant,
            "pack": self.pack,
            "message": self.message,
        }


@dataclass
class VerifyReport:
    """What was checked, and everything that was found; `bytes` counts ciphertext."""

    ref: str
    deep: bool
    segments: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "ref": self.ref,
            "ok": self.ok,
            "deep": self.deep,
            "segments": self.segments,
            "bytes": self.bytes,
            "problems": [problem.as_json() for problem in self.problems],
        }


def problem_of(error: IntegrityError | NotFound) -> Problem:
    """How an error of the reader shows in a report."""
    if isinstance(error, Rollback):
        kind = "rollback"
    elif error.code.endswith(".missing") or isinstance(error, NotFound):
        kind = "missing"
    elif isinstance(error, Truncated):
        kind = "truncated"
    elif error.code.endswith(".swapped"):
        kind = "swapped"
    else:
        kind = "tampered"
    return Problem(kind, error.message, pack=str(error.evidence.get("pack", "")))


def verify(vault: Vault, ref: str, *, deep: bool, progress: Progress) -> VerifyReport:
    """See `Vault.verify`. What is missing because the version was rotated or shredded meanwhile is no problem: then it
    is checked anew, as it is now."""
    return settled(
        vault,
        vault.row(ref),
        lambda row: _verified(vault, row, deep=deep, progress=progress),
        lambda report: report.ok,
    )


def _verified(vault: Vault, row: Row[Any], *, deep: bool, progress: Progress) -> VerifyReport:
    report = VerifyReport(f"{row.name}@{row.number}", deep)
    try:
        vault.readable(row)  # its NotFound is raised: that a version was shredded is no problem of its bytes
    except IntegrityError as error:
        report.problems.append(problem_of(error))
        return report
    try:
        record = vault.record(row)
        image = vault.image(record)
    except (IntegrityError, NotFound) as error:
        report.problems.append(problem_of(error))
        return report
    verify_image(image, report, record if deep else None, workers=vault.workers, progress=progress)
    return report


def verify_image(
    image: SealedImage, report: VerifyReport, record: VersionRecord | None, *, workers: int, progress: Progress
) -> None:
    """Check all packs of `image`; with `record`, also decrypt both variants and compare with the files that were
    put."""
    total = sum(image.manifest.body_bytes(pack) for pack in image.manifest.packs)
    done = 0
    with ThreadPoolExecutor(workers, "strongroom-verify") as pool:
        for pack, found in zip(
            image.manifest.packs,
            pool.map(lambda pack: _scrub(image, pack), image.manifest.packs),
            strict=True,
        ):
            report.problems += found
            report.segments += pack.count * (2 if pack.kind == MARKED else 1)
            report.bytes += image.manifest.body_bytes(pack)
            done += image.manifest.body_bytes(pack)
            progress(done, total)
    report.deep = record is not None and report.ok  # what does not match is not decrypted
    if record is not None and report.ok:
        report.problems += _compare(image, record)


def _scrub(image: SealedImage, pack: PackEntry) -> list[Problem]:
    """Hash every sealed segment of a pack; no key is needed for it."""
    manifest = image.manifest
    body = manifest.body_bytes(pack)
    problems: list[Problem] = []
    expected = body + trailer_bytes(pack.kind, pack.count)
    try:
        # The size first: it makes the store forget a file that it still holds open but that is no longer there.
        size = image.blobs.size(pack.name)
        trailer = image.trailer(pack)
        if size != expected:
            kind = "truncated" if size < expected else "tampered"
            problems.append(_whole(image, pack, kind, f"the pack has {size} bytes, expected {expected}"))
        buffer = memoryview(bytearray(max(manifest.common_segment, manifest.marked_segment) + TAG_BYTES))
        for number, variant, offset, length in sealed_segments(manifest, pack):
            sealed = buffer[:length]
            image.blobs.read_into(pack.name, offset, sealed)
            digest = manifest.suite.digest(sealed)
            if digest != trailer.digest_of(number, variant):
                problems.append(_damaged(image, pack, number, variant, digest))
    except (IntegrityError, NotFound) as error:
        found = problem_of(error)
        problems.append(_whole(image, pack, found.kind, found.message))
    return problems


def _whole(image: SealedImage, pack: PackEntry, kind: str, message: str) -> Problem:
    """A problem of a pack as such: it names the first segment that is lost with it, and the files of all of them."""
    files: dict[str, None] = {}
    for number in range(pack.first, pack.end):
        files |= dict.fromkeys(image.layout.files_of(_segment(image, pack.kind, number)))
    return Problem(kind, message, ", ".join(files), pack.first, "", pack.name)


def _damaged(image: SealedImage, pack: PackEntry, number: int, variant: int, digest: bytes) -> Problem:
    files = ", ".join(image.layout.files_of(_segment(image, pack.kind, number)))
    letter = "AB"[variant] if pack.kind == MARKED else ""
    what, really = _name(pack.kind, number, variant), _place_of(image, digest)
    if really is not None:
        return Problem("swapped", f"in the place of {what} is {_name(*really)}", files, number, letter, pack.name)
    return Problem("tampered", f"{what} is not the one that was signed", files, number, letter, pack.name)


def _name(kind: int, number: int, variant: int) -> str:
    return f"marked segment {number} variant {'AB'[variant]}" if kind == MARKED else f"common segment {number}"


def _place_of(image: SealedImage, digest: bytes) -> tuple[int, int, int] | None:
    """Where in the version a sealed segment with this digest belongs: (kind, number, variant)."""
    for pack in image.manifest.packs:
        try:
            records = image.trailer(pack).records
        except (IntegrityError, NotFound):
            continue  # that pack is reported by its own scrub
        if digest in records:
            trailer = image.trailer(pack)
            for number, variant, _, _ in sealed_segments(image.manifest, pack):
                if trailer.digest_of(number, variant) == digest:
                    return pack.kind, number, variant
    return None


def _segment(image: SealedImage, kind: int, number: int) -> Segment:
    if kind == MARKED:
        return Segment(True, number, int(image.layout.marked_starts[number]), image.layout.marked)
    return image.layout.common_segment(number)


def _compare(image: SealedImage, record: VersionRecord) -> list[Problem]:
    """Decrypt everything and compare the SHA-256 of each original file with the one recorded when it was put."""
    problems: list[Problem] = []
    files = list(zip(image.layout.files, image.index.sha256, strict=True))
    hashes = [hashlib.sha256() for _ in files]
    try:
        for segment, plain in Originals(image, record).segments():
            for k, (entry, _) in enumerate(files):
                begin, end = _overlap(entry, segment)
                if begin < end:
                    hashes[k].update(plain[begin - segment.start : end - segment.start])
    except StrongroomError as error:
        if not isinstance(error, IntegrityError):
            raise
        return [problem_of(error)]
    for (entry, expected), found in zip(files, hashes, strict=True):
        if found.hexdigest() != expected:
            problems.append(Problem("tampered", "the file decrypts, but not to what was put", entry.path))
    return problems


def _overlap(entry: FileEntry, segment: Segment) -> tuple[int, int]:
    return max(entry.offset, segment.start), min(entry.end, segment.end)
