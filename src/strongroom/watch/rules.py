"""Which budgets there are: a share of the weights' effective size, by scope and window (spec/gateway.md, section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import NamedTuple

from strongroom.core.ids import Ref

SCOPES = ("identity", "destination", "team", "model", "everybody")
WINDOWS = ("hour", "day", "month", "lifetime")
SECONDS = {"hour": 3600, "day": 86_400, "month": 2_629_746}  # of a month on the average: for rates, not for windows
MBIT = 1_000_000
ANSWER = 16_384  # bits of an answer of 1,024 tokens, of a vocabulary of 65,536


@dataclass(frozen=True)
class Rule:
    """At most `share` of W_eff, or `floor` bits if that is more, in each `window` (UTC). `hard`: refused beyond;
    otherwise an alarm."""

    scope: str
    window: str
    share: float
    floor: int = 0
    hard: bool = False

    def limit(self, size: int) -> int:
        """In bits, for weights whose W_eff is `size`; the same on every machine."""
        return max(self.floor, math.floor(size * Fraction(repr(self.share))))

    def means(self, size: int) -> bool:
        """Whether it says anything of weights of this size: an alarm at less than one answer is none."""
        return self.hard or self.limit(size) >= ANSWER


RULES = (
    Rule("identity", "day", 1e-5, 2 * MBIT, hard=True),
    Rule("destination", "day", 1e-4, 20 * MBIT, hard=True),
    *(
        Rule(scope, window, share)
        for scope in ("team", "model", "everybody")
        for window, share in (("hour", 1e-3), ("day", 1e-3), ("month", 1e-2), ("lifetime", 1e-1))
    ),
)


class Spender(NamedTuple):
    """Whose answer it is. `destination`: the caller's network, as text; `key`: the start of an API key's digest.

    Keys are not counted alone: many keys of one identity, or of one team, share its budget.
    """

    principal: str
    destination: str
    teams: tuple[str, ...] = ()
    key: str = ""

    def counted(self, scope: str) -> tuple[str, ...]:
        """The names under which `scope` counts this spender."""
        match scope:
            case "identity":
                return (self.principal,)
            case "destination":
                return (self.destination,)
            case "team":
                return self.teams
        return ("",)


def counted_ref(scope: str, ref: str) -> str:
    """What `scope` counts an answer of `ref` under: everybody's budget is for all versions of the name, which have most
    of their worth in common; a version can't be had in instalments from its successors."""
    return Ref.parse(ref).name if scope == "everybody" else ref


def window_at(window: str, now: int) -> tuple[int, int | None]:
    """First second of the `window` that `now` (Unix time) is in, and of the next; of a lifetime 0 and None."""
    if window == "lifetime":
        return 0, None
    if window == "month":
        at = datetime.fromtimestamp(now, UTC)
        first = datetime(at.year, at.month, 1, tzinfo=UTC)
        after = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
        return int(first.timestamp()), int(after.timestamp())
    start = now - now % SECONDS[window]
    return start, start + SECONDS[window]
