"""``strongroom keystore``: where the key is kept that wraps the room's key."""

from __future__ import annotations

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts


@click.group("keystore", cls=Group)
def keystore() -> None:
    """Where the room's key is kept."""


@command(
    "show", explain="The URI is in the database; whether it opens the room is found out by unwrapping the room key."
)
@pass_options
def show(options: Options) -> None:
    """Which key store the room has, and whether it opens the room."""
    with options.open() as room:
        answer = room.keystore_show()
    lines = [
        ("key store", answer["keystore"]),
        ("room", f"sealed: {answer['sealed_because']}" if answer["sealed"] else "unsealed"),
        ("key epoch", answer["key_epoch"]),
    ]
    options.output.answer(answer, facts(lines))


@command(
    "rotate",
    explain="""The room key is unwrapped, a new one is made and wrapped by a new key-encryption key, and every
    version's secrets are sealed anew, in one transaction; then the old key-encryption key is destroyed where that
    is possible. Packs stay as they are: they are encrypted under the versions' own keys.""",
)
@click.option("--to", metavar="URI", help="Move to this key store.  [default: a new key in the same one]")
@pass_options
def rotate(options: Options, to: str | None) -> None:
    """Put the room under a new key."""
    with options.open() as room:
        done = room.keystore_rotate(to)
    text = f"the room is under a new key in {done['keystore']}, epoch {done['key_epoch']}"
    options.output.answer(done, [text, f"records sealed anew: {done['resealed']}"])
    options.output.note(
        "  → back up the database and the key store: older backups of either do not open this room together"
    )


keystore.add_command(show)
keystore.add_command(rotate)
