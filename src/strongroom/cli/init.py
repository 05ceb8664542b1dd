"""``strongroom init``: a new room."""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path
from typing import Any

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.core.ids import parse_principal
from strongroom.errors import BackendError, UsageError


class Recovery(click.ParamType[tuple[int, int]]):
    """2of3: how many shares are needed, of how many that are made."""

    name = "KofN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,3})of([0-9]{1,3})", str(value), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not like 2of3", param, ctx)
        return int(match[1]), int(match[2])


@command(
    "init",
    explain="""A random room key is made and wrapped by the key store; with --recovery it is also sealed to a key
    that is split into shares. Database and store are made, the owner is registered, and room.json is written last:
    without it the folder is no room.""",
)
@click.option(
    "--store", default="store", show_default=True, metavar="URL", help="Where ciphertext goes: a folder or s3://…"
)
@click.option(
    "--db", default="sqlite:room.db", show_default=True, metavar="URL", help="The database: SQLite or PostgreSQL."
)
@click.option(
    "--keystore",
    default="file:keys/room.key",
    show_default=True,
    metavar="URI",
    help="file:PATH, passphrase: or openbao:https://HOST:8200/transit/KEY",
)
@click.option("--recovery", type=Recovery(), metavar="KofN", help="Make N recovery shares, of which K open the room.")
@click.option("--owner", metavar="PRINCIPAL", help="The first principal.  [default: --as, else user/LOGIN]")
@click.option(
    "--custody",
    type=click.Choice(["team", "solo"]),
    default="team",
    show_default=True,
    help="The policy to begin with: several people approve, or you are alone here.",
)
@click.option("--shares-dir", metavar="DIR", help="Write each share to a file of its own there instead of printing it.")
@pass_options
def init(
    options: Options,
    store: str,
    db: str,
    keystore: str,
    recovery: tuple[int, int] | None,
    owner: str | None,
    custody: str,
    shares_dir: str | None,
) -> None:
    """Make a room.

    The recovery shares are shown once and kept nowhere: print them, and give them to different people.
    """
    from strongroom.client import Room

    output, folder = options.output, options.folder
    owner = parse_principal(owner or options.identity() or default_owner())
    directory = _shares_directory(shares_dir, folder, recovery)
    room, shares = Room.init(
        folder, store=store, db=db, keystore=keystore, recovery=recovery, owner=owner, custody=custody
    )
    with room:
        status = room.status()
    files = [_write_share(directory, number, share) for number, share in enumerate(shares, 1)] if directory else []
    scheme = f"{recovery[0]}of{recovery[1]}" if recovery else None
    answer = {
        "room": status["room"],
        "folder": str(folder),
        "store": status["store"],
        "keystore": status["keystore"],
        "owner": owner,
        "custody": custody,
        "recovery": scheme,
        "shares": [] if files else shares,
        "share_files": files,
    }
    lines = [f"{folder} is a room; {owner} is its first principal", f"key store  {status['keystore']}"]
    lines += [f"store      {status['store']}"]
    if shares and recovery:
        output.warn(
            f"the {recovery[1]} shares are kept nowhere else and are not shown again; any {recovery[0]} of them open "
            "the room: keep them apart from each other and from it"
        )
        lines += ["", *(f"share in {file}" for file in files)] if files else ["", *shares]
    output.answer(answer, lines)
    if shares:
        output.note("  → prove them now and once a year: strongroom recovery drill")
    elif not recovery:
        output.note("  → without recovery shares a lost key store is a lost room: see strongroom init --help")
    output.note("  → strongroom put PATH NAME")


def default_owner() -> str:
    """user/ and the login name, as far as the path grammar goes."""
    try:
        login = getpass.getuser()
    except (OSError, KeyError):  # no such user id in a container's passwd
        login = ""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", login.lower())).lstrip("._-")[:64]
    return f"user/{name or 'owner'}"


def _shares_directory(text: str | None, folder: Path, recovery: tuple[int, int] | None) -> Path | None:
    """The folder for the shares, made and writable, before a room exists whose shares could get lost."""
    if text is None:
        return None
    directory = Path(text)
    if recovery is None:
        raise UsageError(
            "init.shares", "--shares-dir without --recovery: there are no shares to write", hint="--recovery 2of3"
        )
    if directory.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "init.shares",
            "the shares would lie in the room's own folder, where whoever loses or steals the one has the other",
            hint="--shares-dir on another disk",
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("init.shares", f"can't make {directory}: {error.strerror}") from None
    if any(directory.glob("share-*.txt")) or not os.access(directory, os.W_OK):
        raise UsageError(
            "init.shares",
            f"{directory} can't be written to, or holds the shares of another room",
            hint="name a new folder",
        )
    return directory


def _write_share(directory: Path, number: int, share: str) -> str:
    path = directory / f"share-{number}.txt"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{share}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BackendError(
            "init.shares",
            f"share {number} could not be written to {path}: {error.strerror}; the room was made, its shares are lost",
            hint="remove the room's folder and make it again",
        ) from None
    return str(path)
