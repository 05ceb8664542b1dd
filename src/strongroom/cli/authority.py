"""``strongroom authority``: whose word is taken for who somebody is."""

from __future__ import annotations

from pathlib import Path

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import table
from strongroom.errors import UsageError
from strongroom.formats.authority import ALGORITHMS, AUDIENCE, NONCE, OIDC, X509, Authority

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("authority", cls=Group)
def authority() -> None:
    """Identity providers and trust domains: whose word is taken for who somebody is."""


@command(
    "add",
    explain="""Recorded in the log, signed by you. Once three people may grant, somebody else who may has to agree:
    whoever runs an authority speaks for everybody who is bound to it. What is on record under the same name is
    replaced, and its logins end.""",
)
@click.option("--issuer", metavar="URL", help="An identity provider (OpenID Connect), as its tokens name it.")
@click.option("--audience", metavar="TEXT", help="The client id that its tokens are made for.")
@click.option(
    "--binding",
    type=click.Choice([NONCE, AUDIENCE]),
    default=NONCE,
    show_default=True,
    help="Where a token names the key that it introduces: people's in the nonce, a CI's in the audience.",
)
@click.option("--algorithm", "algorithms", multiple=True, type=click.Choice(ALGORITHMS), help="[default: RS256, ES256]")
@click.option("--jwks", type=_FILE, help="Its keys, if they are not to be asked for at the issuer.")
@click.option("--ca", type=_FILE, help="The authority of its web server (PEM), if that is your own.")
@click.option("--trust-domain", metavar="DOMAIN", help="A SPIFFE trust domain.")
@click.option("--bundle", type=_FILE, help="The certificates of that domain's authorities (PEM).")
@pass_options
def add(
    options: Options,
    *,
    issuer: str | None,
    audience: str | None,
    binding: str,
    algorithms: tuple[str, ...],
    jwks: Path | None,
    ca: Path | None,
    trust_domain: str | None,
    bundle: Path | None,
) -> None:
    """Take the word of an identity provider, or of a trust domain."""
    if (issuer is None) == (trust_domain is None):
        raise UsageError("authority.which", "an authority is an issuer or a trust domain", hint="--issuer URL")
    if issuer is not None:
        chosen = tuple(sorted(set(algorithms))) or ("ES256", "RS256")
        name = audience or ("strongroom" if binding == AUDIENCE else "")
        made = Authority(OIDC, issuer, name, binding, chosen, _read(jwks), _read(ca))
    else:
        made = Authority(X509, trust_domain or "", bundle=_read(bundle))
    with options.open() as room:
        done = room.authority_add(made)
    if done["state"] != "pending":
        options.output.answer(done, [f"{made.name} is an authority of this room"])
        options.output.note("  → bind somebody to a name that it gives: strongroom principal add --help")
        return
    options.output.answer(done, [f"{done['id']}: {made.name} waits for a second person"])
    options.output.note(f"  → somebody else who may grant: strongroom approve {done['id']}")


@command("ls", explain="Read from the log: those that were added, under the terms that count now.")
@pass_options
def ls(options: Options) -> None:
    """Whose word is taken."""
    with options.open() as room:
        found = room.authority_ls()
    rows = [(each["name"], each["kind"], each["audience"], ", ".join(each["algorithms"])) for each in found]
    options.output.answer({"authorities": found}, table(("AUTHORITY", "KIND", "AUDIENCE", "ALGORITHMS"), rows))


@command("rm", explain="One person does it alone: whoever came in by its word is out for every entry after this one.")
@click.argument("name", metavar="AUTHORITY")
@pass_options
def rm(options: Options, name: str) -> None:
    """Take its word no more."""
    with options.open() as room:
        done = room.authority_rm(name)
    options.output.answer(done, [f"{name} is no authority of this room any more"])


def _read(path: Path | None) -> str:
    try:
        return path.read_text("ascii") if path is not None else ""
    except (OSError, UnicodeError) as error:
        raise UsageError("authority.unreadable", f"can't read {path}: {error}") from None


for each in (add, ls, rm):
    authority.add_command(each)
