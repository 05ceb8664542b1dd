"""How many bits an answer gives away, in whole bits, rounded up (spec/gateway.md, section 5). Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from strongroom.errors import BackendError

_EMBEDDING_BITS = 8  # a dimension: one of 255 steps
_LOGPROB_BITS = 24  # the significand of a float32: what one log-probability can say, rounded or not
# What is charged for a byte of text, in bits: where nothing says how many tokens it was, and at least. UTF-8 has at
# most 7.18 bits a byte, so whoever says that text is few tokens gains 1.8 times what is charged; honest text has about
# 4.2 bytes a token, and is charged little more for it (docs/explanation/egress.md).
ANY_BYTE, TEXT_BYTE = 8, 4
_ROUNDING = 1e-4  # what float32 leaves above 0 of a probability of 1
_UNIT = 32  # log2 V is kept in units of 2^-32 bits, rounded up: a bound must not be below what it bounds


def bound(tokens: int, vocabulary: int, *, logprobs: int = 0) -> int:
    """E_c, what `tokens` tokens of a `vocabulary` can carry at most, with `logprobs` log-probabilities beside each.

    Too large by at most 2^-32 bits for each token and log-probability, and never too small.
    """
    said = tokens * (1 + logprobs)
    return -(-(said * _bits_a_token(vocabulary)) >> _UNIT) + tokens * logprobs * _LOGPROB_BITS


def embeddings(dimensions: int, *, count: int = 1) -> int:
    """E_c of `count` embeddings, as they are given out: a byte a dimension."""
    return count * dimensions * _EMBEDDING_BITS


def estimate(logprobs: Iterable[float]) -> int:
    """E_m, −Σ log2 q over the natural log-probabilities that the reference model has for each token.

    BackendError ``meter.malformed`` for what is no log-probability: not a number, or above 0 by more than rounding. One
    of a token that the reference model excludes (−∞) has no estimate, either.
    """
    total = 0.0
    for each in logprobs:
        # One that is positive would take away from what the others count.
        if not -math.inf < each <= _ROUNDING:
            raise BackendError("meter.malformed", "the reference model's log-probabilities are none", hint="ask again")
        total -= min(each, 0.0)
    return math.ceil(total / math.log(2))


@lru_cache(maxsize=256)
def _bits_a_token(vocabulary: int) -> int:
    """log2 of `vocabulary`, in units of 2^-32 bits, rounded up; one word is what every vocabulary has."""
    exact = max(vocabulary, 1).bit_length() - 1
    if vocabulary <= 1 or vocabulary == 1 << exact:
        return exact << _UNIT
    return math.floor(math.log2(vocabulary) * (1 << _UNIT)) + 1
