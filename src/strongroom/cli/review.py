"""``strongroom review`` and ``strongroom renew``: what is held, and for how long it still should be."""

from __future__ import annotations

import click

from strongroom.cli.custody import Duration
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, table
from strongroom.core.clock import text

_CODES = {"": 0, "info": 11, "low": 12, "medium": 13, "high": 14}


@command(
    "review",
    explain="""Made from the whole log: the same log gives the same review. --apply takes away what a finding names as
    unused or left over, by statements of yours, and records that it was reviewed; an emergency counts as looked at from
    then on.""",
)
@click.option("--apply", is_flag=True, help="Revoke what is unused or left over, and record the review.")
@pass_options
def review(options: Options, apply: bool) -> int:
    """Who has what, who used it when, what was never used, and what to look at.

    Ends with 11 to 14 by the worst finding (info, low, medium, high), with 0 if there is none.
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
            f"{item['used']} times, last {text(item['last_used'])}" if item["used"] else "never",
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
    if apply:
        options.output.note(f"  → {counted(len(found['removed']), 'right')} taken away, entry {found['entry']}")
    elif removable:
        options.output.note(f"  → strongroom review --apply takes away {counted(len(removable), 'right')}")
    return _CODES[found["findings"][0]["severity"] if found["findings"] else ""]


@command(
    "renew",
    explain="""Takes a fresh yes of somebody who may approve and is not the holder; the approvals that granted the lease
    still have to count. A lease to copy is not renewed: ask again.""",
)
@click.argument("lease")
@click.option("--duration", "seconds", type=Duration(), default=0, help="From now.  [default: as it was granted for]")
@pass_options
def renew(options: Options, lease: str, seconds: int) -> None:
    """Extend somebody else's lease to load."""
    with options.open() as room:
        found = room.renew(lease, duration=seconds)
    options.output.answer(found, [f"{lease} holds until {text(found['expires_at'])}"])
