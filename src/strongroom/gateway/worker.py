"""One worker of the gateway: its parts, made out of a room and the settings."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from strongroom.errors import NotFound, UsageError
from strongroom.gateway.app import GatewayApp
from strongroom.gateway.beside import Beside
from strongroom.gateway.capture import Capture
from strongroom.gateway.door import Door
from strongroom.gateway.filters import Classifier, Filter, Words
from strongroom.gateway.generations import Generations
from strongroom.gateway.limits import Limits
from strongroom.gateway.probe import Probe
from strongroom.gateway.queue import FairQueue
from strongroom.gateway.records import Records
from strongroom.gateway.request import Forms
from strongroom.gateway.rooms import Behind
from strongroom.gateway.routes import Backend, Routes
from strongroom.gateway.settings import Settings
from strongroom.gateway.settings import Upstream as At
from strongroom.gateway.spelt import Spellings
from strongroom.gateway.tolls import Small, Tolls, told
from strongroom.gateway.upstream import Timeouts, Upstream
from strongroom.gateway.verified import Verified
from strongroom.watch.budget import Budgets
from strongroom.watch.debts import Debts
from strongroom.watch.effective import effective_bits

if TYPE_CHECKING:
    from strongroom.gateway.limits_redis import RedisLimits
    from strongroom.gateway.tracing import Tracing

_VERSIONS = 1024
_VOCABULARY = 1 << 20  # tokens, where neither the configuration nor the tensors say how many there are
_CHANNEL = (
    "--channel takes the file that strongroom infer was started with, as does channel in [[upstream]] and [verify]; "
    "key in [[upstream]] is a file, too"
)
_SECRET = re.compile("[0-9a-f]{64}", re.ASCII)
_log = logging.getLogger("strongroom.gateway")


def application(room: Behind, settings: Settings, records: Path, *, workers: int = 1) -> Generations:
    """The application of one of so many workers. `records`: the folder that they are written into."""
    _check(room, settings)
    door = Door(room.callers, threads=room.threads)
    small = Small()
    debts = Debts(records, room.name)
    try:
        kept = Records(records, room.callers.record, settings.digest, stream=room.stream())

        def make(settings: Settings, before: GatewayApp | None) -> GatewayApp:
            return _made(room, door, kept, debts, small, settings, workers, before)

        return Generations(door, kept, debts, make, settings, check=lambda settings: _check(room, settings))
    except BaseException:
        debts.close()  # what it has is for whoever is started next
        raise


def _check(room: Behind, settings: Settings) -> None:
    """Errors of `Behind.check`; NotFound ``gateway.model`` for a version that there is not: nobody could ever ask for
    it."""
    room.check(settings)
    for ref in (ref for each in settings.upstream for ref, _ in each.models):
        try:
            room.callers.resolve(ref)
        except NotFound:
            raise NotFound(
                "gateway.model",
                f"there are no weights {ref!r:.200} in this room, so nobody could ask for them",
                hint="strongroom ls; then --model REF=NAME, or models of [[upstream]], with a version that there is",
            ) from None


def _made(
    room: Behind,
    door: Door,
    records: Records,
    debts: Debts,
    small: Small,
    settings: Settings,
    workers: int,
    before: GatewayApp | None,
) -> GatewayApp:
    callers = room.callers

    # What a version has in it does not change: it is asked for once.
    @lru_cache(_VERSIONS)
    def size(ref: str) -> int:
        return effective_bits(
            callers.model(ref).parameters,
            bits_per_parameter=settings.budgets.bits_per_parameter,
            compression=settings.budgets.compression,
        )

    @lru_cache(_VERSIONS)
    def vocabulary(ref: str) -> int:
        return callers.model(ref).vocabulary or _VOCABULARY

    budgets = Budgets(
        room.counters(settings.budgets),
        settings.budgets.rules,
        size,
        time.time,
        alarm=told,
        small=partial(small, settings.budgets),
        debts=debts,
    )
    limits = _limits(room, settings, workers, before)
    backends = [
        Backend(
            _upstream(each, settings),
            dict(each.models),
            FairQueue(max(1, each.concurrency // workers), settings.queue, quantum=settings.answer.max_tokens),
            each.weight,
        )
        for each in settings.upstream
    ]
    channelled = bool(settings.upstream) and all(each.channel for each in settings.upstream)
    filters: list[Filter] = [Words(settings.requests.words, settings.requests.patterns)]
    if settings.requests.classifier:
        filters.append(Classifier(settings.requests.classifier))
    routes = Routes(backends, channelled=channelled)
    verified = _verified(settings, room, vocabulary)
    capture = Capture(settings.capture, records.path) if settings.capture.key else None
    try:
        tracing = _tracing(settings)
    except BaseException:
        if capture is not None:  # its thread and file: settings that can't be used are read again and again
            capture.close()
        raise
    return GatewayApp(
        door,
        Forms(settings.requests.control_tokens, drop_unknown=settings.requests.unknown_fields == "drop"),
        routes,
        Tolls(settings, limits, budgets, vocabulary, filters, Spellings(callers.spelling) if channelled else None),
        records,
        Beside(
            verified,
            Probe(routes.upstreams, settings.probe.every) if settings.probe.every else None,
            tracing,
            capture,
        ),
        before=before,
    )


def _limits(room: Behind, settings: Settings, workers: int, before: GatewayApp | None) -> Limits | RedisLimits:
    if not settings.redis.url:
        known = before.limits if before is not None else None
        return Limits(settings, time.monotonic, scale=1 / workers, before=known if isinstance(known, Limits) else None)
    try:
        from strongroom.gateway.limits_redis import RedisLimits
    except ImportError:
        raise UsageError(
            "redis.not_installed",
            "the client for Redis, of which the settings speak, is not installed",
            hint="pip install 'strongroom[gateway,redis]'",
        ) from None
    return RedisLimits(settings, time.monotonic, name=room.name)


def _upstream(at: At, settings: Settings) -> Upstream:
    headers = []
    if at.channel:
        headers.append(("strongroom-channel", _secret(Path(at.channel))))
    if at.key:
        headers.append(("authorization", f"Bearer {_line(Path(at.key))}"))
    times = settings.timeouts
    return Upstream(
        at.url,
        timeouts=Timeouts(first=times.first_byte, between=times.between, whole=times.whole),
        headers=tuple(headers),
        trusted=Path(at.ca) if at.ca else None,
    )


def _verified(settings: Settings, room: Behind, vocabulary: Callable[[str], int]) -> Verified | None:
    """What runs answers again. UsageError ``settings.verify`` where no upstream can say which tokens it drew."""
    verify = settings.verify
    if not verify.url:
        return None
    if not verify.channel or not all(each.channel for each in settings.upstream):
        raise UsageError(
            "settings.verify",
            "answers can be run again only where upstream and verifier are `strongroom infer`, each with its channel",
            hint="strongroom infer REF --channel FILE, and channel = FILE in [[upstream]] and in [verify]",
        )
    if any(each.url == verify.url for each in settings.upstream):
        _log.warning(
            "[verify] names the very server that answers, which finds right whatever it likes: %s; have answers run "
            "again by another strongroom infer, on a machine that the first one's people have no way into",
            verify.url,
        )
    secret = ("strongroom-channel", _secret(Path(verify.channel)))
    tallies = room.tallies(verify.term)
    return Verified(Upstream(verify.url, headers=(secret,)), verify.share, tallies, vocabulary, stop=verify.stop)


def _tracing(settings: Settings) -> Tracing | None:
    traces = settings.traces
    if not traces.endpoint:
        return None
    try:
        from strongroom.gateway.tracing import sending
    except ImportError:
        raise UsageError(
            "traces.not_installed",
            "OpenTelemetry, of which the settings speak, is not installed",
            hint="pip install 'strongroom[gateway,otel]'",
        ) from None
    hint = "key in [traces] is a file with the token that the receiver asks for, on one line"
    return sending(traces, _line(Path(traces.key), hint) if traces.key else "")


def _secret(path: Path) -> str:
    text = _line(path)
    if not _SECRET.fullmatch(text):
        raise UsageError("gateway.channel", f"{path} has no secret of 64 hexadecimal digits", hint=_CHANNEL)
    return text


def _line(path: Path, hint: str = _CHANNEL) -> str:
    try:
        text = path.read_text("ascii").strip()
    except OSError as error:
        raise UsageError("gateway.secret", f"can't read {path}: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        raise UsageError("gateway.secret", f"{path} is no text", hint=hint) from None
    if not text or "\n" in text or "\r" in text:
        raise UsageError("gateway.secret", f"{path} has not one line", hint=hint)
    return text
