"""Sampling: the same token for the same seed, by a generator that others have written down, and by the right odds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.infer.sampling import Sampling, choose, gumbel, log_softmax, nucleus, steered, uniforms

_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_WORD = (1 << 64) - 1


def philox(counter, key):
    """Philox4x64-10, from its paper (Salmon and others 2011)."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * counter[0], _MULTIPLIERS[1] * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & _WORD,
            (first >> 64) ^ counter[3] ^ key[1],
            first & _WORD,
        ]
        key = [(each + step) & _WORD for each, step in zip(key, _WEYL, strict=True)]
    return counter


def test_the_reference_gives_the_published_answers():
    """Known answers of Random123."""
    assert [f"{word:016x}" for word in philox([0] * 4, [0] * 2)] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    assert [f"{word:016x}" for word in philox([_WORD] * 4, [_WORD] * 2)] == [
        "87b092c3013fe90b",
        "438c3c67be8d0224",
        "9cc7d7c69cd777b6",
        "a09caebf594f0ba0",
    ]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 3), (_WORD, 12345), (1 << 63, 1)])
def test_noise_is_the_block_function_of_seed_position_and_token(seed, position):
    found = uniforms(seed, position, 19)
    for token in range(19):
        word = philox([token // 4, 0, 0, 0], [seed, position])[token % 4]
        assert found[token] == ((word >> 12) + 0.5) / 2**52


def test_no_noise_is_infinite():
    words = np.array([0, _WORD], np.uint64)
    least, most = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    assert 0 < least < most < 1
    assert np.isfinite(-np.log(-np.log([least, most]))).all()
    assert np.isfinite(gumbel(5, 5, 4096)).all()


def test_tokens_come_by_the_odds_of_the_model():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -2.0])
    temperature, draws = 0.8, 20_000
    found = np.bincount(
        [choose(logits, Sampling(temperature=temperature, seed=seed), 4, {}) for seed in range(draws)], minlength=5
    )
    expected = draws * np.exp(log_softmax(logits / temperature))
    assert ((found - expected) ** 2 / expected).sum() < 18.47  # chi-squared of 4 degrees: one in a thousand


def test_the_same_seed_gives_the_same_token_and_another_position_another():
    logits = np.zeros(512)
    how = Sampling(seed=99)
    drawn = [choose(logits, how, position, {}) for position in range(50)]
    assert drawn == [choose(logits, how, position, {}) for position in range(50)]
    assert len(set(drawn)) > 40


def test_temperature_nothing_is_the_largest_and_the_lowest_of_equals():
    assert choose(np.array([0.0, 3.0, 3.0, 1.0]), Sampling(temperature=0.0, seed=1), 0, {}) == 1


def test_steering():
    logits = np.arange(6.0)
    assert choose(logits, Sampling(temperature=0.0, bias={2: 10.0}), 0, {}) == 2
    assert choose(logits, Sampling(temperature=0.0, banned=(5, 4)), 0, {}) == 3
    assert choose(logits, Sampling(temperature=0.0, allowed=(1, 3), banned=(3,)), 0, {}) == 1
    assert choose(logits, Sampling(temperature=0.0, presence_penalty=1.5), 0, {5: 1}) == 4
    assert choose(logits, Sampling(temperature=0.0, frequency_penalty=0.6), 0, {5: 1}) == 5
    assert choose(logits, Sampling(temperature=0.0, frequency_penalty=0.6), 0, {5: 2}) == 4
    np.testing.assert_array_equal(logits, np.arange(6.0))  # the model's own are left as they were
    assert np.isneginf(steered(logits, Sampling(banned=(0,)), {})[0])


def test_the_nucleus_is_the_least_that_has_the_probability():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    assert nucleus(logits, 1.0, 0.5).tolist() == [False, True, False, False]
    assert nucleus(logits, 1.0, 0.6).tolist() == [False, True, False, True]
    assert nucleus(logits, 1.0, 1.0).all()
    assert nucleus(logits, 1.0, 1e-9).sum() == 1
    drawn = {choose(logits, Sampling(top_p=0.6, seed=seed), 0, {}) for seed in range(200)}
    assert drawn == {1, 3}


@given(st.integers(0, 2**32), st.sampled_from([3, 300, 5000]), st.sampled_from([0.01, 1.0, 8.0]), st.floats(0.01, 1))
def test_the_nucleus_is_that_of_all_words_in_order(seed, words, spread, top_p):
    """Whatever is sorted of them: also where many are equal, or may not come at all."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, spread, words), 1)
    logits[rng.integers(0, words, words // 3)] = -np.inf
    logits[rng.integers(words)] = spread
    order = np.argsort(-logits, kind="stable")
    probability = np.exp(logits[order] - logits[order[0]])
    before = np.cumsum(probability) - probability
    total = np.exp(logits - logits.max()).sum()
    wanted = {int(each) for each in order[before < top_p * total]} | {int(order[0])}
    if top_p < 1.0:
        assert set(np.flatnonzero(nucleus(logits, 1.0, top_p)).tolist()) == wanted
