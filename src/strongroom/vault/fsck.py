"""Fsck: the whole room. Database against store, both ways, and what interrupted jobs left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from strongroom.errors import IntegrityError, NotFound
from strongroom.formats.pack import trailer_bytes
from strongroom.storage.db import put_packs, puts
from strongroom.vault.verify import Problem, problem_of

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault


@dataclass
class FsckReport:
    """`problems`: what is damaged. `orphans`: objects that nothing refers to, in bytes and by name. `pending`:
    interrupted puts."""

    versions: int = 0
    objects: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    orphan_bytes: int = 0
    pending: list[dict[str, Any]] = field(default_factory=list)
    repaired: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}


def fsck(vault: Vault, *, repair: bool = False) -> FsckReport:
    """Check that every object that the room needs is there in its full size, signed and pinned, and find those it does
    not need. With `repair`, drop those, and interrupted puts with them. It reads no bodies: that is what verify is
    for."""
    report = FsckReport(repaired=repair)
    # The listing comes first: an object that a put writes meanwhile is in neither list, and so is no orphan.
    objects = dict(vault.blobs.list(""))
    report.objects = len(objects)
    needed: set[str] = set()
    for info in vault.ls():
        if info.state == "active":
            report.versions += 1
            needed |= _check_version(vault, info.ref, objects, report)
    needed |= _pending(vault, report)
    report.orphans = sorted(set(objects) - needed)
    report.orphan_bytes = sum(objects[name] for name in report.orphans)
    if repair:
        for name in report.orphans:
            vault.blobs.delete(name)
    return report


def _check_version(vault: Vault, ref: str, objects: dict[str, int], report: FsckReport) -> set[str]:
    def note(problem: Problem) -> None:
        report.problems.append({"ref": ref, **problem.as_json()})

    try:
        row = vault.find(ref)
        # Its names even when it can't be read: a damaged version's objects are not orphans.
        prefix = f"versions/{row.version_id}/{row.revision}"
        needed = {f"{prefix}.manifest", f"{prefix}.index"}
        manifest = vault.manifest(vault.record(row))
    except (IntegrityError, NotFound) as error:
        note(problem_of(error))
        return {name for name in objects if name.startswith(("packs/", "versions/"))}
    for pack in manifest.packs:
        needed.add(pack.name)
        expected = manifest.body_bytes(pack) + trailer_bytes(pack.kind, pack.count)
        size = objects.get(pack.name)
        if size is None:
            note(Problem("missing", f"the store has no pack {pack.name}", pack=pack.name))
        elif size != expected:
            kind = "truncated" if size < expected else "tampered"
            note(Problem(kind, f"pack {pack.name} has {size} bytes, expected {expected}", pack=pack.name))
    if objects.get(manifest.index_name) != manifest.index_bytes:
        note(Problem("missing", f"the index {manifest.index_name} is missing or has the wrong size"))
    return needed


def _pending(vault: Vault, report: FsckReport) -> set[str]:
    needed: set[str] = set()
    with vault.db.transaction() as tx:
        for row in tx.execute(select(puts)):
            packs = tx.execute(select(put_packs).where(put_packs.c.put_id == row.put_id)).all()
            report.pending.append(
                {"name": row.name, "created_at": row.created_at, "by": row.created_by, "packs": len(packs)}
            )
            prefix = f"versions/{row.version_id}/{row.revision}"
            needed |= {f"{prefix}.manifest", f"{prefix}.index"}
            needed |= {f"packs/{pack.pack_id[:2]}/{pack.pack_id}" for pack in packs}
    return needed
