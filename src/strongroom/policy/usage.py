"""What came out by inference, as `inference` entries say it: sums for each version and day, so that the state does not
grow with gateways and requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from strongroom.errors import Conflict
from strongroom.formats.entry import Entry

if TYPE_CHECKING:
    from strongroom.policy.state import State

DAY = 86_400
KEPT = 400  # days
_SEEN = 7  # days for which it is known how far a gateway is: each has a stream of its own whenever it starts


@dataclass
class Usage:
    """Requests, those of them that were refused, tokens and bits."""

    requests: int = 0
    refused: int = 0
    tokens: int = 0
    bits: int = 0

    def add(self, requests: int, refused: int, tokens: int, bits: int) -> None:
        self.requests += requests
        self.refused += refused
        self.tokens += tokens
        self.bits += bits

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class Gateway:
    """How many records a worker of a gateway has, the hash of the newest, and the day (since 1970) of its entry."""

    records: int
    head: str
    day: int


def check(state: State, body: Mapping[str, Any]) -> None:
    """Conflict ``inference.behind`` for an account that nobody who checks the log would take: of fewer records than the
    gateway has had, or of others."""
    before = state.gateways.get(body["gateway"])
    if before is not None and (
        body["records"] < before.records or (body["records"] == before.records and body["head"] != before.head)
    ):
        raise Conflict("inference.behind", f"this gateway has had {before.records} records, with another end")


def apply(state: State, entry: Entry) -> None:
    """Take in an entry of the type inference."""
    day, body = entry.at // DAY, entry.body
    state.gateways[body["gateway"]] = Gateway(body["records"], body["head"], day)
    days = state.usage.get(str(day))
    if days is None:
        state.usage = {each: sums for each, sums in state.usage.items() if int(each) > day - KEPT}
        state.gateways = {name: each for name, each in state.gateways.items() if each.day > day - _SEEN}
        days = state.usage[str(day)] = {}
    days.setdefault(entry.ref, Usage()).add(*(body[name] for name in ("requests", "refused", "tokens", "bits")))


def since(state: State, ref: str, begin: int) -> Usage:
    """The sums of `ref`, from the day on that the time `begin` (seconds) is in."""
    found = Usage()
    for day, sums in state.usage.items():
        if int(day) >= begin // DAY and (one := sums.get(ref)) is not None:
            found.add(one.requests, one.refused, one.tokens, one.bits)
    return found
