"""Answers that are run again, elsewhere, with the room's own weights (spec/gateway.md, section 7): an inference server
that hides something in what it samples is found out."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import orjson

from strongroom.errors import BackendError, Sealed
from strongroom.gateway.flight import Flight
from strongroom.gateway.upstream import Upstream

_WAITING = 64  # samples; more are not taken while so many wait
_FINE = 1 << 32
_log = logging.getLogger("strongroom.gateway")


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of all that it was sent, in tokens; `bits` a token could still be smuggled out; `alarm`
    says what is wrong, or nothing."""

    tokens: int
    good: int
    suspicious: int
    dangerous: int
    bits: float
    alarm: str


class Verified:
    """Sends a `share` (0 to 1) of the answers to `verifier`, a ``strongroom infer`` beside the one that answers, over
    its private channel. Which ones, nobody knows before. `stop`: whether an alarm ends all inference here."""

    def __init__(self, verifier: Upstream, share: float, *, stop: bool) -> None:
        self._verifier, self._share, self._stop = verifier, int(share * _FINE), stop
        self._samples: asyncio.Queue[bytes] = asyncio.Queue(_WAITING)
        self._task: asyncio.Task[None] | None = None
        self.verdict: Verdict | None = None
        self.failed = 0  # samples that were not verified

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._verifier.close()

    def check(self) -> None:
        """Sealed ``verify.alarm`` after an alarm, where that is to end inference."""
        if self._stop and self.verdict is not None and self.verdict.alarm:
            raise Sealed("verify.alarm", f"answers do not verify: {self.verdict.alarm}")

    def look(self, flight: Flight) -> None:
        """An answer has been given, or the beginning of one; it may be taken as a sample."""
        meter, body = flight.meter, flight.body
        if not meter.sampled or "n" in body or secrets.randbelow(_FINE) >= self._share:
            return
        # The tokens are the server's word, and the text is what its caller got: they may be two answers.
        text = "".join((meter.text or {}).get(0, ()))
        tokens = meter.sampled.get(0, [])
        value = {"model": flight.ref, "route": flight.route, "request": body, "tokens": tokens, "text": text}
        try:
            self._samples.put_nowait(orjson.dumps(value))
        except asyncio.QueueFull:
            self.failed += 1  # a verifier that is too slow is seen, too

    async def _run(self) -> None:
        while True:
            body = await self._samples.get()
            try:
                said = await self._ask(body)
                self.verdict = Verdict(**{name: said[name] for name in Verdict.__dataclass_fields__})
            except (BackendError, ValueError, TypeError, KeyError) as error:
                self.failed += 1
                _log.warning("an answer was not verified: %s", error)
                continue
            if self.verdict.alarm:
                _log.error("verified inference: %s", self.verdict.alarm)

    async def _ask(self, body: bytes) -> dict[str, Any]:
        reply = await self._verifier.post("/v1/verify", body)
        answer = await reply.read()
        if reply.status != 200:
            raise BackendError("verify.refused", f"the verifier answered with status {reply.status}")
        found: dict[str, Any] = orjson.loads(answer)
        return found
