"""How much of one version's budgets is used, and how long its weights would take to leave that way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from strongroom.watch.counters import Key
from strongroom.watch.rules import SECONDS, Rule, counted_ref, window_at

_SHOWN = 100  # spenders of a scope and window, those that used most
SHARED = ("model", "everybody")  # scopes with one budget for all callers


class Used(Protocol):
    """What one holder has had of one version: releases (loads), and plaintext copies."""

    @property
    def holder(self) -> str: ...
    @property
    def ref(self) -> str: ...
    @property
    def last(self) -> int: ...
    @property
    def releases(self) -> int: ...
    @property
    def copies(self) -> int: ...


def report(
    rules: Sequence[Rule],
    rows: Sequence[tuple[Key, int]],
    uses: Iterable[Used],
    ref: str,
    size: int,
    now: int,
    answered: tuple[int, int] = (0, 0),
    accounted: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> dict[str, Any]:
    """Of `ref`, whose W_eff is `size` bits, at `now` (Unix time). `answered`: bits that gateways have accounted for
    today, and yesterday; `accounted`: those in the window that is open, by scope and window, as far as the log says.

    ``budgets``: scope, window, who (empty: all callers), used, accounted, limit, left (bits), hard, resets_at (Unix
    time, or None). Used is what workers have drawn, and so more than has left: of a limit that refuses by up to a 16th
    of what was left each, of an alarm that has sounded by what some thousand answers may have; accounted is what
    gateways have answered in that window, by the log (of a lifetime: in the last 400 days on which they did), None
    where the budget is one caller's, of whom the log does not know. ``bits_a_day``: as
    gateways have accounted for them; ``charged_bits_a_day``: with what they have drawn in advance, and so the most that
    it can be, whatever they say. ``exfiltration``: seconds that `size` bits would take, at both of these (``current``,
    ``charged``), and at what is allowed: None is never, 0 that no budget bounds it. ``artefacts``: whoever was given
    the weights themselves; each time was one whole artefact. ``too_small``: budgets that are alarms are less than one
    answer, and mean nothing.
    """
    used = dict(rows)
    budgets = []
    for rule in rules:
        start, ends = window_at(rule.window, now)
        where, limit = counted_ref(rule.scope, ref), rule.limit(size)
        shared = Key(rule.scope, rule.window, start, "", where)
        found = {shared: used.get(shared, 0)} if rule.scope in SHARED else {}
        found |= {key: bits for key, bits in rows if key[:3] == shared[:3] and key.ref == where}
        for key, bits in sorted(found.items(), key=lambda item: (-item[1], item[0].who))[:_SHOWN]:
            budgets.append(
                {
                    "scope": rule.scope,
                    "window": rule.window,
                    "who": key.who,
                    "used": bits,
                    "accounted": accounted.get((rule.scope, rule.window)),
                    "limit": limit,
                    "left": max(limit - bits, 0),
                    "hard": rule.hard,
                    "resets_at": ends,
                }
            )
    together = [rule for rule in rules if rule.scope in SHARED]
    hard = [rule for rule in together if rule.hard]
    start, _ = window_at("day", now)
    rate = _rate(answered, now - start)
    days = (used.get(Key("model", "day", start - back, "", ref), 0) for back in (0, SECONDS["day"]))
    # Settings may have no such counter: then what was accounted for is all that is known.
    charged = max(rate, _rate((*days,), now - start))
    artefacts = [
        {"holder": use.holder, "releases": use.releases, "copies": use.copies, "last": use.last}
        for use in uses
        if use.ref == ref
    ]
    return {
        "ref": ref,
        "effective_bits": size,
        "too_small": not all(rule.means(size) for rule in rules),
        "at": now,
        "gone_bits": used.get(Key("model", "lifetime", 0, "", ref), 0),
        "bits_a_day": math.ceil(rate * SECONDS["day"]),
        "charged_bits_a_day": math.ceil(charged * SECONDS["day"]),
        "budgets": budgets,
        "exfiltration": {
            "current_seconds": math.ceil(size / rate) if rate else None,
            "charged_seconds": math.ceil(size / charged) if charged else None,
            "caller_seconds": _time([rule for rule in rules if rule.hard], size),
            "together_seconds": _time(hard, size),
            "alarm_seconds": _time(together, size),
        },
        "releases": sum(each["releases"] for each in artefacts),
        "copies": sum(each["copies"] for each in artefacts),
        "artefacts": sorted(artefacts, key=lambda each: (-each["copies"], -each["releases"], each["holder"])),
    }


def _rate(days: tuple[int, ...], so_far: int) -> float:
    """Bits a second of all callers: of yesterday, or of today, `so_far` seconds of it, if that is more."""
    today, before = days
    return max(today / max(so_far, SECONDS["hour"]), before / SECONDS["day"])


def _time(rules: Sequence[Rule], size: int) -> int | None:
    """Seconds that whoever stays within all of `rules` takes for `size` bits; None if never, 0 without rules."""
    slowest = 0
    for rule in rules:
        limit = rule.limit(size)
        if limit >= size:  # at once
            continue
        if not limit or rule.window == "lifetime":
            return None
        slowest = max(slowest, -(-size * SECONDS[rule.window] // limit))
    return slowest
