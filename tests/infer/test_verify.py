"""Verified inference: honest runs pass, however they were computed; who hides bits in tokens is caught."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infer.test_engine import PROMPTS, heard, tokens
from strongroom.errors import UsageError
from strongroom.infer.engine import Ask
from strongroom.infer.sampling import Sampling, scores, steered
from strongroom.infer.verify import Run, Verifier
from strongroom.load.transformers import from_room
from strongroom.watch.verdict import upper_bound

SAMPLINGS = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.7, top_p=0.9),
    Sampling(seed=3, temperature=0.0),
    Sampling(seed=4, temperature=1.5, presence_penalty=0.4, frequency_penalty=0.3),
]


@pytest.fixture(scope="module")
def weights(small_room):
    return from_room(AutoModelForCausalLM, small_room.load("acme/small"), dtype="float32").eval()


@pytest.fixture
def runs(model):
    """Honest ones, made eight side by side."""
    asks = [
        Ask(prompt, replace(how, seed=how.seed + 100 * n), 50) for n, prompt in enumerate(PROMPTS) for how in SAMPLINGS
    ]
    return [
        Run(ask.prompt, tuple(tokens(events)), ask.sampling)
        for ask, events in zip(asks, heard(model.engine, asks), strict=True)
    ]


def judged(verifier, runs):
    return verifier.judge(verifier.check(run) for run in runs)


def test_honest_runs_are_what_these_weights_give(weights, runs):
    found = judged(Verifier(weights), runs)
    assert found.tokens == 32 * 50
    assert found.dangerous == 0
    assert found.alarm == ""
    assert found.suspicious <= 2
    assert found.bits < 0.1  # of 9 a token


def test_honest_runs_in_other_arithmetic_are_within_tau(small_room, weights, runs):
    rough = from_room(AutoModelForCausalLM, small_room.load("acme/small"), dtype="bfloat16").eval()
    found = judged(Verifier(rough, "bfloat16"), runs)
    assert found.dangerous == 0
    assert found.alarm == ""
    assert found.suspicious > 0  # the test would see nothing if there was no difference


def covert(weights, run, bits):
    """A server that sends a bit with each token: the best for 0, the second best for 1."""
    output, sent, counts = [], 0, Counter()
    for position, bit in enumerate(bits):
        with torch.no_grad():
            logits = weights(torch.tensor([[*run.prompt, *output]])).logits[0, -1].numpy()
        order = np.argsort(-scores(steered(logits, run.sampling, counts), run.sampling, position))
        output.append(int(order[bit]))
        counts[output[-1]] += 1
        sent += bit
    return replace(run, output=tuple(output)), sent


def test_bits_hidden_in_the_choice_of_two_are_caught(weights):
    verifier, run = Verifier(weights), Run((5, 80, 300), (1,), Sampling(seed=9))
    bits = [secrets.randbelow(2) for _ in range(59)] + [1]
    hostile, ones = covert(weights, run, bits)
    found = judged(verifier, [hostile])
    assert found.dangerous + found.suspicious == ones
    assert found.dangerous >= ones - 1  # the second best is hardly ever within τ
    assert str(found.dangerous) in found.alarm
    assert found.bits > 1  # which is what it sends, and more
    honest, _ = covert(weights, run, [0] * 60)
    assert judged(verifier, [honest]).alarm == ""


def test_a_server_that_hides_within_tau_is_seen_by_its_share(weights):
    """With a τ as wide as the gaps, nothing is dangerous: then too many second best tell."""
    verifier, run = Verifier(weights, "bfloat16", tau=50.0), Run((5, 80, 300), (1,), Sampling(seed=9))
    hostile, ones = covert(weights, run, [0, 1] * 30)
    found = judged(verifier, [hostile])
    assert (found.dangerous, found.suspicious, ones) == (0, 30, 30)
    assert "second best" in found.alarm
    assert found.open_bits > 1


@pytest.mark.parametrize("change", ["seed", "prompt", "temperature", "weights"])
def test_what_was_not_so_is_dangerous(weights, runs, change):
    run = runs[0]
    match change:
        case "seed":
            run = replace(run, sampling=replace(run.sampling, seed=run.sampling.seed + 1))
        case "prompt":
            run = replace(run, prompt=(77, 450))
        case "temperature":
            run = replace(run, sampling=replace(run.sampling, temperature=0.3))
    model = weights
    if change == "weights":
        torch.manual_seed(1)
        model = type(weights)(weights.config).eval()
    found = judged(Verifier(model), [run])
    assert found.dangerous >= (1 if change == "prompt" else 10)  # a small model soon forgets its prompt
    assert found.alarm


def test_the_bound_is_clopper_and_pearsons():
    assert upper_bound(0, 100) == pytest.approx(1 - 0.01 ** (1 / 100))
    assert upper_bound(0, 1600) == pytest.approx(1 - 0.01 ** (1 / 1600))
    assert upper_bound(1, 10, 0.95) == pytest.approx(0.394163, abs=1e-5)  # from published tables
    assert upper_bound(10, 10) == 1.0


def test_what_is_no_run_is_refused(weights):
    for run in (Run((), (1,), Sampling()), Run((1,), (), Sampling()), Run((1,), (512,), Sampling())):
        with pytest.raises(UsageError, match="a run has"):
            Verifier(weights).check(run)
    with pytest.raises(UsageError, match="nothing to judge"):
        Verifier(weights).judge([])
