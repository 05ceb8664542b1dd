"""Theft of a model's last layer through its API (arXiv 2403.06634, 2403.09539).

Logits are W·x with W of only h columns: differences of log-probabilities for n prompts, put side by side, span the
columns of W, however wide the vocabulary. Each attack below gets such differences another way. `judge` says how much of
the layer they give away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.redteam.target import Choices, Prompt, Target

Floats = NDArray[np.float64]
FLOOR = 1e-7  # of the largest singular value: below it arithmetic is seen, and not the model
_GAP = 2.0  # natural logarithm of the ratio of two singular values that follow each other
_LIFT = 100.0  # a bias that brings any token to the top
_TEXT = """the river key paper gold stone every window night money letter seven door cloud open bread garden sharp
winter market north bank fire yellow train quiet music glass old captain sugar never"""
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Known:
    """A token of the vocabulary, which is public even where the weights are not."""

    number: int
    text: str


@dataclass(frozen=True)
class Setup:
    """`tokens`: the reference and the |S| ≥ 2h others, whose differences from it are wanted. `words` is the size of the
    vocabulary, `hidden` the true h, `layer` the true last layer, (words, h), which only `judge` looks at."""

    tokens: Sequence[Known]
    words: int
    hidden: int
    layer: Floats

    @property
    def columns(self) -> int:
        """How many prompts are asked: 1.05·h."""
        return int(np.ceil(1.05 * self.hidden))


@dataclass(frozen=True)
class Outcome:
    """`found` is ĥ, `gap` its log-gap, `overlap` o. `requests`, `refused` and `tokens` are what it cost."""

    attack: str
    verdict: str
    found: int | None
    gap: float
    overlap: float | None
    requests: int
    refused: int
    tokens: int
    seconds: float


def prompts(count: int) -> list[str]:
    """Distinct short texts."""
    found = [" ".join(words) for words in product(_WORDS, _WORDS, _WORDS[:3])]
    chosen = np.random.default_rng(7).permutation(len(found))[:count]
    return [found[number] for number in chosen]


def spectrum(matrix: Floats) -> tuple[int, float]:
    """ĥ and its gap: where the singular values, floored, fall most; what is behind the last one is the floor."""
    values = np.linalg.svd(matrix, compute_uv=False)
    floor = max(FLOOR * values[0], np.finfo(float).tiny)
    logs = np.log(np.append(np.maximum(values, floor), floor))
    gaps = logs[:-1] - logs[1:]
    return int(np.argmax(gaps)) + 1, float(gaps.max())


def subspace_overlap(matrix: Floats, differences: Floats) -> float:
    """How much of the span of `differences` (|S|, h) the h strongest directions of `matrix` (|S|, n) are: 1 all, 0 what
    chance has."""
    size, hidden = differences.shape
    ours = np.linalg.svd(matrix, full_matrices=False)[0][:, :hidden]
    theirs = np.linalg.qr(differences)[0]
    share, chance = float(np.sum((theirs.T @ ours) ** 2)) / hidden, float(hidden / size)
    found: float = (share - chance) / (1 - chance)
    return found


def judge(setup: Setup, matrix: Floats | None) -> tuple[str, int | None, float, float | None]:
    """BROKEN, STOPPED, or PARTLY what is neither; ĥ, its gap and o."""
    if matrix is None or not np.isfinite(matrix).all() or not matrix.any():
        return "STOPPED", None, 0.0, 0.0
    found, gap = spectrum(matrix)
    numbers = [token.number for token in setup.tokens]
    rows = setup.layer[numbers]
    overlap = subspace_overlap(matrix, rows[1:] - rows[0]) if len(matrix) == len(rows) - 1 else None
    return _verdict(setup, found, gap, overlap), found, gap, overlap


def _verdict(setup: Setup, found: int, gap: float, overlap: float | None) -> str:
    hit = abs(found - setup.hidden) <= max(1, 0.02 * setup.hidden) and gap >= _GAP
    if hit or (overlap is not None and overlap >= 0.5):
        return "BROKEN"
    return "STOPPED" if overlap is None or overlap < 0.1 else "PARTLY"


# ---- what the attacks have in common ---------------------------------------------------------------------------------


_DIALECT = ("return_tokens_as_token_ids", "logprobs_mode")  # vLLM's, which make the same attack a little easier


def _numbered(target: Target, **fields: Any) -> dict[str, Any]:
    found = {"max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True, **fields}
    return {name: value for name, value in found.items() if not (target.plain and name in _DIALECT)}


def _tops(choices: Choices | None) -> dict[str, float]:
    """What the first token's place has: a text to its log-probability."""
    told = ((choices or [{}])[0].get("logprobs") or {}).get("top_logprobs") or [{}]
    return {name: value for name, value in (told[0] or {}).items() if value is not None}


def _name(target: Target, token: Known) -> str:
    return token.text if target.plain else f"token_id:{token.number}"


def _complete(found: Floats) -> Floats | None:
    """Prompts of which everything is known: (|S|, n)."""
    whole = found[:, np.isfinite(found).all(0)]
    return whole if whole.shape[1] else None


# ---- the attacks: each gives differences of log-probabilities, (|S|, n), or None -------------------------------------


def full(target: Target, setup: Setup) -> Floats | None:
    """All log-probabilities: one request a prompt."""
    found = np.full((len(setup.tokens), setup.columns), np.nan)
    together = max(1, min(64, (1 << 19) // setup.words))  # an answer has a number for each word and prompt
    answers = target.complete(prompts(setup.columns), _numbered(target, logprobs=setup.words), together=together)
    for column, choices in enumerate(answers):
        tops = _tops(choices)
        found[:, column] = [tops.get(_name(target, token), np.nan) for token in setup.tokens]
    return _complete(found[1:] - found[0])


def top_k(target: Target, setup: Setup, k: int) -> Floats | None:
    """The `k` best, with the reference and k - 1 others lifted to the top by the same bias: k - 1 values a request."""
    found = np.full((len(setup.tokens) - 1, setup.columns), np.nan)
    reference = setup.tokens[0]
    for first in range(1, len(setup.tokens), k - 1):
        part = setup.tokens[first : first + k - 1]
        bias = {str(token.number): _LIFT for token in (reference, *part)}
        fields = _numbered(target, logprobs=k, logit_bias=bias, logprobs_mode="processed_logprobs")
        answers = target.complete(prompts(setup.columns), fields)
        if all(choices is None for choices in answers):
            return None
        for column, choices in enumerate(answers):
            tops = _tops(choices)
            for row, token in enumerate(part, first - 1):
                found[row, column] = tops.get(_name(target, token), np.nan) - tops.get(_name(target, reference), np.nan)
    return _complete(found)


def top_1(target: Target, setup: Setup) -> Floats | None:
    """The best one, with one token lifted: how far its log-probability is from 0 tells what it was without the bias."""
    found = np.full((len(setup.tokens), setup.columns), np.nan)
    texts = prompts(setup.columns)
    for row, token in enumerate(setup.tokens):
        left = dict.fromkeys(range(setup.columns), 15.0)
        for _ in range(8):
            asked = _by_value(left)
            fields = [
                _numbered(target, logprobs=1, logit_bias={str(token.number): bias}, logprobs_mode="processed_logprobs")
                for bias in asked
            ]
            several = list(zip([[texts[column] for column in each] for each in asked.values()], fields, strict=True))
            answers = target.many(several)
            if not row and all(choices is None for each in answers for choices in each):
                return None
            for (bias, columns), answer in zip(asked.items(), answers, strict=True):
                for column, choices in zip(columns, answer, strict=True):
                    value = _tops(choices).get(_name(target, token))
                    if value is None:
                        left[column] = bias + 8  # it did not come to the top
                    elif value > -1e-6:
                        left[column] = bias - 6  # so near to 0 that nothing is left of what it was
                    else:
                        odds = value - np.log(-np.expm1(value)) - bias
                        found[row, column] = -np.logaddexp(0, -odds)
                        del left[column]
            if not left:
                break
    return _complete(found[1:] - found[0])


def argmax_text(target: Target, setup: Setup, steps: int = 9, reach: float = 12.0) -> Floats | None:
    """Text alone, at temperature 0: a bias is halved in on until the token just wins over the reference. One bit a
    request, `steps` of them for a value within ±`reach`. Prompts that stand at the same place are asked together."""
    return _bisected(target, setup, steps, reach, lift=True)


def ban_text(target: Target, setup: Setup, steps: int = 9, reach: float = 12.0) -> Floats | None:
    """As `argmax_text` where biases may only be negative: all but two tokens are banned, and one of these held back."""
    return _bisected(target, setup, steps, reach, lift=False)


def _bisected(target: Target, setup: Setup, steps: int, reach: float, *, lift: bool) -> Floats | None:
    reference, texts = setup.tokens[0], prompts(setup.columns)
    low = np.full((len(setup.tokens) - 1, setup.columns), -reach)
    high = -low
    banned = _banned(target, setup)
    for row, token in enumerate(setup.tokens[1:]):
        for _ in range(steps):
            middles = (low[row] + high[row]) / 2
            asked = _by_value(dict(enumerate(middles.tolist())))
            several = []
            for middle, columns in asked.items():
                if lift:
                    bias = {str(reference.number): _LIFT, str(token.number): _LIFT - middle}
                else:
                    pair = {str(reference.number): min(0.0, middle), str(token.number): min(0.0, -middle)}
                    bias = banned | pair
                fields = {"max_tokens": 1, "temperature": 0, "logit_bias": bias}
                several.append(([texts[column] for column in columns], fields))
            answers = target.many(several)
            for (middle, columns), answer in zip(asked.items(), answers, strict=True):
                for column, choices in zip(columns, answer, strict=True):
                    if choices is None:
                        return None
                    if choices[0].get("text") == token.text:
                        low[row, column] = middle
                    else:
                        high[row, column] = middle
    found: Floats = (low + high) / 2
    return found


def _banned(target: Target, setup: Setup) -> dict[str, float]:
    """Bans of all tokens, or of the commonest where there may be few."""
    numbers = [token.number for token in setup.tokens[1:63]] if target.plain else range(setup.words)
    return {str(number): -_LIFT for number in numbers}


def ban_only(target: Target, setup: Setup) -> Floats | None:
    """The best one, where biases may only be negative: with all but two tokens banned, its log-probability is the
    difference of these two."""
    found = np.full((len(setup.tokens) - 1, setup.columns), np.nan)
    reference, texts = setup.tokens[0], prompts(setup.columns)
    banned = _banned(target, setup)
    for row, token in enumerate(setup.tokens[1:]):
        bias = {name: value for name, value in banned.items() if name not in (str(reference.number), str(token.number))}
        fields = _numbered(target, logprobs=1, logit_bias=bias, logprobs_mode="processed_logprobs")
        answers = target.complete(texts, fields)
        if all(choices is None for choices in answers):
            return None
        for column, choices in enumerate(answers):
            for name, value in _tops(choices).items():
                difference = value - np.log(-np.expm1(min(value, -1e-15)))
                found[row, column] = difference if name == _name(target, token) else -difference
    return _complete(found)


def forced(target: Target, setup: Setup) -> Floats | None:
    """One token is forced, by a grammar or a list of allowed ones; its own log-probability comes back: a value each."""
    found = np.full((len(setup.tokens), setup.columns), np.nan)
    for row, token in enumerate(setup.tokens):
        fields = _numbered(target, logprobs=1, allowed_token_ids=[token.number])
        answers = target.complete(prompts(setup.columns), fields)
        if all(choices is None for choices in answers):
            return None
        for column, choices in enumerate(answers):
            told = ((choices or [{}])[0].get("logprobs") or {}).get("token_logprobs") or [None]
            found[row, column] = np.nan if told[0] is None else told[0]
    return _complete(found[1:] - found[0])


def allowed(target: Target, setup: Setup) -> Floats | None:
    """A list of allowed tokens, and the log-probabilities of all of these: a column a request, however many words there
    are."""
    numbers = [token.number for token in setup.tokens]
    fields = _numbered(
        target, logprobs=len(numbers), allowed_token_ids=numbers, logprobs_mode="processed_logprobs", top_p=1
    )
    found = np.full((len(numbers), setup.columns), np.nan)
    for column, choices in enumerate(target.complete(prompts(setup.columns), fields, together=16)):
        tops = _tops(choices)
        found[:, column] = [tops.get(_name(target, token), np.nan) for token in setup.tokens]
    return _complete(found[1:] - found[0])


def prompt_logprobs(target: Target, setup: Setup) -> Floats | None:
    """All log-probabilities of every place in long prompts: as many prompts as these have tokens."""
    texts, places = prompts(setup.columns), list[dict[str, Any]]()
    for first in range(0, len(texts), 5):
        fields = {"prompt": " ".join(texts[first : first + 5]), "max_tokens": 1, "prompt_logprobs": setup.words}
        choices = (target.ask("/completions", fields) or {}).get("choices") or [{}]
        told = [place for place in choices[0].get("prompt_logprobs") or [] if place]
        if not told:
            return None
        places += [{str(token.number): place.get(str(token.number)) for token in setup.tokens} for place in told]
        if len(places) >= setup.columns:
            break
    found = np.full((len(setup.tokens), len(places)), np.nan)
    for column, place in enumerate(places):
        found[:, column] = [(place[str(token.number)] or {}).get("logprob", np.nan) for token in setup.tokens]
    return _complete(found[1:] - found[0])


def echo(target: Target, setup: Setup) -> Floats | None:
    """The prompt is echoed with its log-probabilities, and each token stands at its end in turn: a value each."""
    found = np.full((len(setup.tokens), setup.columns), np.nan)
    rng = np.random.default_rng(3)
    starts = [[token.number for token in rng.choice(np.array(setup.tokens), 3)] for _ in range(setup.columns)]
    for row, token in enumerate(setup.tokens):
        fields = {"max_tokens": int(target.plain), "echo": True, "logprobs": 1}
        asked: list[Prompt] = [[*start, token.number] for start in starts]
        if target.plain:
            asked = [f"{text}{token.text}" for text in prompts(setup.columns)]
        answers = target.complete(asked, fields)
        if all(choices is None for choices in answers):
            return None
        for column, choices in enumerate(answers):
            told = ((choices or [{}])[0].get("logprobs") or {}).get("token_logprobs") or [None]
            found[row, column] = np.nan if told[-1] is None else told[-1]
    return _complete(found[1:] - found[0])


def embeddings(target: Target, setup: Setup) -> Floats | None:
    """Embeddings are what goes into the last layer, or means of it: as many dimensions as the layer is wide."""
    texts, found = prompts(setup.columns), list[Any]()
    for first in range(0, len(texts), 64):
        rows = (target.ask("/embeddings", {"input": texts[first : first + 64]}) or {}).get("data")
        if not rows:
            return None
        found += [row["embedding"] for row in rows]
    return np.array(found, np.float64).T


def sampling(
    target: Target, setup: Setup, draws: int = 4096, temperature: float = 1.5, alone: int = 16
) -> Floats | None:
    """Nothing but text: how often each token comes, of many draws. Values come at the price of their variance: 1/count
    each, so that one within 0.1 takes a token about a hundred times. Where nobody may have many answers at once,
    `alone` of them are drawn one by one."""
    found = np.zeros((len(setup.tokens), setup.columns))
    rows = {token.text: row for row, token in enumerate(setup.tokens)}
    fields = {"max_tokens": 1, "temperature": temperature, "n": draws}
    answers = target.complete(prompts(setup.columns), fields)
    if all(choices is None for choices in answers):
        answers = target.complete(prompts(setup.columns) * alone, {**fields, "n": 1})
    if all(choices is None for choices in answers):
        return None
    for number, choices in enumerate(answers):
        for choice in choices or []:
            row = rows.get(choice.get("text", ""))
            if row is not None:
                found[row, number % setup.columns] += 1
    logs = np.log(found + 0.5)
    differences: Floats = temperature * (logs[1:] - logs[0])
    return differences


def _by_value(values: dict[int, float]) -> dict[float, list[int]]:
    """Which have the same value: at most as many together as one request takes."""
    found: dict[float, list[int]] = {}
    for key, value in values.items():
        found.setdefault(value, []).append(key)
    return found


ATTACKS: dict[str, Callable[[Target, Setup], Floats | None]] = {
    "full log-probabilities": full,
    "top-20 with logit_bias": lambda target, setup: top_k(target, setup, 20),
    "top-5 with logit_bias": lambda target, setup: top_k(target, setup, 5),
    "top-1 with logit_bias": top_1,
    "argmax text with logit_bias": argmax_text,
    "ban-only bias, top-1": ban_only,
    "ban-only bias, text": ban_text,
    "forced token": forced,
    "allowed tokens": allowed,
    "prompt_logprobs": prompt_logprobs,
    "echo": echo,
    "embeddings": embeddings,
    "sampling alone": sampling,
}


def run(target: Target, setup: Setup, attack: str) -> Outcome:
    """One of `ATTACKS`, judged, with what it cost. What gets nothing is tried again with OpenAI's fields and sizes: a
    server that knows no others has refused a name, and not what was asked for."""
    before, begun = (target.cost.requests, target.cost.refused, target.cost.tokens), time.monotonic()
    matrix = ATTACKS[attack](target, setup)
    if matrix is None:
        target.plain = True
        matrix = ATTACKS[attack](target, setup)
        target.plain = False
    seconds = time.monotonic() - begun
    verdict, found, gap, overlap = judge(setup, matrix)
    after = (target.cost.requests, target.cost.refused, target.cost.tokens)
    requests, refused, tokens = (now - then for now, then in zip(after, before, strict=True))
    return Outcome(attack, verdict, found, gap, overlap, requests, refused, tokens, seconds)
