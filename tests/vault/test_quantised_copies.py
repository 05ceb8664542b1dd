"""Copies of floats that leave quantised: marked and stamped before the quantiser, reproducible, loaded by the field's
software, and traced to whom they were given."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from strongroom.marking.elements import values
from strongroom.vault.copies import Copy
from strongroom.vault.forms import planned
from strongroom.vault.originals import Originals
from strongroom.vault.quantised import Quantised
from strongroom.vault.suspect import Suspect
from vault.rooms import OWNER, House, safetensors_file
from vault.test_trace import write

HOLDERS = [OWNER, *(f"user/h{k}" for k in range(20))]
LAYERS = {
    f"model.layers.{layer}.{name}.weight": (dtype, shape)
    for layer in range(3)
    for name, dtype, shape in (
        ("self_attn.q_proj", "BF16", (256, 256)),
        ("self_attn.o_proj", "BF16", (256, 256)),
        ("mlp.up_proj", "F32", (640, 256)),
        ("mlp.down_proj", "F16", (256, 640)),
        ("mlp.gate", "BF16", (4, 256)),
        ("input_layernorm", "F32", (256,)),
    )
}
EMBEDDING = {"model.embed_tokens.weight": ("BF16", (800, 256))}
CONFIG = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-06, "vocab_size": 800}
FORMS = {"packed": ("int4", "int8"), "blocks": ("q4_0", "q8_0")}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    house = House.build(folder / "room")
    packed = folder / "packed"
    packed.mkdir()
    shards = {"model-00001-of-00002.safetensors": EMBEDDING, "model-00002-of-00002.safetensors": LAYERS}
    for seed, (name, tensors) in enumerate(shards.items()):
        safetensors_file(packed / name, tensors, seed)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in shards for name in shards[file]}}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    (packed / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    house.put(packed, "packed")
    blocks(folder / "blocks.gguf")
    house.put(folder / "blocks.gguf", "blocks")
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def blocks(path):
    """A GGUF file of floats; its tensors' names are llama.cpp's."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, kind, shape in (
        ("token_embd.weight", np.float16, (800, 256)),
        ("output_norm.weight", np.float32, (256,)),
        ("blk.0.attn_q.weight", np.float16, (256, 256)),
        ("blk.0.ffn_up.weight", np.float32, (640, 256)),
        ("blk.0.ffn_gate_inp.weight", np.float32, (4, 256)),
        ("blk.0.ffn_down.weight", np.float16, (256, 640)),
        ("blk.1.ffn_up.weight", "BF16", (640, 256)),
        ("blk.1.ffn_down.weight", np.float16, (256, 640)),
    ):
        weights = rng.normal(0, 0.05, shape).astype(np.float32)
        if kind == "BF16":
            data = (weights.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, weights.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def opened(house, name):
    record = house.vault.record(house.vault.find(name))
    return Originals(house.vault.image(record), record), record


def floats(house, name, holder):
    """The tensors of a holder's copy as they are before the quantiser, float32."""
    originals, record = opened(house, name)
    image = Copy(originals, record, holder).read(0, originals.layout.image)
    found = {}
    for each in originals.tensors():
        dtype = each.info.dtype.name
        integer = "<u4" if dtype == "F32" else "<u2"
        found[each.info.name] = values(np.frombuffer(image[each.begin : each.end], integer), dtype).reshape(
            each.info.shape
        )
    return found


def copied(house, name, holder, form):
    originals, record = opened(house, name)
    return Quantised(Copy(originals, record, holder), planned(originals, form))


def taken(house, name, holder, form, folder):
    """The files of a quantised copy, in a new folder."""
    copy = copied(house, name, holder, form)
    image = copy.read(0, copy.image)
    folder.mkdir()
    for file in copy.files:
        (folder / file.path).write_bytes(image[file.offset : file.offset + file.bytes])
    return folder


def tensors_of(path):
    """What a found model has, read back as a trace reads it."""
    with Suspect.opened(path) as suspect:
        return {
            name: suspect.read(name).reshape(tensor.info.shape).copy() for name, tensor in suspect.tensors.items()
        }


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_any_range_is_the_same_however_it_is_cut(house, name, form):
    """So a piece that is asked for again, of whichever custodian, is the same ciphertext."""
    whole = bytes((copy := copied(house, name, HOLDERS[1], form)).read(0, copy.image))
    rng = np.random.default_rng(1)
    for _ in range(40):
        begin, end = sorted(int(each) for each in rng.integers(0, copy.image + 1, 2))
        end = min(end, begin + 200_000)
        again = copied(house, name, HOLDERS[1], form) if rng.random() < 0.2 else copy
        assert bytes(again.read(begin, end)) == whole[begin:end]
    assert bytes(copied(house, name, HOLDERS[2], form).read(0, copy.image)) != whole


@pytest.mark.parametrize(("form", "bits", "group"), [("int4", 4, 128), ("int8", 8, None)])
def test_what_compressed_tensors_would_read(house, tmp_path, form, bits, group):
    """By its public layout, with nothing of ours."""
    folder = taken(house, "packed", HOLDERS[1], form, tmp_path / "out")
    before = floats(house, "packed", HOLDERS[1])
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == CONFIG
    assert settings["format"] == "pack-quantized"
    weights = settings["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, group)
    assert settings["ignore"] == ["lm_head", "model.embed_tokens", *(f"model.layers.{k}.mlp.gate" for k in range(3))]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    size = 0
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        head = file.read_bytes()
        header = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
        assert {name: index["weight_map"][name] for name in header} == dict.fromkeys(header, file.name)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            assert begin % {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}[entry["dtype"]] == 0
            size += end - begin
            at = 8 + int.from_bytes(head[:8], "little")
            found[name] = entry["dtype"], entry["shape"], head[at + begin : at + end]
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == size
    quantised = 0
    for name, w in before.items():
        if f"{name}_packed" not in found:
            dtype, shape, data = found[name]
            assert values(np.frombuffer(data, "<u4" if dtype == "F32" else "<u2"), dtype).tobytes() == w.tobytes()
            continue
        assert name not in found
        assert np.frombuffer(found[f"{name}_shape"][2], "<i8").tolist() == list(w.shape)
        dtype, shape, data = found[f"{name}_scale"]
        assert shape == [len(w), w.shape[1] // group if group else 1]
        scales = values(np.frombuffer(data, "<u4" if dtype == "F32" else "<u2"), dtype).reshape(shape)
        words = np.frombuffer(found[f"{name}_packed"][2], "<u4").reshape(len(w), -1).astype(np.int64)
        shifts = np.arange(0, 32, bits)
        codes = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(w.shape) - 2 ** (bits - 1)
        near = codes * np.repeat(scales, w.shape[1] // shape[1], axis=1)
        steps = np.repeat(scales, w.shape[1] // shape[1], axis=1)
        # Half a step, where nothing was cut off at the end of the range; and the scale is the largest one's.
        assert (np.abs(near - w) <= steps * 0.51 + 1e-9).mean() > 0.995
        most = np.abs(w).reshape(len(w), shape[1], -1).max(axis=2)
        assert np.allclose(scales, most / (2**bits - 1) * 2, rtol=0.005)
        quantised += w.size
    assert quantised > 0.6 * sum(w.size for w in before.values())
    # And what a trace reads of it is the same.
    again = tensors_of(folder)
    assert set(again) == set(before)
    assert np.abs(again["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]).max() < 0.02


@pytest.mark.parametrize("form", FORMS["blocks"])
def test_what_ggml_would_write(house, tmp_path, form):
    """Each tensor bit for bit what the gguf package makes of the marked floats, in a file that it reads."""
    folder = taken(house, "blocks", HOLDERS[1], form, tmp_path / "out")
    before = floats(house, "blocks", HOLDERS[1])
    reader = gguf.GGUFReader(folder / "blocks.gguf")
    assert int(reader.get_field("general.file_type").contents()) == {"q8_0": 7, "q4_0": 2}[form]
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b", "c"]
    types = {}
    for tensor in reader.tensors:
        types[tensor.name] = tensor.tensor_type.name
        w = before[tensor.name]
        if tensor.tensor_type.name in ("Q8_0", "Q4_0"):
            assert gguf.quants.quantize(w, tensor.tensor_type).tobytes() == tensor.data.tobytes()
        else:
            assert tensor.data.astype(np.float32).tobytes() == w.tobytes()
    kept = {"output_norm.weight": "F32", "blk.0.ffn_gate_inp.weight": "F32", "token_embd.weight": "Q8_0"}
    assert types == {name: kept.get(name, form.upper()) for name in before}


def each_(function):
    return lambda folder, path: write(path, {name: function(w) for name, w in tensors_of(folder).items()})


LEAKS = {
    "as it is": lambda folder, _path: folder,
    "turned back into floats, renamed": lambda folder, path: write(
        path, {f"w.{k}": w for k, w in enumerate(tensors_of(folder).values())}
    ),
    "cast to half": lambda folder, path: write(path, tensors_of(folder), "F16"),
    "with noise": each_(lambda w: w + np.random.default_rng(1).normal(0, 0.1 * w.std(), w.shape)),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_a_leak_names_its_holder(house, tmp_path, name, form, leak):
    folder = taken(house, name, HOLDERS[3], form, tmp_path / "out")
    found = house.search(LEAKS[leak](folder, tmp_path / "leak.safetensors"))
    print(name, form, leak, [(a["layer2"], a["layer1"]) for a in found["accused"]])
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[3]]
    assert found["weights"] == f"{name}@1"
    assert found["accused"][0]["false_accusation"] <= 1e-9


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_the_mean_of_eight_names_them(house, tmp_path, name, form):
    guilty = HOLDERS[2:10]
    every = [
        tensors_of(taken(house, name, holder, form, tmp_path / f"out{k}")) for k, holder in enumerate(guilty)
    ]
    mean = {each: np.mean([tensors[each] for tensors in every], axis=0) for each in every[0]}
    found = house.search(write(tmp_path / "leak.safetensors", mean))
    print(name, form, [(a["layer2"], a["layer1"]) for a in found["accused"]])
    named = {each["holder"] for each in found["accused"]}
    assert named
    assert named <= set(guilty)
    assert found["false_accusation_bound"] <= 1e-9
