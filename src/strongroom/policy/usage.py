"""What came out by inference, as `inference` entries say it: sums for each version and day, and bits for each hour of
late, so that the state does not grow with gateways and requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from strongroom.core.canonical import MAX_INTEGER
from strongroom.errors import Conflict
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.formats.stream import DAY, after, fault, newest, remembered

if TYPE_CHECKING:
    from strongroom.policy.state import State

_HOUR = 3600


@dataclass
class Usage:
    """Requests, those of them that were refused, tokens and bits."""

    requests: int = 0
    refused: int = 0
    tokens: int = 0
    bits: int = 0

    def add(self, requests: int, refused: int, tokens: int, bits: int) -> None:
        self.requests = _sum(self.requests, requests)
        self.refused = _sum(self.refused, refused)
        self.tokens = _sum(self.tokens, tokens)
        self.bits = _sum(self.bits, bits)

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def _sum(one: int, other: int) -> int:
    """Else a gateway that says absurdly much could make sums of which no snapshot can be written, nor then an entry."""
    return min(one + other, MAX_INTEGER)


def from_json(value: Mapping[str, Any]) -> dict[str, dict[str, Usage]]:
    """The sums of a snapshot, by day and version. TypeError, AttributeError for what is none."""
    return {day: {ref: Usage(**one) for ref, one in of.items()} for day, of in value.items()}


def check(state: State, body: Mapping[str, Any], account: int | None = None) -> None:
    """Conflict ``inference.behind`` for an account that nobody who checks the log would take: of fewer records than the
    gateway has had, or of others, of somebody else's stream, or one of those before (Conflict ``inference.told``) or
    after the next. `account`: its number, if it is signed."""
    before = state.gateways.get(body["gateway"])
    if account is not None and before is not None and account == before.accounts - 1:
        # Nobody but its gateway could have said it: whoever lost the answer is told so, and counts nothing twice.
        raise Conflict("inference.told", f"account {account} is in the log", accounts=before.accounts)
    if wrong := fault(before, body, account):
        raise Conflict("inference.behind", f"that is no account that the log can take: {wrong}")


def apply(state: State, entry: Entry) -> None:
    """Take in an entry of the type inference."""
    day, body = entry.at // DAY, entry.body
    account = Statement.decode(body["statement"]).body["account"] if "statement" in body else None
    state.gateways[body["gateway"]] = after(body, day, account)
    days = state.usage.get(str(day))
    if days is None:
        kept = newest(map(int, state.usage), day)
        state.usage = {each: sums for each, sums in state.usage.items() if int(each) in kept}
        state.gateways = {name: each for name, each in state.gateways.items() if remembered(each, day)}
        days = state.usage[str(day)] = {}
    days.setdefault(entry.ref, Usage()).add(*(body[name] for name in ("requests", "refused", "tokens", "bits")))
    hour = entry.at // _HOUR
    if str(hour) not in state.hours:  # this one, and the one before
        state.hours = {each: sums for each, sums in state.hours.items() if int(each) >= hour - 1} | {str(hour): {}}
    sums = state.hours[str(hour)]
    sums[entry.ref] = _sum(sums.get(entry.ref, 0), body["bits"])


def since(state: State, ref: str, begin: int) -> Usage:
    """The sums of `ref`, from the day on that the time `begin` (seconds) is in."""
    found = Usage()
    for day, sums in state.usage.items():
        if int(day) >= begin // DAY and (one := sums.get(ref)) is not None:
            found.add(one.requests, one.refused, one.tokens, one.bits)
    return found


def bits(state: State, ref: str, begin: int, *, hourly: bool = False) -> int:
    """Those of `ref`, NAME@N, or of all versions of a NAME, from the day on that the time `begin` (seconds) is in, or
    from the hour on, of the last two."""

    def named(each: str) -> bool:
        return each == ref or each.partition("@")[0] == ref

    if hourly:
        hours = [sums for hour, sums in state.hours.items() if int(hour) >= begin // _HOUR]
        return min(MAX_INTEGER, sum(amount for sums in hours for each, amount in sums.items() if named(each)))
    days = [sums for day, sums in state.usage.items() if int(day) >= begin // DAY]
    return min(MAX_INTEGER, sum(one.bits for sums in days for each, one in sums.items() if named(each)))


def on(state: State, ref: str, at: int) -> Usage:
    """Those of the day that the time `at` (seconds) is in."""
    return state.usage.get(str(at // DAY), {}).get(ref) or Usage()
