"""Fsck: the whole room. Database against store, both ways, and what interrupted jobs left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, delete, select

from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, Conflict, IntegrityError, NotFound, StrongroomError, Tampered
from strongroom.formats.dsse import Envelope
from strongroom.formats.manifest import PAYLOAD_TYPE, Manifest
from strongroom.formats.pack import object_bytes
from strongroom.storage.db import put_packs, puts, versions
from strongroom.vault.journal import lock_path, locked
from strongroom.vault.opened import settled
from strongroom.vault.verify import Problem, problem_of
from strongroom.vault.versions import VersionInfo

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

# The only names that a room writes; whatever else somebody keeps in the store is not ours to delete.
_OURS = re.compile(r"packs/[0-9a-f]{2}/[0-9a-f]{64}|versions/[0-9a-f]{32}/[0-9]{1,10}\.(manifest|index)", re.ASCII)


@dataclass
class FsckReport:
    """`problems`: what is damaged. `orphans`: objects that nothing refers to, in bytes and by name. `pending`: puts and
    rotations that are not finished; `running` of them, somebody is at it. `leftovers`: halves of objects that killed
    writers left. `repaired`: orphans were dropped, which is not done while somebody writes."""

    versions: int = 0
    objects: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    orphan_bytes: int = 0
    foreign: int = 0  # objects of a form that no room writes; never touched
    pending: list[dict[str, Any]] = field(default_factory=list)
    leftovers: int = 0
    repaired: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **vars(self)}


def fsck(vault: Vault, *, repair: bool = False) -> FsckReport:
    """Check that every object that the room needs is there in its full size, signed and pinned, and find those it does
    not need. With `repair`, drop those, and interrupted puts and rotations with them. It reads no bodies: that is what
    verify is for."""
    report = FsckReport()
    # In this order, so that what a put or a rotation writes meanwhile is no orphan: an object that comes later than the
    # listing is not in it; one that came before belongs to a job, or, if that is finished by now, to a version.
    objects = dict(vault.blobs.list(""))
    report.objects = len(objects)
    needed = _pending(vault, report, repair=repair)
    rows, logged = _of_one_moment(vault, report)
    for row in rows:
        try:
            info = VersionInfo.of(row)
        except Tampered as error:
            # Nobody knows what it needs, so nothing is an orphan; the other versions are looked at all the same.
            report.problems.append({"ref": f"{row.name}@{row.number}", **problem_of(error).as_json()})
            needed |= set(objects)
            continue
        if info.state == "active":
            report.versions += 1
            if logged is not None and logged.pop(info.ref, None) != (
                info.revision,
                info.digest.removeprefix("sha256:"),
            ):
                message = "the database has another revision of it than the log"
                report.problems.append({"ref": info.ref, "kind": "rollback", "message": message})
            needed |= _check_version(vault, info.ref, objects, report)
    for ref in logged or ():
        message = "the log has it, and the database does not"
        report.problems.append({"ref": ref, "kind": "missing", "message": message})
    report.orphans = sorted(name for name in set(objects) - needed if _OURS.fullmatch(name))
    report.foreign = len(set(objects) - needed) - len(report.orphans)
    report.orphan_bytes = sum(objects[name] for name in report.orphans)
    report.leftovers = len(vault.blobs.leftovers())
    # A job that is at it may have stored a pack and not yet noted it: what looks like an orphan may be that.
    if repair and not any(job["running"] for job in report.pending):
        _refuse_shared(vault, report.orphans)
        for name in report.orphans:
            vault.blobs.delete(name)
        report.leftovers -= vault.blobs.sweep()
        report.repaired = True
    return report


def _of_one_moment(vault: Vault, report: FsckReport) -> tuple[Sequence[Row[Any]], dict[str, tuple[int, str]] | None]:
    """The rows of all versions, and what the log has of them: one is not put, rotated or shredded in between."""
    query = select(versions).order_by(versions.c.name, versions.c.number)
    logged = _logged(vault, report)
    while True:
        with vault.db.reading() as tx:
            rows = tx.execute(query).all()
        before, logged = logged, _logged(vault, report) if logged is not None else None
        if logged is None or logged == before:
            return rows, logged


def _logged(vault: Vault, report: FsckReport) -> dict[str, tuple[int, str]] | None:
    """Revision and manifest digest of every version that the log has and that is not shredded.

    None if the log itself is damaged, which is then in the report.
    """
    try:
        with vault.custodian.ledger.view() as state:
            found = state.versions.values()
            return {each.ref: (each.revision, each.manifest) for each in found if not each.shredded}
    except IntegrityError as error:
        report.problems.append({"ref": "log", **problem_of(error).as_json()})
        return None


def _refuse_shared(vault: Vault, orphans: list[str]) -> None:
    """Another room's objects look like orphans of this one: never delete in a store that has a manifest of one."""
    for name in orphans:
        if not name.endswith(".manifest"):
            continue
        try:
            envelope = Envelope.decode(vault.blobs.read(name, limit=LIMITS.manifest), payload_type=PAYLOAD_TYPE)
            other = Manifest.decode(envelope.payload).room
        except CannotVerify:
            raise  # of a later release: whose it is, this one can't say
        except StrongroomError:
            continue  # not a manifest that any room can read
        if other != vault.id:
            raise Conflict(
                "fsck.shared_store",
                f"the store also holds versions of another room ({other.hex()}); nothing was deleted",
                hint="give each room a store, or a prefix, of its own",
            )


def _check_version(vault: Vault, ref: str, objects: dict[str, int], report: FsckReport) -> set[str]:
    """What a version needs. What is missing because it was rotated or shredded meanwhile is no problem: then it is
    looked at anew, as it is now."""
    problems, needed = settled(
        vault, vault.row(ref), lambda row: _look_at(vault, row, objects), lambda found: not found[0]
    )
    report.problems += [{"ref": ref, **problem.as_json()} for problem in problems]
    return needed


def _look_at(vault: Vault, row: Row[Any], objects: dict[str, int]) -> tuple[list[Problem], set[str]]:
    problems: list[Problem] = []
    if row.state == "shredded":
        return problems, set()
    note = problems.append
    try:
        vault.readable(row)
        # Its names even when it can't be read: a damaged version's objects are not orphans.
        prefix = f"versions/{row.version_id}/{row.revision}"
        needed = {f"{prefix}.manifest", f"{prefix}.index"}
        manifest = vault.manifest(vault.record(row))
    except (IntegrityError, NotFound) as error:
        note(problem_of(error))
        return problems, {name for name in objects if name.startswith(("packs/", "versions/"))}
    for pack in manifest.packs:
        needed.add(pack.name)
        expected = object_bytes(manifest, pack)
        size = objects.get(pack.name) or _size_now(vault, pack.name)
        if size is None:
            note(Problem("missing", f"the store has no pack {pack.name}", pack=pack.name))
        elif size != expected:
            kind = "truncated" if size < expected else "tampered"
            note(Problem(kind, f"pack {pack.name} has {size} bytes, expected {expected}", pack=pack.name))
    if (objects.get(manifest.index_name) or _size_now(vault, manifest.index_name)) != manifest.index_bytes:
        note(Problem("missing", f"the index {manifest.index_name} is missing or has the wrong size"))
    return problems, needed


def _size_now(vault: Vault, name: str) -> int | None:
    """Of an object that was not in the listing: a put or rotation may have finished since."""
    try:
        return vault.blobs.size(name)
    except NotFound:
        return None


def _pending(vault: Vault, report: FsckReport, *, repair: bool) -> set[str]:
    """What unfinished jobs need; with `repair` those that nobody is at are dropped."""
    needed: set[str] = set()
    with vault.db.reading() as tx:
        rows = tx.execute(select(puts)).all()
    for row in rows:
        path = lock_path(vault.folder / "locks", row.put_id)
        with locked(path) as idle:
            with vault.db.transaction() as tx:
                there = tx.execute(select(puts.c.put_id).where(puts.c.put_id == row.put_id)).first() is not None
                packs = tx.execute(select(put_packs).where(put_packs.c.put_id == row.put_id)).all()
                if repair and idle:
                    tx.execute(delete(put_packs).where(put_packs.c.put_id == row.put_id))
                    tx.execute(delete(puts).where(puts.c.put_id == row.put_id))
            if idle and (repair or not there):
                path.unlink(missing_ok=True)  # not before that is durable: else it could be begun again meanwhile
        if there:
            report.pending.append(
                {
                    "name": row.name,
                    "created_at": row.created_at,
                    "by": row.created_by,
                    "packs": len(packs),
                    "running": not idle,
                }
            )
        if idle and (repair or not there):
            continue  # dropped, or finished since: what it has stored is a version's
        prefix = f"versions/{row.version_id}/{row.revision}"
        needed |= {f"{prefix}.manifest", f"{prefix}.index"}
        needed |= {f"packs/{pack.pack_id[:2]}/{pack.pack_id}" for pack in packs}
    return needed
