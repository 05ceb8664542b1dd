"""``strongroom gateway``: inference for everybody who holds no weights."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.errors import StrongroomError, UsageError

if TYPE_CHECKING:
    from strongroom.gateway.changes import Taken
    from strongroom.gateway.generations import Generations
    from strongroom.gateway.rooms import Open
    from strongroom.gateway.settings import Settings


@command(
    "gateway",
    explain="""Clients of OpenAI's API work unchanged: their base URL is http(s)://HOST:PORT/v1, their key one of
    `strongroom apikey new`. Every field of a request is validated and written anew, every bit of an answer is metered
    against the size of the weights, and each request is recorded. What policy does not permit (log-probabilities,
    logit_bias, embeddings, n) is refused. SIGHUP has it read --settings, --certificate and --crl again.""",
)
@click.option("--upstream", "upstreams", multiple=True, metavar="URL", help="An inference server. May be repeated.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="REF=NAME",
    help="What the upstreams call a version.  [default: as they say, under its name in the room]",
)
@click.option("--channel", type=click.Path(dir_okay=False), metavar="FILE", help="The secret of `strongroom infer`.")
@click.option("--settings", "file", type=click.Path(dir_okay=False), metavar="FILE", help="Limits, budgets, filters.")
@click.option("--listen", "where", default="127.0.0.1:8480", show_default=True, metavar="HOST:PORT")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes.")
@click.option(
    "--records",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="[default: inference, in the room; of a served room, here]",
)
@click.option("--certificate", type=click.Path(dir_okay=False), metavar="FILE", help="For TLS: a chain, as PEM.")
@click.option("--key", type=click.Path(dir_okay=False), metavar="FILE", help="Its private key.")
@click.option(
    "--client-certificates", "ask", is_flag=True, help="Take X.509 certificates of workloads in place of keys."
)
@click.option(
    "--crl",
    "revoked",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Certificates of callers that were revoked, PEM or DER, read again at SIGHUP. May be repeated.",
)
@click.option(
    "--metrics",
    "shown_at",
    metavar="HOST:PORT",
    help="Show metrics there, on loopback, to anybody; of several workers each on the next port.  [default: nowhere]",
)
@click.option("--behind-proxy", is_flag=True, help="TLS ends before here: listen beyond loopback without it.")
@pass_options
def gateway(  # noqa: PLR0917 - one for each option
    options: Options,
    upstreams: tuple[str, ...],
    models: tuple[str, ...],
    channel: str | None,
    file: str | None,
    where: str,
    workers: int,
    records: str | None,
    certificate: str | None,
    key: str | None,
    ask: bool,
    revoked: tuple[Path, ...],
    shown_at: str | None,
    behind_proxy: bool,
) -> None:
    """Serve inference to others, with limits and an egress budget, until interrupted."""
    try:
        from strongroom.gateway import serving
        from strongroom.gateway.settings import Settings
        from strongroom.server.listen import listen
    except ImportError:
        raise UsageError(
            "gateway.not_installed", "the gateway is not installed", hint="pip install 'strongroom[gateway]'"
        ) from None
    from strongroom.cli.serve import address
    from strongroom.crypto.capture import key_id

    host, port = address(where)
    if (certificate is None) != (key is None):
        raise UsageError(
            "gateway.certificate", "a certificate comes with its key", hint="--certificate FILE --key FILE"
        )
    if certificate is None and not behind_proxy and host not in ("127.0.0.1", "::1", "localhost"):
        raise UsageError(
            "gateway.plain",
            f"keys and answers would go over the network in the clear from {host}",
            hint="--certificate FILE --key FILE, or --behind-proxy where TLS ends before here",
        )
    if ask and (certificate is None or behind_proxy):
        raise UsageError(
            "gateway.client_certificates",
            "callers show certificates to whatever ends TLS, which is not this gateway",
            hint="--client-certificates goes with --certificate FILE --key FILE, and without --behind-proxy",
        )

    if revoked and not ask:
        raise UsageError(
            "gateway.crl",
            "no caller shows a certificate, so none can be revoked",
            hint="--crl FILE goes with --client-certificates",
        )

    def read() -> Settings:
        return _with(Settings.read(Path(file)) if file else Settings(), upstreams, models, channel)

    settings = read()
    room, kept = _room(options)
    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if certificate else 'http'}://{shown}:{listener.getsockname()[1]}/v1"
        answer = {"url": url, "settings": settings.digest, "workers": workers}
        if settings.capture.key:
            answer["capture"] = key_id(bytes.fromhex(settings.capture.key))
        serving.run(
            serving.Plan(
                room,
                settings,
                Path(records) if records else kept,
                workers,
                (Path(certificate), Path(key)) if certificate and key else None,
                _shown(*address(shown_at)) if shown_at else lambda _, __: None,
                ask,
                revoked,
                # Without a file there is nothing to read again, and a terminal that is closed ends what runs in it.
                read if file or certificate else None,
                partial(_tell, options),
            ),
            listener,
            ready=lambda: options.output.answer(answer, facts(list(answer.items()))),
        )


def _room(options: Options) -> tuple[Open, Path]:
    """What opens the room in each worker, and where records are kept if nobody says where."""
    if (url := options.served) is not None:
        from strongroom.client.away.room import AwayRoom

        return partial(AwayRoom.opened, url, options.identity()), Path("inference")
    from strongroom.gateway.rooms import InFolder

    return partial(InFolder.opened, options.folder), options.folder / "inference"


def _tell(options: Options, found: Taken | StrongroomError) -> None:
    """What came of reading the settings again: on stderr, and never the end of a gateway that nobody listens to."""
    from strongroom.crypto.capture import key_id

    with contextlib.suppress(OSError):
        if isinstance(found, StrongroomError):
            options.output.warn(f"the settings stay as they were: {found}")
        else:
            told = "; ".join(found.changed) or "nothing in them has changed"
            options.output.note(f"  → new settings are in force: {found.settings.digest}: {told}")
            if found.settings.capture.key:
                key = key_id(bytes.fromhex(found.settings.capture.key))
                options.output.note(f"  → prompts and answers are captured, sealed to the key {key}")


def _shown(host: str, port: int) -> Callable[[Generations, int], None]:
    """What shows the metrics of a worker, in a thread of its process."""

    def show(app: Generations, number: int) -> None:
        from strongroom.gateway.metrics import GatewayMetrics
        from strongroom.server.metrics import MetricsServer

        server = MetricsServer(GatewayMetrics(app), host, port + number)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    return show


def _with(settings: Settings, upstreams: tuple[str, ...], models: tuple[str, ...], channel: str | None) -> Settings:
    from strongroom.gateway.settings import Upstream

    pairs = []
    for each in models:
        ref, separator, name = each.partition("=")
        if not (separator and ref and name):
            raise UsageError("gateway.model", f"{each!r:.80} is not REF=NAME", hint="--model acme/tiny@1=tiny")
        pairs.append((ref, name))
    added = tuple(Upstream(url, models=tuple(sorted(pairs)), channel=channel or "") for url in upstreams)
    found = replace(settings, upstream=settings.upstream + added)
    if not found.upstream:
        raise UsageError("gateway.upstream", "there is no inference server", hint="--upstream http://127.0.0.1:8000")
    return found
