"""The options that every command takes, wherever they stand, and the click classes that give them to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from strongroom.cli.output import Output
from strongroom.core.settings import Settings, room_folder

if TYPE_CHECKING:
    from strongroom.client import Room


@dataclass
class Options:
    """What was said before or behind the command's name; the last word counts."""

    room: str | None = None
    principal: str | None = None
    json: bool = False
    explain: bool = False
    quiet: bool = False

    @property
    def output(self) -> Output:
        given = {"--room": self.room, "--as": self.principal}
        named = {option: value for option, value in given.items() if value}
        return Output(json=self.json, quiet=self.quiet, given=named)

    @property
    def folder(self) -> Path:
        """The room's folder; UsageError for a served room, which has none here."""
        return room_folder(self.room or Settings.from_environment().room)

    @property
    def served(self) -> str | None:
        """The address of a served room, if it is one."""
        room = self.room or Settings.from_environment().room
        return room if room.startswith("https://") else None

    def identity(self) -> str | None:
        """Who to act as, if anybody said so."""
        return self.principal or Settings.from_environment().principal

    def open(self) -> Room:
        """The room, as the principal that was named or is the only one."""
        from strongroom.client import Room

        room = self.room or Settings.from_environment().room
        return Room(room if room.startswith("https://") else self.folder, self.identity())


pass_options = click.make_pass_decorator(Options, ensure=True)


def _remember(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if param.name and ctx.get_parameter_source(param.name) is not ParameterSource.DEFAULT:
        setattr(ctx.ensure_object(Options), param.name, value)


def shared() -> list[click.Option]:
    """Fresh objects of the shared options: a click option belongs to one command."""

    def option(names: list[str], **attributes: Any) -> click.Option:
        return click.Option(names, expose_value=False, is_eager=True, callback=_remember, **attributes)

    return [
        option(["--room"], metavar="PATH|URL", help="The room.  [default: $STRONGROOM_ROOM, else ./room]"),
        option(
            ["--as", "principal"],
            metavar="PRINCIPAL",
            help="Act as this principal, e.g. user/ana.  [default: $STRONGROOM_AS, else the only one]",
        ),
        option(["--json"], is_flag=True, help="Print one JSON object on stdout, errors included."),
        option(["--explain"], is_flag=True, help="Say how the answer comes about, on stderr."),
        option(["--quiet"], is_flag=True, help="No hints and no progress on stderr."),
    ]


class Command(click.Command):
    """A command with the shared options. `explain` says how its answer comes about."""

    def __init__(self, *args: Any, explain: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explain = " ".join(explain.split())
        self.params += shared()

    def invoke(self, ctx: click.Context) -> Any:
        options = ctx.ensure_object(Options)
        if options.explain and self.explain:
            import textwrap

            for line in textwrap.wrap(self.explain, 100):
                Output().note(f"  {line}")
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)


class Group(click.Group):
    """A noun with several verbs; takes the shared options, too."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += shared()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _format_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """The command's own options first, those of every command below."""
    own: list[tuple[str, str]] = []
    everywhere: list[tuple[str, str]] = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            common = isinstance(param, click.Option) and param.callback is _remember
            (everywhere if common else own).append(record)
    for title, records in (("Options", own), ("Options of every command, before or behind its name", everywhere)):
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def command(name: str, *, explain: str = "", **attributes: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command of the command line. Its docstring is its help."""
    return click.command(name, cls=Command, explain=explain, **attributes)
