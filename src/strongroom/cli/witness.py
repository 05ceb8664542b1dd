"""``strongroom witness``: a witness of other people's logs, to run on a machine that is not theirs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.errors import BackendError, UsageError


@command(
    "witness",
    explain="""C2SP tlog-witness. For each log that it is given it remembers the newest checkpoint that it has signed,
    and signs only what is proven to extend that. It needs nothing of the room, and should not be on its machine.""",
)
@click.option("--name", required=True, help="The witness's name, e.g. witness.example/w1.")
@click.option("--log", "logs", multiple=True, required=True, metavar="VKEY", help="A log's key: strongroom log key.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("witness"), show_default=True)
@click.option("--listen", default="127.0.0.1:8471", show_default=True, metavar="HOST:PORT")
@pass_options
def witness(options: Options, name: str, logs: tuple[str, ...], folder: Path, listen: str) -> None:
    """Cosign checkpoints of other people's logs, until interrupted."""
    from strongroom.core.clock import unix
    from strongroom.crypto.identity import Identities
    from strongroom.formats.note import VerifierKey
    from strongroom.ledger.witness import Witness
    from strongroom.server.witness import WitnessServer

    keys = [VerifierKey.parse(each) for each in logs]
    signer = Identities(folder / "identity").ensure(_IDENTITY)
    cosigner = Witness(name, signer, folder / "seen", {key.name: key for key in keys}, unix)
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError("witness.listen", f"{listen!r} is not HOST:PORT", hint="--listen 127.0.0.1:8471")
    try:
        server = WitnessServer(cosigner, (host.strip("[]"), int(port)))
    except (OSError, OverflowError) as error:
        raise BackendError("witness.listen", f"can't listen on {listen}: {error}") from None
    answer = {"url": server.url, "key": cosigner.key.encode(), "logs": [key.name for key in keys]}
    options.output.answer(answer, facts([("url", answer["url"]), ("key", answer["key"]), ("logs", len(keys))]))
    options.output.note(
        f"  → on the log's own host: strongroom log cosign --url {answer['url']} --witness {answer['key']}"
    )
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


_IDENTITY = "workload/witness"
