"""Answers that are run again, elsewhere, with the room's own weights (spec/gateway.md, section 7): an inference server
that hides something in what it samples is found out."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from strongroom.errors import BackendError, Sealed
from strongroom.gateway.flight import Flight
from strongroom.gateway.rooms import Keeping
from strongroom.gateway.upstream import Upstream
from strongroom.watch.tallies import Kept
from strongroom.watch.verdict import HONEST, Tally, Verdict

_WAITING = 64  # samples; more are not taken while so many wait
_FINE = 1 << 32
_log = logging.getLogger("strongroom.gateway")


@dataclass
class _Known:
    """What was found in one term. By version and arithmetic: what the database had last (`kept`), what it did not take
    yet (`unkept`), how much is on its way there, and what is wrong (`alarms`, empty: nothing); `alarm` is all of these.
    `verdicts` by version, the newest of each."""

    kept: dict[tuple[str, str], Kept] = field(default_factory=dict)
    unkept: dict[tuple[str, str], Tally] = field(default_factory=dict)
    underway: Counter[tuple[str, str]] = field(default_factory=Counter)
    alarms: dict[tuple[str, str], str] = field(default_factory=dict)
    alarm: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)


class Verified:
    """Sends a `share` (0 to 1) of the answers to `verifier`, a ``strongroom infer`` beside the one that answers, over
    its private channel. Which ones, nobody knows before. `stop`: whether an alarm ends all inference here. `tallies`
    keeps what came of it; `vocabulary` is the number of tokens that a version knows."""

    def __init__(
        self, verifier: Upstream, share: float, tallies: Keeping, vocabulary: Callable[[str], int], *, stop: bool
    ) -> None:
        self._verifier, self._share, self._stop = verifier, int(share * _FINE), stop
        self._tallies, self._vocabulary = tallies, vocabulary
        self._samples: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(_WAITING)
        self._task: asyncio.Task[None] | None = None
        self._keeping: set[asyncio.Task[None]] = set()
        self._known = _Known()
        self.failed = 0  # samples that were not verified
        self._left_out = 0  # of these, since one had room
        for each in tallies.now():  # an alarm does not end with whoever raised it
            self._judge(self._newest(each))

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """By version, the newest of each."""
        return self._known.verdicts

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._verifier.close()

    def check(self) -> None:
        """Sealed ``verify.alarm`` after an alarm, where that is to end inference."""
        if self._stop and self._known.alarm:
            raise Sealed(
                "verify.alarm",
                f"answers do not verify: {self._known.alarm}",
                hint="when that has been looked into: a higher term in [verify] of the settings begins a new tally",
            )

    def inherit(self, other: Verified) -> None:
        """Go on where `other` is, which may still be given answers: what it has found is not forgotten, and what it
        takes as a sample is run again here."""
        self.failed, self._samples = other.failed, other._samples
        if self._tallies.term == other._tallies.term:  # else a new tally begins
            self._known = other._known

    def rest(self) -> None:
        """Take samples, and leave it to another one to run them again."""
        if self._task is not None:
            self._task.cancel()

    def look(self, flight: Flight) -> None:
        """An answer has been given, or the beginning of one; it may be taken as a sample."""
        meter, body = flight.meter, flight.body
        # Each choice of several is an answer of its own. Its tokens are the server's word, and the text is what its
        # caller got: they may be two answers.
        for index, tokens in meter.sampled.items():
            if secrets.randbelow(_FINE) >= self._share:
                continue
            text = "".join((meter.text or {}).get(index, ()))
            value: dict[str, Any] = {"model": flight.ref, "route": flight.route, "request": body}
            value |= {"choice": index, "tokens": tokens, "text": text}
            self._wait((flight.ref, orjson.dumps(value)))

    def _wait(self, sample: tuple[str, bytes]) -> None:
        """Until it is run again. Where more come than the verifier can take, those that stay are drawn from all
        (Vitter's algorithm R): else whoever keeps it busy would know that what comes next is not looked at."""
        if not self._samples.full():
            self._samples.put_nowait(sample)
            self._left_out = 0
            return
        self.failed += 1  # a verifier that is too slow is seen, too
        self._left_out += 1
        place = secrets.randbelow(_WAITING + self._left_out)
        if place < _WAITING:
            for at in range(_WAITING):
                each = self._samples.get_nowait()
                self._samples.put_nowait(sample if at == place else each)

    async def _run(self) -> None:
        while True:
            ref, body = await self._samples.get()
            try:
                await self._verify(ref, body)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next answers are still run again
                self.failed += 1
                _log.warning("an answer was not run again by the verifier, %s: %s", self._verifier.url, error)

    async def _verify(self, ref: str, body: bytes) -> None:
        said = await self._ask(body)
        arithmetic, run = said["arithmetic"], _tally(said["run"])
        if arithmetic not in HONEST:  # each name has a tally of its own: one that is drawn anew would hide an alarm
            raise ValueError("the verifier's arithmetic is none")
        # Settings that are read again end this task, and not what it has found: of it an alarm may be made.
        keeping = asyncio.get_running_loop().create_task(self._keep(ref, arithmetic, run))
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)
        await asyncio.shield(keeping)

    async def _keep(self, ref: str, arithmetic: str, run: Tally) -> None:
        key, known = (ref, arithmetic), self._known
        run += known.unkept.pop(key, Tally())
        known.underway[key] += 1
        try:
            found = self._newest(await asyncio.to_thread(self._tallies.add, ref, arithmetic, run))
        except Exception as error:  # noqa: BLE001 - of a driver, too
            _log.warning("the tally of verified inference is not kept yet: %s", error)
            known.unkept[key] = known.unkept.get(key, Tally()) + run
            before = known.kept.get(key)  # whoever stops the database must not end an alarm
            found = Kept(ref, self._tallies.term, arithmetic, run + (before.tally if before else Tally()))
        finally:
            known.underway[key] -= 1
        self._judge(found)
        if alarm := known.verdicts[ref].alarm:
            _log.error("verified inference of %s: %s", ref, alarm)

    def _newest(self, found: Kept) -> Kept:
        """What the database has, and never fewer than it had: one of its answers may come after the next, and nobody
        ends an alarm by setting it back."""
        key = (found.ref, found.arithmetic)
        before = self._known.kept.get(key)
        if before is None or _size(before.tally) <= _size(found.tally):
            self._known.kept[key] = found
        return self._known.kept[key]

    def _judge(self, found: Kept) -> None:
        """What all gateways of the room have had verified, of one version in one kind of arithmetic."""
        known, key = self._known, (found.ref, found.arithmetic)
        if found.tally.tokens or found.tally.others:
            verdict = found.verdict(self._vocabulary(found.ref))
            # What an alarm was sounded for may be in none of this yet: it is not ended by who was quicker.
            if not verdict.alarm and known.alarms.get(key) and (known.underway[key] or key in known.unkept):
                return
            known.verdicts[found.ref], known.alarms[key] = verdict, verdict.alarm
            known.alarm = "; ".join(filter(None, known.alarms.values()))

    async def _ask(self, body: bytes) -> dict[str, Any]:
        reply = await self._verifier.post("/v1/verify", body)
        answer = await reply.read()
        if reply.status != 200:
            raise BackendError("verify.refused", f"the verifier answered with status {reply.status}")
        found: dict[str, Any] = orjson.loads(answer)
        return found


def _size(tally: Tally) -> int:
    return tally.tokens + tally.others


def _tally(value: Any) -> Tally:
    """One run, as a verifier counts it. ValueError."""
    counts = [value[name] for name in ("good", "suspicious", "dangerous", "others", "open_bits")]
    if not all(type(each) in (int, float) and 0 <= each < 1 << 32 for each in counts):
        raise ValueError("the verifier's counts are none")
    good, suspicious, dangerous, others = map(int, counts[:4])
    return Tally(good, suspicious, dangerous, others, float(counts[4]))
