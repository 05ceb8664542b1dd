"""Which token comes next: a pure function of logits, seed and position (spec/gateway.md, section 7).

Nothing here is random: Gumbel-max takes the largest of logit/temperature plus noise that seed and position give, so
that whoever has the weights and the seed finds the same token again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_ALL = (1 << 64) - 1
_BEST = 256  # words that are sorted at first


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen. `bias` is added to logits of tokens, `allowed` (None: all) are the only
    tokens that may come, `banned` never come. Penalties go by how often a token was in the answer so far."""

    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None
    banned: tuple[int, ...] = ()

    @property
    def steers(self) -> bool:
        """Whether logits are changed before anything is chosen."""
        return bool(
            self.bias or self.allowed is not None or self.banned or self.presence_penalty or self.frequency_penalty
        )


def uniforms(seed: int, position: int, words: int) -> Floats:
    """(words,) in (0, 1): word t % 4 of Philox4x64-10's block t // 4 under the key (seed, position)."""
    # NumPy counts up before it makes a block: from the last counter it makes that of counter 0 first.
    counter = np.full(4, _ALL, np.uint64)
    key = np.array([seed & _ALL, position & _ALL], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(words)
    # 52 bits and a half are exact in 53; with one bit more the largest would round to 1, and its noise be infinite.
    found: Floats = ((np.asarray(raw, np.uint64) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return found


def gumbel(seed: int, position: int, words: int) -> Floats:
    """(words,): the noise of every token at one position."""
    noise: Floats = -np.log(-np.log(uniforms(seed, position, words)))
    return noise


def steered(logits: NDArray[np.floating], how: Sampling, counts: Mapping[int, int]) -> Floats:
    """(V,): the logits after bias, penalties and bans. `counts`: how often each token was in the answer so far."""
    found = logits.astype(np.float64)
    for token, bias in how.bias.items():
        found[token] += bias
    if how.presence_penalty or how.frequency_penalty:
        for token, count in counts.items():
            found[token] -= how.presence_penalty + how.frequency_penalty * count
    if how.allowed is not None:
        kept = np.full(found.shape, -np.inf)
        allowed = list(how.allowed)
        kept[allowed] = found[allowed]
        found = kept
    if how.banned:
        found[list(how.banned)] = -np.inf
    return found


def nucleus(logits: Floats, temperature: float, top_p: float) -> NDArray[np.bool_]:
    """(V,): the tokens before which less than `top_p` of the probability lies, most probable first."""
    if top_p >= 1.0:
        return np.ones(logits.shape, bool)
    probability = np.exp((logits - logits.max()) / temperature)
    least = top_p * probability.sum()
    # To sort all words takes longer than the rest of a token together: sort the best, more of them until they suffice.
    count = min(_BEST, len(logits))
    while True:
        edge = np.partition(logits, -count)[-count]
        best = np.flatnonzero(logits >= edge)  # with all that equal the last
        order = best[np.argsort(-logits[best], kind="stable")]
        before = np.cumsum(probability[order]) - probability[order]
        if before[-1] >= least or len(best) == len(logits):
            break
        count = min(16 * count, len(logits))
    kept = np.zeros(logits.shape, bool)
    kept[order[before < least]] = True
    kept[order[0]] = True
    return kept


def scores(logits: Floats, how: Sampling, position: int) -> Floats:
    """(V,): what the chosen token is the largest of, before `top_p`; the logits themselves at temperature 0."""
    if how.temperature == 0.0:
        return logits
    found: Floats = logits / how.temperature + gumbel(how.seed, position, len(logits))
    return found


def choose(logits: NDArray[np.floating], how: Sampling, position: int, counts: Mapping[int, int]) -> int:
    """The token at `position` of the answer, of logits (V,); the lowest of equals."""
    changed = steered(logits, how, counts) if how.steers else logits.astype(np.float64)
    found = scores(changed, how, position)
    if how.top_p < 1.0 and how.temperature > 0.0:
        found = np.where(nucleus(changed, how.temperature, how.top_p), found, -np.inf)
    return int(np.argmax(found))


def log_softmax(logits: NDArray[np.floating]) -> Floats:
    """(..., V): natural log-probabilities at temperature 1, in double precision."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values
