"""Quantised copies of models that are more than one stack of linear layers: with towers for images, experts, an encoder
and a decoder, or weights that are used twice. Small ones of transformers' own classes, loaded by it again."""

from __future__ import annotations

import json

import pytest

from strongroom.errors import UsageError
from strongroom.vault.forms import planned
from vault.rooms import House
from vault.test_quantised_copies import HOLDERS, opened, taken, tensors_of
from vault.test_trace import write

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

TEXT = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.arange(20, 40)[None]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    house = House.build(tmp_path_factory.mktemp("shapes") / "room")
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def llava():
    # A tower of a size that is a multiple of no group.
    vision = {"hidden_size": 40, "intermediate_size": 84, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=40),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=3,
        image_seq_length=4,
    )
    ids = torch.cat([torch.full((1, 4), 3), IDS], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 8, 8)}
    return transformers.LlavaForConditionalGeneration(config), inputs


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 40, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 3, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
        tie_word_embeddings=True,
    )
    ids = torch.cat([torch.tensor([[5, 3, 3, 3, 3, 6]]), IDS], 1)
    image = {"pixel_values": torch.rand(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    types = (ids == 3).int()
    return transformers.Qwen2VLForConditionalGeneration(config), {"input_ids": ids, "mm_token_type_ids": types, **image}


def mixtral():
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), {"input_ids": IDS}


def qwen2_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = transformers.Qwen2MoeConfig(**TEXT, **experts, shared_expert_intermediate_size=128)
    return transformers.Qwen2MoeForCausalLM(config), {"input_ids": IDS}


def t5():
    """Which transformers has no way to load packed: it looks for the floats of each layer that it makes."""
    config = transformers.T5Config(vocab_size=200, d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32)
    return transformers.T5ForConditionalGeneration(config), {}


def whisper():
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 256))}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=200,
        d_model=128,
        num_mel_bins=20,
        max_source_positions=8,
        begin_suppress_tokens=None,
        **layers,
        **heads,
        **tokens,
    )
    inputs = {"input_features": torch.rand(1, 20, 16), "decoder_input_ids": IDS}
    return transformers.WhisperForConditionalGeneration(config), inputs


def gpt_oss():
    config = transformers.GptOssConfig(**TEXT, head_dim=32, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config), {}


def mamba():
    config = transformers.MambaConfig(vocab_size=200, hidden_size=64, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config), {}


def put(house, tmp_path, shape, name):
    torch.manual_seed(0)
    model, inputs = shape()
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "model")
    house.put(tmp_path / "model", name)
    return model, {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def differ(one, other):
    return float((one - other).std() / other.std())


@pytest.mark.parametrize(
    ("shape", "form"),
    [(llava, "int4"), (qwen2_vl, "int8"), (mixtral, "int4"), (qwen2_moe, "int8"), (whisper, "int4")],
)
def test_it_is_loaded_as_it_is_and_names_its_holder(house, tmp_path, shape, form):
    """By transformers, to the very weights that a trace reads of it: every layer was found, none taken for another."""
    name = shape.__name__.replace("_", "-")
    model, inputs = put(house, tmp_path, shape, name)
    folder = taken(house, name, HOLDERS[1], form, tmp_path / "out")
    same = tmp_path / "same"
    model.config.save_pretrained(same)
    write(same / "model.safetensors", tensors_of(folder))
    after, before = (logits(type(model).from_pretrained(each), inputs) for each in (folder, same))
    assert torch.equal(after, before)
    assert differ(after, logits(model, inputs)) < (0.3 if form == "int4" else 0.1)  # another expert is chosen at times
    found = house.search(folder)
    assert ([each["holder"] for each in found["accused"]], found["weights"]) == ([HOLDERS[1]], f"{name}@1")
    assert found["accused"][0]["false_accusation"] <= 1e-9


@pytest.mark.parametrize(("shape", "code"), [(gpt_oss, "form.part"), (mamba, "form.nothing"), (t5, "form.nothing")])
def test_what_would_stay_floats_for_the_most_part_is_refused(house, tmp_path, shape, code):
    put(house, tmp_path, shape, shape.__name__.replace("_", "-"))
    with pytest.raises(UsageError) as caught:
        planned(opened(house, shape.__name__.replace("_", "-"))[0], "int8")
    assert caught.value.code == code
    assert "without --quantise" in caught.value.hint


def test_towers_of_other_senses_stay_floats(house, tmp_path):
    """Beside layers of the same names that do not."""
    put(house, tmp_path, llava, "towers")
    folder = taken(house, "towers", HOLDERS[1], "int4", tmp_path / "out")
    head = (folder / "model.safetensors").read_bytes()
    names = set(json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")]))
    stems = {name.removesuffix("_packed") for name in names if name.endswith("_packed")}
    assert len(stems) == 7
    assert all("language_model" in name for name in stems)
    assert sum(name.endswith(".q_proj.weight") for name in names) == 2
