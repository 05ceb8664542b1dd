"""A text names the copy that wrote it, by its words alone; and nobody else, whatever is in it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from strongroom.client import Room
from strongroom.core.limits import LIMITS
from strongroom.errors import Denied, LimitExceeded, StrongroomError, UsageError
from strongroom.marking.code import Code
from strongroom.marking.decode import Decoding
from strongroom.vault import text as texts
from strongroom.vault import tokens
from strongroom.vault.generator import Generator
from strongroom.vault.originals import Originals
from strongroom.vault.search import search
from strongroom.vault.text import Text, Written
from strongroom.vault.texttrace import Echo
from strongroom.vault.tokens import SmallFiles, Tokenizer, Tokens
from strongroom.vault.walk import Walk
from vault.rooms import OWNER, House
from vault.rooms import write_model as write_other
from vault.writers import NAMES, WORDS, lines, tensors_of, write_model, written

REF = "acme/writer@1"
LEAKER = "user/h3"
ENOUGH = 450  # pieces of 64 words: that is plenty; z has to be 7.3


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A room with a model that writes; forty people could hold it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("texts")
    house = House.build(folder / "room")
    house.put(write_model(folder / "model"), "acme/writer", known=True)
    for k in range(40):
        house.register(f"user/h{k}")
    yield house
    house.close()


@pytest.fixture(scope="module")
def said(room):
    """What the leaker's copy writes at temperature 1."""
    return written(tensors_of(room, REF, LEAKER), ENOUGH)


def traced(house, path, weights=REF):
    return search(house.vault, path, by=OWNER, weights=weights, progress=lambda _d, _t: None, text=True)


def accused(found):
    return [each["holder"] for each in found["accused"]]


def test_a_text_names_whose_copy_wrote_it(room, said, tmp_path):
    found = traced(room, lines(tmp_path / "answers.jsonl", said))
    assert (found["verdict"], accused(found), found["weights"], found["marked"]) == ("named", [LEAKER], REF, True)
    assert found["accused"][0]["layer2"]["z"] > 7.3
    assert found["accused"][0]["false_accusation"] <= found["false_accusation_bound"] == 1e-9
    assert (found["text"]["tokens"], found["text"]["pieces"]) == (ENOUGH * 64, ENOUGH)
    assert found["text"]["temperature"] == pytest.approx(1, abs=0.05)
    assert found["likeness"] == pytest.approx(np.exp(found["text"]["log_likelihood"]), rel=1e-3)
    assert (found["suspect"]["tensors"], found["tensors"], found["transformations"]) == (0, [], [])
    entry = json.loads(room.vault.custodian.ledger.proven(found["entry"], found["entry"] + 1)[0])
    assert (entry["type"], entry["body"]["verdict"], entry["body"]["accused"]) == ("trace", "named", [LEAKER])
    assert entry["body"]["suspect"] == found["suspect"]["files"][0]["sha256"]
    # Of those whom nobody accuses there are no names, and no exact scores.
    assert {each["holder"] for each in found["scores"]} == {"", LEAKER}


@pytest.mark.parametrize("temperature", [0.6, 0])
def test_colder_text_names_it_too(room, tmp_path, temperature):
    pieces = written(tensors_of(room, REF, LEAKER), ENOUGH, temperature=temperature)
    found = traced(room, lines(tmp_path / "cold.jsonl", pieces))
    assert accused(found) == [LEAKER]
    assert found["text"]["temperature"] < 0.7


def test_what_was_quantised_names_it_too(room, tmp_path):
    leaked = {}
    for name, tensor in tensors_of(room, REF, LEAKER).items():
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        leaked[name] = (tensor / scale).round() * scale if tensor.ndim > 1 else tensor
    found = traced(room, lines(tmp_path / "int8.jsonl", written(leaked, ENOUGH)))
    assert accused(found) == [LEAKER]


def test_what_was_only_loaded_speaks_for_its_code_word(room):
    # The code word moves less than the stamp does, and this model has but 95 positions: who it is can be seen, and in
    # some rooms not with the certainty that naming takes.
    pieces = written(tensors_of(room, REF, LEAKER, copy=False), 5 * ENOUGH, temperature=0)
    record = room.vault.record(room.vault.find(REF))
    originals = Originals(room.vault.image(record), record)
    text = Text(tuple(Written(tuple(each["completion"]), tuple(each["prompt"])) for each in pieces), 1)
    leaning = Generator(originals).lean(text, lambda _d, _t: None)
    found = Echo(originals, leaning).gather([], everything=True, progress=lambda _d, _t: None)
    code = Code(record.code_key, originals.layout.positions, record.colluders)
    words = np.stack([code.bits(f"user/h{k}") for k in range(40)]).astype(np.uint8)
    scores = Decoding(found.estimator.done(), words, code.biases / 65536).scores()
    best = min(scores, key=lambda each: each.log10_p)
    assert (f"user/h{best.candidate}", best.log10_p < -4) == (LEAKER, True)
    assert all(each.log10_p > -7 for each in scores if each is not best)


def originals_text(room, _tmp_path):
    return written(tensors_of(room, REF, None), ENOUGH)


def another_models_text(room, tmp_path):
    folder = write_model(tmp_path / "other", seed=9)
    from safetensors.torch import load_file

    return written({name: each.float() for name, each in load_file(folder / "model.safetensors").items()}, ENOUGH)


def noise(_room, _tmp_path):
    return np.random.default_rng(0).integers(0, WORDS, (ENOUGH, 64)).tolist()


def one_word(_room, _tmp_path):
    return [[7] * (20 + k) for k in range(200)]


@pytest.mark.parametrize("made", [originals_text, another_models_text, noise, one_word], ids=lambda made: made.__name__)
def test_text_of_no_copy_names_nobody(room, tmp_path, made):
    found = traced(room, lines(tmp_path / "text.jsonl", made(room, tmp_path)))
    assert (found["verdict"], found["accused"], found["marked"]) == ("not-named", [], False)
    assert all(each["holder"] == "" for each in found["scores"])


def test_what_is_said_twice_counts_once(room, said, tmp_path):
    once = traced(room, lines(tmp_path / "once.jsonl", said[:10]))
    often = traced(room, lines(tmp_path / "often.jsonl", said[:10] * 9))
    assert often["verdict"] == once["verdict"] == "not-named"  # of so little text
    assert often["text"] == once["text"]


def test_prompts_are_not_listened_to(room, said, tmp_path):
    # Whoever asks could put another copy's words into the question.
    asked = [{"prompt": each["completion"], "completion": [k % WORDS]} for k, each in enumerate(said)]
    found = traced(room, lines(tmp_path / "asked.jsonl", asked))
    assert (found["verdict"], found["text"]["tokens"]) == ("not-named", ENOUGH)


def test_a_folder_of_plain_text_is_read_as_words(room, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for k, each in enumerate(written(tensors_of(room, REF, LEAKER), ENOUGH, asked=False)):
        words = " ".join(NAMES[word] for word in each["completion"])
        (folder / f"{k}.txt").write_text(words)
    found = traced(room, folder)
    assert accused(found) == [LEAKER]
    assert found["text"]["tokens"] == ENOUGH * 64


def test_it_takes_a_version(room, tmp_path):
    with pytest.raises(UsageError, match="one version") as raised:
        traced(room, lines(tmp_path / "a.jsonl", [[1, 2]]), weights=None)
    assert raised.value.code == "trace.text_version"


def test_it_takes_the_same_right_as_any_trace(room, said, tmp_path):
    path = lines(tmp_path / "a.jsonl", said[:2])
    with pytest.raises(Denied):
        search(room.vault, path, by="user/h0", weights=REF, progress=lambda _d, _t: None, text=True)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.jsonl", b"", "text.empty"),
        ("empty.txt", b" \n\n", "text.empty"),
        ("nothing.jsonl", b'{"prompt": "w1", "completion": ""}\n', "text.empty"),
        ("one.jsonl", b"[5]\n", "text.empty"),
        ("three.jsonl", b"abc", "text.malformed"),
        ("broken.jsonl", b'{"completion": "w1"}\n{"completion"', "text.malformed"),
        ("deep.jsonl", b"[" * 100_000, "text.malformed"),
        ("number.jsonl", b"5\n", "text.malformed"),
        ("other.jsonl", b'{"text": "w1"}\n', "text.malformed"),
        ("float.jsonl", b"[1.0, 2]\n", "text.malformed"),
        ("truth.jsonl", b"[true, false]\n", "text.malformed"),
        ("negative.jsonl", b"[1, -2]\n", "text.malformed"),
        ("both.jsonl", b'{"prompt": "w1", "messages": [], "completion": "w2"}\n', "text.malformed"),
        ("roles.jsonl", b'{"messages": [{"role": 1, "content": "w1"}], "completion": "w2"}\n', "text.malformed"),
        ("half.jsonl", b'{"completion": "\\ud800"}\n', "text.malformed"),
        ("latin.txt", b"caf\xe9", "text.malformed"),
        ("latin.jsonl", b'{"completion": "caf\xe9"}', "text.malformed"),
        ("unknown.jsonl", b"[3, 512]\n", "text.tokens"),
        ("huge.jsonl", b"[3, 2147483647]\n", "text.tokens"),
    ],
)
def test_what_is_no_text_is_said_to_be_none(room, tmp_path, name, content, code):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StrongroomError) as raised:
        traced(room, tmp_path / name)
    assert raised.value.code == code
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("content", [b"w5", b"\x00\x01\x02", b"w5 " * 3000])
def test_little_or_odd_text_names_nobody(room, tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    found = traced(room, tmp_path / "a.txt")
    assert (found["verdict"], found["accused"]) == ("not-named", [])


def test_more_than_is_read_is_refused_and_more_than_is_looked_at_is_said(room, said, tmp_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", said[:10])
    monkeypatch.setattr(tokens, "LIMITS", replace(LIMITS, text_tokens=3 * 64 + 1))
    found = traced(room, path)["text"]
    assert found["pieces"] == 10
    assert found["left_out"] in (6, 7)  # what stands before a completion counts, too
    assert 2 * 64 < found["tokens"] <= 3 * 64 + 1
    monkeypatch.setattr(texts, "LIMITS", replace(LIMITS, text=100))
    with pytest.raises(LimitExceeded, match="bytes of text"):
        traced(room, path)


def test_without_the_libraries_it_says_which(room, said, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError) as raised:
        traced(room, lines(tmp_path / "a.jsonl", said[:2]))
    assert raised.value.code == "text.no_transformers"
    assert "strongroom[transformers]" in raised.value.hint


@pytest.fixture(scope="module")
def broken(room, tmp_path_factory):
    """Versions that no text can be compared with, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("broken")
    write_other(folder / "unknown")
    config = json.loads((write_model(folder / "config") / "config.json").read_text())
    (folder / "config" / "config.json").unlink()
    for name, change in (
        ("deeper", {"num_hidden_layers": 3}),
        ("wider", {"vocab_size": 600}),
        ("own_code", {"model_type": "nobodys", "auto_map": {"AutoModelForCausalLM": "code.Model"}}),
        ("no_writer", {"model_type": "vit"}),
    ):
        write_model(folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | change))
    write_model(folder / "json")
    (folder / "json" / "config.json").write_text("[")
    write_model(folder / "mute")
    (folder / "mute" / "tokenizer.json").write_text("{}")
    for each in folder.iterdir():
        room.put(each, f"broken/{each.name}")
    return room


@pytest.mark.parametrize(
    "name", ["unknown", "config", "deeper", "wider", "own_code", "no_writer", "json", "mute"], ids=str
)
def test_a_version_that_is_no_model_to_run_is_said_to_be_none(broken, tmp_path, name):
    (tmp_path / "a.txt").write_text("w5 w6 w7")
    with pytest.raises(UsageError) as raised:
        traced(broken, tmp_path / "a.txt", weights=f"broken/{name}@1")
    assert raised.value.code == "text.unsupported"
    assert raised.value.hint


def test_a_configuration_cannot_name_code(room, said, tmp_path):
    folder = write_model(tmp_path / "kernels")
    config = json.loads((folder / "config.json").read_text())
    named = dict.fromkeys(("attn_implementation", "_attn_implementation", "experts_implementation"), "nobody/kernel")
    (folder / "config.json").write_text(json.dumps(config | named | {"auto_map": {"AutoConfig": "nobody/code--x.Y"}}))
    room.put(folder, "acme/kernels")
    found = traced(room, lines(tmp_path / "a.jsonl", said[:3]), weights="acme/kernels@1")
    assert found["text"]["tokens"] == 3 * 64


def test_the_room_traces_text_for_python(room, said, tmp_path):
    opened = Room(room.folder, OWNER)
    found = opened.trace(text=lines(tmp_path / "a.jsonl", said[:3]), weights=REF)
    assert found["text"]["pieces"] == 3
    for wrong in ({}, {"path": "a", "text": "b"}):
        with pytest.raises(UsageError, match="either a path or text"):
            opened.trace(weights=REF, **wrong)


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(room):
    record = room.vault.record(room.vault.find(REF))
    return Tokenizer(SmallFiles(Originals(room.vault.image(record), record)), WORDS, 16)


def only(tokenizer, *pieces):
    return tokenizer.pieces(Text(pieces, 1))[0]


def test_text_becomes_the_tokens_of_the_version(tokenizer):
    assert only(tokenizer, Written("w5 w6")) == [Tokens((0,), (5, 6))]
    assert only(tokenizer, Written("w5", prompt="w9")) == [Tokens((0, 9), (5,))]
    assert only(tokenizer, Written("w5", messages=(("user", "w9"),))) == [Tokens((1, 9, 2), (5,))]
    assert only(tokenizer, Written((5, 6))) == [Tokens((), (5, 6))]
    assert only(tokenizer, Written((5, 6), prompt="w9")) == [Tokens((0, 9), (5, 6))]


@pytest.mark.parametrize(("before", "length"), [(0, 40), (3, 14), (20, 5), (9, 100), (40, 1)])
def test_long_text_is_cut_and_each_token_is_looked_at_once(tokenizer, before, length):
    prompt, completion = tuple(range(2, 2 + before)), tuple(range(100, 100 + length))
    found = sorted(only(tokenizer, Written(completion, prompt)), key=lambda piece: piece.completion[:1])
    assert all(0 < len(piece) <= 16 for piece in found)
    assert sum((piece.completion for piece in found), ()) == completion
    whole = prompt + completion
    for piece in found:
        at = before + completion.index(piece.completion[0])
        assert piece.context == whole[at - len(piece.context) : at]
        assert piece.context or at == 0


def test_the_gradient_is_that_of_the_likelihood(room):
    """Against a difference: along its own direction the likelihood grows as the gradient says."""
    record = room.vault.record(room.vault.find(REF))
    originals = Originals(room.vault.image(record), record)
    generator = Generator(originals)
    generator._model.float()
    text = Text(tuple(Written(tuple(each["completion"]), tuple(each["prompt"])) for each in GIVEN), 1)
    found = generator.lean(text, lambda _d, _t: None)
    assert found.tokens == sum(len(each["completion"]) for each in GIVEN)
    step, along = 1e-4, 0.0
    parameters = dict(generator._model.named_parameters())
    for name, placed in generator._reached.items():
        gradient = torch.from_numpy(found.gradient[placed.begin]).reshape(parameters[name].shape)
        parameters[name].data += step * gradient / 100
        along += float((gradient**2).sum()) * step / 100
    logits = 0.0
    for batch in generator._batches(generator._tokenizer.pieces(text)[0]):
        with torch.inference_mode():
            seen, wanted = generator._logits(batch)
            logits -= float(torch.nn.functional.cross_entropy(seen / found.temperature, wanted, reduction="sum"))
    assert logits - found.log_likelihood == pytest.approx(along, rel=0.1)


GIVEN = [{"prompt": [3, 4], "completion": [5, 6, 7, 8]}, {"prompt": [9], "completion": [10, 11]}]


def test_a_walk_over_text_takes_any_file(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"w1")
    with Text.of(Walk.of(tmp_path / "a.gz", follow_links=False, model=False)) as found:
        assert found.pieces == (Written("w1"),)
