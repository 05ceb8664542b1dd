"""``strongroom policy``: the rules; read, tested and changed."""

from __future__ import annotations

from pathlib import Path

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import counted, facts, table
from strongroom.core.clock import text
from strongroom.errors import UsageError

_FAILED = 14  # a finding of high severity


@click.group("policy", cls=Group)
def policy() -> None:
    """The rules: read, test and change them."""


@command("show", explain="The text is kept under its SHA-256, which is in the log, and is checked against it.")
@click.argument("rule", required=False)
@click.option("--proposal", metavar="ID", help="A proposed policy in place of the one in force.")
@pass_options
def show(options: Options, rule: str | None, proposal: str | None) -> None:
    """The policy in force, or one RULE of it; and what is proposed."""
    with options.open() as room:
        found = room.policy(proposal)
    if rule is None:
        proposals = [
            f"proposed: {item['id']} by {item['by']}, may be enacted from {text(item['enact_after'])}; to read it: "
            f"strongroom policy show --proposal {item['id']}"
            for item in found["proposals"]
        ]
        options.output.answer(found, [found["text"].rstrip("\n")])
        for line in proposals:
            options.output.note(f"  → {line}")
        return
    known = {item["id"]: item for item in found["rules"]}
    if rule not in known:
        raise UsageError("policy.no_rule", f"the policy has no rule {rule!r:.80}", hint="strongroom policy show")
    item = known[rule]
    lines = facts(
        [("rule", item["id"]), ("effect", item["effect"]), ("because", item["reason"]), ("line", item["line"])]
    )
    options.output.answer(item, lines)


@command("check", explain="Parsed, and checked against the schema: a rule that names what there is not is refused.")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@pass_options
def check(options: Options, file: Path) -> None:
    """Whether FILE is a policy. Needs no room."""
    from strongroom.policy.engine import Policies

    found = Policies.parse(_read(file))
    rules = [{"id": rule.id, "effect": rule.effect, "reason": rule.reason} for rule in found.rules.values()]
    forbids = sum(rule.effect == "forbid" for rule in found.rules.values())
    lines = [f"{file} is a policy: {counted(len(rules), 'rule')}, {forbids} of them forbid", f"digest {found.digest}"]
    options.output.answer({"digest": found.digest, "rules": rules}, lines)


@command(
    "test",
    explain="""Every case of the table is asked of every subject in it: who is not named as allowed has to be refused.
    Without --policy the policy in force is asked.""",
)
@click.argument("table_file", metavar="TABLE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--policy", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Test this one.")
@pass_options
def test(options: Options, table_file: Path, file: Path | None) -> int:
    """Hold a table of expected decisions (TOML) against a policy."""
    from strongroom.policy.engine import Policies
    from strongroom.policy.table import Table

    if file is not None:
        policies = Policies.parse(_read(file))
    else:
        with options.open() as room:
            policies = Policies.parse(room.policy()["text"])
    outcomes = [outcome.as_json() for outcome in Table.parse(_read(table_file)).run(policies)]
    failed = [outcome for outcome in outcomes if not outcome["passed"]]
    rows = [
        (
            item["case"],
            item["subject"],
            item["action"],
            "allowed" if item["allowed"] else "refused",
            ", ".join(item["rules"]) or "no rule permits it",
        )
        for item in failed
    ]
    lines = table(("CASE", "SUBJECT", "ACTION", "IS", "BY"), rows) if rows else []
    lines.append(f"{counted(len(outcomes), 'decision')}: {len(failed)} not as expected")
    options.output.answer({"ok": not failed, "outcomes": outcomes}, lines)
    return _FAILED if failed else 0


@command(
    "propose",
    explain="""The proposal is an entry of the log, signed by you. Somebody else has to approve it, and a day has to
    pass, before anybody can enact it; until then the policy in force stays.""",
)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--reason", required=True, metavar="TEXT")
@pass_options
def propose(options: Options, file: Path, reason: str) -> None:
    """Propose FILE as the policy."""
    with options.open() as room:
        found = room.propose(_read(file), reason=reason)
    options.output.answer(found, [f"{found['id']} is proposed; from {text(found['enact_after'])} it may be enacted"])
    options.output.note(f"  → somebody else: strongroom approve {found['id']}")
    options.output.note(f"  → then: strongroom policy enact {found['id']}")


@command("enact", explain="Takes a second person's approval, and the waiting time that began with the proposal.")
@click.argument("identifier", metavar="ID")
@click.option("--break-glass", metavar="REASON", help="Do not wait: an emergency, which somebody else has to review.")
@pass_options
def enact(options: Options, identifier: str, break_glass: str | None) -> None:
    """Make a proposal the policy in force."""
    with options.open() as room:
        found = room.enact(identifier, break_glass=break_glass)
    options.output.answer(found, [f"the policy is now {found['policy']}, in entry {found['entry']}"])
    if break_glass is not None:
        options.output.warn("this was an emergency: status and doctor say so until somebody else has reviewed it")
        options.output.note("  → somebody else runs: strongroom review --apply")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("policy.unreadable", f"can't read {file}: {error}") from None


for each in (show, check, test, propose, enact):
    policy.add_command(each)
