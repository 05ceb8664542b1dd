"""``strongroom log``: the record of everything, and whether it holds together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts, number, seconds, table
from strongroom.core.clock import text
from strongroom.errors import NotFound, StrongroomError, UsageError

if TYPE_CHECKING:
    from strongroom.client import Room

_LAST = 20


@click.group("log", cls=Group)
def log() -> None:
    """The record of everything, and whether it holds together."""


@command("show", explain="The entry as it is in the log, with what is kept beside it checked against its commitments.")
@click.argument("entry", type=click.IntRange(min=0))
@pass_options
def show(options: Options, entry: int) -> None:
    """One entry, whole."""
    with options.open() as room:
        found = room.log.show(entry)
    body = [(f"  {name}", value) for name, value in found["body"].items() if name != "statement"]
    lines = facts(
        [
            ("entry", found["index"]),
            ("type", found["type"]),
            ("at", text(found["at"])),
            ("by", found["by"]),
            ("about", found["ref"] or "the room"),
            *body,
            ("signed", "yes, by a statement of its own" if found["body"].get("statement") else "by the custodian"),
            *((f"  {name}", value) for name, value in found["private"].items()),
            *((f"  {name}", _why_missing(found)) for name in found["missing"]),
            ("leaf hash", found["leaf"]),
        ]
    )
    options.output.answer(found, lines)


def _why_missing(found: dict[str, Any]) -> str:
    if found["redacted"] is not None:
        return f"redacted (entry {found['redacted']})"
    return "not here: it is kept on the room's host only"


@command("tail", explain="The newest entries. They are checked against the signed root before one is shown.")
@click.option("-n", "count", type=click.IntRange(1, 1000), default=_LAST, show_default=True)
@pass_options
def tail(options: Options, count: int) -> None:
    """The newest entries."""
    with options.open() as room:
        found = room.log.tail(count)
    rows = [
        (str(item["index"]), text(item["at"]), item["type"], item["by"], item["ref"], _gist(item)) for item in found
    ]
    header = ("ENTRY", "AT", "TYPE", "BY", "ABOUT", "")
    options.output.answer({"entries": found}, table(header, rows, right=(0,)))


def _gist(item: dict[str, Any]) -> str:
    body, told = item["body"], ""
    match item["type"]:
        case "approve":
            told = f"{body['id']}" + (": lease granted" if body["lease"] else "")
        case "request":
            told = f"{body['id']}: {body['action']} for {body['for']}"
        case "deny":
            told = str(body["id"])
        case "release":
            under = f"by lease {body['lease']}" if body["lease"] else "no lease"
            form = f" as {body['form']}" if "form" in body else ""
            told = f"{body['action']}{form}, " + ("BROKE THE GLASS" if body["break_glass"] else under)
        case "policy" if body["break_glass"]:
            told = "before its time: BROKE THE GLASS"
        case "reinstate":
            told = f"{body['role']}, BY RECOVERY SHARES"
        case "revoke":
            told = str(body["target"])
        case "apikey":
            told = f"{body['key'][:16]} ({body['name']}) {body['state']}"
        case "inference":
            told = (
                f"{body['requests']} requests, {body['refused']} refused, {body['tokens']} tokens, {body['bits']} bits"
                + (f"; captured for {body['capture'][:16]}" if "capture" in body else "")
            )
        case "refused":
            told = f"{body['action']}: {body['rule'] or body['code']}"
        case "principal":
            told = f"{body['state']}, {', '.join(body['roles']) or 'no role'}"
    return told


def _has_records(options: Options) -> bool:
    try:
        return any((options.folder / "inference").glob("*.jsonl"))
    except UsageError:  # a served room, which keeps them on its own host
        return False


def _checked(*keys: str) -> None:
    """UsageError ``log.vkey``: a typo in a verifier key is a mistake of whoever types, and no sign of tampering."""
    from strongroom.formats.note import VerifierKey

    for key in keys:
        try:
            VerifierKey.parse(key)
        except StrongroomError as error:
            raise UsageError(
                "log.vkey", error.message, hint="strongroom log key shows a log's; a witness its own"
            ) from None


def _room_of(options: Options, folder: Path | None) -> Room:
    """The room whose log is verified; whoever has none gives the log's key."""
    try:
        return options.open()
    except NotFound as error:
        if folder is None or error.code != "room.missing":
            raise
        raise UsageError(
            "log.no_key",
            f"the log in {folder} is checked with its public key, or with its room, and there is no room here",
            hint=f"strongroom log verify {folder} --key VKEY, as `strongroom log key` shows it where the room is",
        ) from None


@command(
    "verify",
    explain="""From what is published of the log and its public key alone: every entry is hashed, the tiles and the
    signed root are compared, and every signed statement is checked with the key that the log itself gave its principal
    before. Then the newest checkpoint that this machine has seen has to be one of this log.""",
)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--key", "verifier", metavar="VKEY", help="The log's public key, for a FOLDER without its room.")
@click.option("--witness", "witnesses", multiple=True, metavar="VKEY", help="A witness that must have cosigned.")
@pass_options
def verify(options: Options, folder: Path | None, verifier: str | None, witnesses: tuple[str, ...]) -> None:
    """Check the whole log, offline.

    FOLDER is an exported log; without it, the room's own.
    """
    from strongroom.client.roomlog import verify_log

    output = options.output
    begun = time.monotonic()
    _checked(*witnesses, *([verifier] if verifier else []))
    if folder is None and verifier is not None:
        raise UsageError(
            "log.no_folder",
            "--key is for the log in a FOLDER; a room's own log is checked with the key that is pinned",
            hint="strongroom log verify FOLDER --key VKEY",
        )
    if folder is not None and verifier is not None:
        found = verify_log(folder, verifier, witnesses=witnesses)
    else:
        with _room_of(options, folder) as room:
            found = room.log.verify(folder, witnesses=witnesses)
    took = time.monotonic() - begun
    holds = f"{number(found['size'])} entries, {number(found['statements'])} signed statements"
    lines = [
        f"the log holds together: {holds}, all under the signed root ({seconds(took)})",
        *facts(
            [
                ("root", found["root"]),
                ("origin", found["origin"]),
                ("witnesses", ", ".join(found["witnessed_by"]) or "none"),
            ]
        ),
    ]
    output.answer({**found, "seconds": round(took, 3)}, lines)
    if folder is None and _has_records(options):
        output.note("  → strongroom records compares what gateways have kept of each request with it")
    if not found["witnessed_by"] and verifier is None:
        output.note("  → nobody else has cosigned: that there is only one log rests on what this machine remembers")


@command("prove", explain="A C2SP tlog-proof: whoever has it and the log's public key can check it without the log.")
@click.argument("entry", type=click.IntRange(min=0))
@pass_options
def prove(options: Options, entry: int) -> None:
    """The proof that an entry is in the log, for somebody else."""
    with options.open() as room:
        found = room.log.prove(entry)
    options.output.answer(found, found["proof"].rstrip("\n").split("\n"))


@command(
    "redact",
    explain="""Reasons, addresses and the like are not in the log: it has commitments to them, with a random salt. Value
    and salt are deleted here; the log verifies as before, and nobody can tell any more what it was.""",
)
@click.argument("entry", type=click.IntRange(min=0))
@pass_options
def redact(options: Options, entry: int) -> None:
    """Delete the personal data that is kept beside an entry."""
    with options.open() as room:
        found = room.log.redact(entry)
    options.output.answer(found, [f"what was kept beside entry {entry} is deleted; entry {found['entry']} says so"])


@command("key", explain="What a verifier or a witness is given beforehand, over a channel that it trusts.")
@pass_options
def key(options: Options) -> None:
    """The log's public key, as verifiers and witnesses take it."""
    with options.open() as room:
        found = room.log.key
    options.output.answer({"key": found}, [found])


@command(
    "export",
    explain="""One line an entry, in the order of the log. Reasons, addresses and other personal data are kept beside
    the log and are not exported; `strongroom log show` has them.""",
)
@click.option("--format", "form", type=click.Choice(["jsonl", "ocsf", "cef"]), default="jsonl", show_default=True)
@pass_options
def export(options: Options, form: str) -> None:
    """The whole log for other systems: JSON lines, OCSF or CEF."""
    with options.open() as room:
        for line in room.log.export(form):
            options.output.line(line)


@command(
    "cosign",
    explain="""The witness is sent the newest checkpoint and the proof that it extends the one that it signed last; its
    signature is published with the checkpoint.""",
)
@click.option("--url", required=True, metavar="URL", help="Where the witness is.")
@click.option("--witness", required=True, metavar="VKEY", help="The witness's key, as it prints it.")
@pass_options
def cosign(options: Options, url: str, witness: str) -> None:
    """Have a witness sign the newest checkpoint."""
    _checked(witness)
    with options.open() as room:
        found = room.log.cosign(url, witness)
    options.output.answer(found, [f"{found['witness']} has signed {number(found['size'])} entries"])
    options.output.note(f"  → strongroom log verify --witness {witness}")


@command("clock", explain="Every lease ends, since nobody can say which of them had ended while the clock was ahead.")
@click.option("--reason", required=True, metavar="TEXT")
@pass_options
def clock(options: Options, reason: str) -> None:
    """After this machine's clock was ahead: take the room's time back to now."""
    with options.open() as room:
        found = room.set_clock(reason)
    options.output.answer(found, [f"the room's time is {text(found['now'])}, and was {text(found['before'])}"])


for each in (show, tail, verify, prove, export, cosign, redact, key, clock):
    log.add_command(each)
