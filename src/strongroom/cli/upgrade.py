"""``strongroom upgrade``: a room that an older release made."""

from __future__ import annotations

import click

from strongroom.cli.options import Options, command, pass_options


@command(
    "upgrade",
    explain="""The database is copied, then brought to this release's schema in one transaction. The log begins with the
    room, its owner and every version that is there, as brought in by the upgrade; room.json is written last. Principals
    of before had no keys, so they are registered anew. A room that has a log already keeps it, its owner and its
    custody: only its database is brought to this release. Killed at any point, the same command goes on where it
    was.""",
)
@click.option("--owner", required=True, metavar="PRINCIPAL", help="The first principal, who registers the others.")
@click.option(
    "--custody",
    type=click.Choice(["team", "solo"]),
    default="team",
    show_default=True,
    help="The policy to begin with: several people approve, or you are alone here.",
)
@pass_options
def upgrade(options: Options, owner: str, custody: str) -> None:
    """Bring a room that an older release made to this one."""
    from strongroom.vault.upgrade import upgrade as bring

    done = bring(options.folder, owner=owner, custody=custody)
    if done.schema > 1:
        kept = {"schema_before": done.schema, "versions": done.versions, "owner": None, "custody": None}
        options.output.answer(kept, ["the database is of this release now; log, owner and custody are as they were"])
        return
    answer = {"schema_before": done.schema, "versions": done.versions, "owner": owner, "custody": custody}
    options.output.answer(answer, [f"the room has a log now, which names {done.versions} versions; {owner} owns it"])
    options.output.note("  → strongroom principal add user/NAME, for everybody else who used it")
