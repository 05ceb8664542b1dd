"""Who calls and what each may do: the room's word, remembered for as long as the log does not change it
(spec/gateway.md, sections 1 and 2)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from strongroom.errors import AuthRequired, Conflict, Denied, NotFound, Sealed, StrongroomError
from strongroom.gateway.certificates import Certificates, Peer

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
_KEPT = 10_000  # answers of each kind that are remembered
_DECISION = 60.0  # seconds: policy may look at the time of the day
_LOOK_EVERY = 0.5  # seconds between two looks at the log
_REFUSED_EVERY = 5.0  # of one that the room does not let look: each is an entry of its log
_BLIND = 10.0  # seconds without a look, after which nothing is answered
_PATIENCE = 30.0  # seconds that the room has for one answer, with the time until it is asked
_KEY = re.compile(r"sr-[A-Za-z0-9_-]{43}", re.ASCII)


class Caller(Protocol):
    """Whoever asks, as vault/callers.py has it. `key` is empty where no API key was shown."""

    @property
    def principal(self) -> str: ...
    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def teams(self) -> tuple[str, ...]: ...
    @property
    def key(self) -> str: ...
    @property
    def method(self) -> str: ...


class Model(Protocol):
    """A version, as vault/callers.py has it."""

    @property
    def ref(self) -> str: ...
    @property
    def created(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def parameters(self) -> int: ...


class Callers(Protocol):
    """What the gateway uses of a room. Whoever is asked about is one of those that it named itself."""

    def version(self) -> str: ...
    def by_key(self, digest: str) -> tuple[Caller, int] | None: ...
    def by_token(self, token: str) -> tuple[Caller, int]: ...
    def by_certificate(self, chain: str, at: int) -> tuple[Caller, int]: ...
    def bundles(self) -> Sequence[str]: ...
    def models(self, caller: Any) -> Sequence[Model]: ...
    def resolve(self, model: str) -> str: ...
    def decide(self, caller: Any, action: str, ref: str) -> None: ...
    def record(self, ref: str, body: dict[str, Any]) -> int: ...


class Door:
    """Answers of a room, remembered. `changed` is called when the log has changed what decides, `blind` each time that
    it could not be seen for too long."""

    def __init__(self, callers: Callers, *, threads: int = 2, clock: Callable[[], float] = time.monotonic) -> None:
        self._callers, self._clock = callers, clock
        # Few threads: whoever sends keys that don't exist keeps these busy, and nothing else.
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="door")
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="look")
        self._version: str | None = None
        self._seen = -_BLIND * 2
        self.trouble = ""  # of the last look, if it failed: for who runs this
        self.epoch = 0
        self._callers_by_token: OrderedDict[str, tuple[Caller, float]] = OrderedDict()
        self._decisions: OrderedDict[tuple[str, str, str, str], tuple[StrongroomError | None, float]] = OrderedDict()
        self._refs: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._models: OrderedDict[tuple[str, str], tuple[Sequence[Model], float]] = OrderedDict()
        self.certificates = Certificates(callers.bundles)
        self.changed: Callable[[], None] = lambda: None
        self.blind: Callable[[], None] = lambda: None

    async def look(self) -> None:
        """One look at the log: what it changed is forgotten."""
        begun = self._clock()  # what it answers may be as old as that
        version = await asyncio.get_running_loop().run_in_executor(self._looker, self._callers.version)
        if version != self._version:
            await asyncio.get_running_loop().run_in_executor(self._looker, self.certificates.learn)
        self._seen = begun
        if version == self._version:
            return
        first, self._version = self._version is None, version
        self.epoch += 1
        for kept in (self._callers_by_token, self._decisions, self._refs, self._models):
            kept.clear()
        if not first:
            self.changed()

    async def watch(self) -> None:
        """Look at the log until cancelled."""
        while True:
            refused = False
            try:
                async with asyncio.timeout(_BLIND):
                    await self.look()
                self.trouble = ""
            except Exception as error:  # noqa: BLE001 - `awake` tells when it fails for long
                self.trouble = error.message if isinstance(error, StrongroomError) else type(error).__name__
                if isinstance(error, Sealed) and error.code == "gateway.refused":
                    self._seen, refused = -_BLIND * 2, True  # it may not look, so it may not answer
            if not self.awake:
                self.blind()
            await asyncio.sleep(_REFUSED_EVERY if refused else _LOOK_EVERY)

    @property
    def awake(self) -> bool:
        return self._clock() - self._seen < _BLIND

    def check(self) -> None:
        """Sealed ``gateway.blind``: what was decided long ago may have been taken back since."""
        if not self.awake:
            raise Sealed("gateway.blind", "the gateway can't see the room's log, and answers nothing meanwhile")

    def known(self, digest: str) -> Caller | None:
        """As `caller`, of a token alone, by its digest and from memory."""
        found = self._callers_by_token.get(digest)
        return found[0] if found is not None and found[1] >= self._clock() else None

    async def caller(self, token: str, peer: Peer | None = None) -> Caller:
        """Whoever a bearer token stands for, or a certificate, or both: then `token` may be empty, and counts if it is
        not. AuthRequired ``apikey.invalid``, one error for every reason."""
        if peer is not None:
            return await self._certified(token, peer)
        digest = digest_of(token)
        found = self._remembered(self._callers_by_token, digest)
        if found is not None:
            return found
        epoch = self.epoch
        caller, until = await self._ask(self._find, token, digest)
        return self._keep(self._callers_by_token, digest, caller, until, epoch)

    async def _certified(self, token: str, peer: Peer) -> Caller:
        found = self._remembered(self._callers_by_token, peer.digest)
        if found is None:
            epoch = self.epoch
            caller, until = await self._ask(self._by_certificate, peer)
            found = self._keep(self._callers_by_token, peer.digest, caller, until, epoch)
        if not token:
            return found
        said = await self.caller(token)
        # Else whoever has got hold of a key could use it from any workload, under another name than its connection's.
        if said.principal != found.principal:
            raise _nobody()
        return said

    def _by_certificate(self, peer: Peer) -> tuple[Caller, float]:
        with contextlib.suppress(AuthRequired):  # one error for every reason
            caller, until = self._callers.by_certificate(peer.chain, peer.at)
            return caller, self._remember_until(until)
        raise _nobody()

    def _find(self, token: str, digest: str) -> tuple[Caller, float]:
        if _KEY.fullmatch(token):
            found = self._callers.by_key(digest)
            if found is not None:
                return found[0], self._remember_until(found[1])
        elif token.count(".") == 2:
            with contextlib.suppress(AuthRequired):  # one error for every reason
                caller, until = self._callers.by_token(token)
                return caller, self._remember_until(until)
        raise _nobody()

    def _remember_until(self, ends: int) -> float:
        """By our clock, for what ends at the Unix time `ends`: nobody is remembered for longer than they are known."""
        return self._clock() + min(_DECISION, max(0.0, ends - time.time()))

    def resolved(self, model: str) -> str | None:
        """As `resolve`, from memory alone."""
        found = self._refs.get(model)
        return found[0] if found is not None and found[1] >= self._clock() else None

    async def resolve(self, model: str) -> str:
        """``NAME@N`` of what was asked for; NotFound ``model.not_found``."""
        epoch = self.epoch
        try:
            ref = await self._ask(self._callers.resolve, model)
        except NotFound:
            raise missing(model) from None
        return str(self._keep(self._refs, model, ref, self._clock() + _DECISION, epoch))

    def allowed(self, caller: Caller, actions: list[str], ref: str) -> bool:
        """Whether every action is known to be, from memory alone."""
        now = self._clock()
        for action in actions:
            kept = self._decisions.get((caller.principal, caller.method, action, ref))
            if kept is None or kept[0] is not None or kept[1] < now:
                return False
        return True

    async def allow(self, caller: Caller, actions: list[str], ref: str, model: str) -> None:
        """Every action, or Denied; NotFound ``model.not_found`` where not even `infer` is allowed, so that nobody
        learns which models there are."""
        for action in actions:
            # Policy may tell a token from an API key: its word about one is none about the other.
            key = (caller.principal, caller.method, action, ref)
            kept = self._decisions.get(key)
            if kept is None or kept[1] < self._clock():
                epoch = self.epoch
                denied: StrongroomError | None = None
                try:
                    await self._ask(self._callers.decide, caller, action, ref)
                except Conflict as error:
                    denied = error
                except Denied as error:
                    denied = error if action == "infer" else _not_permitted(error, action)
                except NotFound:
                    denied = missing(model)
                except AuthRequired:  # suspended since the key was looked up
                    raise _nobody() from None
                kept = (denied, self._clock() + _DECISION)
                self._keep(self._decisions, key, *kept, epoch)
            if kept[0] is not None:
                if action == "infer" and kept[0].code != "version.frozen":
                    raise missing(model)
                # The same error each time: without this it would keep the frames, and bodies, of all who were told it.
                raise kept[0].with_traceback(None)

    async def models(self, caller: Caller) -> Sequence[Model]:
        """The versions that `caller` may infer on; AuthRequired ``apikey.invalid`` if it was suspended meanwhile."""
        key = (caller.principal, caller.method)
        found = self._remembered(self._models, key)
        if found is not None:
            return found
        epoch = self.epoch
        try:
            models = await self._ask(self._callers.models, caller)
        except AuthRequired:  # suspended since the key was looked up
            raise _nobody() from None
        self._keep(self._models, key, models, self._clock() + _DECISION, epoch)
        return models

    def _remembered(self, kept: OrderedDict[K, tuple[T, float]], key: K) -> T | None:
        found = kept.get(key)
        return found[0] if found is not None and found[1] >= self._clock() else None

    def _keep(self, kept: OrderedDict[Any, tuple[T, float]], key: Hashable, value: T, until: float, epoch: int) -> T:
        # What was asked before the log changed and is answered after it would be remembered for too long.
        if epoch == self.epoch:
            kept[key] = (value, until)
            if len(kept) > _KEPT:
                kept.popitem(last=False)
        return value

    async def _ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """Whatever it raises; Sealed ``gateway.blind`` where it takes too long: else whoever comes while the room is
        behind a network that has gone dark would wait behind all who came before."""
        try:
            async with asyncio.timeout(_PATIENCE):
                return await asyncio.get_running_loop().run_in_executor(self._threads, question, *arguments)
        except TimeoutError:
            raise Sealed(
                "gateway.blind", "the room does not answer, and the gateway knows nothing without it"
            ) from None

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._looker.shutdown(cancel_futures=True)


def digest_of(token: str) -> str:
    """What stands for a token in memory: no token is kept."""
    return hashlib.sha256(token.encode("latin-1", "replace")).hexdigest()


def missing(model: str) -> NotFound:
    """One error for what is not there and for what is not the caller's to know of."""
    return NotFound("model.not_found", f"there is no model {model!r:.80} that you may use", param="model")


def _not_permitted(error: Denied, action: str) -> Denied:
    """As the policy says it, with what would change that: no lease does."""
    if error.code == "version.frozen":
        return error
    hint = f"a rule has to permit {action} by its name: strongroom policy propose FILE --reason TEXT"
    return Denied(error.code, error.message, hint=hint, **error.evidence)


def _nobody() -> AuthRequired:
    return AuthRequired("apikey.invalid", "the API key, token or certificate is not one that is good here")
