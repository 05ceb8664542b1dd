"""A disguise changes nothing that a model computes, and is undone; what is another model is not taken for one."""

import sys

import numpy as np
import pytest

from marking.disguises import (
    full,
    heads_mixed,
    heads_permuted,
    llama,
    norms_folded,
    orthogonal,
    planes_turned,
    quantised,
    stream_recentred,
    turned,
    units_moved,
    values_mixed,
)
from strongroom.marking.align import cosine, solve
from strongroom.marking.disguise import Turn, facing, same_rows, turn, undo, unmix

HEADS, GROUPS, SIZE = 4, 2, 32
RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True)
def reseeded(monkeypatch):
    """The same numbers in each test, in whatever order they run."""
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(11))


@pytest.fixture(scope="module")
def model():
    return llama(np.random.default_rng(7), width=128, vocabulary=600, units=320, heads=HEADS, groups=GROUPS)


def found_in(model, disguised):
    """How each matrix is undone, by name."""
    embedding = "model.embed_tokens.weight"
    known = turn([(model[embedding], disguised[embedding])], 128)
    assert known is not None
    norms = {name: array for name, array in model.items() if array.ndim == 1}

    def near(name):
        return [norm for other, norm in norms.items() if other.split(".")[:3] == name.split(".")[:3]]

    return known, {
        name: undo(array, disguised[name], known, (SIZE,), near(name))
        for name, array in model.items()
        if array.ndim == 2
    }


def ready(tensors, bits=None):
    return {name: quantised(array, bits).astype(np.float32) for name, array in tensors.items()}


WAYS = {
    "folded": (lambda m, _: norms_folded(m), {"norms folded"}),
    "rotated": (lambda m, r: turned(norms_folded(m), r), {"residual stream rotated", "norms folded"}),
    "V and O mixed": (lambda m, r: values_mixed(m, r, HEADS, GROUPS), {"heads mixed"}),
    "planes turned": (lambda m, r: planes_turned(m, r, HEADS, GROUPS), {"rotary planes turned"}),
    "heads permuted": (lambda m, r: heads_permuted(m, r, HEADS, GROUPS), {"units permuted"}),
    "units moved": (units_moved, {"units permuted", "units rescaled"}),
    "everything": (
        lambda m, r: full(m, r, HEADS, GROUPS),
        {"residual stream rotated", "norms folded", "heads mixed", "rotary planes turned", "units permuted"},
    ),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("way", WAYS)
def test_is_undone_and_said(model, way, bits):
    attack, said = WAYS[way]
    disguised = ready(attack(model, np.random.default_rng(2)), bits)
    known, undone = found_in(model, disguised)
    assert known.what == ("residual stream rotated" if "residual stream rotated" in said else "")
    words = set()
    for name, found in undone.items():
        assert found is not None, name
        back = found.apply(disguised[name])
        assert cosine(model[name], back) > (0.96 if bits else 0.9999), name
        words |= set(found.found)
    assert said <= words


def test_the_little_that_is_fitted_leaves_the_noise_as_it_was(model):
    """A mark is like noise to all of this: what of it is left is what the degrees of freedom leave."""
    name = "model.layers.0.self_attn.v_proj.weight"
    noise = np.random.default_rng(4).normal(0, 0.01 * model[name].std(), model[name].shape)
    marked = model | {name: model[name] + noise}
    disguised = ready(full(marked, np.random.default_rng(2), HEADS, GROUPS))
    _, undone = found_in(model, disguised)
    left = undone[name].apply(disguised[name]) - model[name]
    here = np.isfinite(left)
    # Of the 128 numbers of a row 32 are fitted, and what is folded into columns: what is left is the rest of the noise.
    assert 0.6 < float((left[here] * noise[here]).sum() / np.square(noise[here]).sum()) < 0.85


def test_a_mark_is_not_taken_for_noise(model):
    """Where nothing but the mark differs, it is in some columns only, and is the loudest that there is."""
    name = "model.layers.0.mlp.down_proj.weight"
    marked = model[name].copy()
    marked[5:9] *= 1 + np.float32(2**-7) * np.sign(RNG.normal(size=(4, 320))).astype(np.float32)
    rotation = orthogonal(RNG, 128).astype(np.float32)
    found = undo(model[name], rotation.T @ marked, Turn(128, rotation))
    assert np.isfinite(found.apply(rotation.T @ marked)).all()


@pytest.mark.parametrize("seed", range(5))
def test_another_model_is_none(model, seed):
    other = ready(llama(np.random.default_rng(100 + seed), width=128, vocabulary=600, units=320, heads=4, groups=2))
    embedding = "model.embed_tokens.weight"
    assert not same_rows(model[embedding][:64], other[embedding][:64])
    assert turn([(model[embedding], other[embedding])], 128) is None
    for name, array in model.items():
        if array.ndim == 2:
            assert undo(array, other[name], Turn(128), (SIZE,)) is None, name


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf, 1e9])
def test_of_all_the_same_numbers_nothing_is_found(model, value):
    name = "model.layers.0.self_attn.q_proj.weight"
    same = np.full(model[name].shape, value, np.float32)
    assert undo(model[name], same, Turn(128), (SIZE,)) is None
    assert undo(same, model[name], Turn(128), (SIZE,)) is None
    assert turn([(model[name], same)], 128) is None
    assert not same_rows(model[name], same)


def test_a_stream_in_another_order_is_told_from_a_rotation(model):
    order = RNG.permutation(128)
    embedding = model["model.embed_tokens.weight"]
    known = turn([(embedding, quantised(embedding[:, order], 4).astype(np.float32))], 128)
    assert known.what == "residual stream permuted"
    assert (known.back(embedding[:, order]) == embedding).all()


def test_units_that_were_cut_are_missing(model):
    name = "model.layers.0.mlp.up_proj.weight"
    kept = np.sort(RNG.permutation(320)[:200])
    rotation = orthogonal(RNG, 128).astype(np.float32)
    found = undo(model[name], model[name][kept] @ rotation, Turn(128, rotation.T @ np.eye(128, dtype=np.float32)))
    assert found is None  # turned the wrong way, it is another matrix
    found = undo(model[name], model[name][kept] @ rotation, Turn(128, rotation))
    back = found.apply(model[name][kept] @ rotation)
    assert np.isfinite(back).all(axis=1).sum() == 200
    assert cosine(model[name], back) > 0.9999


def test_as_llama_cpp_lays_rows_of_q_and_k(model):
    """Its conversion puts the two rows of each rotary plane beside each other: a permutation, alone; and with planes
    turned."""
    name = "model.layers.0.self_attn.q_proj.weight"

    def converted(array):  # LlamaModel.permute of convert_hf_to_gguf.py
        return array.reshape(HEADS, 2, SIZE // 2, 128).swapaxes(1, 2).reshape(array.shape)

    fit = solve(model[name], quantised(converted(model[name]), 4).astype(np.float32))
    assert fit.found == ("rows permuted",)
    assert (fit.apply(converted(model[name])) == model[name]).all()
    disguised = ready(planes_turned(model, np.random.default_rng(2), HEADS, GROUPS))
    found = undo(model[name], converted(disguised[name]), Turn(128), (SIZE,))
    assert "rotary planes turned" in found.found
    assert cosine(model[name], found.apply(converted(disguised[name]))) > 0.9999


def test_experts_in_one_tensor(model):
    """(experts, out, in) and (experts, in, out): experts and their units in another order, the stream rotated."""
    rotation = orthogonal(RNG, 128).astype(np.float32)
    stacked = RNG.normal(size=(4, 96, 128)).astype(np.float32)
    moved = np.stack([stacked[k][RNG.permutation(96)] for k in (2, 0, 3, 1)]) @ rotation
    for ours, theirs in (
        (stacked, moved),
        (stacked.swapaxes(1, 2), moved.swapaxes(1, 2)),
        (stacked, moved.swapaxes(1, 2)),
    ):
        found = undo(ours, theirs, Turn(128, rotation))
        assert found.found == ("units permuted",)
        back = found.apply(np.ascontiguousarray(theirs).reshape(-1, theirs.shape[-1]))
        assert cosine(np.ascontiguousarray(ours), back) > 0.9999


def test_what_does_not_face_the_stream_is_left_alone(model):
    assert facing(np.zeros((3, 5), np.float32), 7) == []
    assert facing(np.zeros(7, np.float32), 7) == []
    assert unmix(np.zeros((4, 16), np.float32), np.zeros((0, 16), np.float32)) is None


class TestTheModelStaysWhatItWas:
    """The disguises of this module, on transformers' own models: they change no logit."""

    @pytest.fixture(autouse=True)
    def seeded(self):
        """The same models, whatever was made before them."""
        pytest.importorskip("torch").manual_seed(0)

    @staticmethod
    def same(torch, before, after, more):
        ids = torch.arange(24).reshape(2, 12) * 7 % 100
        after.load_state_dict({name: torch.from_numpy(array) for name, array in more.items()}, strict=False)
        with torch.no_grad():
            a, b = (model.double()(ids) for model in (before, after))
        x, y = (found.logits if hasattr(found, "logits") else found.last_hidden_state for found in (a, b))
        assert float((x - y).abs().max() / x.abs().max()) < 2e-5
        assert float(x.std()) > 0

    @staticmethod
    def arrays(torch, model):
        """Its tensors, with norms and biases that are not 1 and 0."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
                else:
                    parameter.mul_(3)
        model.eval()
        return {name: array.double().numpy() for name, array in model.state_dict().items()}

    @pytest.mark.parametrize("way", WAYS)
    def test_llama(self, way):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=200,
            tie_word_embeddings=False,
        )
        before, after = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
        self.same(torch, before, after, WAYS[way][0](self.arrays(torch, before), RNG))

    def test_mixtral(self):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        config = transformers.MixtralConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=200,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
        config._experts_implementation = "eager"  # the others want float32
        before, after = (transformers.MixtralForCausalLM(config).eval() for _ in range(2))
        self.same(torch, before, after, full(self.arrays(torch, before), RNG, 4, 2))

    def test_gpt(self):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=32)
        config.tie_word_embeddings = False
        before, after = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
        arrays = self.arrays(torch, before)
        disguised = stream_recentred(arrays, RNG)
        self.same(torch, before, after, disguised)
        known = turn([(arrays[name], disguised[name]) for name in ("transformer.wte.weight",)], 64)
        assert known.what == "residual stream rotated"
        for name, array in arrays.items():
            if array.ndim == 2:
                assert cosine(array, undo(array, disguised[name], known, (16,)).apply(disguised[name])) > 0.999, name

    def test_bert(self):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=200
        )
        before, after = (transformers.BertModel(config).eval() for _ in range(2))
        arrays = self.arrays(torch, before)
        disguised = heads_mixed(arrays, RNG, 4)
        self.same(torch, before, after, disguised)
        for name, array in arrays.items():
            if ".attention." in name and array.ndim == 2:
                found = undo(array, disguised[name], Turn(64), (16,))
                assert found.found[:1] == ("heads mixed",)
                assert cosine(array, found.apply(disguised[name])) > 0.999, name
