"""What a leaker does to a matrix is found and undone; what is another matrix is not taken for one."""

import sys

import numpy as np
import pytest

from strongroom.marking.align import ALIKE, cosine, normalised, rescaled, solve

RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def reseeded(monkeypatch):
    """The same numbers in each test, in whatever order they run."""
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(4))


def matrix(rows=96, columns=160):
    return (RNG.normal(size=(rows, columns)) * RNG.uniform(0.5, 2, (rows, 1))).astype(np.float32)


def noisy(found, share=0.1):
    return (found + share * found.std() * RNG.normal(size=found.shape)).astype(np.float32)


ORIGINAL = matrix()
ROWS, COLUMNS = RNG.permutation(96), RNG.permutation(160)
DONE = {
    "nothing": (ORIGINAL, ()),
    "transposed": (ORIGINAL.T, ("transposed",)),
    "rows permuted": (ORIGINAL[ROWS], ("rows permuted",)),
    "columns permuted": (ORIGINAL[:, COLUMNS], ("columns permuted",)),
    "both permuted": (ORIGINAL[ROWS][:, COLUMNS], ("rows permuted", "columns permuted")),
    "both, transposed": (ORIGINAL[ROWS][:, COLUMNS].T, ("transposed", "rows permuted", "columns permuted")),
    "rows cut": (ORIGINAL[10:40], ("rows missing",)),
    "columns cut, transposed": (ORIGINAL[:, 3:90].T, ("transposed", "columns missing")),
}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", DONE)
def test_is_found_and_undone(name, noise):
    suspect, found = DONE[name]
    fit = solve(ORIGINAL, noisy(suspect, noise))
    assert fit is not None
    assert fit.found == found
    back = fit.apply(suspect)
    here = np.isfinite(back)
    assert here.sum() == suspect.size
    assert (back[here] == ORIGINAL[here]).all()


def test_another_matrix_is_none():
    for shape in ((96, 160), (160, 96), (30, 160), (96, 80), (7, 9)):
        assert solve(ORIGINAL, matrix(*shape)) is None


def test_what_runs_smoothly_is_not_taken_for_a_row_of_a_table_of_positions():
    at, waves = np.arange(512)[:, None], np.exp(-np.arange(48) / 8)
    table = np.concatenate([np.sin(at * waves), np.cos(at * waves), np.sin(at * waves / 3)], axis=1)
    table = noisy(table.astype(np.float32))
    for few in (np.arange(512.0)[None], np.linspace(-1, 1, 512)[None], RNG.normal(size=(4, 512)).cumsum(axis=1)):
        assert solve(table, few.astype(np.float32)) is None
    fit = solve(table, noisy(table[:, 7:8].T))
    assert fit is not None
    assert np.flatnonzero(fit.columns >= 0).tolist() == [7]


@pytest.mark.parametrize(
    "suspect",
    [np.zeros((96, 160)), np.ones((96, 160)), np.full((96, 160), np.nan), np.full((96, 160), np.inf), np.zeros((1, 1))],
)
def test_what_is_nothing_is_none(suspect):
    assert solve(ORIGINAL, suspect.astype(np.float32)) is None


def test_factors_of_rows_and_columns_are_taken_out():
    columns, rows = RNG.uniform(0.2, 4, (1, 160)), RNG.uniform(0.2, 4, (96, 1))
    suspect = (ORIGINAL * columns * rows).astype(np.float32)
    back, found = rescaled(ORIGINAL, suspect)
    assert set(found) == {"columns rescaled", "rows rescaled"}
    assert cosine(ORIGINAL, back) > 0.999


def test_noise_is_no_rescaling():
    assert rescaled(ORIGINAL, noisy(ORIGINAL))[1] == ()


def test_a_cosine_of_what_is_not_finite():
    odd = ORIGINAL.copy()
    odd[::2] = np.nan
    assert cosine(ORIGINAL, odd) == pytest.approx(1)
    assert cosine(ORIGINAL, np.full_like(ORIGINAL, np.nan)) == 0
    assert cosine(ORIGINAL, np.zeros_like(ORIGINAL)) == 0
    assert abs(cosine(ORIGINAL, matrix())) < ALIKE


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("module.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("blk.ffn.x", "blk.ffn.x"),
        ("", ""),
    ],
)
def test_names_of_other_tools(theirs, ours):
    assert normalised(theirs) == normalised(ours)
