"""``strongroom serve``: the custodian over HTTP."""

from __future__ import annotations

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.errors import UsageError


@command(
    "serve",
    explain="""Any number of these may serve one room from one PostgreSQL and one object store. TLS is always on, with
    a certificate of the room's own authority; clients are given the room's card, and believe that authority and the
    room's keys only. Every request is signed by its principal.""",
)
@click.option("--listen", default="127.0.0.1:8470", show_default=True, metavar="HOST:PORT")
@click.option("--name", "names", multiple=True, metavar="HOST", help="What clients call this server.  [default: HOST]")
@pass_options
def serve(options: Options, listen: str, names: tuple[str, ...]) -> None:
    """Serve the room to others, until interrupted."""
    try:
        import uvicorn

        from strongroom.server.app import CustodianApp
    except ImportError:
        raise UsageError(
            "serve.not_installed", "the server is not installed", hint="pip install 'strongroom[server]'"
        ) from None
    from strongroom.crypto.authority import Authority
    from strongroom.formats.card import Card
    from strongroom.vault.vault import Vault

    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UsageError("serve.listen", f"{listen!r} is not HOST:PORT", hint="--listen 127.0.0.1:8470")
    called = list(names) or [host]
    vault = Vault(options.folder)
    try:
        authority = Authority(vault.folder / "tls", f"Strongroom room {vault.id.hex()[:8]}")
        chain, key = authority.issue(sorted({*called, host}))
        shown = f"[{called[0]}]" if ":" in called[0] else called[0]
        card = Card(f"https://{shown}:{port}", vault.id, vault.log_key.public_key, vault.signer, authority.pem)
        path = vault.folder / "card.json"
        path.write_bytes(card.encode())
        vault.keys.room_key  # noqa: B018 - asked for now, at the terminal, and not by the first client
        answer = {"url": card.url, "card": str(path), "log_key": vault.log_key.verifier.encode()}
        options.output.answer(answer, facts(list(answer.items())))
        options.output.note("  → give the card to clients, over a channel that they trust: strongroom trust CARD")
        uvicorn.run(
            CustodianApp(vault, card.url).asgi,
            host=host,
            port=int(port),
            ssl_certfile=str(chain),
            ssl_keyfile=str(key),
            log_level="warning",
            server_header=False,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 * 1024,
        )
    finally:
        vault.close()
