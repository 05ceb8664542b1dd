"""Verified inference (spec/gateway.md, section 7; arXiv 2511.02620, 2511.20621): whether an answer is the one that
these weights, this seed and this prompt give, and how much a hostile server could still have hidden in it.

A server that chooses its tokens freely can send the weights out in them, a few bits a token. With the seed chosen
elsewhere and the noise known, one token is right; all freedom that is left is in what arithmetic leaves open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strongroom.errors import UsageError
from strongroom.infer.sampling import Floats, Sampling, nucleus, scores, steered
from strongroom.watch.verdict import HONEST, Tally, Verdict, verdict

GOOD, SUSPICIOUS, DANGEROUS = "good", "suspicious", "dangerous"
# Measured on SmolLM2-135M: see docs/explanation/extraction.md. In logits, that is scores times temperature.
TAU = {"float32": 1e-3, "bfloat16": 0.5}


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


class Verifier:
    """Checks runs with the room's own weights: a causal model of transformers. `arithmetic`: float32 where server and
    verifier both compute in it, else bfloat16; `tau` in logits, that of the arithmetic unless it is given."""

    def __init__(self, model: Any, arithmetic: str = "float32", *, tau: float | None = None) -> None:
        self._model, self.arithmetic = model, arithmetic
        self._tau = TAU[arithmetic] if tau is None else tau
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

    def tallied(self, checked: Checked) -> Tally:
        """One run, counted."""
        counts = Counter(checked.classes)
        open_bits = float(np.log2(checked.choices).sum())
        return Tally(counts[GOOD], counts[SUSPICIOUS], counts[DANGEROUS], open_bits=open_bits)

    def judge(self, checked: Iterable[Checked]) -> Verdict:
        """What all of them say together."""
        return self.verdict(sum(map(self.tallied, checked), Tally()))

    def verdict(self, tally: Tally) -> Verdict:
        """What everything in `tally` says. UsageError ``verify.run`` for nothing."""
        return verdict(tally, self.vocabulary, HONEST[self.arithmetic])


def _places(logits: NDArray[np.float32], run: Run) -> Iterable[tuple[Floats, int, int, Sampling]]:
    counts: Counter[int] = Counter()
    for position, token in enumerate(run.output):
        yield steered(logits[position], run.sampling, counts), token, position, run.sampling
        counts[token] += 1
