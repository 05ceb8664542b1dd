"""What answers that were run again say together (spec/gateway.md, section 7): how many bits a token a hostile server
could still hide, and whether something is wrong. Pure functions, without the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import exp, lgamma, log, log1p, log2

from strongroom.errors import UsageError

# The share of suspicious tokens that honest runs stay below, by the arithmetic that server and verifier have in common;
# measured on SmolLM2-135M: see docs/explanation/extraction.md.
HONEST = {"float32": 1e-3, "bfloat16": 0.03}
_CONFIDENCE = 0.99
_STEPS, _EXACT, _TINY = 100_000, 1e-13, 1e-300  # of a continued fraction: it takes about as many as the root of a count


@dataclass(frozen=True)
class Tally:
    """Tokens of many runs, counted by their class; `open_bits` is what τ leaves open in all of them. `others`: answers
    that are none of this model's, whatever its weights and seeds."""

    good: int = 0
    suspicious: int = 0
    dangerous: int = 0
    others: int = 0
    open_bits: float = 0.0

    @property
    def tokens(self) -> int:
        return self.good + self.suspicious + self.dangerous

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Tally)))


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


def verdict(tally: Tally, vocabulary: int, honest: float) -> Verdict:
    """What `tally` says of a model that knows so many tokens. UsageError ``verify.run`` for nothing."""
    total = tally.tokens
    if not total and not tally.others:
        raise UsageError("verify.run", "there is nothing to judge: no run was checked")
    open_bits = tally.open_bits / max(total, 1)
    bound = upper_bound(tally.dangerous, total)
    alarms = []
    if tally.others:
        alarms.append(f"{tally.others} answers are not what their tokens spell, or none that this model can give")
    if tally.dangerous:
        alarms.append(f"{tally.dangerous} of {total} tokens are not what these weights and this seed give")
    elif tally.suspicious and _tail(tally.suspicious, total, honest) < 1 - _CONFIDENCE:
        alarms.append(f"{tally.suspicious} of {total} tokens are second best, more than arithmetic explains")
    return Verdict(
        tokens=total,
        good=tally.good,
        suspicious=tally.suspicious,
        dangerous=tally.dangerous,
        open_bits=open_bits,
        bound=bound,
        bits=open_bits + bound * log2(max(vocabulary, 1)),
        alarm="; ".join(alarms),
    )


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
    """The probability of `least` or more of `total`, at `share` each: the incomplete beta function, by its continued
    fraction (DLMF 8.17.22). As a sum it has as many terms as were found, which a hostile server decides, and they are
    kept for as long as a term lasts: after a month each answer that is run again would take seconds."""
    if not 0 < share < 1 or not 0 < least <= total:
        return float(least <= 0 or (share >= 1 and least <= total))
    a, b = float(least), float(total - least + 1)
    if share < (a + 1) / (a + b + 2):
        return _beta(share, a, b)
    return 1 - _beta(1 - share, b, a)


def _beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), where the fraction converges: x below (a + 1) / (a + b + 2). By the method of Lentz."""
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    fraction, c, d = 1.0, 1.0, 0.0
    for step in range(_STEPS):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) if m else 1.0
        d = 1 / ((1 + term * d) or _TINY)
        c = (1 + term / c) or _TINY
        fraction *= c * d
        if step and abs(1 - c * d) < _EXACT:
            break
    return min(1.0, max(0.0, front * (fraction - 1)))
