"""The same limits over all workers and machines, by one Lua script a call; the time is Redis's own.

A request's place counts until it is given back, or until its lease is over: a worker that dies holds none for ever.
Without Redis all is refused, or each worker gives out the share of every limit that the settings say.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Coroutine
from typing import Any

import redis.asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from strongroom.errors import BackendError
from strongroom.gateway.door import Caller
from strongroom.gateway.limits import (
    Admission,
    Left,
    Limits,
    headers,
    left_of,
    refused,
    scopes_of,
    step_and_room,
)
from strongroom.gateway.settings import Settings

_AGAIN = 1.0  # seconds for which Redis is not asked after it has failed
_KINDS = ("concurrency", "requests", "tokens")
_NEVER = -1

# Times are microseconds of Redis's clock: whole numbers below 2^53, which Lua's doubles have exactly. Numbers become
# text by %.0f, as tostring() writes 14 digits only. For each scope there are two keys, one with both times and one with
# the requests that are under way, scored by the end of their lease.
# ARGV: id, tokens, lease; for each scope: request step and room, token step and room, concurrency. 0: no limit.
_ADMIT = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local id, tokens, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local worst, kind, scope = 0, 0, 0
local function late(wait, what, which)
  if wait > worst then worst, kind, scope = wait, what, which end
end
local states = {}
for i = 1, #KEYS / 2 do
  local a = 3 + (i - 1) * 5
  local rstep, rroom, tstep, troom, most = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]),
    tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
  local times = redis.call('HMGET', KEYS[2 * i - 1], 'r', 't')
  local r = math.max(tonumber(times[1] or 0), now) + rstep
  local t = math.max(tonumber(times[2] or 0), now) + tokens * tstep
  if rstep > 0 then late(r - now - rroom, 2, i) end
  if tstep > 0 then
    if tokens * tstep > troom then return {-1, 3, i} end
    late(t - now - troom, 3, i)
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[2 * i], '-inf', string.format('%.0f', now))
  if most > 0 and redis.call('ZCARD', KEYS[2 * i]) >= most then late(1000000, 1, i) end
  states[i] = {r, t}
end
if worst > 0 then return {math.ceil(worst), kind, scope} end
local answer = {0, 0, 0}
for i = 1, #KEYS / 2 do
  local r, t = states[i][1], states[i][2]
  redis.call('HSET', KEYS[2 * i - 1], 'r', string.format('%.0f', r), 't', string.format('%.0f', t))
  redis.call('PEXPIRE', KEYS[2 * i - 1], string.format('%.0f', math.ceil((math.max(r, t) - now) / 1000 + lease / 1000)))
  redis.call('ZADD', KEYS[2 * i], string.format('%.0f', now + lease), id)
  redis.call('PEXPIRE', KEYS[2 * i], string.format('%.0f', math.ceil(lease / 1000)))
  answer[#answer + 1] = string.format('%.0f', r - now)
  answer[#answer + 1] = string.format('%.0f', t - now)
end
return answer
"""

# ARGV: id, tokens more than were taken (fewer, if negative); for each scope: token step. Said twice it is done once:
# only what is still under way gives back, so neither a repeated call nor a Redis that lost its data makes tokens.
_DONE = """
local now = redis.call('TIME')
now = now[1] * 1000000 + now[2]
local more = tonumber(ARGV[2])
for i = 1, #KEYS / 2 do
  local step = tonumber(ARGV[2 + i])
  if redis.call('ZREM', KEYS[2 * i], ARGV[1]) == 1 and step > 0 then
    local t = tonumber(redis.call('HGET', KEYS[2 * i - 1], 't') or 0)
    if more > 0 then t = math.max(t, now) end
    t = t + more * step
    if t > now then
      redis.call('HSET', KEYS[2 * i - 1], 't', string.format('%.0f', t))
      local left = redis.call('PTTL', KEYS[2 * i - 1])
      local needed = math.ceil((t - now) / 1000)
      if left < needed then redis.call('PEXPIRE', KEYS[2 * i - 1], string.format('%.0f', needed)) end
    else
      redis.call('HDEL', KEYS[2 * i - 1], 't')
    end
  end
end
return 0
"""


class RedisLimits:
    """The limits of all gateways that share a Redis. `name` keeps rooms apart in it; `clock` is for what each worker
    gives out alone while Redis is down."""

    def __init__(self, settings: Settings, clock: Callable[[], float], *, name: str) -> None:
        self._settings, self._clock, self._name = settings, clock, name
        self._redis = client.from_url(
            settings.redis.url,
            socket_timeout=settings.redis.timeout,
            socket_connect_timeout=settings.redis.timeout,
            # Once, for a connection that Redis has closed meanwhile. What may then be done twice is on the safe side.
            retry=Retry(NoBackoff(), 1),
        )
        self._ending: set[asyncio.Task[Any]] = set()
        self._admit, self._done = self._redis.register_script(_ADMIT), self._redis.register_script(_DONE)
        self._lease = math.ceil((settings.timeouts.whole + settings.queue.wait + 60) * 1e6)
        self._share = Limits(settings, clock, scale=settings.redis.share) if settings.redis.down == "share" else None
        self._down_until = -math.inf

    async def admit(self, caller: Caller, ref: str, tokens: int) -> RedisAdmission | LocalAdmission:
        """As `Limits.admit`; without Redis BackendError ``limits.unreachable``, or what this worker's share admits."""
        scopes = scopes_of(caller, ref)
        rates = [self._settings.rates(scope, caller.roles) for scope, _ in scopes]
        keys, numbers = [], []
        for (scope, who), rate in zip(scopes, rates, strict=True):
            # One hash tag: on a cluster a script's keys have to be on one node.
            cell = f"{{strongroom:{self._name}}}:{scope}:{who}"
            keys += [f"{cell}:times", f"{cell}:running"]
            for many, burst in ((rate.requests, rate.burst), (rate.tokens, rate.tokens_burst)):
                step, room = step_and_room(many, burst)
                numbers += [step * 1e6, room * 1e6 if many else 0]
            numbers.append(rate.concurrency)
        identifier = os.urandom(12).hex()
        asked = self._start(self._ask(self._admit, keys, [identifier, tokens, self._lease, *numbers]))
        try:
            said = await asyncio.shield(asked)
        except asyncio.CancelledError:
            # Whoever asked has gone; Redis may have let it in all the same.
            asked.add_done_callback(lambda _: self._start(self.end(keys, identifier, -tokens, numbers[2::5])))
            raise
        if said is None:
            return LocalAdmission(self._alone(caller, ref, tokens))
        wait, kind, which, *busy = map(int, said)
        if wait:
            scope, rate = scopes[which - 1][0], rates[which - 1]
            seconds = math.inf if wait == _NEVER else wait / 1e6
            raise refused(seconds, _KINDS[kind - 1], scope, getattr(rate, _KINDS[kind - 1]))
        least: list[Left | None] = [None, None]
        for at, (scope, _) in enumerate(scopes):
            for kind, many in enumerate((rates[at].requests, rates[at].tokens)):
                if many and scope in ("key", "identity"):
                    step, room = numbers[5 * at + 2 * kind] / 1e6, numbers[5 * at + 2 * kind + 1] / 1e6
                    left, before = left_of(many, step, room, busy[2 * at + kind] / 1e6), least[kind]
                    least[kind] = left if before is None else min(left, before)
        return RedisAdmission(self, keys, identifier, tokens, numbers[2::5], headers(*least))

    async def close(self) -> None:
        """Close the connections, after what is being given back."""
        while self._ending:
            await asyncio.wait(self._ending)
        await self._redis.aclose()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Something that goes on when the request that it belongs to is cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def give_back(self, keys: list[str], identifier: str, more: int, steps: list[float]) -> None:
        """`end`, also if whoever waits for it is cancelled."""
        await asyncio.shield(self._start(self.end(keys, identifier, more, steps)))

    async def end(self, keys: list[str], identifier: str, more: int, steps: list[float]) -> None:
        """A request has ended. Without Redis nothing is given back: its place is free when its lease is over."""
        await self._ask(self._done, keys, [identifier, more, *steps])

    async def _ask(self, script: Any, keys: list[str], arguments: list[Any]) -> list[Any] | None:
        """What a script says; None without Redis, which is not asked again for a second."""
        if self._clock() < self._down_until:
            return None
        try:
            # A timeout of our own, too: a Redis that answers byte by byte keeps within the socket's.
            async with asyncio.timeout(2 * self._settings.redis.timeout):
                said: list[Any] = await script(keys=keys, args=arguments)
        except (RedisError, OSError, TimeoutError):
            self._down_until = self._clock() + _AGAIN
            return None
        return said

    def _alone(self, caller: Caller, ref: str, tokens: int) -> Admission:
        if self._share is None:
            raise BackendError(
                "limits.unreachable",
                "the limits are kept in Redis, and Redis does not answer",
                hint="ask again; where the gateway runs: see that Redis runs, and redis.url in the settings",
                retry_after=math.ceil(_AGAIN),
            )
        return self._share.admit(caller, ref, tokens)


class RedisAdmission:
    """A request that was let through by all gateways together. `done` must be awaited when it has ended."""

    __slots__ = ("_ended", "_id", "_keys", "_limits", "_steps", "_tokens", "headers")

    def __init__(
        self,
        limits: RedisLimits,
        keys: list[str],
        identifier: str,
        tokens: int,
        steps: list[float],
        told: list[tuple[bytes, bytes]],
    ) -> None:
        self._limits, self._keys, self._id, self._tokens, self._steps = limits, keys, identifier, tokens, steps
        self.headers = told
        self._ended = False

    async def done(self, tokens: int) -> None:
        """As `Admission.done`."""
        if not self._ended:
            self._ended = True
            await self._limits.give_back(self._keys, self._id, tokens - self._tokens, self._steps)


class LocalAdmission:
    """A request that was let through by this worker alone, while Redis was down."""

    __slots__ = ("_admission",)

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def done(self, tokens: int) -> None:
        """As `Admission.done`."""
        self._admission.done(tokens)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self._admission.headers
