"""``strongroom infer``: the bare inference server inside the boundary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.errors import UsageError

if TYPE_CHECKING:
    from strongroom.infer.app import Model


@command(
    "infer",
    explain="""The keys of REF are released to this principal, which is recorded; the weights go from the store into
    this process's memory and to no disk. The version's tokenizer and chat template run in a child process without
    network and files. Each second the log is asked whether the version may still be had: once the lease has ended or
    was revoked, the version is frozen or the principal suspended, streams end and the server with them.""",
)
@click.argument("ref")
@click.option(
    "--listen",
    "where",
    default="127.0.0.1:8471",
    show_default=True,
    metavar="HOST:PORT|unix:PATH",
    help="Loopback, unless there is a channel.",
)
@click.option(
    "--channel",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="32 bytes in hexadecimal: whoever does not send them in the header Strongroom-Channel is refused.",
)
@click.option(
    "--max-tokens",
    "most",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Of a chat that asks for no number.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of the processor.  [default: all]")
@click.option("--rows", type=click.IntRange(1, 512), default=16, show_default=True, help="Answers made side by side.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "auto"]),
    default="float32",
    show_default=True,
    help="What is computed in.",
)
@click.option("--device", default="cpu", show_default=True, help="As torch names it.")
@pass_options
def infer(
    options: Options,
    ref: str,
    *,
    where: str,
    channel: Path | None,
    most: int,
    threads: int | None,
    rows: int,
    dtype: str,
    device: str,
) -> None:
    """Serve the model REF to the gateway, until interrupted.

    The server is bare: it refuses nothing, and whoever reaches it can take the model's last layer. Never expose it;
    put the gateway in front: strongroom gateway.
    """
    try:
        from strongroom.infer import server
    except ImportError:
        raise _not_installed() from None
    secret = server.channel(channel) if channel is not None else None
    # Before anything is released: an address that is refused must cost no entry in the log.
    opened, url = server.listener(where, private=secret is not None)
    output = options.output
    with opened, options.open() as room:

        def ready(model: Model) -> None:
            answer = {"url": url, "model": model.names[0], "channel": secret is not None}
            output.answer(answer, facts(list(answer.items())))
            output.note("  → this server refuses nothing: only the gateway may reach it")

        settings = server.Settings(most=most, rows=rows, threads=threads, dtype=dtype, device=device)
        try:
            server.serve(room, ref, opened, settings, secret, ready)
        except ImportError:
            raise _not_installed() from None


def _not_installed() -> UsageError:
    return UsageError(
        "infer.not_installed", "the inference server is not installed", hint="pip install 'strongroom[infer]'"
    )
