"""``strongroom``: finds the command, imports only that, and ends with the exit code of what happened.

Exit codes: 0 ok · 1 unexpected · 2 usage · 3 denied · 4 authentication needed · 5 approval pending · 6 integrity ·
7 sealed or unavailable · 8 not found · 9 limit or budget · 11-14 findings by severity · 130 interrupted · 141 nobody
reads stdout any more. ``strongroom run`` ends with its command's own code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from strongroom import __version__
from strongroom.cli import output
from strongroom.cli.options import Group
from strongroom.errors import StrongroomError, UsageError

_COMPLETION = "_STRONGROOM_COMPLETE"  # click's name for it: bash_source prints what a shell needs

# The help of a command is said twice, here and in its docstring, so that `strongroom --help` imports none of them.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Start here": {
        "demo": ("demo", "The guided story on a throw-away room and a real model."),
        "init": ("init", "Make a room."),
    },
    "Weights": {
        "put": ("weights", "Store a model as the next version of NAME."),
        "ls": ("weights", "List the versions in the room."),
        "show": ("weights", "Everything about one version."),
        "verify": ("weights", "Check every byte of a version against what was signed."),
        "rotate": ("weights", "Re-encrypt a version under new keys."),
        "shred": ("weights", "Destroy a version's keys and ciphertext."),
    },
    "Custody": {
        "request": ("custody", "Ask for a lease on one version."),
        "requests": ("custody", "List what is asked for and what is granted, or show one request."),
        "approve": ("custody", "Approve somebody else's request, or a proposed policy."),
        "deny": ("custody", "Refuse a request, or take back your own."),
        "renew": ("review", "Extend somebody else's lease to load."),
        "revoke": ("custody", "End a lease, suspend a principal, or freeze a version, at once."),
        "thaw": ("review", "Let a version that was revoked be asked for again."),
        "ceiling": ("review", "How many may hold a version, copy it, and have copies of it."),
        "review": ("review", "Who has what, who used it when, what was never used, and what to look at."),
        "who": ("reach", "Who can reach a version, and by which rule."),
        "reach": ("reach", "What one principal can reach, and by which rule."),
        "principal": ("principal", "Who there is, in which roles."),
        "authority": ("authority", "Identity providers and trust domains: whose word is taken for who somebody is."),
        "policy": ("policy", "The rules: read, test and change them."),
        "log": ("log", "The record of everything, and whether it holds together."),
        "budget": ("budget", "How much of a version has left as answers, and how much may."),
        "records": ("records", "What gateways have answered, checked against the log."),
        "capture": (
            "capture",
            "Prompts and answers that a gateway has sealed for an auditor: the key, and opening them.",
        ),
    },
    "Elsewhere": {
        "serve": ("serve", "Serve the room to others, until interrupted."),
        "trust": ("trust", "Trust the card of a served room."),
        "identity": ("trust", "The keys of principals on this machine, for served rooms."),
        "passkey": ("passkey", "Passkeys and security keys that sign approvals, each time anew."),
        "apikey": ("apikey", "API keys, with which programs call the room's gateway."),
        "login": ("login", "Speak as a principal by an identity provider's token, or a workload's certificate."),
        "gateway": ("gateway", "Serve inference to others, with limits and an egress budget, until interrupted."),
        "witness": ("witness", "Cosign checkpoints of other people's logs, until interrupted."),
    },
    "Use": {
        "run": ("run", "Run a command that reads weights from the room."),
        "infer": ("infer", "Serve the model REF to the gateway, until interrupted."),
        "copy": ("custody", "Write a holder's marked plaintext copy to a folder."),
        "trace": ("trace", "Say whether a found file, or text, is of these weights, and whose copy."),
        "bench": ("bench", "Measure how fast this room is read on this machine."),
    },
    "The room": {
        "keystore": ("keystore", "Where the room's key is kept."),
        "recovery": ("recovery", "Open a room whose key store is lost, and prove that you could."),
        "status": ("room", "Where the room is, whether it is unsealed, what it holds."),
        "doctor": ("room", "Check how safe and how fast this room and machine are."),
        "fsck": ("room", "Check the whole room: database against store, both ways."),
        "upgrade": ("upgrade", "Bring a room that an older release made to this one."),
    },
}


class Root(Group):
    """The commands by topic, imported one by one when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [name for commands in COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        for commands in COMMANDS.values():
            if cmd_name in commands:
                module = import_module(f"strongroom.cli.{commands[cmd_name][0]}")
                found: click.Command = getattr(module, cmd_name)
                return found
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for topic, commands in COMMANDS.items():
            with formatter.section(topic):
                formatter.write_dl([(name, text) for name, (_, text) in commands.items()])


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="strongroom %(version)s")
def cli() -> None:
    """Custody of AI model weights: encrypted, marked, and read back at memory speed.

    REF names weights: acme/tiny@3, or acme/tiny for the newest version. Start with `strongroom demo`.
    """


def execute(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    output.prepare_streams()
    # Looked for by hand, since an error can come before click has read the option. After -- others' options begin.
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    printer = output.Output(json="--json" in ours, given=_given(ours))
    try:
        code = _completed() if _COMPLETION in os.environ else _guarded(list(arguments), printer)
        output.flush()
    except BrokenPipeError:
        output.discard()
        return 141
    return code


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """The shared options that take a value, as they were given; the last word counts."""
    found = {}
    for at, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option in ("--room", "--as") and (equals or at + 1 < len(arguments)):
            found[option] = value if equals else arguments[at + 1]
    return found


def _guarded(arguments: list[str], printer: output.Output) -> int:
    try:
        # Not cli.main(): it has answers of its own for interrupts and for pipes that nobody reads.
        with cli.make_context("strongroom", arguments) as context:
            result: Any = cli.invoke(context)
    except click.exceptions.Exit as ending:  # --help and --version
        return ending.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        if not printer.json:
            printer.note(error.format_message())
            return 2
        failure: StrongroomError = UsageError("usage.no_command", "no command was given", hint="strongroom --help")
    except click.ClickException as error:
        failure = _usage(error)
    except (KeyboardInterrupt, click.Abort):
        return _interrupted(printer)
    except StrongroomError as error:
        failure = error
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the last resort: nothing but our error shape leaves this program
        failure = Unexpected(
            "unexpected.error",
            f"{type(error).__name__}: {error}",
            hint="this is a fault in Strongroom; STRONGROOM_TRACEBACK=1 shows where",
        )
        if os.environ.get("STRONGROOM_TRACEBACK") == "1":
            output.traceback()
    else:
        return result if isinstance(result, int) else 0
    printer.error(failure)
    return failure.exit_code


def _completed() -> int:
    from click.shell_completion import shell_complete

    return shell_complete(cli, {}, "strongroom", _COMPLETION, os.environ[_COMPLETION])


class Unexpected(StrongroomError):
    """A fault of ours that reached the top; its exit code is the root's, 1."""


def _interrupted(printer: output.Output) -> int:
    failure = Interrupted(
        "interrupted.signal",
        "interrupted",
        hint="what was recorded before stays recorded; put and rotate, given again, go on where they were",
    )
    printer.error(failure)
    return failure.exit_code


class Interrupted(StrongroomError):
    """Ctrl-C."""

    exit_code = 130


def _usage(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "strongroom"
    codes = {
        "NoSuchOption": "usage.unknown_option",
        "NoSuchCommand": "usage.unknown_command",
        "MissingParameter": "usage.missing",
        "BadParameter": "usage.bad_value",
    }
    code = codes.get(type(error).__name__, "usage.malformed")
    return UsageError(code, error.format_message(), hint=f"{path} --help")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the program."""
    sys.exit(execute(sys.argv[1:] if arguments is None else arguments))
