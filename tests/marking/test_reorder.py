"""Words that were put into another order in a turned space are found again, and unrelated ones are not."""

import numpy as np
import pytest

from marking.disguises import orthogonal, quantised
from strongroom.marking.reorder import reordered

WORDS, WIDTH = 1500, 96


def embedding(seed):
    return np.random.default_rng(seed).normal(0, 0.02, (WORDS, WIDTH)).astype(np.float32)


def moved(rows, seed=3):
    """The rows in another order, turned; and where each of them is then."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    return (rows[order] @ orthogonal(rng, rows.shape[1])).astype(np.float32), np.argsort(order)


@pytest.mark.parametrize("change", [lambda a: a, lambda a: quantised(a, 8), lambda a: 3 * a])
def test_each_row_is_found(change):
    leak, where = moved(embedding(1))
    assert (reordered(embedding(1), change(leak)) == where).all()


def test_rows_that_say_nothing_are_missed_alone():
    leak, where = moved(embedding(1))
    leak[where[:20]] = np.nan
    found = reordered(embedding(1), leak)
    assert (found[20:] == where[20:]).mean() > 0.99
    assert not np.isin(found[found >= 0], where[:20]).all()


@pytest.mark.parametrize("change", [lambda a: a, lambda a: quantised(a, 4)])
@pytest.mark.parametrize("kept", [0.7, 0.4])
def test_rows_that_are_left_are_found(change, kept):
    """A vocabulary that was pruned; and one that was added to, seen from the other side."""
    leak, where = moved(embedding(1))
    left = np.sort(np.random.default_rng(5).permutation(WORDS)[: int(kept * WORDS)])
    found = reordered(embedding(1), change(leak[left]))
    expected = np.full(WORDS, -1)
    expected[np.isin(where, left)] = np.searchsorted(left, where[np.isin(where, left)])
    there = expected >= 0
    assert (found[there] == expected[there]).mean() > 0.99
    assert (found[~there] == -1).all()
    assert (reordered(change(leak[left]), embedding(1))[expected[there]] == np.flatnonzero(there)).mean() > 0.99


def clustered(seed):
    """Words some of which resemble one another, as they do in real embeddings."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(0, 0.02, (500, WIDTH))
    rows = kinds[rng.integers(len(kinds), size=4000)] + rng.normal(0, 0.012, (4000, WIDTH))
    return (rows * np.exp(rng.normal(0, 0.1, (4000, 1)))).astype(np.float32)


def without(rows, what):
    """Which rows a leaker leaves who drops three of ten: the longest, by which they were known, or those most like
    another."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = unit @ unit.T - 2 * np.eye(len(rows))
    said = {"longest": np.linalg.norm(rows, axis=1), "alike": alike.max(axis=1)}[what]
    return np.sort(np.argsort(said)[: int(0.7 * len(rows))])


@pytest.mark.parametrize("what", ["longest", "alike"])
def test_rows_are_found_whichever_are_left(what):
    rows = clustered(1)
    left = np.random.default_rng(5).permutation(without(rows, what))
    leak = rows[left] @ orthogonal(np.random.default_rng(3), WIDTH)
    found = reordered(rows, quantised(leak, 4).astype(np.float32))
    assert (found[left] == np.arange(len(left))).mean() > 0.99
    assert (np.delete(found, left) == -1).all()


def test_rows_of_another_embedding_are_not_found_by_their_neighbours():
    other = clustered(2)[without(clustered(2), "longest")]
    assert reordered(clustered(1), moved(other)[0]) is None


def test_some_of_unrelated_rows_are_not_found():
    assert reordered(embedding(1), moved(embedding(2))[0][: WORDS // 3]) is None


def test_rows_in_their_order_are_found_in_it():
    leak = embedding(1) @ orthogonal(np.random.default_rng(3), WIDTH)
    assert (reordered(embedding(1), leak) == np.arange(WORDS)).all()


@pytest.mark.parametrize("seed", range(2, 6))
def test_unrelated_rows_are_not_found(seed):
    assert reordered(embedding(1), moved(embedding(seed))[0]) is None


@pytest.mark.parametrize(
    "suspect",
    [np.zeros((WORDS, WIDTH)), np.ones((WORDS, WIDTH)), np.full((WORDS, WIDTH), 9e8), np.zeros((9, 5)), np.zeros(4)],
)
def test_what_has_no_rows_to_tell_apart(suspect):
    assert reordered(embedding(1), suspect.astype(np.float32)) is None
