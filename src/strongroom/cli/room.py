"""``strongroom status``, ``doctor`` and ``fsck``: the room itself."""

from __future__ import annotations

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, facts, size, table
from strongroom.errors import IntegrityError

_SEVERITY = {"ok": 0, "warn": 12, "fail": 14}  # exit codes 11 to 14: info, low, medium, high


@command(
    "status",
    explain="""Sizes and counts come from the database. Whether the room is sealed is found out by asking the key
    store to unwrap the room key.""",
)
@pass_options
def status(options: Options) -> None:
    """Where the room is, whether it is unsealed, what it holds."""
    with options.open() as room:
        found = room.status()
    lines = [("room", found["url"] if "url" in found else found["folder"])]
    if "url" not in found:
        lines += [("store", found["store"]), ("key store", found["keystore"])]
    why = found.get("sealed_because")
    lines.append(("state", (f"sealed: {why}" if why else "sealed") if found["sealed"] else "unsealed"))
    if "url" not in found:
        lines.append(("recovery", _recovery(found["recovery"], found["recovery_proven_at"])))
    lines += [
        ("principals", found["principals"]),
        ("versions", f"{found['versions']} ({found['shredded']} shredded)"),
        ("weights", f"{size(found['bytes'])}, {size(found['stored_bytes'])} in the store"),
    ]
    if found.get("interrupted_puts"):
        lines.append(("interrupted", counted(found["interrupted_puts"], "put")))
    options.output.answer(found, facts(lines))
    if found["emergencies"]:
        entries = ", ".join(map(str, found["emergencies"]))
        told = "the glass was broken, or recovery shares used, and nobody else has reviewed it"
        options.output.warn(f"{told}: entry {entries}")
        options.output.note("  → somebody else, who may administer the room, runs: strongroom review --apply")
    if found.get("interrupted_puts"):
        options.output.note("  → run the put again: it goes on where it was")


def _recovery(scheme: str | None, proven_at: str | None) -> str:
    if scheme is None:
        return "none: a lost key store is a lost room"
    return f"{scheme} shares, " + (f"last proven {proven_at}" if proven_at else "never proven")


@command(
    "doctor",
    explain="""Each line is one check of the key store, recovery, store, folder or machine, made just now. The exit
    code is that of the worst: 0 when all are ok, 12 (low) with warnings, 14 (high) with failures.""",
)
@pass_options
def doctor(options: Options) -> int:
    """Check how safe and how fast this room and machine are.

    Ends with 0 when all is well, 12 when something could be better, 14 when something is broken.
    """
    with options.open() as room:
        checks = room.doctor()
    worst = max((_SEVERITY[check.level] for check in checks), default=0)
    answer = {"ok": worst == 0, "checks": [check.as_json() for check in checks]}
    lines = []
    for level, name, message, hint in ((c.level, c.name, c.message, c.hint) for c in checks):
        lines.append(f"{level:4}  {name}: {message}")
        if hint and not options.quiet:
            lines.append(f"      → {hint}")
    options.output.answer(answer, lines)
    return worst


@command(
    "fsck",
    explain="""The store is listed, then every version's signed manifest is checked against that list: each object
    has to be there in its full size. What no version and no interrupted put refers to is an orphan. Bodies are not
    read: that is what verify is for.""",
)
@click.option("--repair", is_flag=True, help="Delete what nothing refers to.")
@pass_options
def fsck(options: Options, repair: bool) -> int:
    """Check the whole room: database against store, both ways.

    Ends with 6 when a version is damaged.
    """
    with options.open() as room:
        report = room.fsck(repair=repair)
    found = report.as_json()
    lines = [f"{counted(report.versions, 'version')}, {counted(report.objects, 'object')} in the store"]
    if report.problems:
        rows = [(item["kind"], item["ref"], item["message"]) for item in report.problems]
        lines += table(("KIND", "VERSION", "WHAT"), rows)
    if report.orphans:
        done = "deleted" if report.repaired else "not needed by any version"
        lines.append(f"{counted(len(report.orphans), 'object')} ({size(report.orphan_bytes)}) {done}")
    lines += [
        f"{'running' if item['running'] else 'interrupted'} put of {item['name']} by {item['by']}, "
        f"{item['created_at']}: {counted(item['packs'], 'pack')}"
        for item in report.pending
    ]
    if report.ok:
        lines.append("nothing is damaged")
    options.output.answer(found, lines)
    if report.problems:
        options.output.note(
            "  → strongroom verify REF names every damaged segment; restore the objects from a copy of the store"
        )
    elif report.orphans and not report.repaired:
        when = " once nobody puts or rotates" if repair else ""
        options.output.note(f"  → strongroom fsck --repair deletes what nothing refers to{when}")
    if any((options.folder / "inference").glob("*.jsonl")):
        options.output.note("  → strongroom records checks what gateways have kept of each request")
    return 0 if report.ok else IntegrityError.exit_code
