"""The engine: what it answers is what the model alone would, whoever else is answered beside."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infer.small import POSITIONS, WORDS
from strongroom.errors import BackendError, LimitExceeded, StrongroomError, UsageError
from strongroom.infer.engine import Ask, Engine, PromptLogprobs, Token
from strongroom.infer.rows import Rows
from strongroom.infer.sampling import Sampling
from strongroom.load.transformers import from_room

PROMPTS = [
    (5, 80, 300),
    (7,) * 40,
    (9, 10),
    (400, 301, 77, 12, 6),
    (1, 2, 3, 4, 5, 6, 7, 8, 9),
    (300,),
    (11, 12),
    (8, 8),
]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def alone(small_room):
    """The model as transformers runs it."""
    return from_room(AutoModelForCausalLM, small_room.load("acme/small"), dtype="float32").eval()


def heard(engine, asks):
    """The events of each ask, once all are complete."""
    found, done, left = [[] for _ in asks], threading.Event(), [sum(ask.choices for ask in asks)]

    def telling(events):
        def tell(news):
            events.extend(news)
            left[0] -= sum(getattr(each, "finish", None) is not None for each in news)
            if left[0] <= 0 or any(isinstance(each, StrongroomError) for each in news):
                done.set()

        return tell

    for ask, events in zip(asks, found, strict=True):
        engine.submit(ask, telling(events))
    assert done.wait(60)
    return found


def tokens(events, choice=0):
    return [each.token for each in events if isinstance(each, Token) and each.choice == choice]


def test_together_is_as_alone_and_as_transformers_has_it(model, alone):
    asks = [Ask(prompt, GREEDY, 5 + 7 * number) for number, prompt in enumerate(PROMPTS)]
    together = heard(model.engine, [*asks, *asks])  # more than there are rows
    for ask, first, second in zip(asks, together[:8], together[8:], strict=True):
        expected = alone.generate(
            torch.tensor([ask.prompt]), max_new_tokens=ask.most, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ask.prompt) :].tolist()
        assert tokens(first) == tokens(second) == expected
        assert tokens(heard(model.engine, [ask])[0]) == expected


def test_positions_grow_to_the_last_and_no_further(model):
    long = tuple(range(3, 203))
    assert len(tokens(heard(model.engine, [Ask(long, GREEDY, POSITIONS - 200)])[0])) == POSITIONS - 200
    with pytest.raises(UsageError, match="positions"):
        model.engine.submit(Ask(long, GREEDY, POSITIONS - 199), print)
    with pytest.raises(UsageError, match="numbers from 0"):
        model.engine.submit(Ask((WORDS,), GREEDY, 1), print)
    with pytest.raises(UsageError, match="no token is allowed"):
        model.engine.submit(Ask((1,), Sampling(allowed=(4,), banned=(4,)), 1), print)


def test_each_choice_has_the_next_seed(model):
    how = Sampling(seed=(1 << 64) - 2)
    (several,) = heard(model.engine, [Ask((5, 80, 300), how, 12, choices=5)])
    for choice in range(5):
        (single,) = heard(model.engine, [Ask((5, 80, 300), replace(how, seed=(how.seed + choice) % (1 << 64)), 12)])
        assert tokens(several, choice) == tokens(single)
    assert len({tuple(tokens(several, choice)) for choice in range(5)}) == 5


def test_log_probabilities_are_the_models_own(model, alone):
    prompt = (5, 80, 300, 17)
    how = Sampling(seed=3, temperature=0.5, bias={9: 4.0})
    ask = Ask(prompt, how, 6, top=4, prompt_top=WORDS, record=True)
    (events,) = heard(model.engine, [ask])
    (first,), rest = [each for each in events if isinstance(each, PromptLogprobs)], events[1:]
    whole = torch.tensor([[*prompt, *tokens(events)]])
    with torch.no_grad():
        expected = alone(whole).logits[0].double().log_softmax(-1).numpy()
    np.testing.assert_allclose(first.logprobs, [expected[at, prompt[at + 1]] for at in range(3)], atol=1e-5)
    for at, top in enumerate(first.tops):
        np.testing.assert_allclose(top.logprobs, expected[at, top.tokens], atol=1e-5)
    for at, each in enumerate(rest, len(prompt) - 1):
        assert each.own == each.logprob == pytest.approx(expected[at, each.token], abs=1e-5)
        assert each.top.tokens.tolist() == np.argsort(-expected[at])[:4].tolist()
    (steered,) = heard(model.engine, [replace(ask, processed=True)])
    assert tokens(steered) == tokens(events)
    assert steered[1].logprob != steered[1].own


def test_stops_and_what_comes_at_least(model):
    (free,) = heard(model.engine, [Ask((5, 80), GREEDY, 30)])
    stop = tokens(free)[0]
    (stopped,) = heard(model.engine, [Ask((5, 80), GREEDY, 30, stops=frozenset((stop,)))])
    assert [(each.token, each.finish) for each in stopped] == [(stop, "stop")]
    (later,) = heard(model.engine, [Ask((5, 80), GREEDY, 30, stops=frozenset((stop,)), least=4)])
    assert len(later) >= 4
    assert stop not in tokens(later)[:4]


def test_who_has_gone_leaves_their_row_at_once(model):
    told, gone, many = threading.Event(), threading.Event(), 200

    def tell(_):
        told.set()
        assert gone.wait(60)  # on the engine's thread, which would be far ahead of one that is held up

    job = model.engine.submit(Ask((5,), Sampling(seed=1), many, choices=8), tell)
    assert told.wait(60)
    before = model.engine.tokens
    model.engine.abandon(job)
    gone.set()
    (events,) = heard(model.engine, [Ask((6,), GREEDY, 3)])  # all eight rows were taken
    assert len(events) == 3
    assert model.engine.tokens - before < 8 * many / 2


def test_the_queue_is_bounded_and_a_stop_ends_everything(alone):
    engine = Engine(Rows(alone, 2), waiting=3)
    found = []
    engine.submit(Ask((5,), GREEDY, 5, choices=3), found.extend)
    with pytest.raises(LimitExceeded, match="wait already"):
        engine.submit(Ask((5,), GREEDY, 5), found.extend)
    engine.start()
    why = BackendError("test.over", "over")
    engine.stop(why)
    assert found[-1] is why or [each.finish for each in found[-1:]] == ["length"]
    assert not engine.alive
    with pytest.raises(BackendError, match="over"):
        engine.submit(Ask((5,), GREEDY, 5), found.extend)


def test_a_model_that_fails_ends_the_engine_and_says_so(alone):
    engine = Engine(Rows(alone, 2))
    engine.start()
    alone.model.layers = None
    (events,) = heard(engine, [Ask((5,), GREEDY, 5)])
    assert events[-1].code == "infer.failed"
    assert not engine.alive


def test_layers_that_look_at_a_window_are_refused(alone):
    alone.config.sliding_window = 16
    with pytest.raises(UsageError, match="a window of 16"):
        Rows(alone, 2)
