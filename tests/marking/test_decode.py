"""Bounds on naming somebody innocent hold, exactly; the guilty are found under each attack that a decoder is for."""

import itertools
import math
import sys

import numpy as np
import pytest

from strongroom.marking import decode
from strongroom.marking.code import bias_table
from strongroom.marking.decode import Decoder, Decoding, marked_bound, tail
from strongroom.marking.estimate import Estimates
from strongroom.marking.matched import bound

P = bias_table()[np.random.default_rng(7).integers(0, 256, 3000)] / 65536
RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def reseeded(monkeypatch):
    """The same numbers in each test, in whatever order they run."""
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(7))


def words(holders, p=P):
    return (RNG.random((holders, len(p))) < p).astype(np.uint8)


def estimates(share, information=4.0):
    """What is seen where `share` of the leak is variant B, through noise."""
    m = len(share)
    i = np.full(m, information)
    n = i * (1 - 2 * share) + np.sqrt(i) * RNG.normal(size=m)
    return Estimates(n, i, n**2 / i, np.ones(m))


def attacked(bits, how):
    mean = bits.mean(axis=0)
    match how:
        case "mean":
            return mean
        case "segments":
            return bits[RNG.integers(0, len(bits), bits.shape[1]), np.arange(bits.shape[1])].astype(float)
        case "extremes":
            return np.where(mean == 0, 0.0, np.where(mean == 1, 1.0, 0.5))
        case _:
            return np.where(mean == 0.5, 0.5, np.round(mean))


@pytest.mark.parametrize("how", ["mean", "segments", "extremes", "median"])
@pytest.mark.parametrize("colluders", [1, 2, 3, 5, 8])
def test_the_guilty_are_found_and_nobody_else(how, colluders):
    bits = words(400)
    share = attacked(bits[:colluders], how)
    scores = Decoding(estimates(share), bits, P).scores()
    assert [score.candidate for score in scores] == list(range(400))
    best = sorted(scores, key=lambda score: score.log10_p)
    assert {score.candidate for score in best[:colluders]} == set(range(colluders))
    assert best[0].log10_p < -8
    assert min(score.log10_p for score in scores[colluders:]) > -7


def test_who_is_known_helps_to_find_the_rest():
    bits = words(200)
    seen = estimates(attacked(bits[:12], "segments"), information=9.0)
    decoding = Decoding(seen, bits, P)
    alone = decoding.scores()
    known = decoding.scores([0, 1, 2, 3, 4, 5])
    rest = range(6, 12)
    assert sum(known[k].log10_p for k in rest) < sum(alone[k].log10_p for k in rest)
    assert min(known[k].log10_p for k in range(12, 200)) > -7


def test_the_bound_is_above_the_exact_probability():
    """Of ten positions every word is counted."""
    p = P[:10]
    for model, colluders in (("mean", 1), ("mean", 3), ("segments", 2), ("extremes", 4), ("median", 6)):
        seen = estimates(RNG.random(10).round())
        g = Decoder(colluders, model).weights(seen, p, np.zeros(10, np.int64), 0)
        found = []
        for word in itertools.product((0, 1), repeat=10):
            chance = math.prod(q if bit else 1 - q for bit, q in zip(word, p, strict=True))
            found.append((sum(g[bit][k] for k, bit in enumerate(word)), chance))
        found.sort(reverse=True)
        exact = 0.0
        for score, chance in found:
            exact += chance
            assert 10 ** tail(g, p, np.array([score]))[0] >= exact * (1 - 1e-9)


def test_innocents_reach_a_bound_no_more_often_than_it_says():
    bits = words(20_000, P[:600])
    seen = estimates(attacked(words(4, P[:600]), "mean"))
    decoding = Decoding(seen, bits, P[:600])
    found = np.array([score.log10_p for score in decoding.scores()])
    ways = len(decoding.decoders(0))
    for level in (-2, -3, -4):
        expected = 20_000 * ways * 10.0**level
        assert (found <= level).sum() <= expected + 4 * math.sqrt(expected)


def test_positions_that_say_nothing_and_nobody_to_score():
    nothing = Estimates(*(np.zeros(3000) for _ in range(4)))
    assert Decoding(nothing, words(5), P).scores() == []
    assert Decoding(estimates(np.zeros(3000)), words(0), P).scores() == []
    assert marked_bound(nothing) == 0.0


def test_what_never_was_in_the_room_is_not_marked():
    """N² / V of a sum of independent signs, of any weights whatever, is not large together."""
    weights = RNG.exponential(size=(2000, 64)) ** 3
    found = []
    for _ in range(300):
        n = (weights * RNG.choice([-1.0, 1.0], size=weights.shape)).sum(axis=1)
        square = n**2 / (weights**2).sum(axis=1)
        found.append(marked_bound(Estimates(n, np.ones(2000), square, np.ones(2000))))
    for level in (-1, -2):
        expected = 300 * 10.0**level
        assert sum(each <= level for each in found) <= expected + 4 * math.sqrt(expected)
    marked = np.full(2000, 5.0)
    assert marked_bound(Estimates(marked, marked, marked**2 / 5, np.ones(2000))) < -100


def test_the_bound_of_a_stamp():
    assert bound(0.0) == bound(-3.0) == 0.0
    assert bound(8.31) * math.log(10) == pytest.approx(-(8.31**2) / 2)


@pytest.mark.parametrize("how", ["mean", "segments", "median"])
def test_of_very_many_the_guilty_are_scored_by_all_decoders(monkeypatch, how):
    """Everybody is scored by some decoders, those who do best by all; nobody's bound is under what all of them say."""
    bits = words(400)
    seen = estimates(attacked(bits[[7, 90, 300]], how))
    whole = Decoding(seen, bits, P).scores()
    monkeypatch.setattr(decode, "_BEST", 20)
    few = Decoding(seen, bits, P).scores()
    assert [score.candidate for score in few] == list(range(400))
    for guilty in (7, 90, 300):
        assert few[guilty] == whole[guilty]
    assert len({score.decoder for score in few}) > 1
    assert all(a.log10_p >= b.log10_p - 1e-9 for a, b in zip(few, whole, strict=True) if b.log10_p < -1)
