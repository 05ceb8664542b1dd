"""``strongroom principal``: who there is, in which roles."""

from __future__ import annotations

from typing import Any

import click

from strongroom.cli.custody import leases_ended
from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts, table
from strongroom.policy.query import ROLES


@click.group("principal", cls=Group)
def principal() -> None:
    """Who there is, in which roles."""


@command(
    "add",
    explain="""Registering is an entry of the log, signed by you. The principal's key is made on its own machine
    (`strongroom identity new`), and --public-key is its public half. In an embedded room it may be left out: then the
    key is made in the room's folder, where whoever can read the folder has it. No weights and no lease come with
    it. A team is not registered: it is there as soon as somebody is in it.""",
)
@click.argument("path", metavar="PRINCIPAL")
@click.option("--role", "roles", multiple=True, type=click.Choice(ROLES), help="May be given several times.")
@click.option("--team", "teams", multiple=True, metavar="team/NAME", help="May be given several times.")
@click.option("--person", metavar="PRINCIPAL", help="The same human's first principal, if this is a further one.")
@click.option("--public-key", metavar="HEX", help="Its public key, as identity new shows it.")
@click.option("--oidc", metavar="ISSUER#SUBJECT", help="What an identity provider calls it; it gets no key here.")
@click.option("--spiffe", metavar="SPIFFE-ID", help="What a trust domain calls it; it gets no key here.")
@pass_options
def add(
    options: Options,
    path: str,
    roles: tuple[str, ...],
    teams: tuple[str, ...],
    person: str | None,
    public_key: str | None,
    oidc: str | None,
    spiffe: str | None,
) -> None:
    """Register a principal: user/NAME or workload/NAME."""
    with options.open() as room:
        done = room.principal_add(
            path, roles=roles, teams=teams, person=person, public_key=public_key, oidc=oidc, spiffe=spiffe
        )
    _told(options, done, f"{path} is registered" + (f": {', '.join(done['roles'])}" if roles else ""))
    if "key_file" in done:
        options.output.warn(
            f"the private key of {path} lies in {done['key_file']}: whoever can read it can act as {path}. Its owner "
            "has to take it away from there, to their own machine"
        )
    if not roles:
        options.output.note(f"  → it may do nothing yet: strongroom principal role {path} researcher")


def _told(options: Options, done: dict[str, Any], text: str) -> None:
    """What was done, or that it waits for a second person."""
    if done["state"] != "pending":
        options.output.answer(done, [text, *leases_ended(done)])
        return
    options.output.answer(
        done, [f"{done['id']}: {done['principal']} as {', '.join(done['roles'])} waits for a second person"]
    )
    options.output.note(f"  → somebody else who may grant: strongroom approve {done['id']}")


@command("ls", explain="Read from the log, and applied in order; no key is needed.")
@pass_options
def ls(options: Options) -> None:
    """List the principals."""
    with options.open() as room:
        found = room.principal_ls()
    rows = [
        (
            item["path"],
            item["state"],
            ", ".join(item["roles"]),
            "" if item["person"] == item["path"] else item["person"],
            item["since"],
        )
        for item in found
    ]
    header = ("PRINCIPAL", "STATE", "ROLES", "SAME PERSON AS", "SINCE")
    options.output.answer({"principals": found}, table(header, rows))


@command("show", explain="Read from the log: who it is, and what it holds.")
@click.argument("path", metavar="PRINCIPAL")
@pass_options
def show(options: Options, path: str) -> None:
    """Everything about one principal."""
    with options.open() as room:
        found = room.principal_show(path)
    keys = ", ".join(f"{item['id']} ({item['name']})" for item in found["apikeys"]) or "none"
    leases = ", ".join(f"{item['action']} {item['ref']}" for item in found["leases"]) or "none"
    lines = facts(
        [
            ("principal", found["path"]),
            ("state", found["state"]),
            ("person", found["person"]),
            ("roles", ", ".join(found["roles"]) or "none"),
            ("teams", ", ".join(found["teams"]) or "none"),
            ("key", found["key"] or "none"),
            ("bound to", found["subject"] or "nothing"),
            ("since", found["since"]),
            ("leases", leases),
            ("API keys", keys),
        ]
    )
    options.output.answer(found, lines)


@command(
    "bind",
    explain="""In the principal's record is a hash of the name: the log does not show it. Without a name it is bound to
    none. Logins that it has end.""",
)
@click.argument("path", metavar="PRINCIPAL")
@click.option("--oidc", metavar="ISSUER#SUBJECT", help="What an identity provider calls it.")
@click.option("--spiffe", metavar="SPIFFE-ID", help="What a trust domain calls it.")
@pass_options
def bind(options: Options, path: str, oidc: str | None, spiffe: str | None) -> None:
    """Bind a principal to a name that an authority gives it, or to none."""
    with options.open() as room:
        done = room.principal_bind(path, oidc=oidc, spiffe=spiffe)
    _told(options, done, f"{path} is bound to {oidc or spiffe or 'nothing'}")


@command(
    "key",
    explain="""For a key that is lost, or that somebody else may have. The old one is refused for every entry of the log
    after this one; leases, logins and passkeys of the principal end. For an operator, officer or executive it takes a
    second person once there are three who may grant.""",
)
@click.argument("path", metavar="PRINCIPAL")
@click.option("--public-key", metavar="HEX", required=True, help="The new key, as identity new shows it.")
@pass_options
def key(options: Options, path: str, public_key: str) -> None:
    """Give a principal another key."""
    with options.open() as room:
        done = room.principal_key(path, public_key)
    _told(options, done, f"{path} has the key {public_key}")


@command("role", explain="The roles replace those that it had. Nobody gives roles to themselves, under any name.")
@click.argument("path", metavar="PRINCIPAL")
@click.argument("roles", nargs=-1, type=click.Choice(ROLES))
@pass_options
def role(options: Options, path: str, roles: tuple[str, ...]) -> None:
    """Give a principal these roles, and no others."""
    with options.open() as room:
        done = room.principal_change(path, roles=roles)
    _told(options, done, f"{path}: {', '.join(done['roles']) or 'no role'}")


@command(
    "team",
    explain="""The teams replace those that it had; without any it is in none. What policy permits a team, its members
    may; limits and budgets of a team are for all of them together. Nobody puts themselves into a team, under any
    name.""",
)
@click.argument("path", metavar="PRINCIPAL")
@click.argument("teams", nargs=-1, metavar="[team/NAME]...")
@pass_options
def team(options: Options, path: str, teams: tuple[str, ...]) -> None:
    """Put a principal into these teams, and no others."""
    with options.open() as room:
        done = room.principal_change(path, teams=teams)
    _told(options, done, f"{path}: {', '.join(done['teams']) or 'no team'}")


def _state(name: str, state: str, text: str, explain: str) -> click.Command:
    @command(name, explain=explain)
    @click.argument("path", metavar="PRINCIPAL")
    @pass_options
    def change(options: Options, path: str) -> None:
        with options.open() as room:
            done = room.principal_change(path, state=state)
        _told(options, done, f"{path} is {done['state']}")

    change.help = text
    return change


for each in (
    add,
    ls,
    show,
    bind,
    key,
    role,
    team,
    _state(
        "suspend",
        "suspended",
        "Take everything from a principal, for now.",
        "Its leases end and its key is refused, for every entry of the log after this one.",
    ),
    _state(
        "restore",
        "active",
        "Let a suspended principal act again.",
        "It may do again what its roles allow; leases that ended stay ended.",
    ),
    _state(
        "rm",
        "removed",
        "Remove a principal for good.",
        "Its entries in the log stay; so does its code word. `principal add` brings the name back, with a new key.",
    ),
):
    principal.add_command(each)
