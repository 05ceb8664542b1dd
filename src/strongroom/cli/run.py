"""``strongroom run``: a command that reads weights from the room, and never sees a file.

This process becomes the command (execve): it keeps its process id, terminal and signals, its exit code is the command's
own, and the room's keys, which were in this process's memory until then, are gone with it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from typing import NoReturn

import click

from strongroom.cli.options import Command, Options, pass_options
from strongroom.core.ids import Ref
from strongroom.errors import UsageError

# What opens the room or its key store is not for the command: it gets bundles of the named versions, and no more.
_SECRETS = ("STRONGROOM_PASSPHRASE", "STRONGROOM_NEW_PASSPHRASE")
_REMOVED = ("BAO_TOKEN", "VAULT_TOKEN", "STRONGROOM_ROOM", "STRONGROOM_AS")


class RunCommand(Command):
    """Everything behind ``--`` is the command, options and further ``--`` included."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours, separator, command = args, "", []
        if "--" in args:
            at = args.index("--")
            ours, separator, command = args[:at], args[at], args[at + 1 :]
        rest = super().parse_args(ctx, ours)
        if not (separator and command):
            ctx.fail("after the names of the weights come -- and a command")
        ctx.params["arguments"] = command
        return rest


@click.command(
    "run",
    cls=RunCommand,
    options_metavar="[OPTIONS]",
    explain="""The command gets one key bundle for each version: it opens one variant of every marked segment, in
    the order of this principal's code word, and nothing else in the room. The bundles are in sealed anonymous
    memory (memfd) that the command inherits; STRONGROOM_GRANT=fd:N says where. Taken out of its environment are the
    passphrase, the key store's tokens, and the room itself. Core dumps are off. Whoever is the same user on this
    machine, or root, can look into its memory.""",
)
@click.argument("refs", nargs=-1, required=True, metavar="REF... -- COMMAND...")
@pass_options
def run(options: Options, refs: tuple[str, ...], arguments: list[str]) -> NoReturn:
    """Run a command that reads weights from the room.

    Inside it, strongroom.safe_open(REF, framework="pt") and the loaders find the weights; they
    reach its memory and no file. The exit code is the command's own; an error of ours before it starts is
    printed as `strongroom: …`.
    """
    from strongroom.load.grant import VARIABLE, Grant, hold, variable

    # Before any key is in memory; the command inherits it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with options.open() as room:
        grants = [Grant(*room.grant(str(Ref.parse(ref)))) for ref in refs]
    descriptor = hold(grants)
    environment = scrubbed(dict(os.environ))
    environment[VARIABLE] = variable(descriptor)
    for name in _SECRETS:
        _close_inherited(os.environ.get(f"{name}_FD"))
    _become(arguments, environment)


def scrubbed(environment: dict[str, str]) -> dict[str, str]:
    """`environment` without what opens a room or a key store."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _REMOVED and not any(name in (secret, f"{secret}_FD") for secret in _SECRETS)
    }


def _close_inherited(descriptor: str | None) -> None:
    """The passphrase can still be read from the descriptor that it came through, if that is a file."""
    if descriptor and descriptor.isdigit() and int(descriptor) > 2:
        with contextlib.suppress(OSError):  # closed already
            os.close(int(descriptor))


def _become(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    # Python ignores these two; a program expects them as they are by default.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvpe(arguments[0], arguments, environment)  # noqa: S606 - no shell is wanted
    except OSError as error:
        raise UsageError(
            "run.command",
            f"can't run {arguments[0]}: {error.strerror}",
            hint="strongroom run REF -- COMMAND [ARGUMENT]...",
        ) from None
