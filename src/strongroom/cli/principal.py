"""``strongroom principal``: who may hold weights."""

from __future__ import annotations

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import table


@click.group("principal", cls=Group)
def principal() -> None:
    """Who may hold weights."""


@command("add", explain="The name is registered in the room's database; it is given no weights and no key by that.")
@click.argument("path", metavar="PRINCIPAL")
@pass_options
def add(options: Options, path: str) -> None:
    """Register a principal: user/NAME, workload/NAME or team/NAME."""
    with options.open() as room:
        room.principal_add(path)
    options.output.answer({"principal": path}, [f"{path} is registered"])


@command("ls", explain="Read from the room's database; no key is needed.")
@pass_options
def ls(options: Options) -> None:
    """List the principals."""
    with options.open() as room:
        found = room.principal_ls()
    rows = [(item["path"], item["created_at"], item.get("suspended_at") or "") for item in found]
    options.output.answer({"principals": found}, table(("PRINCIPAL", "SINCE", "SUSPENDED"), rows))


principal.add_command(add)
principal.add_command(ls)
