"""``strongroom apikey``: keys with which programs call the gateway."""

from __future__ import annotations

import click

from strongroom.cli.custody import Duration
from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts, table
from strongroom.core.clock import text


@click.group("apikey", cls=Group)
def apikey() -> None:
    """API keys, with which programs call the room's gateway."""


@command(
    "new",
    explain="""The key is made on this machine and shown once: the room gets its SHA-256, in a statement that is signed
    with your own key, and recorded. Whoever has it gets the inference that policy permits you, and nothing else of
    yours. Under a login it ends when the login does. Nobody makes one for somebody else.""",
)
@click.option("--name", default="default", show_default=True, help="What it is for: a-z, 0-9, dot, dash, underscore.")
@click.option("--expires", "seconds", type=Duration(), default="90d", show_default=True, help="At most 366d.")
@pass_options
def new(options: Options, name: str, seconds: int) -> None:
    """Make an API key, and show it, once."""
    with options.open() as room:
        done = room.apikeys.new(name, seconds)
        options.output.answer(done, [done["key"]])  # first: whatever comes now, it is shown this once
    if not done["infers"]:
        options.output.warn(
            f"policy lets {done['principal']} infer on no version that is here with an API key, so the gateway answers "
            "this key nothing"
        )
        options.output.note(
            f"  → strongroom reach {done['principal']} --all shows which rule is missing, or in the way"
        )
    options.output.note(
        f"  → {done['id']}: for {done['principal']}, until {text(done['expires_at'])}; it is shown this once, and kept "
        "nowhere"
    )
    options.output.note("  → a client of the gateway takes it as its key, OPENAI_API_KEY: Authorization: Bearer KEY")


@command(
    "ls",
    explain="""Those that are good now, without the keys, which nobody has. Whoever may audit or grant sees everybody's,
    else each sees their own.""",
)
@click.argument("path", metavar="[PRINCIPAL]", required=False)
@pass_options
def ls(options: Options, path: str | None) -> None:
    """List API keys."""
    with options.open() as room:
        found = room.apikeys.ls(path)
    rows = [
        (each["id"], each["principal"], each["name"], text(each["expires_at"]), str(each["entry"])) for each in found
    ]
    header = ("KEYID", "PRINCIPAL", "NAME", "UNTIL", "SINCE ENTRY")
    options.output.answer({"apikeys": found}, table(header, rows) if rows else ["no API key"])


@command("end", explain="At once, and for good. Your own, or, if you may grant, anybody's.")
@click.argument("identifier", metavar="KEYID")
@pass_options
def end(options: Options, identifier: str) -> None:
    """End an API key."""
    with options.open() as room:
        done = room.apikeys.end(identifier)
    said = facts([("ended", done["id"]), ("principal", done["principal"]), ("name", done["name"])])
    options.output.answer(done, [*said, *facts([("entry", str(done["entry"]))])])


for each in (new, ls, end):
    apikey.add_command(each)
