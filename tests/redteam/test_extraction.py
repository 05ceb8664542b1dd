"""The last layer of the small model, taken from the bare server every way there is. What the gateway makes of the same
attacks is tested where the gateway is."""

from __future__ import annotations

import numpy as np
import pytest

from infer.running import Running
from infer.small import HIDDEN, make_room
from strongroom.redteam.extraction import (
    ATTACKS,
    judge,
    prompts,
    run,
    sampling,
    spectrum,
    subspace_overlap,
)
from strongroom.redteam.target import Target


@pytest.fixture(scope="module")
def server(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare") / "room"
    make_room(folder, small).close()
    running = Running(folder, "acme/small", "--rows", "64")
    yield running
    running.stop()


@pytest.fixture
def target(server):
    found = Target(f"{server.url}/v1", "acme/small")
    yield found
    found.close()


EXACT = [name for name in ATTACKS if "text" not in name and name not in ("sampling alone", "embeddings")]


@pytest.mark.parametrize("attack", EXACT)
def test_whatever_gives_a_value_gives_the_layer(target, setup, attack):
    found = run(target, setup, attack)
    print(found)
    assert found.verdict == "BROKEN"
    assert found.found == HIDDEN
    assert found.gap >= 2
    assert found.overlap > 0.99
    assert found.refused == 0


def test_embeddings_are_as_wide_as_the_layer(target, setup):
    found = run(target, setup, "embeddings")
    assert (found.verdict, found.found, found.requests) == ("BROKEN", HIDDEN, 2)


def test_text_alone_gives_the_layer_where_a_bias_can_be_halved_in_on(target, setup):
    found = run(target, setup, "argmax text with logit_bias")
    print(found)
    assert found.verdict == "BROKEN"
    assert found.overlap >= 0.5
    assert found.tokens > 8 * 2 * HIDDEN * setup.columns  # a bit a token


def test_sampling_alone_gives_a_little_for_much(target, setup):
    """It leaks, too: slowly. docs/explanation/extraction.md has what it would take."""
    matrix = sampling(target, setup, draws=1024)
    verdict, _, _, overlap = judge(setup, matrix)
    print(verdict, overlap, target.cost)
    assert target.cost.tokens >= 1024 * setup.columns
    assert 0.0 < overlap < 0.5


def test_what_is_refused_is_no_answer(server, setup):
    """Another model's name, which this server refuses: every attack ends early and has nothing."""
    for attack in ATTACKS:
        target = Target(f"{server.url}/v1", "acme/other")
        found = run(target, setup, attack)
        target.close()
        assert (found.verdict, found.found, found.tokens) == ("STOPPED", None, 0), attack
        assert found.refused == found.requests <= 2 * setup.columns + 2, attack


def test_the_judge_tells_a_layer_from_noise(setup):
    rng = np.random.default_rng(1)
    rows = setup.layer[[token.number for token in setup.tokens]]
    differences = rows[1:] - rows[0]
    exact = differences @ rng.normal(size=(HIDDEN, setup.columns))
    assert judge(setup, exact)[0] == "BROKEN"
    assert spectrum(exact)[0] == HIDDEN
    noise = rng.normal(size=exact.shape)
    verdict, found, *_ = judge(setup, noise)
    assert (verdict, found != HIDDEN) == ("STOPPED", True)
    chance = [subspace_overlap(rng.normal(size=exact.shape), differences) for _ in range(20)]
    assert abs(np.mean(chance)) < 0.02
    assert judge(setup, None)[0] == "STOPPED"
    assert len(set(prompts(605))) == 605
