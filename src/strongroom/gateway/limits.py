"""Requests, tokens and concurrency, over all scopes that a caller falls under at once: all are taken, or none.

Each limit is a GCRA (ITU-T I.371), which is a token bucket kept as one time: `at`, when the bucket would be full again.
`max_tokens` are taken before an answer, and what was not generated is given back: so the sum of what was generated
since the start never passes burst + rate · time, however many requests run side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from strongroom.errors import LimitExceeded
from strongroom.gateway.door import Caller
from strongroom.gateway.settings import Rate, Settings

SCOPES = ("key", "identity", "team", "model", "everybody")
_OWN = 2  # of a caller's cells, the first so many at most are its own, of which it is told
_CODES = {"requests": "rate.requests", "tokens": "rate.tokens", "concurrency": "rate.concurrency"}
_ROUNDING = 1e-6  # of one request or token


class Cell:
    """The state of one scope: for requests and tokens the step (seconds each takes), the room (seconds that all of a
    burst take), and the time `at`."""

    __slots__ = (
        *("scope", "rate", "most", "running"),
        *("request_step", "request_room", "request_at", "token_step", "token_room", "token_at"),
    )

    def __init__(self, scope: str, rate: Rate) -> None:
        self.scope, self.rate = scope, rate
        self.most = rate.concurrency or math.inf
        self.request_step, self.request_room = step_and_room(rate.requests, rate.burst)
        self.token_step, self.token_room = step_and_room(rate.tokens, rate.tokens_burst)
        self.request_at = self.token_at = 0.0
        self.running = 0


class Limits:
    """The limits of one process, whose event loop alone uses it. `clock`: seconds that never go back. `scale`: the part
    of each limit that is this worker's. `before`: the limits of other settings, where what is the same goes on."""

    def __init__(
        self, settings: Settings, clock: Callable[[], float], *, scale: float = 1.0, before: Limits | None = None
    ) -> None:
        self._settings, self._clock, self._scale = settings, clock, scale
        self._cells: dict[tuple[str, str, Rate], Cell] = before._cells if before else {}  # noqa: SLF001 - its own class
        self._found: dict[tuple[str, str, tuple[str, ...], tuple[str, ...], str], tuple[Cell, ...]] = {}
        self._sweep_at = 1024

    def admit(self, caller: Caller, ref: str, tokens: int) -> Admission:
        """One request of `caller` to `ref`, of at most `tokens` tokens.

        LimitExceeded ``rate.requests``, ``rate.tokens``, ``rate.concurrency``, with scope, limit and retry_after
        (seconds; None if so many tokens are never let through). What is refused has taken nothing.
        """
        now = self._clock()
        cells = self._found.get((caller.key, caller.principal, caller.roles, caller.teams, ref))
        if cells is None:
            cells = self._find(caller, ref, now)
        # Written out, without max(): this is done for every request, five times and more.
        for cell in cells:
            busy = cell.token_at - now
            if (
                cell.running >= cell.most
                or cell.request_at - now + cell.request_step > cell.request_room
                or (busy if busy > 0 else 0) + tokens * cell.token_step > cell.token_room  # noqa: FURB136
            ):
                raise self._refusal(cells, tokens, now)
        for cell in cells:
            cell.running += 1
            at = cell.request_at
            cell.request_at = (at if at > now else now) + cell.request_step  # noqa: FURB136
            at = cell.token_at
            cell.token_at = (at if at > now else now) + tokens * cell.token_step  # noqa: FURB136
        return Admission(self, cells, tokens)

    def end(self, cells: tuple[Cell, ...], more: int) -> None:
        """A request has ended, and had `more` tokens than were taken (fewer, if negative)."""
        now = self._clock() if more > 0 else -math.inf  # a full bucket that is given more is full
        for cell in cells:
            cell.running -= 1
            at = cell.token_at
            cell.token_at = (at if at > now else now) + more * cell.token_step  # noqa: FURB136

    def told(self, cells: tuple[Cell, ...]) -> list[tuple[bytes, bytes]]:
        """The headers about a caller's own limits."""
        now = self._clock()
        requests = tokens = None
        for cell in cells[:_OWN]:
            if cell.scope not in ("key", "identity"):
                continue
            if cell.request_step:
                left = left_of(cell.rate.requests, cell.request_step, cell.request_room, cell.request_at - now)
                requests = left if requests is None or left < requests else requests
            if cell.token_step:
                left = left_of(cell.rate.tokens, cell.token_step, cell.token_room, cell.token_at - now)
                tokens = left if tokens is None or left < tokens else tokens
        return headers(requests, tokens)

    def _find(self, caller: Caller, ref: str, now: float) -> tuple[Cell, ...]:
        if len(self._cells) + len(self._found) >= self._sweep_at:
            self._sweep(now)
        found = []
        for scope, who in scopes_of(caller, ref):
            rate = self._settings.rates(scope, caller.roles)
            if not (rate.requests or rate.tokens or rate.concurrency):
                continue
            name = (scope, who, rate)
            cell = self._cells.get(name)
            if cell is None:
                cell = self._cells[name] = Cell(scope, rate if self._scale == 1 else rate.scaled(self._scale))
            found.append(cell)
        cells = tuple(found)
        self._found[caller.key, caller.principal, caller.roles, caller.teams, ref] = cells
        return cells

    def _sweep(self, now: float) -> None:
        """Forget whoever is idle: a full bucket is like a new one. At most one pass for each doubling."""
        self._found.clear()
        self._cells = {
            name: cell
            for name, cell in self._cells.items()
            if cell.running or cell.request_at > now or cell.token_at > now
        }
        self._sweep_at = max(1024, 2 * len(self._cells))

    def _refusal(self, cells: tuple[Cell, ...], tokens: int, now: float) -> LimitExceeded:
        """Of all that refuse the one that does so for longest."""
        refusals: list[tuple[float, str, str, int]] = []
        for cell in cells:
            rate = cell.rate
            if rate.concurrency and cell.running >= rate.concurrency:
                refusals.append((1.0, "concurrency", cell.scope, rate.concurrency))
            late = max(cell.request_at, now) + cell.request_step - now - cell.request_room
            if late > 0:
                refusals.append((late, "requests", cell.scope, rate.requests))
            late = max(cell.token_at, now) + tokens * cell.token_step - now - cell.token_room
            if late > 0:
                never = tokens * cell.token_step > cell.token_room
                refusals.append((math.inf if never else late, "tokens", cell.scope, rate.tokens))
        return refused(*max(refusals))


class Admission:
    """A request that was let through. `done` must be called when it has ended, however it ended."""

    __slots__ = ("_cells", "_ended", "_limits", "_tokens")

    def __init__(self, limits: Limits, cells: tuple[Cell, ...], tokens: int) -> None:
        self._limits, self._cells, self._tokens = limits, cells, tokens
        self._ended = False

    def done(self, tokens: int) -> None:
        """It had `tokens` tokens: what was taken beyond is given back, and its place is free. Once; then nothing."""
        if not self._ended:
            self._ended = True
            self._limits.end(self._cells, tokens - self._tokens)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """``x-ratelimit-limit-requests``, ``-remaining-requests``, ``-reset-requests``, and the same of tokens: of the
        caller's own limits (key, identity) the one with the least left; how busy others are is not told."""
        return self._limits.told(self._cells)


def scopes_of(caller: Caller, ref: str) -> list[tuple[str, str]]:
    """The scopes that a request falls under, with the name that each counts it under; the caller's own first."""
    own = [("key", caller.key)] if caller.key else []
    teams = [("team", team) for team in dict.fromkeys(caller.teams)]
    return [*own, ("identity", caller.principal), *teams, ("model", ref), ("everybody", "")]


def step_and_room(rate: int, burst: int) -> tuple[float, float]:
    """Seconds that one takes at `rate` a minute, and seconds that a burst may take; no rate takes no time."""
    if not rate:
        return 0.0, math.inf
    step = 60 / rate
    return step, ((burst or rate) + _ROUNDING) * step


def refused(wait: float, kind: str, scope: str, limit: int) -> LimitExceeded:
    """The error of a limit of `kind`. `wait` in seconds; infinite: it would never be let through."""
    if wait == math.inf:
        return LimitExceeded(
            _CODES[kind],
            f"no request may have so many tokens: this {scope} has {limit} a minute",
            hint="ask for fewer max_tokens",
            scope=scope,
            limit=limit,
            retry_after=None,
        )
    seconds = max(1, math.ceil(wait))
    what = f"{limit} requests under way" if kind == "concurrency" else f"{limit} {kind} a minute"
    return LimitExceeded(
        _CODES[kind],
        f"this {scope} may have {what}, and has them",
        hint=f"ask again in {seconds} s",
        scope=scope,
        limit=limit,
        retry_after=seconds,
    )


Left = tuple[int, int, float]
"""How many are left, the limit, and seconds until there are as many as there can be; the least is the tightest."""


def left_of(rate: int, step: float, room: float, busy: float) -> Left:
    """Of a limit that is full again in `busy` seconds."""
    if busy <= 0:
        return int(room / step), rate, 0.0
    return max(0, int((room - busy) / step)), rate, busy


def headers(requests: Left | None, tokens: Left | None) -> list[tuple[bytes, bytes]]:
    """What a caller is told of the tightest limit of each kind."""
    found = []
    if requests is not None:
        found += [
            (b"x-ratelimit-limit-requests", b"%d" % requests[1]),
            (b"x-ratelimit-remaining-requests", b"%d" % requests[0]),
            (b"x-ratelimit-reset-requests", b"%ds" % math.ceil(requests[2])),
        ]
    if tokens is not None:
        found += [
            (b"x-ratelimit-limit-tokens", b"%d" % tokens[1]),
            (b"x-ratelimit-remaining-tokens", b"%d" % tokens[0]),
            (b"x-ratelimit-reset-tokens", b"%ds" % math.ceil(tokens[2])),
        ]
    return found
