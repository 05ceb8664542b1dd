"""``strongroom who`` and ``strongroom reach``: who can do what, and by which rule."""

from __future__ import annotations

from typing import Any

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import table

_EXPLAIN = """Each answer is a decision of the policy that is in force, with the counts and leases of now; what would be
needed is found by asking it again with more approvals, a lease, or in an emergency. The path names principal, role and
rule."""


# What policies speak of, and nothing serves yet.
_NOT_YET = {"adapt"}


@command("who", explain=_EXPLAIN)
@click.argument("ref")
@click.option("--all", "everything", is_flag=True, help="Those who never can, too.")
@pass_options
def who(options: Options, ref: str, everything: bool) -> None:
    """Who can reach a version, and by which rule."""
    with options.open() as room:
        found = room.who(ref)
    _answer(options, found, "principal", everything)


@command("reach", explain=_EXPLAIN)
@click.argument("path", metavar="PRINCIPAL")
@click.option("--all", "everything", is_flag=True, help="What it never can, too.")
@pass_options
def reach(options: Options, path: str, everything: bool) -> None:
    """What one principal can reach, and by which rule."""
    with options.open() as room:
        found = room.reach(path)
    _answer(options, found, "ref", everything)


def _answer(options: Options, found: list[dict[str, Any]], first: str, everything: bool) -> None:
    shown = [item for item in found if everything or item["state"] != "never"]
    rows = [(item[first], item["action"], item["answer"], " → ".join(item["path"])) for item in shown]
    header = (first.upper(), "ACTION", "WHEN", "BECAUSE")
    options.output.answer({"access": shown}, table(header, rows) if rows else ["nobody, nothing"])
    if any(item["action"] == "infer" for item in shown):
        options.output.note(
            "  → inference is by the gateway, with an API key or a token: strongroom apikey ls PRINCIPAL"
        )
    if waits := sorted({item["action"] for item in shown} & _NOT_YET):
        options.output.note(
            f"  → {' and '.join(waits)}: that is what the policy says; no command of this release does it yet"
        )
