"""``strongroom serve``: the custodian over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from strongroom.cli.custody import Duration
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.core.files import write_whole
from strongroom.core.limits import MIB
from strongroom.errors import BackendError, StrongroomError, UsageError

if TYPE_CHECKING:
    from strongroom.formats.card import Card
    from strongroom.vault.revocations import Revocations


@command(
    "serve",
    explain="""Any number of these may serve one room from one PostgreSQL and one object store. TLS is always on, with
    a certificate of the room's own authority; clients are given the room's card, and believe that authority and the
    room's keys only. Every request is signed by its principal.""",
)
@click.option("--listen", "where", default="127.0.0.1:8470", show_default=True, metavar="HOST:PORT")
@click.option("--name", "names", multiple=True, metavar="HOST", help="What clients call this server.  [default: HOST]")
@click.option(
    "--metrics",
    "shown_at",
    metavar="HOST:PORT",
    help="Show metrics there, on loopback, to anybody.  [default: nowhere]",
)
@click.option(
    "--direct",
    is_flag=True,
    help="Clients read an object store by themselves, with credentials of their own, and not through here.",
)
@click.option(
    "--trace-memory",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Memory for files that clients have found.  [default: 8192, or half of what is free if that is less]",
)
@click.option(
    "--trace-limit",
    type=Duration(),
    default="1h",
    show_default=True,
    help="How long a file that a client has found is aligned with the room's versions at most.",
)
@click.option(
    "--gateway-settings",
    "settings",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Its budgets are those of gateways elsewhere, and of `strongroom budget`.  [default: those without a file]",
)
@click.option(
    "--crl",
    "revoked",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Certificates of workloads that were revoked, PEM or DER, read again at SIGHUP. May be repeated.",
)
@pass_options
def serve(  # noqa: PLR0917 - one for each option
    options: Options,
    where: str,
    names: tuple[str, ...],
    shown_at: str | None,
    direct: bool,
    trace_memory: int | None,
    trace_limit: int,
    settings: Path | None,
    revoked: tuple[Path, ...],
) -> None:
    """Serve the room to others, until interrupted."""
    one_thread_each()
    try:
        from strongroom.server.app import CustodianApp
        from strongroom.server.listen import configure, listen, run
        from strongroom.server.metrics import MetricsServer
    except ImportError:
        raise UsageError(
            "serve.not_installed", "the server is not installed", hint="pip install 'strongroom[server]'"
        ) from None
    from strongroom.crypto.authority import Authority
    from strongroom.formats.card import Card
    from strongroom.gateway.settings import Settings
    from strongroom.vault.revocations import Revocations
    from strongroom.vault.vault import Vault

    budgets = Settings.read(settings).budgets if settings else None
    host, port = address(where)
    metrics_at = address(shown_at) if shown_at is not None else None
    called = list(names) or [host]
    vault = Vault(options.folder)
    try:
        vault.keys.log_signer  # noqa: B018 - asked for now, at the terminal, and not by the first client
        revocations = Revocations(vault, revoked)
        revocations.take(revocations.read())
        # Before anything is written: the card of a server that runs here already stays.
        with listen(host, port) as listener, contextlib.ExitStack() as stack:
            authority = Authority(vault.folder / "tls", f"Strongroom room {vault.id.hex()[:8]}")
            shown = f"[{called[0]}]" if ":" in called[0] else called[0]
            url = f"https://{shown}:{listener.getsockname()[1]}"
            made = Card(url, vault.id, vault.log_key.public_key, vault.signer, authority.pem)
            card = Card.decode(made.encode())  # no client takes another
            memory = trace_memory * MIB if trace_memory else None
            app = CustodianApp(
                vault, url, direct=direct, trace_memory=memory, trace_seconds=trace_limit, budgets=budgets
            )
            with authority.issued(sorted({*called, host})) as certificate:
                config = configure(app.asgi, certificate)
            metrics = stack.enter_context(MetricsServer(app.metrics, *metrics_at)) if metrics_at else None
            path = _keep(vault.folder / "card.json", card)
            answer = {"url": url, "card": str(path), "log_key": vault.log_key.verifier.encode()}
            if metrics is not None:
                answer["metrics"] = f"{metrics.url}/metrics"
                threading.Thread(target=metrics.serve_forever, daemon=True).start()
                stack.callback(metrics.shutdown)
            if revoked:  # before anybody is told that there is a server: SIGHUP would have ended it
                stack.enter_context(_again(options, revocations))
            options.output.answer(answer, facts(list(answer.items())))
            options.output.note("  → give the card to clients, over a channel that they trust: strongroom trust CARD")
            run(config, listener)
    finally:
        vault.close()


def one_thread_each() -> None:
    """Have searches compute on one thread each, unless the environment says another number; before NumPy is imported.

    Most of a search is short products, in which two threads wait for each other for longer than they work, and beside
    other work on the machine ten times as long."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


@contextlib.contextmanager
def _again(options: Options, revocations: Revocations) -> Iterator[None]:
    """SIGHUP has the lists read again; what can't be used is said, and those in force stay."""
    from strongroom.gateway.changes import of_lists

    def read() -> None:
        with contextlib.suppress(OSError):  # stderr, where nobody listens
            try:
                before, found = revocations.taken, revocations.read()
                revocations.take(found)
                told = "; ".join(of_lists(before, found)) or "the same as before"
                options.output.note(f"  → new revocation lists are in force: {told}")
            except StrongroomError as error:
                options.output.warn(f"the revocation lists stay as they were: {error}")

    lock = threading.Lock()

    def once() -> None:
        with lock:
            read()

    # In a thread: it asks the database, and a request may be in the middle of that here.
    before = signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=once, daemon=True).start())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def address(text: str) -> tuple[str, int]:
    """HOST and PORT; UsageError ``serve.listen``."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdigit()) or int(port[:6]) > 65535:
        raise UsageError("serve.listen", f"{text!r} is not HOST:PORT", hint="--listen 127.0.0.1:8470")
    return host, int(port)


def _keep(path: Path, card: Card) -> Path:
    try:
        write_whole(path, card.encode(), mode=0o644)  # it is handed on
    except OSError as error:
        raise BackendError("card.unwritable", f"can't write {path}: {error.strerror}") from None
    return path
