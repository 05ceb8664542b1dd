"""Verified inference (spec/gateway.md, section 7; arXiv 2511.02620, 2511.20621): whether an answer is the one that
these weights, this seed and this prompt give, and how much a hostile server could still have hidden in it.

A server that chooses its tokens freely can send the weights out in them, a few bits a token. With the seed chosen
elsewhere and the noise known, one token is right; all freedom that is left is in what arithmetic leaves open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, lgamma, log, log1p, log2
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strongroom.errors import UsageError
from strongroom.infer.sampling import Floats, Sampling, nucleus, scores, steered

GOOD, SUSPICIOUS, DANGEROUS = "good", "suspicious", "dangerous"
# Measured on SmolLM2-135M: see docs/explanation/extraction.md. In logits, that is scores times temperature.
TAU = {"float32": 1e-3, "bfloat16": 0.5}
# The share of suspicious tokens that honest runs stay below, from the same measurement.
HONEST = {"float32": 1e-3, "bfloat16": 0.03}
_CONFIDENCE = 0.99


@dataclass(frozen=True)
class Run:
    """What was answered: tokens of the prompt and the answer, and how the answer was sampled, with its seed."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Checked:
    """Of each token of a run: its class, how far it is behind the largest (logits), and how many tokens stand within τ
    of the largest, which a server could have chosen among unseen."""

    classes: tuple[str, ...]
    behind: Floats
    choices: NDArray[np.int64]


@dataclass(frozen=True)
class Verdict:
    """All runs of a sample. `open_bits` is what τ leaves open, a token; `bound` the share of dangerous tokens that the
    sample does not exclude; `bits` what could still be smuggled out, a token. `alarm`: what is wrong, or nothing."""

    tokens: int
    good: int
    suspicious: int
    dangerous: int
    open_bits: float
    bound: float
    bits: float
    alarm: str


class Tally:
    """Tokens of many runs, counted by their class; `open_bits` is what τ leaves open in all of them. `others`: answers
    that are none of this model's, whatever its weights and seeds."""

    def __init__(self) -> None:
        self.others = 0
        self.counts: Counter[str] = Counter()
        self.open_bits = 0.0

    def add(self, checked: Checked) -> None:
        self.counts.update(checked.classes)
        self.open_bits += float(np.log2(checked.choices).sum())


class Verifier:
    """Checks runs with the room's own weights: a causal model of transformers. `tau` in logits."""

    def __init__(self, model: Any, *, tau: float = TAU["float32"], honest: float = HONEST["float32"]) -> None:
        self._model, self._tau, self._honest = model, tau, honest
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def check(self, run: Run) -> Checked:
        """One pass through prompt and answer. UsageError ``verify.run`` for what is no run."""
        tokens = [*run.prompt, *run.output]
        if not run.prompt or not run.output or not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise UsageError(
                "verify.run", f"a run has a prompt and an output of tokens from 0 to {self.vocabulary - 1}"
            )
        with torch.inference_mode():
            ids = torch.tensor([tokens[:-1]], device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(run.output)).logits[0]
        found = [self._token(*each) for each in _places(logits.float().cpu().numpy(), run)]
        behind = np.array([each[1] for each in found])
        return Checked(tuple(each[0] for each in found), behind, np.array([each[2] for each in found], np.int64))

    def _token(self, logits: Floats, token: int, position: int, how: Sampling) -> tuple[str, float, int]:
        found, unit = scores(logits, how, position), how.temperature or 1.0
        inside = outer = np.ones(len(logits), bool)
        if how.top_p < 1.0 and how.temperature > 0.0:
            # A difference of τ in logits moves the edge of the nucleus by at most this much of the probability.
            edge = self._tau / unit / 2
            inside = nucleus(logits, how.temperature, max(how.top_p - edge, 1e-12))
            outer = nucleus(logits, how.temperature, min(how.top_p + edge, 1.0))
        best = float(found[inside].max())
        near = outer & ((best - found) * unit <= self._tau)
        behind = max(0.0, (best - float(found[token])) * unit) if outer[token] else float("inf")
        own = nucleus(logits, how.temperature, how.top_p) if how.top_p < 1.0 and how.temperature > 0.0 else outer
        if token == int(np.argmax(np.where(own, found, -np.inf))):
            return GOOD, 0.0, int(near.sum())
        return (SUSPICIOUS if near[token] else DANGEROUS), behind, int(near.sum())

    def judge(self, checked: Iterable[Checked]) -> Verdict:
        """What all of them say together."""
        tally = Tally()
        for each in checked:
            tally.add(each)
        return self.verdict(tally)

    def verdict(self, tally: Tally) -> Verdict:
        """What everything that was added to `tally` says. UsageError ``verify.run`` for nothing."""
        counts, total = tally.counts, sum(tally.counts.values())
        if not total and not tally.others:
            raise UsageError("verify.run", "there is nothing to judge: no run was checked")
        open_bits = tally.open_bits / max(total, 1)
        bound = upper_bound(counts[DANGEROUS], total)
        alarms = []
        if tally.others:
            alarms.append(f"{tally.others} answers are not what their tokens spell, or none that this model can give")
        if counts[DANGEROUS]:
            alarms.append(f"{counts[DANGEROUS]} of {total} tokens are not what these weights and this seed give")
        elif counts[SUSPICIOUS] and _tail(counts[SUSPICIOUS], total, self._honest) < 1 - _CONFIDENCE:
            alarms.append(f"{counts[SUSPICIOUS]} of {total} tokens are second best, more than arithmetic explains")
        return Verdict(
            tokens=total,
            good=counts[GOOD],
            suspicious=counts[SUSPICIOUS],
            dangerous=counts[DANGEROUS],
            open_bits=open_bits,
            bound=bound,
            bits=open_bits + bound * log2(self.vocabulary),
            alarm="; ".join(alarms),
        )


def _places(logits: NDArray[np.float32], run: Run) -> Iterable[tuple[Floats, int, int, Sampling]]:
    counts: Counter[int] = Counter()
    for position, token in enumerate(run.output):
        yield steered(logits[position], run.sampling, counts), token, position, run.sampling
        counts[token] += 1


def upper_bound(found: int, total: int, confidence: float = _CONFIDENCE) -> float:
    """Clopper-Pearson: the largest share under which `found` or fewer of `total` are not yet less likely than
    1 - `confidence`."""
    if found >= total:
        return 1.0
    low, high = found / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 - _tail(found + 1, total, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _tail(least: int, total: int, share: float) -> float:
    """The probability of `least` or more of `total`, at `share` each."""
    if not 0 < share < 1:
        return float(share >= 1 or least <= 0)
    below = (
        exp(
            lgamma(total + 1)
            - lgamma(count + 1)
            - lgamma(total - count + 1)
            + count * log(share)
            + (total - count) * log1p(-share)
        )
        for count in range(least)
    )
    return max(0.0, 1.0 - sum(below))


def check_all(verifier: Verifier, runs: Sequence[Run]) -> Verdict:
    """`judge` of every run."""
    return verifier.judge(verifier.check(run) for run in runs)
