"""``strongroom request``, ``requests``, ``approve``, ``deny``, ``revoke`` and ``copy``: who may, and who said so."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, facts, size, table
from strongroom.core.canonical import MAX_INTEGER
from strongroom.core.clock import duration, text
from strongroom.formats.entry import FORMS

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType[int]):
    """``8h``, ``30m``, ``2d``: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", value, re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not a duration such as 30m, 8h or 2d", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@command(
    "request",
    explain="""The request is a statement, signed with your key; it and every approval are entries of the log. Policy
    says how many people, and in which roles, have to approve; nobody approves their own request, under any name.""",
)
@click.argument("ref")
@click.option("--action", type=click.Choice(["load", "copy", "trace"]), default="load", show_default=True)
@click.option("--for", "holder", metavar="PRINCIPAL", help="Who is to have it.  [default: you]")
@click.option("--duration", "seconds", type=Duration(), default="8h", show_default=True, help="How long, e.g. 30m, 8h.")
@click.option(
    "--uses", type=click.IntRange(1, MAX_INTEGER), help="At most so many releases.  [default: any number; one trace]"
)
@click.option("--reason", required=True, metavar="TEXT", help="Why: whoever may approve reads it, and it is kept.")
@pass_options
def request(
    options: Options, ref: str, action: str, holder: str | None, seconds: int, uses: int | None, reason: str
) -> None:
    """Ask for a lease on one version."""
    with options.open() as room:
        found = room.request(ref, action=action, reason=reason, holder=holder, duration=seconds, uses=uses)
    options.output.answer(
        found,
        [
            f"{found['id']}: {found['for']} asks to {found['action']} {found['ref']} for {duration(found['duration'])}"
            + _times(found["uses"])
        ],
    )
    _next(options, found)


@command(
    "requests",
    explain="""Made from the log. Of one request everything is shown, checked against what its asker has signed; the
    reason to whoever may approve it, and to those whom it is about.""",
)
@click.argument("identifier", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Those that are over, too.")
@pass_options
def requests(options: Options, identifier: str | None, everything: bool) -> None:
    """List what is asked for and what is granted, or show one request."""
    with options.open() as room:
        if identifier is not None:
            _one(options, room.show_request(identifier))
            return
        found = [item for item in room.requests() if everything or item["state"] in ("pending", "approved")]
    rows = [
        (
            item["id"],
            item["state"],
            item["action"],
            item["ref"],
            item["for"],
            duration(item["duration"]) if item["duration"] else "",
            text(item["expires_at"]) if item["expires_at"] is not None else "",
            ", ".join(item["needs"] or item["approved_by"]),
        )
        for item in found
    ]
    header = ("ID", "STATE", "ACTION", "REF", "FOR", "TIME", "UNTIL", "NEEDS, OR WHO APPROVED")
    options.output.answer({"requests": found}, table(header, rows) if rows else ["nothing is asked for, nothing held"])


def _one(options: Options, found: dict[str, Any]) -> None:
    lease = found["lease"] or {}
    ended = lease.get("ended", "")  # "revoked in entry 12"
    uses = lease.get("uses", found["uses"])  # an approver may have made it fewer
    lines = [
        ("request", found["id"]),
        ("state", ended if ended.startswith(found["state"]) else ": ".join(filter(None, (found["state"], ended)))),
        ("asked by", found["by"]),
        ("for", found["for"]),
        ("action", f"{found['action']} {found['ref']}".strip()),
        ("time", duration(found["duration"]) if found["duration"] else ""),
        ("uses", f"{lease.get('used', 0)} of {uses or 'any number'}" if found["duration"] else ""),
        *found["details"].items(),
        ("reason", found["reason"] or "not told, or deleted"),
        ("until", text(found["expires_at"]) if found["expires_at"] is not None else ""),
        ("approved by", ", ".join(found["approved_by"]) or "nobody"),
    ]
    options.output.answer(found, facts([(name, said) for name, said in lines if said]))
    _next(options, found)


with_passkey = click.option("--passkey", is_flag=True, help="Sign with a passkey, in a browser on this machine.")


def shown(options: Options) -> Callable[[str], None]:
    """How the address of the page for a passkey is told."""
    return lambda address: options.output.note(f"  → open in a browser here: {address}")


@command(
    "approve",
    explain="""Your approval names the whole request by its hash, so it holds for nothing else. It counts for you as a
    person, with the roles that you have. The approval that completes what policy asks for grants the lease.""",
)
@click.argument("identifier", metavar="ID")
@click.option("--duration", "seconds", type=Duration(), default=0, help="Shorten the lease to this.")
@click.option("--uses", type=click.IntRange(1, MAX_INTEGER), help="At most so many releases.")
@with_passkey
@pass_options
def approve(options: Options, identifier: str, seconds: int, uses: int | None, passkey: bool) -> None:
    """Approve somebody else's request, or a proposed policy."""
    with options.open() as room:
        found = room.approve(identifier, duration=seconds, uses=uses, show=shown(options) if passkey else None)
    if found["lease"]:
        what = f"{found['for']} may {found['action']} {found['ref']}"
        line = f"{found['id']} is approved: {what} until {text(found['expires_at'])}{_times(found['lease']['uses'])}"
    elif found["state"] == "done" and found["action"] == "grant":
        line = f"{found['id']}: {found['for']} is {found['ref']}"
    else:
        line = f"{found['id']}: the approval of {found['approved_by'][-1]} is recorded"
    options.output.answer(found, [line])
    _next(options, found)


@command("deny", explain="One no, of somebody who could approve, ends a request. Your own you may take back.")
@click.argument("identifier", metavar="ID")
@click.option("--reason", required=True, metavar="TEXT")
@with_passkey
@pass_options
def deny(options: Options, identifier: str, reason: str, passkey: bool) -> None:
    """Refuse a request, or take back your own."""
    with options.open() as room:
        found = room.deny(identifier, reason=reason, show=shown(options) if passkey else None)
    options.output.answer(found, [f"{found['id']} is denied"])


def leases_ended(found: dict[str, Any]) -> list[str]:
    """The leases that ended with what was done, and what that does to a search that goes on."""
    ended = found["ended"]
    lines = [f"{counted(len(ended), 'lease')} ended with it:"] if ended else []
    lines += [f"  {each['id']}: {each['holder']} might {each['action']} {each['ref']}" for each in ended]
    if any(each["action"] == "trace" for each in ended):
        lines.append("  what is being traced under one of these is not told: it takes a new request")
    return lines


@command(
    "revoke",
    explain="""In force for every entry of the log after this one: a release that is recorded later is refused, whatever
    clocks say. Keys that were released before stay where they are; `strongroom rotate`, on the room's own host, makes
    them useless for the store.""",
)
@click.argument("target", metavar="LEASE|PRINCIPAL|REF")
@click.option("--reason", required=True, metavar="TEXT")
@pass_options
def revoke(options: Options, target: str, reason: str) -> None:
    """End a lease, suspend a principal, or freeze a version, at once."""
    with options.open() as room:
        found = room.revoke(target, reason=reason)
    options.output.answer(found, [f"{target} is revoked, in entry {found['entry']}", *leases_ended(found)])
    ref = found["ref"] if "@" in found["ref"] else ""
    if ref:
        rotated = f"strongroom rotate {ref} ends that"
    else:
        rotated = "strongroom rotate ends that, given each version that it has held"
    options.output.note(
        f"  → keys that were released before still open the store: on the room's host, {rotated} (an officer runs it)"
    )


@command(
    "copy",
    explain="""The one way in which plaintext leaves: under a lease for this action, counted against the ceilings of
    the version, marked with the holder's code word at every position, and stamped all over. The custodian writes
    it, and gives it out encrypted, piece by piece. With --quantise the marked weights are rounded on their way: int4
    and int8 of safetensors, as vLLM and transformers load them (compressed-tensors), q4_0 and q8_0 of GGUF.""",
)
@click.argument("ref")
@click.option("--to", required=True, metavar="PRINCIPAL", help="The holder: whose marks it carries.")
@click.option("--out", required=True, metavar="DIR", help="A new folder.")
@click.option("--quantise", type=click.Choice(FORMS), help="Round the weights on their way; of versions put as floats.")
@pass_options
def copy(options: Options, ref: str, to: str, out: str, quantise: str | None) -> None:
    """Write a holder's marked plaintext copy to a folder."""
    output = options.output
    with options.open() as room, output.progress(f"copy {ref}") as progress:
        done = room.copy(ref, to, out, quantise=quantise, progress=progress)
    marked = f"marked for {to}" if done["carries_marks"] else "without a mark"
    form = f" as {quantise}" if quantise else ""
    output.answer(
        done, [f"{done['ref']}{form}: {counted(len(done['files']), 'file')}, {size(done['bytes'])}, {marked}, in {out}"]
    )
    names = "the weights name its holder" if done["carries_marks"] else "nothing in it says whose copy it is"
    output.note(f"  → this is plaintext: whoever gets it has the weights, and {names}")


def _times(uses: int | None) -> str:
    """How often a lease holds, where that is counted: who is refused for it should have read it before."""
    if uses is None:
        return ""
    return ", once" if uses == 1 else f", at most {uses} times"


def _next(options: Options, found: dict[str, Any]) -> None:
    if found["state"] != "pending":
        return
    if found["needs"]:
        options.output.note(f"  → still needed: {'; '.join(found['needs'])}")
    proposed = found["action"] == "policy" and not found["needs"]
    if proposed:
        options.output.note(f"  → from {text(found['enact_after'])}: strongroom policy enact {found['id']}")
    else:
        options.output.note(f"  → whoever may approve it: strongroom approve {found['id']}")
