"""A served room as a gateway elsewhere has it: it asks, as a principal that policy lets `relay`, and holds nothing of
the room's own (spec/gateway.md, section 10)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from strongroom.client import answers
from strongroom.client.away.accounts import Accounts
from strongroom.client.away.callings import Callings
from strongroom.client.away.draws import ServedCounters, ServedTallies
from strongroom.client.away.line import Line
from strongroom.client.away.settlements import Settlements
from strongroom.errors import AuthRequired, BackendError, StrongroomError, UsageError
from strongroom.storage.session import card_of, error_of
from strongroom.vault.callers import Caller, ModelInfo
from strongroom.vault.spelling import Spelling
from strongroom.watch.relayed import digest_of

if TYPE_CHECKING:
    from pathlib import Path

    from strongroom.formats.card import Card
    from strongroom.gateway.settings import Budgets, Settings
    from strongroom.vault.revocations import Revocations

_ASKED = 64  # decisions at once: a custodian takes no more
_LEADERS = 2  # requests for decisions at a time

Question = dict[str, str]


class AwayRoom:
    """`strongroom.gateway.rooms.Behind`, of the room that `card` names, as `principal` (default: the only identity on
    this machine). Thread-safe; one for each process."""

    threads = 16  # so that those who ask meanwhile are asked about together

    def __init__(self, card: Card, principal: str | None) -> None:
        self._line = Line(card, principal)
        self.name = card.room.hex()
        self._accounts = Accounts(self._line)
        self.callers = AwayCallers(self._line, self._accounts)
        self._settlements = Settlements(self._line)

    @classmethod
    def opened(cls, url: str, principal: str | None) -> AwayRoom:
        """By the card that is trusted here. NotFound ``card.missing``, AuthRequired ``identity.missing``."""
        room = cls(card_of(url), principal)
        room._line.voice()  # that there is a key is said at the start
        return room

    def stream(self) -> str:
        return self._accounts.stream

    def counters(self, budgets: Budgets) -> ServedCounters:
        rules = digest_of(budgets.rules, budgets.bits_per_parameter, budgets.compression)
        return ServedCounters(rules, self._settlements)

    def tallies(self, term: int) -> ServedTallies:
        return ServedTallies(self._line, term)

    def revocations(self, paths: Sequence[Path]) -> Revocations:
        """UsageError ``gateway.crl_away``: certificates are judged by the custodian."""
        raise UsageError(
            "gateway.crl_away",
            f"{', '.join(path.name for path in paths)}: certificates are judged where the room is, by its lists",
            hint="leave --crl out here; where the room is: strongroom serve --crl FILE",
        )

    def check(self, settings: Settings) -> None:
        """Sealed ``gateway.refused``, Conflict ``budget.other_settings``."""
        self.counters(settings.budgets).check()

    def close(self) -> None:
        self._settlements.settle()  # what is left, if that can be
        self._accounts.close()
        self._line.close()


class AwayCallers:
    """`strongroom.gateway.rooms.RoomCallers`. What is wrong with the gateway itself is Sealed ``gateway.refused``, and
    never taken for something about a caller."""

    def __init__(self, line: Line, accounts: Accounts) -> None:
        self._line, self._accounts = line, accounts
        self._together = _Together(self._decide)
        self._callings = Callings(self._calling)
        self._version, self._bundles = "", tuple[str, ...]()
        self._models: dict[str, ModelInfo] = {}  # what a version has in it does not change

    def version(self) -> str:
        """Held back there for up to a second, while it is what it was."""
        after = f"?after={quote(self._version, safe='')}" if self._version else ""
        found = self._line.get(f"/v1/gateway/version{after}", answers.SEEN)
        self._bundles = tuple(found["bundles"])
        if found["version"] != self._version:
            self._version = str(found["version"])
            self._callings.changed()
        return self._version

    def bundles(self) -> tuple[str, ...]:
        """As `version` has told."""
        return self._bundles

    def by_key(self, digest: str) -> tuple[Caller, int] | None:
        return self._callings.of({"key": digest})

    def by_token(self, token: str) -> tuple[Caller, int]:
        return _known(self._callings.of({"token": token}))

    def by_certificate(self, chain: str, at: int) -> tuple[Caller, int]:
        return _known(self._callings.of({"chain": chain, "at": at}))

    def _calling(self, shown: Mapping[str, Any]) -> tuple[Caller, int] | None:
        found = self._line.post("/v1/gateway/callers", shown, answers.CALLING)
        said = found["caller"]
        if said is None:
            return None
        texts = {name: said[name] for name in ("principal", "person", "key", "method")}
        return Caller(roles=tuple(said["roles"]), teams=tuple(said["teams"]), **texts), found["until"]

    def models(self, caller: Caller) -> list[ModelInfo]:
        found = self._asked({"principal": caller.principal, "method": caller.method})
        if found is None:
            raise AuthRequired("principal.unknown", f"{caller.principal} is not active in this room")
        return found

    def resolve(self, model: str) -> str:
        return self._one({"name": model}).ref

    def model(self, ref: str) -> ModelInfo:
        return self._models.get(ref) or self._one({"ref": ref})

    def _one(self, asked: Mapping[str, str]) -> ModelInfo:
        found = self._asked(asked)
        if not found:
            raise BackendError("server.answer", "the custodian names no version, and does not say why")
        return found[0]

    def _asked(self, asked: Mapping[str, str]) -> list[ModelInfo] | None:
        found = self._line.post("/v1/gateway/models", asked, answers.MODELS)["models"]
        if found is None:
            return None
        known = [
            ModelInfo(each["ref"], each["created"], each["parameters"], each["vocabulary"], hidden=0, bytes=0)
            for each in found
        ]
        self._models |= {each.ref: each for each in known}
        return known

    def decide(self, caller: Caller, action: str, ref: str) -> None:
        self._together.ask({"principal": caller.principal, "method": caller.method, "action": action, "ref": ref})

    def _decide(self, asked: list[Question]) -> list[StrongroomError | None]:
        different = {tuple(each.values()): each for each in asked}  # many streams of one caller ask the same
        found = self._line.post("/v1/gateway/decisions", {"asked": [*different.values()]}, answers.DECISIONS)
        if len(found["decisions"]) != len(different):
            raise BackendError("server.answer", "the custodian decides something else than it was asked")
        said = dict(zip(different, found["decisions"], strict=True))
        told = (said[tuple(each.values())] for each in asked)
        return [None if each is None else error_of(each) for each in told]

    def record(self, ref: str, body: dict[str, Any]) -> int:
        return self._accounts.say(ref, body)

    def spelling(self, ref: str) -> Spelling:
        return Spelling.from_json(self._line.post("/v1/gateway/spellings", {"ref": ref}, answers.SPELLING))


class _Together:
    """Questions of several threads, asked in one request: those that come while others are on their way wait for the
    next. `send` answers each with what it raises, or None."""

    def __init__(self, send: Callable[[list[Question]], list[StrongroomError | None]]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._waiting: list[tuple[Question, Future[None]]] = []
        self._leaders = 0

    def ask(self, question: Question) -> None:
        """Back when it is allowed; else whatever `send` answers, or raises."""
        told = Future[None]()
        with self._lock:
            self._waiting.append((question, told))
            leads = self._leaders < _LEADERS
            self._leaders += leads
        if leads:
            self._lead()
        told.result()

    def _lead(self) -> None:
        while True:
            with self._lock:
                taken, self._waiting = self._waiting[:_ASKED], self._waiting[_ASKED:]
                if not taken:
                    self._leaders -= 1
                    return
            try:
                found = self._send([question for question, _ in taken])
            except BaseException as error:  # noqa: BLE001 - whoever waits has to know
                for _, told in taken:
                    told.set_exception(error)
                continue
            for (_, told), refused in zip(taken, found, strict=True):
                if refused is None:
                    told.set_result(None)
                else:
                    told.set_exception(refused)


def _known(found: tuple[Caller, int] | None) -> tuple[Caller, int]:
    if found is None:
        raise AuthRequired("token.refused", "the token or certificate is of nobody who may act here")
    return found
