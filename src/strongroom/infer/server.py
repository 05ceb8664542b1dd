"""From a version in the room to a server of it: released to this principal, in memory, gone when the server ends."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import resource
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.infer.standing import Standing, watch

if TYPE_CHECKING:
    from strongroom.client.room import Room
    from strongroom.infer.app import Model
    from strongroom.load.weights import Weights

_SECRET = re.compile(r"[0-9a-f]{64}", re.ASCII)
_END = 3  # seconds in which streams may still say why they end


@dataclass(frozen=True)
class Settings:
    """`most`: tokens of an answer unless a chat says how many. `rows`: answers that are made side by side. `dtype`:
    what is computed in (``auto``: as the weights are). `device` as torch names it."""

    most: int = 1024
    rows: int = 16
    threads: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    waiting: int = 65_536


def load(weights: Weights, settings: Settings) -> tuple[Model, Callable[[], None]]:
    """Its model in memory, and a running engine; and what ends its other processes. UsageError ``transformers.*`` for
    a model or a tokenizer that can't be had from a room, ``infer.unsupported``, ``device.unavailable``."""
    import torch
    import transformers

    from strongroom.infer.app import Model, now
    from strongroom.infer.embed import Embedder
    from strongroom.infer.engine import Engine
    from strongroom.infer.fields import Reader
    from strongroom.infer.rows import Rows
    from strongroom.infer.text import Prompts, Spelling
    from strongroom.infer.verify import Verifier
    from strongroom.load.device import available
    from strongroom.load.transformers import from_room, tokenizer_from_room

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = json.loads(weights.file("config.json"))
    writes = any("CausalLM" in str(name) or "LMHead" in str(name) for name in config.get("architectures") or ())
    auto = transformers.AutoModelForCausalLM if writes else transformers.AutoModel
    # Elsewhere than on the CPU each tensor goes from the room to its place by itself, and no whole model is in memory.
    placed: dict[str, Any] = {} if settings.device == "cpu" else {"device_map": available(settings.device)}
    model = from_room(auto, weights, dtype=settings.dtype, **placed).eval()
    rows = Rows(model, settings.rows) if writes else None
    text = model.config.get_text_config()
    words, longest = int(text.vocab_size), int(getattr(text, "max_position_embeddings", 0) or 2048)
    prompts = Prompts.of(weights)
    spelling = Spelling(tokenizer_from_room(weights) if prompts is not None else None, words)
    stops = spelling.stops() | _stops(model)
    engine = Engine(rows, waiting=settings.waiting)
    engine.start()
    ref = weights.reader.bundle.ref
    reader = Reader(prompts, words, longest, most=settings.most, stops=stops)
    names = (ref, ref.partition("@")[0])
    exact = "float32" if model.dtype is torch.float32 else "bfloat16"
    verifier = Verifier(model, exact) if writes else None
    made = Model(names, engine, reader, spelling, Embedder(model), verifier, now())
    return made, prompts.close if prompts is not None else lambda: None


def _stops(model: Any) -> frozenset[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return frozenset(each for each in listed if isinstance(each, int))


def channel(path: Path) -> str:
    """The secret of a private channel in a file: 64 hexadecimal digits. UsageError ``infer.channel``."""
    try:
        text = path.read_text(encoding="ascii").strip()
        open_to_all = bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("infer.channel", f"can't read {path}: {error}", hint=_new_secret(path)) from None
    if not _SECRET.fullmatch(text):
        raise UsageError(
            "infer.channel",
            f"{path} does not hold 32 bytes in hexadecimal",
            hint=_new_secret(path),
        )
    if open_to_all:
        raise UsageError("infer.channel", f"others may read {path}", hint=f"chmod 600 {path}")
    return text


def _new_secret(path: Path) -> str:
    return f"(umask 077; openssl rand -hex 32 > {path})"


def listener(where: str, *, private: bool) -> tuple[socket.socket, str]:
    """A socket that listens at HOST:PORT or ``unix:PATH``, and its address. UsageError ``infer.exposed`` for an address
    that others can reach, unless there is a `private` channel; BackendError ``serve.listen``."""
    from strongroom.server.listen import listen

    if where.startswith("unix:"):
        return _unix(Path(where.removeprefix("unix:")))
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdigit()) or int(port[:6]) > 65535:
        raise UsageError("infer.listen", f"{where!r} is not HOST:PORT or unix:PATH", hint="--listen 127.0.0.1:8471")
    if not private and not _loopback(host):
        raise UsageError(
            "infer.exposed",
            f"{host} can be reached from elsewhere, and this server refuses nothing: whoever reaches it can take the "
            "last layer of the model, and anything else that a gateway would stop",
            hint="--listen 127.0.0.1:8471, or --channel FILE with a secret that only the gateway has",
        )
    opened = listen(host, int(port))
    shown = f"[{host}]" if ":" in host else host
    return opened, f"http://{shown}:{opened.getsockname()[1]}"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unix(path: Path) -> tuple[socket.socket, str]:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()  # of a server that was killed
        before = os.umask(0o177)
        try:
            opened.bind(str(path))
        finally:
            os.umask(before)
        opened.listen(2048)
    except OSError as error:
        opened.close()
        raise BackendError("serve.listen", f"can't listen on {path}: {error.strerror or error}") from None
    return opened, f"unix:{path}"


@contextmanager
def _watched(standing: Standing, ended: Callable[[StrongroomError], None]) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=watch, args=(standing, ended, over.wait), name="standing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


def serve(
    room: Room,
    ref: str,
    opened: socket.socket,
    settings: Settings,
    secret: str | None,
    ready: Callable[[Model], None],
) -> None:
    """Serve one version until interrupted, or until the room says no more: then the error that says why. `ready` is
    called when it answers."""
    import uvicorn

    from strongroom.infer.app import InferApp

    # A core dump would be plaintext weights on a disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    weights = room.load(ref)
    model, close = load(weights, settings)
    standing = Standing(room, weights.reader.bundle.ref)
    why: list[StrongroomError] = []
    config = uvicorn.Config(
        InferApp(model, secret),
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_END,
    )
    # Without the gateway's protection from slow clients: the gateway is the only client, or whoever is on this machine.
    server = uvicorn.Server(config)

    def ended(error: StrongroomError) -> None:
        why.append(error)
        model.engine.stop(error)
        server.should_exit = True

    try:
        with _watched(standing, ended), contextlib.suppress(KeyboardInterrupt):
            ready(model)
            server.run(sockets=[opened])
    finally:
        model.engine.stop(BackendError("infer.ended", "this server has been stopped"))
        close()
    if why:
        raise why[0]
