"""``strongroom run``: a command that reads weights from the room, and never sees a file.

This process becomes the command (execve): it keeps its process id, terminal and signals, its exit code is the command's
own, and the room's keys, which were in this process's memory until then, are gone with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
from typing import NoReturn

import click

from strongroom.cli.options import Command, Options, pass_options
from strongroom.core.ids import Ref
from strongroom.errors import UsageError

# What opens the room or its key store is not for the command: it gets bundles of the named versions, and no more.
_SECRETS = ("STRONGROOM_PASSPHRASE", "STRONGROOM_NEW_PASSPHRASE")
_REMOVED = ("STRONGROOM_ROOM", "STRONGROOM_AS")
# By prefix: tokens, client keys and the files that hold them go by many names.
_REMOVED_PREFIXES = ("BAO_", "VAULT_", *_SECRETS)


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
    passphrase, every variable of the key store (BAO_*, VAULT_*), and the room itself; a descriptor that the
    passphrase came through is closed, and is /dev/null if it is a standard one. Core dumps are off. Whoever is the
    same user on this machine, or root, can look into its memory.""",
)
@click.argument("refs", nargs=-1, required=True, metavar="REF... -- COMMAND...")
@click.option(
    "--break-glass",
    metavar="REASON",
    help="Load without a lease, in an emergency, if policy lets you: it is recorded, and stays marked until reviewed.",
)
@pass_options
def run(options: Options, refs: tuple[str, ...], break_glass: str | None, arguments: list[str]) -> NoReturn:
    """Run a command that reads weights from the room.

    Inside it, strongroom.safe_open(REF, framework="pt") and the loaders find the weights; they
    reach its memory and no file. The exit code is the command's own; an error of ours before it starts is
    printed as `strongroom: …`.
    """
    from strongroom.load.grant import VARIABLE, Grant, hold, variable

    # Before any key is in memory; the command inherits it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Before anything else is opened here: what has these numbers now was inherited.
    inherited = _passphrase_descriptors()
    # Before a release is recorded that nothing would be read under.
    if shutil.which(arguments[0]) is None:
        raise _no_command(arguments[0], "there is no such program, or it can't be run")
    with options.open() as room:
        grants = [Grant(*room.grant(str(Ref.parse(ref)), break_glass=break_glass)) for ref in refs]
    if break_glass is not None:
        emergency = "this was an emergency: status says so until somebody else has reviewed it, who runs:"
        options.output.note(f"  → {emergency} strongroom review --apply")
    for number in inherited:
        _take_away(number)
    descriptor = hold(grants)
    environment = scrubbed(dict(os.environ))
    environment[VARIABLE] = variable(descriptor)
    _become(arguments, environment)


def scrubbed(environment: dict[str, str]) -> dict[str, str]:
    """`environment` without what opens a room or a key store."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _REMOVED and not name.startswith(_REMOVED_PREFIXES)
    }


def _passphrase_descriptors() -> set[int]:
    """The descriptors that a passphrase was handed over in."""
    found = set()
    for secret in _SECRETS:
        text = os.environ.get(f"{secret}_FD", "")
        if re.fullmatch("[0-9]{1,9}", text, re.ASCII):
            with contextlib.suppress(OSError):  # there is none of that number
                os.fstat(int(text))
                found.add(int(text))
    return found


def _take_away(number: int) -> None:
    """The passphrase could be read once more from a descriptor that is a file: the command must not inherit it."""
    if number > 2:
        with contextlib.suppress(OSError):  # closed already
            os.close(number)
        return
    # A program relies on 0 to 2 being open: the next file that it opened would be taken for one of them.
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, number)
    if nothing != number:
        os.close(nothing)


def _become(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    # Python ignores these two; a program expects them as they are by default.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvpe(arguments[0], arguments, environment)  # noqa: S606 - no shell is wanted
    except OSError as error:
        raise _no_command(arguments[0], str(error.strerror)) from None


def _no_command(name: str, why: str) -> UsageError:
    return UsageError("run.command", f"can't run {name}: {why}", hint="strongroom run REF -- COMMAND [ARGUMENT]...")
