"""What a request costs its caller: limits, filters, and bits of the budgets, taken before and settled after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

from strongroom.errors import StrongroomError
from strongroom.gateway.answer import BYTES_A_TOKEN, TOKEN_BYTES
from strongroom.gateway.filters import Filter
from strongroom.gateway.flight import Flight
from strongroom.gateway.limits import Limits
from strongroom.gateway.request import invalid
from strongroom.gateway.settings import Settings
from strongroom.gateway.spelt import Spellings, spelled
from strongroom.watch import meter
from strongroom.watch.budget import Alarm, Budgets, Reservation
from strongroom.watch.debts import Debts
from strongroom.watch.rules import Spender

if TYPE_CHECKING:
    from strongroom.gateway.limits_redis import RedisLimits

DIMENSIONS = 256  # of an embedding
_SLACK = 256  # bytes of text beyond `BYTES_A_TOKEN` for each: single tokens are longer
_PART = 16  # of the reservation: what a stream that has more text than that is charged beforehand at a time
_TEND = 10.0  # seconds between two rounds over budgets that nobody uses
_TRIES, _PAUSE = 3, 1.0  # at the end, to charge what is owed

_log = logging.getLogger("strongroom.gateway")


class Tolls:
    """One worker's. `vocabulary` gives the number of tokens that a version knows, `spellings` what they spell, where
    all upstreams tell their tokens."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits | RedisLimits,
        budgets: Budgets,
        vocabulary: Callable[[str], int],
        filters: Sequence[Filter],
        spellings: Spellings | None = None,
    ) -> None:
        self._settings, self._limits, self._budgets = settings, limits, budgets
        self._spellings = spellings
        self._vocabulary, self._filters = vocabulary, tuple(each for each in filters if each.looks)
        # Where nothing is to be waited for but, now and then, the database.
        self._direct = limits if isinstance(limits, Limits) and not self._filters and spellings is None else None
        self._tending: asyncio.Task[None] | None = None
        self.digest, self.limits = settings.digest, limits
        self.durable_before = settings.records.durable == "before"
        self.dimensions = DIMENSIONS

    def start(self) -> None:
        self._tending = asyncio.get_running_loop().create_task(self._tend())
        if self._budgets.owed:  # by those who ended before
            _in_thread(self._budgets.pay)

    @property
    def debts(self) -> Debts:
        """What answers had beyond what was drawn, until it is charged."""
        return self._budgets.debts

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_TEND)
            try:
                await asyncio.to_thread(self._budgets.tend)
            except StrongroomError:  # the next round gives it back
                continue
            except Exception:  # noqa: BLE001 - of a driver, too
                _log.exception("budgets could not be looked after")  # and are still, the next time

    async def close(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
        if not isinstance(self._limits, Limits):
            await self._limits.close()
        for more in (*[True] * (_TRIES - 1), False):
            with suppress(StrongroomError):  # what can't be given back stays charged
                await asyncio.to_thread(self._budgets.close)
            if not self._budgets.owed:
                return
            if more:
                await asyncio.sleep(_PAUSE)
        _log.error(
            "%d bits that answers had beyond what was reserved are in no budget yet; this gateway charges them, or "
            "whichever of the room is started next with these records: %s",
            self._budgets.owed, self._budgets.debts.path,
        )  # fmt: skip

    def take(self, flight: Flight) -> bool:
        """Before anything is generated, from memory alone; False where the rest has to be waited for, with `wait`.
        LimitExceeded, BudgetExceeded, UsageError. What was taken is given back with `give`, whatever came of it."""
        asked, caller = flight.asked, flight.caller
        most = self._settings.max_tokens(caller.roles)
        if asked.most is not None and asked.most > most:
            raise invalid("max_tokens", f"is more than the {most} that you may ask for")
        flight.most = asked.most or min(most, self._settings.answer.max_tokens_default)
        flight.reserved = self._most(flight)
        if self._direct is None:
            return False
        flight.admission = self._direct.admit(caller, flight.ref, _tokens(flight))
        flight.headers += flight.admission.headers
        if flight.trace is not None:
            flight.trace.part("budget")
        flight.toll = self._budgets.take(_spender(flight), flight.ref, flight.reserved)
        return flight.toll is not None

    async def wait(self, flight: Flight) -> None:
        """What `take` left. LimitExceeded, BudgetExceeded, UsageError ``content.refused``."""
        if self._direct is None:
            await self._look(flight)
            if flight.trace is not None:
                flight.trace.part("budget")
        toll = self._budgets.take(_spender(flight), flight.ref, flight.reserved)
        flight.toll = toll or await flight.interruptible(self._reserve(flight))

    async def _look(self, flight: Flight) -> None:
        asked, limits = flight.asked, self._limits
        if isinstance(limits, Limits):
            flight.admission = limits.admit(flight.caller, flight.ref, _tokens(flight))
        else:
            flight.admission = await limits.admit(flight.caller, flight.ref, _tokens(flight))
        flight.headers += flight.admission.headers
        for each in self._filters:
            await each.check(asked.texts, flight.caller)
        if self._spellings is not None and asked.route != "embeddings":
            flight.spelling = await self._spellings.of(flight.ref)

    def give(self, flight: Flight) -> Awaitable[None] | None:
        """After the request: what it had not used. May have to be awaited."""
        self.settle(flight)
        return None if flight.admission is None else flight.admission.done(flight.meter.prompt + flight.tokens)

    async def _reserve(self, flight: Flight) -> Reservation:
        """Out of the database, which takes milliseconds; but it may be behind a network that has gone dark."""
        work = asyncio.to_thread(self._budgets.reserve, _spender(flight), flight.ref, flight.reserved)
        asked = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(_free)  # nobody else will, and nothing was generated
            raise

    def _most(self, flight: Flight) -> int:
        """E_c of the most that may come."""
        asked = flight.asked
        if asked.route == "embeddings":
            return meter.embeddings(min(asked.dimensions or DIMENSIONS, DIMENSIONS), count=asked.inputs)
        flight.text_most = flight.most * asked.n * BYTES_A_TOKEN + _SLACK
        return meter.bound(flight.most * asked.n, self._vocabulary(flight.ref), logprobs=_beside(flight))

    def settle(self, flight: Flight) -> None:
        """Charge what has been given out; once."""
        if flight.toll is None:
            return
        toll, flight.toll = flight.toll, None
        if flight.route == "embeddings":
            flight.bits = meter.embeddings(1, count=flight.numbers)
        else:
            flight.bits = self._bits(flight)
        # A server can make any answer cost more than was reserved: nobody else waits for the database then.
        if toll.settle(flight.bits, pay=_in_thread):
            flight.owes = True

    def metered(self, flight: Flight) -> None:
        """A stream begins. What its text is charged at least is charged before it goes out: see `cover`."""
        if flight.spelling is not None:  # of text that its tokens account for no bytes are charged
            flight.covered = flight.text_most
        else:
            bits = flight.reserved
            if _beside(flight):
                bits = meter.bound(flight.most * flight.asked.n, self._vocabulary(flight.ref))
            flight.covered = bits // meter.TEXT_BYTE

    async def cover(self, flight: Flight) -> None:
        """A stream has more text than was reserved for: none of it is given out by somebody who may be killed before
        that is charged, or on disk as owed. BackendError ``records.unwritable``."""
        toll = flight.toll
        assert toll is not None  # noqa: S101 - until it is settled
        part = flight.reserved // (_PART * meter.TEXT_BYTE)  # bytes of text, so that not each piece has to be charged
        more = max(flight.meter.given - flight.covered, part)
        if toll.extend(more * meter.TEXT_BYTE, pay=_in_thread):
            await self.noted(flight)
        flight.covered += more

    async def noted(self, flight: Flight) -> None:
        """Back when what it owes is on disk: the end of its answer goes out then, so that whoever kills this gateway
        has none of it for nothing. BackendError ``records.unwritable``."""
        flight.owes = False
        await asyncio.wrap_future(self._budgets.debts.written())

    def _bits(self, flight: Flight) -> int:
        given, beside, words = flight.meter, _beside(flight), self._vocabulary(flight.ref)
        tokens, counted = given.tokens()
        flight.tokens = tokens
        if flight.spelling is not None and given.sampled:
            tokens = min(max(given.channel, given.chunks, given.listed), given.most)
            bits, counted = meter.bound(tokens, words), True
            if not spelled(flight.spelling, given.sampled, given.text or {}):
                bits = max(bits, meter.ANY_BYTE * given.given)  # text that no tokens account for may be anything
                flight.misspelled = True
                _log.warning("an answer of %s is not what its tokens spell: it is charged as if it hid all", flight.ref)
        elif counted:
            bits = max(meter.bound(tokens, words), meter.TEXT_BYTE * given.given)
        else:  # a stream that was cut, or a word that can't be true
            bits = meter.ANY_BYTE * given.given
        if beside:  # log-probabilities of each token, or of those that came before the end; and their names are text
            listed = min(given.listed, given.most)
            spelled_out = min(given.named, listed * beside * TOKEN_BYTES)
            named = tokens if counted else listed
            bits += meter.bound(named, words, logprobs=beside) - meter.bound(named, words)
            bits += max(0, meter.TEXT_BYTE * spelled_out - meter.bound(listed * beside, words))
        return bits


def _tokens(flight: Flight) -> int:
    """The most that it may have, with those of its prompt."""
    asked = flight.asked
    answers = 0 if asked.route == "embeddings" else flight.most * asked.n
    return 1 + asked.characters // 4 + answers


def _spender(flight: Flight) -> Spender:
    caller = flight.caller
    return _spender_of(caller.principal, flight.destination, caller.teams, caller.key)


_spender_of = lru_cache(4096)(Spender)  # to make one costs more than to look it up


def _in_thread(work: Callable[[], None]) -> None:
    asyncio.get_running_loop().run_in_executor(None, work)


def _free(asked: asyncio.Future[Reservation]) -> None:
    """Give back what was reserved for somebody who had gone."""
    if not asked.cancelled() and asked.exception() is None:
        asked.result().settle(0)


def _beside(flight: Flight) -> int:
    """Log-probabilities that come with a token: the sampled one's, too."""
    asked = flight.asked
    return 0 if asked.logprobs is None else asked.logprobs + 1


def told(alarm: Alarm) -> None:
    """A budget that passes a part of its limit is in the log of this machine."""
    _log.warning(
        "budget of %s, %s: %d %% of %d bits used or reserved; beyond it %s is refused: strongroom budget %s",
        f"{alarm.scope} {alarm.who}".strip(), alarm.window, alarm.percent, alarm.limit,
        "all" if alarm.hard else "nothing", alarm.ref,
    )  # fmt: skip


class Small:
    """Says of a version that its budget means nothing: once under the same `rules`, however often settings are read,
    and not as an alarm at each part of a limit that one answer passes."""

    def __init__(self) -> None:
        self._said: set[tuple[object, str]] = set()

    def __call__(self, rules: Hashable, ref: str, size: int) -> None:
        if (rules, ref) in self._said:
            return
        self._said.add((rules, ref))
        _log.warning(
            "%s is too small for its budget to mean anything: all that is worth stealing of it is %d bits, and "
            "budgets that are shares of that are less than one answer. They sound no alarm; of limits that refuse, "
            "floors count",
            ref, size,
        )  # fmt: skip
