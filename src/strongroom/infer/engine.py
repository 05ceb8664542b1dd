"""One thread that runs the model: all answers that are under way take their next token in the same forward pass.

Whoever comes in joins at the next step, whoever is done or gone leaves at once (continuous batching). All choices of
one prompt share the pass through the prompt as far as their first token.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from strongroom.errors import BackendError, LimitExceeded, StrongroomError, UsageError
from strongroom.infer.sampling import Sampling, choose, log_softmax, steered

if TYPE_CHECKING:
    from strongroom.infer.rows import Rows

_TOGETHER = 4096  # tokens of prompts, padding included, that go through the model in one pass
_FIRSTS = 256  # first tokens of further choices that are drawn between two steps
_MANY_LOGITS = 1 << 24  # of several prompts, as many as are had in one pass
_MOST_LOGITS = 1 << 28  # of one prompt whose every log-probability is wanted: 1 GiB


@dataclass(frozen=True, slots=True)
class Ask:
    """What an answer is made of. `choices` answers to one prompt, the c-th with the seed of `sampling` plus c.

    `top`: log-probabilities beside each token's own (None: none at all), `processed` after steering and not before;
    `prompt_top` the same of the prompt's tokens. `record`: the model's own log-probability of each token.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    most: int
    stops: frozenset[int] = frozenset()
    least: int = 0
    choices: int = 1
    top: int | None = None
    processed: bool = False
    prompt_top: int | None = None
    record: bool = False


@dataclass(frozen=True, slots=True)
class Top:
    """The most probable tokens of one place, and their natural log-probabilities: (k,) each."""

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer `choice`. `own` is the model's own log-probability, at temperature 1; `logprob` what is
    told to who asked. `finish` is stop or length with the last token, which a stop is not part of the text. A token of
    -1 is none: the answer ends without one."""

    choice: int
    token: int
    own: float | None = None
    logprob: float | None = None
    top: Top | None = None
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of each token of the prompt but the first, its log-probability and the most probable ones of its place."""

    logprobs: tuple[float, ...]
    tops: tuple[Top, ...]


Event = Token | PromptLogprobs | StrongroomError
Tell = Callable[[list[Event]], None]
Work = Callable[[StrongroomError | None], None]


@dataclass(slots=True)
class Job:
    """An `Ask` under way. `tell` is called on the engine's thread with what is new."""

    ask: Ask
    tell: Tell
    gone: bool = False
    logits: NDArray[np.float32] | None = None  # behind the prompt, once it went through the model
    left: int = 0
    news: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class _Sequence:
    job: Job
    choice: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)


class Engine:
    """Runs jobs on `rows` (None: a model that writes no text); at most `waiting` sequences wait. Start it, submit, stop
    it."""

    def __init__(self, rows: Rows | None, *, waiting: int = 65_536) -> None:
        self._given, self._most_waiting = rows, waiting
        self._changed = threading.Condition()
        self._inbox: list[Job | Work] = []
        self._waiting: deque[_Sequence] = deque()
        self._waits = 0
        self._active: list[_Sequence] = []
        self._entering: list[_Sequence] = []
        self._stopped: StrongroomError | None = None
        self.passes = self.tokens = 0
        self.busy = 0.0  # seconds in which a step was under way
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._stopped is None

    @property
    def _rows(self) -> Rows:
        if self._given is None:
            raise UsageError("infer.no_text", "this model makes embeddings, and no text", hint="/v1/embeddings")
        return self._given

    def stop(self, why: StrongroomError) -> None:
        """End what is under way, with `why`, and take nothing more."""
        with self._changed:
            self._stopped = self._stopped or why
            self._changed.notify()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(60)

    def submit(self, ask: Ask, tell: Tell) -> Job:
        """Begin. UsageError ``infer.too_long``, ``infer.token``; LimitExceeded ``infer.busy``; why it was stopped."""
        self._check(ask)
        job = Job(ask, tell, left=ask.choices)
        with self._changed:
            if self._stopped is not None:
                raise self._stopped
            if self._waits + ask.choices > self._most_waiting:
                raise LimitExceeded(
                    "infer.busy",
                    f"{self._waits} answers wait already, of at most {self._most_waiting}",
                    hint="try later",
                )
            self._waits += ask.choices
            self._inbox.append(job)
            self._changed.notify()
        return job

    def call(self, work: Work) -> None:
        """Have `work` done on the engine's thread, between two steps: torch's threads are its own. It is given why if
        that is no longer possible."""
        with self._changed:
            if self._stopped is not None:
                raise self._stopped
            self._inbox.append(work)
            self._changed.notify()

    def abandon(self, job: Job) -> None:
        """Nobody reads it any more: its rows are free at the next step."""
        job.gone = True
        with self._changed:
            self._changed.notify()

    def _check(self, ask: Ask) -> None:
        length, words = len(ask.prompt), self._rows.vocabulary
        if not length or length + ask.most > self._rows.longest:
            raise UsageError(
                "infer.too_long",
                f"a prompt of {length} tokens and an answer of {ask.most}; there are {self._rows.longest} positions",
                hint="a shorter prompt, or less max_tokens",
            )
        how = ask.sampling
        for each in (ask.prompt, how.bias, how.allowed or (), how.banned, ask.stops):
            if each and not 0 <= min(each) <= max(each) < words:
                raise UsageError("infer.token", f"tokens are numbers from 0 to {words - 1}")
        if how.allowed is not None and not set(how.allowed) - set(how.banned):
            raise UsageError("infer.token", "no token is allowed that is not banned")
        if ask.prompt_top is not None and length * words > _MOST_LOGITS:
            raise UsageError("infer.too_long", f"log-probabilities of {length} tokens of a prompt are too many")

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._next():
                begun = time.monotonic()
                told = self._admit()
                told |= self._step()
                self.busy += time.monotonic() - begun
                _deliver(told)
        except StrongroomError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001  # the model is transformers' own: whatever it raises ends this
            self._end(BackendError("infer.failed", f"the model could not be run: {type(error).__name__}: {error}"))
        else:
            assert self._stopped is not None  # noqa: S101 - `_next` has said so
            self._end(self._stopped)

    def _next(self) -> bool:
        """Wait for work; False once stopped."""
        with self._changed:
            while not (self._stopped or self._inbox or self._waiting or self._active):
                self._changed.wait()
            taken, self._inbox = self._inbox, []
            stopped = self._stopped is not None
        for each in taken:
            if isinstance(each, Job):
                how = each.ask.sampling
                self._waiting += [
                    _Sequence(each, choice, replace(how, seed=how.seed + choice) if choice else how)
                    for choice in range(each.ask.choices)
                ]
            else:
                each(self._stopped)
        return not stopped

    def _end(self, why: StrongroomError) -> None:
        with self._changed:
            self._stopped = self._stopped or why
            jobs = {id(each.job): each.job for each in (*self._active, *self._entering, *self._waiting)}
            left, self._active, self._inbox = self._inbox, [], []
            self._waiting.clear()
        for each in left:
            if isinstance(each, Job):
                jobs[id(each)] = each
            else:
                each(why)
        for job in jobs.values():
            job.tell([why])

    def _admit(self) -> dict[int, Job]:
        """Take in who waits while there are rows; who has their prompt's logits already draws from those."""
        told: dict[int, Job] = {}
        for _ in range(_FIRSTS):
            if not self._waiting:
                break
            first = self._waiting[0]
            if first.job.gone:
                self._take()
            elif first.job.logits is not None and not first.tokens:
                if self._add(first, first.job.logits, told):
                    self._take()  # else it needs a row, with its first token
            elif len(self._rows.lengths) < self._rows.most:
                self._begin(told)
            else:
                break
        return told

    def _begin(self, told: dict[int, Job]) -> None:
        batch: list[_Sequence] = []
        longest, begun, every = 0, set[int](), False
        while self._waiting and len(self._rows.lengths) + len(batch) < self._rows.most:
            each = self._waiting[0]
            job = each.job
            longest = max(longest, len(job.ask.prompt) + len(each.tokens))
            wants_all = _wants_all(each)
            size = longest * (len(batch) + 1)
            # A second choice waits for the logits that the first one gets.
            if batch and (wants_all != every or id(job) in begun or size > _TOGETHER):
                break
            every = wants_all
            if every and batch and size * self._rows.vocabulary > _MANY_LOGITS:
                break
            if job.logits is None and not each.tokens:
                begun.add(id(job))
            batch.append(self._take())
        self._entering = batch  # whoever asked hears of it if this fails
        first = len(self._rows.lengths)
        prompts: list[tuple[int, ...]] = [(*each.job.ask.prompt, *each.tokens) for each in batch]
        logits = self._rows.begin(prompts, every=every)
        self.passes += 1
        if every:
            for each, found, prompt in zip(batch, logits, prompts, strict=True):
                _tell_prompt(each.job, found[: len(prompt)])
            logits = np.stack([found[len(prompt) - 1] for found, prompt in zip(logits, prompts, strict=True)])
        self._active += batch
        self._entering = []
        for number in reversed(range(len(batch))):
            each = batch[number]
            if each.job.ask.choices > 1 and each.job.logits is None:
                each.job.logits = logits[number].copy()
            if self._add(each, logits[number], told):
                self._leave(first + number)

    def _step(self) -> dict[int, Job]:
        """One token more for every active sequence."""
        told: dict[int, Job] = {}
        for row in reversed(range(len(self._active))):
            if self._active[row].job.gone:
                self._leave(row)
        if self._active:
            logits = self._rows.step([each.tokens[-1] for each in self._active])
            self.passes += 1
            for row in reversed(range(len(self._active))):
                if self._add(self._active[row], logits[row], told):
                    self._leave(row)
        return told

    def _leave(self, row: int) -> None:
        last = self._rows.leave(row)
        self._active[row] = self._active[last]
        self._active.pop()

    def _take(self) -> _Sequence:
        with self._changed:
            self._waits -= 1
        return self._waiting.popleft()

    def _add(self, sequence: _Sequence, logits: NDArray[np.float32], told: dict[int, Job]) -> bool:
        """Draw the next token from `logits`; whether it was the last."""
        job, ask, how = sequence.job, sequence.job.ask, sequence.sampling
        if not ask.most:
            found = Token(sequence.choice, -1, finish="length")
        else:
            found = self._drawn(sequence, logits, how)
            sequence.tokens.append(found.token)
            sequence.counts[found.token] += 1
            self.tokens += 1
        job.news.append(found)
        told[id(job)] = job
        return found.finish is not None

    def _drawn(self, sequence: _Sequence, logits: NDArray[np.float32], how: Sampling) -> Token:
        ask, position = sequence.job.ask, len(sequence.tokens)
        open_to = logits
        if position < ask.least and ask.stops:  # min_tokens: what would end the answer can't come
            open_to = logits.copy()
            open_to[list(ask.stops)] = -np.inf
        token = choose(open_to, how, position, sequence.counts)
        own = shown = top = None
        if ask.record or ask.top is not None:
            raw = log_softmax(logits)
            own = float(raw[token])
            if ask.top is not None:
                told = log_softmax(steered(open_to, how, sequence.counts)) if ask.processed else raw
                shown, top = float(told[token]), _top(told, ask.top)
        finish = "stop" if token in ask.stops else "length" if position + 1 >= ask.most else None
        return Token(sequence.choice, token, own, shown, top, finish)


def _deliver(told: dict[int, Job]) -> None:
    for job in told.values():
        news, job.news = job.news, []
        if news and not job.gone:
            job.tell(news)


def _wants_all(sequence: _Sequence) -> bool:
    """Whether it wants the log-probabilities of its prompt, which did not go through the model yet."""
    return sequence.job.ask.prompt_top is not None and sequence.job.logits is None and not sequence.tokens


def _tell_prompt(job: Job, logits: NDArray[np.float32]) -> None:
    prompt, wanted = job.ask.prompt, job.ask.prompt_top or 0
    found = list(_rows_of(logits[:-1]))
    own = tuple(float(row[token]) for row, token in zip(found, prompt[1:], strict=True))
    job.news.append(PromptLogprobs(own, tuple(_top(row, wanted) for row in found)))


def _rows_of(logits: NDArray[np.float32]) -> Iterator[NDArray[np.float64]]:
    for row in logits:
        yield log_softmax(row)


def _top(logprobs: NDArray[np.float64], wanted: int) -> Top:
    wanted = min(wanted, len(logprobs))
    if not wanted:
        tokens: NDArray[Any] = np.zeros(0, np.int64)
    elif wanted == len(logprobs):
        tokens = np.arange(wanted)  # all of them: nobody needs them in order
    else:
        tokens = np.argpartition(-logprobs, wanted - 1)[:wanted]
        tokens = tokens[np.argsort(-logprobs[tokens], kind="stable")]
    return Top(tokens.astype(np.int64), logprobs[tokens])
