"""``strongroom trust`` and ``strongroom identity``: what a client of a served room has beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts, table
from strongroom.errors import CannotVerify, Tampered, UsageError

if TYPE_CHECKING:
    from strongroom.crypto.identity import Identities


_CARD = "strongroom trust card.json, with the file card.json that strongroom serve has written into the room's folder"


@command(
    "trust",
    explain="""From then on --room https://… is the room on this card: the server has to show a certificate of the
    card's authority, and log and manifests have to be signed with the card's keys. Get the card over a channel that you
    trust. With --witness no key that is released here is used before so many of them have cosigned the log that
    records it; they stay until others are named.""",
)
@click.argument("card", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--witness", "named", nargs=2, multiple=True, metavar="VKEY URL", help="A witness, and where it answers.")
@click.option("--quorum", type=click.IntRange(1), help="How many of them have to have cosigned.  [default: all]")
@pass_options
def trust(options: Options, card: Path, named: tuple[tuple[str, str], ...], quorum: int | None) -> None:
    """Trust the card of a served room."""
    from strongroom.formats.card import Card, Witnesses
    from strongroom.formats.note import VerifierKey
    from strongroom.ledger.key import LogKey
    from strongroom.storage.session import trust as keep

    try:
        found = Card.decode(card.read_bytes())
    except OSError as error:
        raise UsageError("card.unreadable", f"can't read {card}: {error.strerror}", hint=_CARD) from None
    except Tampered as error:  # nothing is trusted yet that it could contradict
        raise UsageError(error.code, f"{card} is not the card of a room: {error.message}", hint=_CARD) from None
    if quorum is not None and not named:
        raise UsageError("trust.quorum", "a quorum is of witnesses that are named", hint="--witness VKEY URL")
    try:
        keys = tuple((VerifierKey.parse(key), url) for key, url in named)
        witnesses = Witnesses(keys, len(keys) if quorum is None else quorum) if keys else None
    except (Tampered, CannotVerify) as error:
        raise UsageError(error.code, error.message, hint="strongroom witness prints its key") from None
    kept, path = keep(found, witnesses)
    key = LogKey(found.room, found.log_key).verifier.encode()
    answer = {"url": found.url, "room": found.room.hex(), "log_key": key, "kept": str(path)}
    pinned = kept.witnesses
    told = [f"{pinned.quorum} of {', '.join(each.name for each, _ in pinned.named)}"] if pinned else []
    lines = facts([*answer.items(), *(("witnesses", each) for each in told)])
    options.output.answer({**answer, "witnesses": pinned.as_json() if pinned else None}, lines)
    if _identities().ls():
        options.output.note(f"  → strongroom --room {found.url} ls")
    else:
        options.output.note("  → a key to act with: strongroom identity new user/NAME")


@click.group("identity", cls=Group)
def identity() -> None:
    """The keys of principals on this machine, for served rooms."""


@command("new", explain="The private key stays on this machine, in a file that only you may read.")
@click.argument("path", metavar="PRINCIPAL")
@pass_options
def new(options: Options, path: str) -> None:
    """Make a key to act as PRINCIPAL with."""
    signer = _identities().create(path)
    key = signer.public_key.hex()
    options.output.answer({"principal": path, "public_key": key}, facts([("principal", path), ("key", key)]))
    options.output.note(f"  → somebody who may grant: strongroom principal add {path} --public-key {key} --role ROLE")


@command("ls", explain="The files in the folder of identities. Of the keys the public halves are shown.")
@pass_options
def ls(options: Options) -> None:
    """Whom this machine can act as."""
    identities = _identities()
    found = {path: identities.signer(path).public_key.hex() for path in identities.ls()}
    rows = list(found.items())
    lines = table(("PRINCIPAL", "PUBLIC KEY"), rows) if rows else ["nobody"]
    options.output.answer({"identities": list(found), "public_keys": found}, lines)


def _identities() -> Identities:
    from strongroom.core.settings import Settings
    from strongroom.crypto.identity import Identities

    return Identities(Settings.from_environment().identities_folder)


identity.add_command(new)
identity.add_command(ls)
