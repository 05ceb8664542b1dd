"""The model on a GPU: it goes there tensor by tensor, and answers what it answers on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from infer.test_engine import PROMPTS, heard, tokens
from strongroom.errors import BackendError, UsageError
from strongroom.infer.engine import Ask
from strongroom.infer.sampling import Sampling
from strongroom.infer.server import Settings, load
from strongroom.infer.verify import Run, Verifier
from strongroom.load.transformers import from_room

ASKS = [Ask(prompt, Sampling(seed=100 * k + 1, temperature=0.9), 40) for k, prompt in enumerate(PROMPTS)]


def test_a_device_that_is_not_there_is_refused(small_room):
    with pytest.raises(UsageError) as error:
        load(small_room.load("acme/small"), Settings(rows=8, threads=1, device="cuda:99"))
    assert error.value.code == "device.unavailable"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_answers_as_the_cpu_and_a_verifier_on_either_finds_it_right(small_room, model, dtype):
    made, close = load(small_room.load("acme/small"), Settings(rows=8, threads=1, device="cuda", dtype=dtype))
    try:
        found = [tokens(events) for events in heard(made.engine, ASKS)]
    finally:
        made.engine.stop(BackendError("test.over", "the test is over"))
        close()
    if dtype == "float32":
        assert found == [tokens(events) for events in heard(model.engine, ASKS)]
    runs = [Run(ask.prompt, tuple(said), ask.sampling) for ask, said in zip(ASKS, found, strict=True)]
    for device in ("cpu", "cuda"):
        weights = from_room(AutoModelForCausalLM, small_room.load("acme/small"), dtype="float32").to(device).eval()
        verifier = Verifier(weights, dtype)
        honest = verifier.judge(map(verifier.check, runs))
        assert honest.dangerous == 0
        assert honest.alarm == ""
        elsewhere = [replace(run, sampling=replace(run.sampling, seed=run.sampling.seed + 1)) for run in runs]
        assert verifier.judge(map(verifier.check, elsewhere)).dangerous > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_lie_on_the_gpu_as_they_lie_in_the_room(small_room):
    here = from_room(AutoModelForCausalLM, small_room.load("acme/small"), dtype="float32").state_dict()
    there = from_room(AutoModelForCausalLM, small_room.load("acme/small"), dtype="float32", device_map="cuda")
    for name, tensor in there.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), here[name]), name
