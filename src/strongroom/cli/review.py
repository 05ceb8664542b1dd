"""``strongroom review``, ``renew``, ``thaw`` and ``ceiling``: what is held, and how long, and by how many, it should
be."""

from __future__ import annotations

import click

from strongroom.cli.custody import Duration, shown, with_passkey
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, table
from strongroom.cli.weights import ceilings
from strongroom.core.clock import text

_CODES = {"": 0, "info": 11, "low": 12, "medium": 13, "high": 14}


@command(
    "review",
    explain="""Made from the whole log: the same log gives the same review. --apply takes away what a finding names as
    unused or left over, by statements of yours, and records that it was reviewed; an emergency counts as looked at from
    then on, unless it was your own.""",
)
@click.option("--apply", is_flag=True, help="Revoke what is unused or left over, and record the review.")
@pass_options
def review(options: Options, apply: bool) -> int:
    """Who has what, who used it when, what was never used, and what to look at.

    Exit code, for scripts: 0 when there is nothing to look at, else that of the worst finding, 11 for one that is for
    your information, 12 for low, 13 for medium, 14 for high severity. The review itself has not failed then, and what
    --apply takes away is taken away.
    """
    with options.open() as room:
        found = room.review(apply=apply)
    findings = [(item["severity"], item["kind"], item["message"]) for item in found["findings"]]
    holdings = [
        (
            item["holder"],
            item["action"],
            item["ref"],
            text(item["expires_at"]),
            f"{counted(item['used'], 'time')}, last {text(item['last_used'])}" if item["used"] else "never",
            ", ".join(item["approved_by"]),
        )
        for item in found["holdings"]
    ]
    activity = [
        (
            item["principal"],
            *(str(item[name]) for name in ("releases", "copies", "requests", "approvals", "refused")),
            text(item["last"]) if item["last"] else "never",
        )
        for item in found["activity"]
    ]
    lines = table(("SEVERITY", "WHAT", ""), findings) if findings else ["nothing to look at"]
    if holdings:
        lines += ["", *table(("HOLDER", "MAY", "REF", "UNTIL", "USED", "APPROVED BY"), holdings)]
    header = ("PRINCIPAL", "RELEASES", "COPIES", "REQUESTS", "APPROVALS", "REFUSED", "LAST")
    lines += ["", *table(header, activity, right=(1, 2, 3, 4, 5))]
    options.output.answer(found, lines)
    removable = [item for item in found["findings"] if item["removes"]]
    if apply and found["reviewed"]:
        options.output.note(f"  → reviewed: the emergency in entry {', '.join(map(str, found['reviewed']))}")
    if apply and found["left"]:
        entries = ", ".join(map(str, found["left"]))
        own = f"entry {entries} is an emergency of your own: somebody else has to review it"
        options.output.note(f"  → {own}, and runs: strongroom review --apply")
    if apply:
        options.output.note(f"  → {counted(len(found['removed']), 'right')} taken away, entry {found['entry']}")
    elif removable:
        options.output.note(f"  → strongroom review --apply takes away {counted(len(removable), 'right')}")
    return _CODES[found["findings"][0]["severity"] if found["findings"] else ""]


@command("thaw", explain="Its leases ended when it was revoked, and stay ended: each takes a new request.")
@click.argument("ref")
@click.option("--reason", required=True, metavar="TEXT")
@pass_options
def thaw(options: Options, ref: str, reason: str) -> None:
    """Let a version that was revoked be asked for again."""
    with options.open() as room:
        found = room.thaw(ref, reason=reason)
    options.output.answer(found, [f"{ref} may be asked for again, entry {found['entry']}"])


@command(
    "ceiling",
    explain="""Policy refuses beyond a ceiling whatever else permits it. Set for a NAME it holds for every version that
    has none of its own. What is out already stays out.""",
)
@click.argument("ref", metavar="REF|NAME")
@click.option("--holders", type=click.IntRange(min=0), help="How many may be given keys.")
@click.option("--copies", type=click.IntRange(min=0), help="How many plaintext copies may be made.")
@click.option("--copiers", type=click.IntRange(min=0), help="How many may have such copies.")
@pass_options
def ceiling(options: Options, ref: str, holders: int | None, copies: int | None, copiers: int | None) -> None:
    """How many may hold a version, copy it, and have copies of it.

    Without an option it says how many that are."""
    given = {"holders": holders, "copies": copies, "copiers": copiers}
    changes = {name: value for name, value in given.items() if value is not None}
    with options.open() as room:
        found = room.set_ceiling(ref, **changes)
    options.output.answer(found, [f"{ref}: {ceilings(found)}"])


@command(
    "renew",
    explain="""Takes a fresh yes of somebody who may approve and is not the holder; the approvals that granted the lease
    still have to count. A lease to copy is not renewed: ask again.""",
)
@click.argument("lease")
@click.option("--duration", "seconds", type=Duration(), default=0, help="From now.  [default: as it was granted for]")
@with_passkey
@pass_options
def renew(options: Options, lease: str, seconds: int, passkey: bool) -> None:
    """Extend somebody else's lease to load."""
    with options.open() as room:
        found = room.renew(lease, duration=seconds, show=shown(options) if passkey else None)
    options.output.answer(found, [f"{lease} holds until {text(found['expires_at'])}"])
