"""Whose code word a leak carries (spec/mark.md, section 6): scores, and bounds on accusing somebody innocent.

A decoder may be as wrong as it likes about the thieves and their attack: its bound is computed from the biases alone,
exactly (Chernoff, over independent bits), so being wrong only costs power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from strongroom.marking.estimate import Estimates

COLLUDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
MODELS = ("mean", "segments", "extremes", "median")
_CHUNK = 1 << 22  # bits at a time: as numbers they stay in the cache
_EXACT = 64
_BEST, _EVERY = 4096, 5  # candidates, of more than twice as many, whom all decoders score; each fifth scores everybody
_TRIED, _FITTING = 256, 4  # candidates and decoders whose bounds are made as tight as they get
_ROUNDING = 0.05  # nats, more than adding up in single precision may lose of a score
_SINGLE = 1e-5  # more than single precision may add to a square of a sum of signs, relative to it
_FLAT = 1e-3  # of a likelihood: no position alone rules anybody out
_LAMBDAS = np.geomspace(0.02, 40, 56)


@dataclass(frozen=True)
class Decoder:
    """What it takes the attack for: `colluders` of them, and how they made one of theirs out of all."""

    colluders: int
    model: str

    def weights(
        self, estimates: Estimates, p: NDArray[np.float64], known: NDArray[np.int64], named: int
    ) -> NDArray[np.float64]:
        """float64 (2, m): g_i(0) and g_i(1). `known` has how many of the `named` holders have a 1 at each position."""
        c = self.colluders
        likelihood = self._likelihoods(estimates)  # (m, c + 1), by how many have a 1
        more = c - named - 1  # of whom nothing is known
        levels, level = np.unique(p, return_inverse=True)  # a code has few
        chance = _binomial(more)[None, :] * levels[:, None] ** np.arange(more + 1)
        chance *= (1 - levels)[:, None] ** np.arange(more, -1, -1)
        chance = chance[level]
        both = np.empty((2, len(p)))
        for count in np.unique(known):
            those = slice(None) if not named else known == count
            for bit in (0, 1):
                given = likelihood[those, count + bit : count + bit + more + 1]
                both[bit, those] = np.einsum("ij,ij->i", chance[those], given)
        without = (1 - p) * both[0] + p * both[1]
        weights: NDArray[np.float64] = np.log(both / without)
        return weights

    def _likelihoods(self, estimates: Estimates) -> NDArray[np.float64]:
        k = np.arange(self.colluders + 1)
        share = k / self.colluders
        if self.model == "extremes":
            share = np.where(k == 0, 0.0, np.where(k == self.colluders, 1.0, 0.5))
        elif self.model == "median":
            share = np.where(2 * k == self.colluders, 0.5, np.round(share))
        elif self.model == "segments":
            ends = _likelihood(estimates, np.array([0.0, 1.0]))
            return ends[:, :1] * (1 - share) + ends[:, 1:] * share
        unlike, which = np.unique(share, return_inverse=True)
        found = _likelihood(estimates, unlike)
        return found if len(unlike) == len(share) else found[:, which]


def _likelihood(estimates: Estimates, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 (m, shares): how likely the estimates are if this share of the leak is variant B; the best is 1."""
    expected = 1 - 2 * share[None, :]
    log = estimates.n[:, None] * expected - estimates.information[:, None] * expected**2 / 2
    found: NDArray[np.float64] = np.exp(log - log.max(axis=1, keepdims=True)) + _FLAT
    return found


@lru_cache
def _binomial(n: int) -> NDArray[np.float64]:
    return np.array([math.comb(n, k) for k in range(n + 1)], np.float64)


@dataclass(frozen=True)
class Score:
    """One candidate's best: `sigma` is in standard deviations of an innocent's score, `log10_p` the bound on an
    innocent scoring so high with that decoder."""

    candidate: int
    sigma: float
    log10_p: float
    decoder: Decoder


class Decoding:
    """All decoders over all candidates. `words` is uint8 (candidates, m) of bits, `p` float64 (m,) their biases."""

    def __init__(
        self, estimates: Estimates, words: NDArray[np.uint8], p: NDArray[np.float64], *, workers: int = 1
    ) -> None:
        self._estimates, self._p, self._words, self._workers = estimates, p, words, workers
        self._alone: list[Score] | None = None

    @staticmethod
    def decoders(named: int) -> list[Decoder]:
        """Those that can hold when `named` are known."""
        alone = [Decoder(1, "mean")] if named == 0 else []
        return alone + [Decoder(c, model) for c, model in product(COLLUDERS, MODELS) if c > named]

    def scores(self, named: Sequence[int] = (), among: Sequence[int] | None = None) -> list[Score]:
        """Each candidate's best score, or that of each of those `among` whom it is looked for, given who has been
        named. A position that says nothing adds nothing to any score."""
        if not self._estimates.used or not len(self._words):
            return []
        if named or among is not None:
            return self._scores(named, among, self.decoders(len(named)))
        if self._alone is None:
            self._alone = self._screened(self.decoders(0))
        return self._alone

    def _screened(self, decoders: Sequence[Decoder]) -> list[Score]:
        """Of very many each one's score by a few decoders of all kinds; by all of them of those who do best then. That
        leaves people out, and touches no bound."""
        if len(self._words) <= 2 * _BEST:
            return self._scores((), None, decoders)
        found = self._scores((), None, decoders[::_EVERY])
        best = sorted(sorted(range(len(found)), key=lambda k: -found[k].sigma)[:_BEST])
        for score in self._scores((), best, decoders):
            found[score.candidate] = score
        return found

    def _scores(self, named: Sequence[int], among: Sequence[int] | None, decoders: Sequence[Decoder]) -> list[Score]:
        known = self._words[list(named)].sum(axis=0, dtype=np.int64)
        words = self._words if among is None else self._words[list(among)]
        with ThreadPoolExecutor(max(1, self._workers), "strongroom-decode") as pool:
            weights = list(pool.map(lambda each: each.weights(self._estimates, self._p, known, len(named)), decoders))
        steps = np.stack([g[1] - g[0] for g in weights], axis=1)
        base = np.array([g[0].sum() for g in weights])
        single = steps.astype(np.float32)
        step = max(1, _CHUNK // words.shape[1])
        totals = np.empty((len(words), len(decoders)))
        buffer = np.empty((min(step, len(words)), words.shape[1]), np.float32)
        for at in range(0, len(words), step):
            some = words[at : at + step]
            np.copyto(buffer[: len(some)], some)
            totals[at : at + step] = buffer[: len(some)] @ single
        totals += base
        # Single precision is enough to see who is far from being named. Whoever may be is added up again in double.
        highest = np.unique(np.argpartition(-totals, min(_EXACT, len(totals)) - 1, axis=0)[:_EXACT])
        for at in range(0, len(highest), step):
            rows = highest[at : at + step]
            totals[rows] = words[rows].astype(np.float64) @ steps + base
        means = np.array([((1 - self._p) * g[0] + self._p * g[1]).sum() for g in weights])
        deviations = np.sqrt((self._p * (1 - self._p)) @ steps**2)
        sigmas = (totals - means) / np.maximum(deviations, 1e-30)
        bounds = self._bounds(weights, totals, sigmas)
        best = np.where(bounds.min(axis=1) < 0, bounds.argmin(axis=1), sigmas.argmax(axis=1))
        return [
            Score(candidate, float(sigmas[row, k]), float(bounds[row, k]), decoders[k])
            for row, (candidate, k) in enumerate(zip(among or range(len(words)), best, strict=True))
        ]

    def _bounds(
        self, weights: Sequence[NDArray[np.float64]], totals: NDArray[np.float64], sigmas: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """float64 (candidates, decoders): log10 of the bounds.

        A score is a sum of log-likelihood ratios, so E exp(S) = 1 for an innocent, and exp(−S) is a bound already (the
        one of λ = 1). Where it matters, for the highest candidates and the decoders that fit best, the others are
        tried, too."""
        bounds = np.minimum((_ROUNDING - totals) / math.log(10), 0.0)
        highest = np.argsort(-sigmas.max(axis=1))[:_TRIED]
        fitting = {*np.argsort(-sigmas.max(axis=0))[:_FITTING], *np.argsort(-totals.max(axis=0))[:_FITTING]}
        for k in fitting:
            bounds[highest, k] = np.minimum(bounds[highest, k], tail(weights[k], self._p, totals[highest, k]))
        return bounds


def tail(g: NDArray[np.float64], p: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 of the shape of `scores`: log10 of a bound on an innocent's score Σ g_i(bit i) being that high.

    Chernoff: of Σ log E exp(λ g_i) − λ s the least over a fixed set of λ. Each λ gives a bound that holds, so their
    least holds, too; a finer set only makes it tighter.
    """
    steps = g[1] - g[0]
    base = float(g[0].sum())
    telling = steps != 0  # a position that says nothing adds its g(0), whatever the bit is
    steps, p = steps[telling], p[telling]
    with np.errstate(under="ignore"):
        # No ratio of likelihoods is beyond 1 / _FLAT, so that no exponential here overflows.
        cumulants = np.array([at * base + np.log(1 - p + p * np.exp(at * steps)).sum() for at in _LAMBDAS])
    exponents = (cumulants[:, None] - _LAMBDAS[:, None] * scores[None, :]).min(axis=0)
    bounds: NDArray[np.float64] = np.minimum(exponents, 0.0) / math.log(10)
    return bounds


def marked_bound(estimates: Estimates) -> float:
    """log10 of a bound on weights that never came out of the room agreeing so well with the version's signs
    (section 8)."""
    m = float(estimates.sums.sum())
    total = float(estimates.square.sum()) * (1 - _SINGLE)
    if total <= m:
        return 0.0
    # The least over λ of −(m / 2) log(1 − 2λ) − λ t is at 2λ = 1 − m / t.
    return float(m / 2 * math.log(total / m) - (total - m) / 2) / math.log(10)
