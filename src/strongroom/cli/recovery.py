"""``strongroom recovery``: what the shares are for."""

from __future__ import annotations

import getpass
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from strongroom.cli import output
from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.errors import NotFound, UsageError

_BEGINS = "srshare1-"
_MOST = 64 * 1024  # bytes of a file of shares


@click.group("recovery", cls=Group)
def recovery() -> None:
    """Open a room whose key store is lost, and prove that you could."""


@command(
    "drill",
    explain="""The shares are combined to the recovery key, which has to open the copy of the room key that was
    sealed to it, and that key the room's own secrets. Nothing changes but the date of the last proof.""",
)
@click.argument("files", nargs=-1, metavar="[FILE]...")
@pass_options
def drill(options: Options, files: tuple[str, ...]) -> None:
    """Prove that these shares open the room.

    Shares come from the files, else from stdin; on a terminal they are asked for one by one.
    """
    with options.open() as room:
        shares = _shares(files)
        room.recovery_drill(shares)
    text = f"{len(shares)} shares open the room; nothing was changed"
    options.output.answer({"ok": True, "shares": len(shares)}, [text])


@command(
    "recover",
    explain="""The shares are combined to the recovery key, which opens the copy of the room key that was sealed to
    it. A new room key is made and wrapped by the new key store, every version's secrets are sealed anew, in one
    transaction. The shares stay good for the next time.""",
)
@click.option("--keystore", "uri", required=True, metavar="URI", help="The key store that the room gets instead.")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@pass_options
def recover(options: Options, uri: str, files: tuple[str, ...]) -> None:
    """Open a room whose key store is lost, and give it another."""
    with options.open() as room:
        shares = _shares(files)
        done = room.recover(shares, uri)
    resealed = output.counted(int(done["resealed"]), "record")
    text = f"the room is open again, under a new key in {done['keystore']}; {resealed} sealed anew"
    options.output.answer(done, [text])
    options.output.note("  → strongroom doctor")


@command(
    "reinstate",
    explain="""The way back into a room where nobody is left who could let anybody in. The shares sign that this
    principal is active, and has this role; its person and teams stay as they were. The entry is an emergency until
    another person has reviewed it.""",
)
@click.argument("path", metavar="PRINCIPAL")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("--role", type=click.Choice(["officer", "executive"]), default="officer", show_default=True)
@click.option("--reason", required=True, metavar="TEXT", help="Why; whoever reviews it reads this.")
@click.option("--public-key", metavar="HEX", help="Its key from now on.  [default: as it was; for somebody new, made]")
@pass_options
def reinstate(
    options: Options, path: str, files: tuple[str, ...], role: str, reason: str, public_key: str | None
) -> None:
    """Let somebody let others in again."""
    with options.open() as room:
        done = room.reinstate(_shares(files), path, role, reason=reason, public_key=public_key)
    text = f"{path} is active, and {role}, by the word of the recovery shares: entry {done['entry']}"
    options.output.answer(done, [text])
    options.output.note("  → somebody else: strongroom review")


def _shares(files: Sequence[str]) -> list[str]:
    """The shares in `files`, or on stdin, or typed; the text of an error never repeats one."""
    if files:
        return [share for file in files for share in split_shares(_content(Path(file)), file)]
    if output.interactive():
        return _asked()
    return split_shares(sys.stdin.read(_MOST + 1), "stdin")


def split_shares(text: str, origin: str) -> list[str]:
    """Every share in `text`: each begins with srshare1-, and lines that begin with # are remarks."""
    if len(text) > _MOST:
        raise UsageError("recovery.too_long", f"{origin} is too long to be a file of recovery shares")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    pieces = re.split(f"(?i)(?={_BEGINS})", "\n".join(lines))
    shares = [piece.strip() for piece in pieces if piece.lower().startswith(_BEGINS)]
    if not shares or pieces[0].strip():
        raise UsageError(
            "recovery.no_share",
            f"{origin} does not begin with a recovery share ({_BEGINS}…)",
            hint="one share a file, or one a line",
        )
    return shares


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST + 1).decode("ascii", "replace")
    except OSError as error:
        raise NotFound("recovery.no_file", f"can't read the share in {path}: {error.strerror}") from None


def _asked() -> list[str]:
    """Shares typed by a person, who may mistype one and try again."""
    from strongroom.crypto.shamir import Share

    shares: list[str] = []
    needed = 1
    while len(shares) < needed:
        typed = getpass.getpass(f"Recovery share {len(shares) + 1} (not shown; can be pasted): ")
        if not typed.strip():
            raise UsageError(
                "recovery.no_share", "no recovery share was typed", hint="strongroom recovery drill FILE..."
            )
        try:
            needed = Share.parse(typed).k
        except UsageError as error:
            output.Output().warn(str(error))
            continue
        shares.append(typed)
    return shares


recovery.add_command(drill)
recovery.add_command(recover)
recovery.add_command(reinstate)
