"""``strongroom login``: speak as a principal by the word of an identity provider, or of a workload's certificate."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from strongroom.cli.custody import Duration
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.core.clock import text
from strongroom.errors import UsageError

_FILE = click.Path(path_type=Path, dir_okay=False)
_MOST = 64 * 1024


@command(
    "login",
    explain="""A key is made on this machine, and the token or certificate introduces that key to the room, for some
    hours: the token is of use to nobody else. From then on every command is signed with the key. Approving, granting
    and administering take the principal's own key.""",
)
@click.option("--browser", is_flag=True, help="Sign in with a browser, at --issuer as --client-id.")
@click.option("--issuer", metavar="URL", help="The identity provider, for --browser.")
@click.option("--client-id", metavar="ID", help="What the identity provider calls this room, for --browser.")
@click.option("--ca", type=_FILE, help="The authority of the provider's web server (PEM), for --browser.")
@click.option("--prepare", "--audience-only", "prepare", is_flag=True, help="Make the key; say what a token must have.")
@click.option("--oidc-token", "shown", metavar="FILE|-", help="The token that was asked for, in a file or on stdin.")
@click.option("--svid", nargs=2, type=_FILE, metavar="CERT KEY", help="A workload's certificate chain and key (PEM).")
@click.option("--duration", type=Duration(), default="8h", show_default=True, help="For how long, at most.")
@click.option("--end", is_flag=True, help="Forget the key of the login.")
@pass_options
def login(
    options: Options,
    *,
    browser: bool,
    issuer: str | None,
    client_id: str | None,
    ca: Path | None,
    prepare: bool,
    shown: str | None,
    svid: tuple[Path, Path] | None,
    duration: int,
    end: bool,
) -> None:
    """Speak as a principal by an identity provider's token, or a workload's certificate."""
    if sum((browser, prepare, shown is not None, svid is not None, end)) != 1:
        raise UsageError("login.how", "say how to log in, in one way", hint="strongroom login --help")
    if options.identity() is None:
        raise UsageError("login.who", "say whom you log in as", hint="--as PRINCIPAL")
    with options.open() as room:
        attempt = room.login(duration)
        if end:
            there = attempt.end()
            options.output.answer({"ended": there}, ["the login is forgotten" if there else "there is no login here"])
            return
        if prepare:
            asked = attempt.prepare()
            options.output.answer(asked, facts(list(asked.items())))
            options.output.note("  → ask for a token with one of these, then: strongroom login --oidc-token -")
            return
        if svid is not None:
            from strongroom.crypto.svid import uri_of

            chain = _read(svid[0]).decode("ascii", "replace")
            done = attempt.with_certificate(chain, _read(svid[1]), uri_of(chain))
        elif browser:
            from strongroom.client.browser import token

            if issuer is None or client_id is None:
                raise UsageError("login.browser", "which identity provider?", hint="--issuer URL --client-id ID")
            nonce = attempt.prepare()["nonce"]
            authority = _read(ca).decode("ascii", "replace") if ca else ""
            done = attempt.with_token(token(issuer, client_id, nonce, options.output.note, ca=authority))
        else:
            done = attempt.with_token(_stdin() if shown == "-" else _read(Path(shown or "")).decode("ascii", "replace"))
    until = text(done["expires_at"])
    options.output.answer(done, [f"{done['principal']} may be spoken for from here until {until}"])


def _stdin() -> str:
    return sys.stdin.read(_MOST)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except OSError as error:
        raise UsageError("login.unreadable", f"can't read {path}: {error.strerror}") from None
