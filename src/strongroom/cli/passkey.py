"""``strongroom passkey``: passkeys and security keys that sign approvals."""

from __future__ import annotations

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts, table


@click.group("passkey", cls=Group)
def passkey() -> None:
    """Passkeys and security keys that sign approvals, each time anew."""


@command(
    "add",
    explain="""A page of this machine's own asks the authenticator for a new credential. Its public key becomes yours by
    a statement that is signed with your own key, and recorded. Nothing that the authenticator attests is looked at.""",
)
@pass_options
def add(options: Options) -> None:
    """Add a passkey, in a browser on this machine."""
    from strongroom.client.passkey import fingerprint_of

    with options.open() as room:
        done = room.passkeys.add(lambda address: options.output.note(f"  → open in a browser here: {address}"))
    answer = {**done, "fingerprint": fingerprint_of(done["key"])}
    shown = [("principal", done["principal"]), ("fingerprint", answer["fingerprint"]), ("entry", str(done["entry"]))]
    options.output.answer(answer, facts(shown))
    options.output.note("  → strongroom approve ID --passkey")


@command(
    "ls", explain="Those that the log has, with the entry that each is from. They end with the key that added them."
)
@pass_options
def ls(options: Options) -> None:
    """Your passkeys in this room."""
    from strongroom.client.passkey import fingerprint_of

    with options.open() as room:
        found = [{**each, "fingerprint": fingerprint_of(each["key"])} for each in room.passkeys.ls()]
    rows = [(each["fingerprint"], str(each["entry"])) for each in found]
    lines = table(("FINGERPRINT", "SINCE ENTRY"), rows) if rows else ["no passkey"]
    options.output.answer({"passkeys": found}, lines)


@command("rm", explain="What it has signed stays signed. Another key of yours ends all passkeys, too.")
@click.argument("fingerprint")
@pass_options
def rm(options: Options, fingerprint: str) -> None:
    """Take away a passkey, by the beginning of its fingerprint."""
    with options.open() as room:
        done = room.passkeys.rm(fingerprint)
    options.output.answer(done, [f"{done['principal']} has one passkey less, entry {done['entry']}"])


for each in (add, ls, rm):
    passkey.add_command(each)
