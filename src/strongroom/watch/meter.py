"""How many bits an answer gives away, in whole bits, rounded up (spec/gateway.md, section 5). Pure functions."""

from __future__ import annotations

import math
from functools import lru_cache

_EMBEDDING_BITS = 8  # a dimension: one of 255 steps
_LOGPROB_BITS = 24  # the significand of a float32: what one log-probability can say, rounded or not
# What is charged for a byte of text, in bits: where nothing says how many tokens it was, and at least. UTF-8 has at
# most 7.18 bits a byte, so whoever says that text is few tokens gains 1.8 times what is charged; honest text has about
# 4.2 bytes a token, and is charged little more for it (docs/explanation/egress.md).
ANY_BYTE, TEXT_BYTE = 8, 4
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


@lru_cache(maxsize=256)
def _bits_a_token(vocabulary: int) -> int:
    """log2 of `vocabulary`, in units of 2^-32 bits, rounded up; one word is what every vocabulary has."""
    exact = max(vocabulary, 1).bit_length() - 1
    if vocabulary <= 1 or vocabulary == 1 << exact:
        return exact << _UNIT
    return math.floor(math.log2(vocabulary) * (1 << _UNIT)) + 1
