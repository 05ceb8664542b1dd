"""The routes for relays, which are gateways that run elsewhere (spec/http.md, section 10).

Each call is by a principal that policy lets `relay`; what is said of callers is in the body of a 200, so that nobody
takes it for something about the gateway.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool

from strongroom.errors import AuthRequired, Conflict, Denied, LimitExceeded, NotFound, UsageError
from strongroom.formats.entry import COUNT, DIGEST, ID, TEXT, Kind, conforms, one_of
from strongroom.formats.statement import Statement
from strongroom.gateway.settings import Budgets
from strongroom.policy.query import FEATURES
from strongroom.server.bodies import members, text_of
from strongroom.server.calls import Calls
from strongroom.server.problem import described
from strongroom.vault.callers import Caller, Callers, ModelInfo
from strongroom.vault.spelling import Spelling
from strongroom.vault.vault import Vault
from strongroom.watch.drawing import Drawn
from strongroom.watch.effective import effective_bits
from strongroom.watch.relayed import RelayedCounters, Settled, Taken, digest_of
from strongroom.watch.tallies import CLASSES, Tallies, heard, told
from strongroom.watch.verdict import HONEST

if TYPE_CHECKING:
    from starlette.requests import Request

_METHODS = ("apikey", "oidc", "x509")  # what callers show at a gateway, and it is taken at its word for
_HELD = 1.0  # seconds for which an unchanged version is held back
_LOOK_EVERY = 0.2  # seconds between two looks at the log, for all who wait
_ASKED = 64  # decisions at once
_COUNTERS = 1024  # of a request: a caller has some for each of its teams
_TOKEN = 64 << 10  # characters of a token, or of a chain
_ACCOUNTS = 1200.0  # of one gateway in a minute: 200 workers of one version, or 20 of ten
_SPELLINGS = 4  # of the versions that were asked for last
_QUERY = re.compile(r"[0-9a-zA-Z.-]{0,200}", re.ASCII)
_QUESTION: dict[str, Kind] = {"principal": TEXT, "method": one_of(*_METHODS), "ref": TEXT}
_QUESTION["action"] = one_of("infer", *FEATURES)
_TAKE: dict[str, Kind] = {"scope": TEXT, "window": TEXT, "start": COUNT, "who": TEXT, "missing": COUNT}
_FEW: Kind = lambda value: COUNT(value) and value < 1 << 40  # noqa: E731 - no sum of them leaves a database's integers
_ADDED: dict[str, Kind] = {"ref": TEXT, "arithmetic": one_of(*HONEST), **dict.fromkeys(CLASSES, _FEW)}
_SETTLE: dict[str, Kind] = {"scope": TEXT, "window": TEXT, "start": COUNT, "who": TEXT, "ref": TEXT, "bits": COUNT}


class Relays:
    """The routes of one room for whoever may relay. `budgets`: those by which the custodian was told to reckon."""

    def __init__(self, vault: Vault, calls: Calls, budgets: Budgets) -> None:
        self._vault, self._calls = vault, calls
        self._callers = Callers(vault)
        self._rules = digest_of(budgets.rules, budgets.bits_per_parameter, budgets.compression)

        def size(ref: str) -> int:
            return effective_bits(
                self._callers.model(ref).parameters,
                bits_per_parameter=budgets.bits_per_parameter,
                compression=budgets.compression,
            )

        self._counters = RelayedCounters(vault.db, budgets.rules, size, vault.clock)
        self._spelling_lock = threading.Lock()
        # By the version's identifier, too, which is found in the log each time: nothing is told of what was shredded.
        self._spelled: Callable[[str, str], Spelling] = lru_cache(_SPELLINGS)(
            lambda ref, _: self._callers.spelling(ref)
        )
        self._accounts: dict[str, tuple[float, float]] = {}  # by principal: how many more, and since when
        self._accounts_lock = threading.Lock()
        self._looked = asyncio.Lock()
        self._version, self._seen = "", -1.0

    # -- who calls, and what each may ----------------------------------------------------------------------------

    async def version(self, request: Request, body: bytes) -> dict[str, Any]:
        """Not in a thread: as many wait here as there are workers of gateways."""
        await run_in_threadpool(self._calls.caller, request, body, "relay")
        after = request.query_params.get("after", "")
        if not _QUERY.fullmatch(after):
            raise UsageError("server.query", f"{after!r:.80} is no version of the log")
        loop = asyncio.get_running_loop()
        end = loop.time() + _HELD
        found = await self._look()
        while found == after and (left := end - loop.time()) > 0:
            await asyncio.sleep(min(left, _LOOK_EVERY))
            found = await self._look()
        return {"version": found, "bundles": await run_in_threadpool(self._callers.bundles)}

    async def _look(self) -> str:
        async with self._looked:
            now = asyncio.get_running_loop().time()
            if now - self._seen >= _LOOK_EVERY:
                self._version = await run_in_threadpool(self._callers.version)
                self._seen = asyncio.get_running_loop().time()
            return self._version

    def callers(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body, "relay")
        value = members(body, {"key", "token", "chain", "at"})
        found: tuple[Caller, int] | None = None
        try:
            match value:
                case {"key": key, **none} if not none and DIGEST(key):
                    found = self._callers.by_key(key)
                case {"token": str(token), **none} if not none and len(token) <= _TOKEN:
                    found = self._callers.by_token(token)
                case {"chain": str(chain), "at": at, **none} if not none and len(chain) <= _TOKEN and COUNT(at):
                    found = self._callers.by_certificate(chain, at)
                case _:
                    raise _body("one of key, token, or chain and at")
        except AuthRequired:  # whatever the reason
            found = None
        return {"caller": vars(found[0]) if found else None, "until": found[1] if found else 0}

    def decisions(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body, "relay")
        asked = _list(members(body, {"asked"}), "asked", _QUESTION, _ASKED)
        return {"decisions": [self._decision(each) for each in asked]}

    def _decision(self, asked: Mapping[str, str]) -> dict[str, Any] | None:
        try:
            self._callers.decide(_caller(asked), asked["action"], asked["ref"])
        except (AuthRequired, Conflict, Denied, NotFound, UsageError) as error:
            return described(error)
        return None

    def models(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body, "relay")
        value = members(body, {"principal", "method", "name", "ref"})
        match value:
            case {"principal": str(), "method": method, **none} if not none and method in _METHODS:
                try:
                    return {"models": [_model(each) for each in self._callers.models(_caller(value))]}
                except AuthRequired:
                    return {"models": None}
            case {"name": str(name), **none} if not none:
                return {"models": [_model(self._callers.model(self._callers.resolve(name)))]}
            case {"ref": str(ref), **none} if not none:
                return {"models": [_model(self._callers.model(ref))]}
        raise _body("one of principal and method, name, or ref")

    def spellings(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body, "relay")
        match members(body, {"ref"}):
            case {"ref": str(ref)}:
                # One at a time, and nobody waits: it takes a second of a process of its own, and a thread of this one.
                if not self._spelling_lock.acquire(blocking=False):
                    raise LimitExceeded("server.busy", "another vocabulary is being read", hint="wait a second")
                try:
                    return self._spelled(ref, self._callers.named(ref)).as_json()
                finally:
                    self._spelling_lock.release()
        raise _body("ref")

    # -- what was answered ---------------------------------------------------------------------------------------

    def account(self, _: Request, body: bytes) -> dict[str, Any]:
        """One account, of so many a minute: the log is kept for ever, and whoever has a gateway's key could fill it."""
        envelope = text_of(members(body, {"statement", "reason"}), "statement")
        said = Statement.decode(envelope)
        if said.kind != "inference":
            raise UsageError("statement.elsewhere", "the statement is not one that this address takes")
        with self._accounts_lock:
            left = self._left(said.by)[0]
        if left < 1:
            raise LimitExceeded(
                "server.busy",
                f"the log takes {_ACCOUNTS:.0f} accounts of a gateway in a minute",
                hint="say more in each",
            )
        found = self._vault.custodian.acted(envelope)
        # Only now: anybody could have named this gateway. What was taken of it meanwhile counts, too.
        with self._accounts_lock:
            left, now = self._left(said.by)
            self._accounts[said.by] = (left - 1, now)
        return found

    def _left(self, gateway: str) -> tuple[float, float]:
        """How many more accounts it may say, by now."""
        now = time.monotonic()
        left, at = self._accounts.get(gateway, (_ACCOUNTS, now))
        return min(_ACCOUNTS, left + (now - at) * _ACCOUNTS / 60), now

    # -- bits ----------------------------------------------------------------------------------------------------

    def draws(self, request: Request, body: bytes) -> dict[str, Any]:
        gateway = self._calls.caller(request, body, "relay").path
        value = members(body, {"id", "rules", "ref", "bits", "take"})
        self._check(value)
        ref, bits = value.get("ref"), value.get("bits")
        if not isinstance(ref, str) or not COUNT(bits):
            raise _body("ref and bits")
        taken = [Taken(**each) for each in _list(value, "take", _TAKE, _COUNTERS, least=0)]
        return _drawn(self._counters.draw(gateway, value["id"], ref, int(str(bits)), taken))

    def settlements(self, request: Request, body: bytes) -> dict[str, Any]:
        gateway = self._calls.caller(request, body, "relay").path
        value = members(body, {"id", "rules", "pay", "back"})
        self._check(value)
        pay, back = (
            [Settled(**each) for each in _list(value, name, _SETTLE, _COUNTERS, least=0)] for name in ("pay", "back")
        )
        return {"now": self._counters.settle(gateway, value["id"], pay, back)}

    def tallies(self, request: Request, body: bytes) -> dict[str, Any]:
        gateway = self._calls.caller(request, body, "relay").path
        value = members(body, {"id", "term", "add"})
        added, term = value.get("add"), value.get("term")
        if not ID(value.get("id")) or not COUNT(term):
            raise _body("id and term")
        tallies = Tallies(self._vault.db, int(str(term)))
        if added is None:
            return {"kept": [told(each) for each in tallies.now()]}
        if not isinstance(added, dict) or not conforms(added, _ADDED):
            raise _body(f"add: {', '.join(_ADDED)}")
        said = heard(added, tallies.term)
        self._callers.model(said.ref)  # of a version that there is
        new = self._counters.once(gateway, value["id"])
        return {"kept": [told(tallies.add(said.ref, said.arithmetic, said.tally, new=new))]}

    def _check(self, value: Mapping[str, Any]) -> None:
        if not ID(value.get("id")) or not DIGEST(value.get("rules")):
            raise _body("id and rules")
        if value["rules"] != self._rules:
            raise Conflict(
                "budget.other_settings",
                "the gateway reckons budgets by other settings than the custodian",
                hint="give both the same [budgets]: strongroom serve --gateway-settings FILE",
                rules=self._rules,
            )


def _caller(asked: Mapping[str, Any]) -> Caller:
    """Whoever a gateway says has called: policy is asked about it as it is now."""
    return Caller(asked["principal"], (), (), "", "", asked["method"])


def _model(found: ModelInfo) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("ref", "created", "parameters", "vocabulary")}


def _drawn(found: Drawn) -> dict[str, Any]:
    spares = found.spare or (0,) * len(found.used)
    counters = [{"used": used, "spare": spare} for used, spare in zip(found.used, spares, strict=True)]
    return {"now": found.now, "moved": found.moved, "full": found.full, "counters": counters}


def _list(value: Mapping[str, Any], name: str, kind: Mapping[str, Kind], most: int, *, least: int = 1) -> list[Any]:
    found = value.get(name)
    if not isinstance(found, list) or not least <= len(found) <= most:
        raise _body(f"{name}: a list of {least} to {most}")
    if not all(isinstance(each, dict) and conforms(each, kind) for each in found):
        raise _body(f"{name}: each of {', '.join(kind)}")
    return found


def _body(expected: str) -> UsageError:
    return UsageError("server.body", f"the body is not as it should be; expected {expected}")
