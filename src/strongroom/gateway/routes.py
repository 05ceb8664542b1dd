"""Which inference server answers for which version: several for one, in turn by their weight, left alone while they
fail. What one can't take at once waits, and nobody's requests wait behind all of somebody else's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from strongroom.core.ids import Ref
from strongroom.errors import AuthRequired, BackendError, StrongroomError, UsageError
from strongroom.gateway.flight import Flight
from strongroom.gateway.queue import FairQueue
from strongroom.gateway.upstream import Reply, Upstream

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}


@dataclass
class Backend:
    """An inference server. `models`: NAME or NAME@N → what it calls that; empty: it is asked at the start."""

    upstream: Upstream
    models: dict[str, str]
    queue: FairQueue
    weight: int = 1


class Routes:
    """`channelled`: all of them are ``strongroom infer`` and were given the channel's secret."""

    def __init__(self, backends: Sequence[Backend], *, channelled: bool = False) -> None:
        self._backends = list(backends)
        self._turn = itertools.count()
        self._by_ref: dict[str, list[tuple[Backend, str]]] = {}  # versions that were allowed: few
        self.channelled = channelled

    async def find(self) -> None:
        """Ask what they serve, where nobody has said. UsageError ``upstream.model`` if that is nothing that can be a
        version in the room; BackendError ``upstream.*``, AuthRequired ``upstream.refused``, each with what to do."""
        for backend in self._backends:
            if backend.models:
                continue
            identifiers = await _listed(backend.upstream)
            for identifier in identifiers:
                try:
                    backend.models[str(Ref.parse(identifier))] = identifier
                except UsageError:
                    continue
            if not backend.models:
                raise UsageError(
                    "upstream.model",
                    f"{backend.upstream.url} serves nothing under the name of weights in a room",
                    hint="--model NAME@N=NAME-AT-UPSTREAM says which version a model is",
                )

    @property
    def upstreams(self) -> list[Upstream]:
        return [backend.upstream for backend in self._backends]

    @property
    def available(self) -> bool:
        return any(backend.upstream.available for backend in self._backends)

    def serves(self, ref: str) -> bool:
        return any(_name(backend, ref) is not None for backend in self._backends)

    async def begin(self, flight: Flight, body: dict[str, object]) -> Reply:
        """The beginning of an answer to `body`, which gets the name that the model has there. Another server is tried
        only where the first has not begun: nothing is generated twice. BackendError ``upstream.*``, LimitExceeded.
        After it, whatever it came to, `end`."""
        failure: StrongroomError | None = None
        for backend, name in self._in_turn(flight.ref):
            size = flight.most * flight.asked.n
            try:
                flight.place = backend.queue.free_place()
                if flight.place is None:
                    flight.place = await flight.interruptible(backend.queue.enter(flight.caller.principal, size))
                upstream = backend.upstream
                request = upstream.request(
                    PATHS[flight.route],
                    orjson.dumps({**body, "model": name}),
                    b"" if flight.trace is None else flight.trace.header,
                )
                first = upstream.timeouts.first if flight.asked.stream else upstream.timeouts.whole
                flight.check()
                # Most often there is one connection to wait for, and no coroutine is needed to do it: what ends the
                # request gives up the reply.
                reply = flight.reply = upstream.begin(request, first)
                if reply is not None:
                    await reply.head()
                if reply is None or not reply.there:
                    reply = flight.reply = await flight.interruptible(upstream.send(request, first, reply))
                else:
                    upstream.answered()
            except BackendError as error:
                if error.code != "upstream.unavailable":
                    raise
                failure = error
            else:
                flight.check()
                if reply.status not in (429, 503):
                    return reply
                failure = BackendError("upstream.unavailable", "the inference server has too much to do")
            self.end(flight)
        raise failure or BackendError("upstream.unavailable", f"no inference server serves {flight.ref} now")

    def end(self, flight: Flight) -> None:
        """What is left of an answer is given up, and its place is free."""
        if flight.reply is not None:
            flight.reply.abort()
        if flight.place is not None:
            flight.place.leave()

    def _in_turn(self, ref: str) -> list[tuple[Backend, str]]:
        known = self._by_ref.get(ref)
        if known is None:
            known = self._by_ref[ref] = [
                (each, name) for each in self._backends if (name := _name(each, ref)) is not None
            ]
        if len(known) == 1:
            return known
        found = list(known)
        weighted = [pair for pair in found for _ in range(pair[0].weight)]
        if weighted:
            begin = next(self._turn) % len(weighted)
            order = list(dict.fromkeys(id(pair[0]) for pair in weighted[begin:] + weighted[:begin]))
            found.sort(key=lambda pair: order.index(id(pair[0])))
        return [pair for pair in found if pair[0].upstream.available] or found[:1]

    def close(self) -> None:
        for backend in self._backends:
            backend.upstream.close()


async def _listed(upstream: Upstream) -> list[str]:
    """The names of the models that an inference server says it has."""
    named = "--model NAME@N=NAME-AT-UPSTREAM says which version a model is, and then it is not asked"
    try:
        reply = await upstream.get("/v1/models")
        body = await reply.read()
    except BackendError as error:
        raise BackendError(
            error.code,
            f"{upstream.url} is to say which models it has: {error.message}",
            hint=f"start it first, e.g. strongroom infer REF --channel FILE; or {named}",
        ) from None
    if reply.status in (401, 403):
        raise AuthRequired(
            "upstream.refused",
            f"{upstream.url} refuses the gateway: it wants another secret, or one at all (status {reply.status})",
            hint="--channel with the file that strongroom infer was started with; others: key = FILE, of [[upstream]]",
        )
    try:
        return [str(each["id"]) for each in orjson.loads(body)["data"]]
    except (ValueError, TypeError, KeyError):
        raise BackendError(
            "upstream.malformed",
            f"{upstream.url} does not say what it serves: a list of models was expected at /v1/models, "
            f"and it answered with status {reply.status}",
            hint=named,
        ) from None


def _name(backend: Backend, ref: str) -> str | None:
    return backend.models.get(ref) or backend.models.get(ref.partition("@")[0])
