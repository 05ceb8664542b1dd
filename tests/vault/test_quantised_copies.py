"""Copies of floats that leave quantised: marked and stamped before the quantiser, reproducible, loaded by the field's
software, and traced to whom they were given."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

from strongroom.client.receive import receive
from strongroom.errors import Denied, Tampered, UsageError
from strongroom.formats.copybundle import CopyBundle
from strongroom.marking import quantiser
from strongroom.marking.elements import values
from strongroom.vault import copies
from strongroom.vault.copies import Copies, Copy
from strongroom.vault.forms import planned
from strongroom.vault.originals import Originals
from strongroom.vault.quantised import Quantised
from strongroom.vault.suspect import Suspect
from vault.rooms import OWNER, House, safetensors_file
from vault.test_release import REF, hall, remembered, template  # noqa: F401 - fixtures
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
HEADS = r"re:(?:.*\.)?(?:lm_head(?:\..*)?|decoder|proj_out|embed_out|output_projection"
HEADS += "|vocab_projector|generator_lm_head|lm_loss)$"
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
    house.put(packed, "packed", known=True)
    blocks(folder / "blocks.gguf")
    house.put(folder / "blocks.gguf", "blocks", known=True)
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
        ("blk.1.ffn_up_exps.weight", np.float16, (2, 64, 128)),
        ("blk.1.ssm_dt.weight", np.float16, (128, 48)),
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
        return {name: suspect.read(name).reshape(tensor.info.shape).copy() for name, tensor in suspect.tensors.items()}


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
    assert settings["ignore"] == ["lm_head", HEADS, "re:(?:.*\\.)?embed_tokens$", "re:(?:.*\\.)?gate$"]
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
    kept["blk.1.ssm_dt.weight"] = "F16"  # its rows are no whole blocks
    assert types == {name: kept.get(name, form.upper()) for name in before}


def each_(function):
    return lambda folder, path: write(path, {name: function(w) for name, w in tensors_of(folder).items()})


LEAKS = {
    "as it is": lambda folder, _path: folder,
    "turned back into floats, renamed, cast to half": lambda folder, path: write(
        path, {f"w.{k}": w for k, w in enumerate(tensors_of(folder).values())}, "F16"
    ),
    "with noise": each_(lambda w: w + np.random.default_rng(1).normal(0, 0.1 * w.std(), w.shape)),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_a_leak_names_its_holder(house, tmp_path, name, form, leak):
    folder = taken(house, name, HOLDERS[3], form, tmp_path / "out")
    found = house.search(LEAKS[leak](folder, tmp_path / "leak.safetensors"))
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[3]]
    assert found["weights"] == f"{name}@1"
    assert found["accused"][0]["false_accusation"] <= 1e-9


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_the_mean_of_eight_names_them(house, tmp_path, name, form):
    guilty = HOLDERS[2:10]
    every = [tensors_of(taken(house, name, holder, form, tmp_path / f"out{k}")) for k, holder in enumerate(guilty)]
    mean = {each: np.mean([tensors[each] for tensors in every], axis=0) for each in every[0]}
    found = house.search(write(tmp_path / "leak.safetensors", mean))
    named = {each["holder"] for each in found["accused"]}
    assert len(named) >= 4
    assert named <= set(guilty)
    assert found["false_accusation_bound"] <= 1e-9


# -- asked for, given and recorded ------------------------------------------------------------------------------------


class TestTaken:
    """By its holder, out of a team's room."""

    def test_it_is_recorded_and_written_as_it_can_be_written_again(self, hall, tmp_path):  # noqa: F811
        with hall.room("user/ana") as ana:
            told = ana.copy(REF, "user/ana", tmp_path / "out", quantise="int4")
        release, copy = (hall.entries()[at] for at in (-2, -1))
        assert (release.body["form"], told["form"], copy.body["bytes"]) == ("int4", "int4", told["bytes"])
        record = hall.vault.record(hall.vault.find(REF))
        again = Quantised(
            Copy(originals := Originals(hall.vault.image(record), record), record, "user/ana"),
            planned(originals, "int4"),
        )
        for file in again.files:
            data = bytes(again.read(file.offset, file.offset + file.bytes))
            assert (tmp_path / "out" / file.path).read_bytes() == data
        assert told["bytes"] == sum(file.bytes for file in again.files) < sum(f.bytes for f in originals.layout.files)
        assert told["carries_marks"]
        hall.verify()

    def test_a_form_is_planned_once_for_a_revision(self, hall, monkeypatch):  # noqa: F811
        """Before the release is recorded, and not again for what is given out after."""
        forms = []
        monkeypatch.setattr(copies, "planned", lambda *given: forms.append(given[1]) or planned(*given))
        for form in ("int4", "int8", "int4"):
            hall.received(action="copy", body={"form": form})
        assert forms == ["int4", "int8"]
        with hall.room("user/olga") as olga:
            olga.rotate(REF)
        hall.received(action="copy", body={"form": "int4"})
        assert forms == ["int4", "int8", "int4"]

    def test_a_piece_is_the_same_from_whichever_custodian(self, hall):  # noqa: F811
        with hall.room("user/ana") as ana:
            found = [receive(hall.vault, ana._say, "user/ana", REF, "copy", form=form) for form in ("int4", "int8")]
        assert all(isinstance(each.bundle, CopyBundle) for each in found)
        pieces = [hall.vault.copies.read(f"copies/{each.index}/0") for each in found]
        assert found[0].bundle.key != found[1].bundle.key
        another = hall.again()
        assert [another.vault.copies.read(f"copies/{each.index}/0") for each in found] == pieces
        another.close()

    def test_a_form_that_does_not_fit_is_refused_before_anything_is_recorded_as_given(self, hall, tmp_path):  # noqa: F811
        with hall.room("user/ana") as ana, hall.records("user/ana", "form.kind", action="copy"):
            ana.copy(REF, "user/ana", tmp_path / "out", quantise="q8_0")
        assert not list(tmp_path.glob("*out*"))
        with hall.log.view() as state:
            assert not any(lease.used for lease in state.leases.values())

    def test_who_may_not_copy_is_told_nothing_of_what_would_fit(self, hall, tmp_path, monkeypatch):  # noqa: F811
        monkeypatch.delattr(Copies, "unfit")  # nor is it found out, which costs more than a refusal
        with hall.room("user/amy") as amy, pytest.raises(Denied):
            amy.copy(REF, "user/amy", tmp_path / "out", quantise="q8_0")

    def test_a_load_has_no_form(self, hall):  # noqa: F811
        with hall.records("user/ana", "release.form"):
            hall.release(body={"form": "int4"})

    @pytest.mark.parametrize("form", ["int3", "INT4", "", 4, None])
    def test_of_forms_that_there_are_not(self, hall, tmp_path, form):  # noqa: F811
        with hall.room("user/ana") as ana:
            if form is not None:
                with pytest.raises(UsageError) as caught:
                    ana.copy(REF, "user/ana", tmp_path / "out", quantise=form)
                assert caught.value.code == "copy.form"
            with pytest.raises(ValueError, match="not a statement"):
                hall.taking(action="copy", body={"form": form})

    def test_floats_are_no_answer_to_who_has_signed_for_less(self, hall, remembered):  # noqa: F811
        statement, key, _ = hall.received(action="copy", body={"form": "int4"})
        _, _, other = hall.received(action="copy")
        for entry in (other, hall.received(action="copy", body={"form": "int8"})[2]):
            with pytest.raises(Tampered):
                hall.accept(statement, key, entry, remembered)
        assert key.opened == 0


def one(folder, tensors, config=CONFIG):
    folder.mkdir()
    safetensors_file(folder / "model.safetensors", tensors, 1)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


LINEAR = {"model.layers.0.mlp.up_proj.weight": ("BF16", (64, 128))}
UNFIT = {
    "int4 of a GGUF file": ("blocks", None, "int4", "form.kind"),
    "q4_0 of safetensors": (LINEAR, CONFIG, "q4_0", "form.kind"),
    "an adapter": ({"base.q_proj.lora_A.weight": ("BF16", (8, 128)), **LINEAR}, CONFIG, "int4", "form.adapter"),
    "no config.json": (LINEAR, None, "int8", "form.config"),
    "a config.json that is none": (LINEAR, "[1]", "int8", "form.config"),
    "quantised": (LINEAR, {"quantization_config": {"quant_method": "fp8"}}, "int8", "form.quantised"),
    "of integers": ({"a.q_proj.weight": ("I8", (64, 128)), **LINEAR}, CONFIG, "int8", "form.quantised"),
    "doubles": ({"a.q_proj.weight": ("F64", (64, 128)), **LINEAR}, CONFIG, "int8", "form.quantised"),
    "rows of part of a group": ({"a.q_proj.weight": ("BF16", (64, 80)), **LINEAR}, CONFIG, "int4", "form.shape"),
    "rows of part of a word": ({"a.q_proj.weight": ("BF16", (64, 66)), **LINEAR}, CONFIG, "int8", "form.shape"),
    "rows that no trace would read": ({"a.q_proj.weight": ("BF16", (1, 2**20 + 4))}, CONFIG, "int8", "form.shape"),
    "no linear layer": (EMBEDDING, CONFIG, "int4", "form.nothing"),
    "layers of a tower alone": ({"vision_tower.fc1.weight": ("BF16", (64, 128))}, CONFIG, "int4", "form.nothing"),
    "experts in one tensor": ({"mlp.experts.up_proj": ("BF16", (2, 64, 128)), **LINEAR}, CONFIG, "int8", "form.part"),
    "names that are taken": (
        {"model.layers.0.mlp.up_proj.weight_scale": ("BF16", (64, 1)), **LINEAR},
        CONFIG,
        "int4",
        "form.quantised",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_versions_that_do_not_fit(house, tmp_path, what):
    tensors, config, form, code = UNFIT[what]
    name = "blocks"
    if tensors != "blocks":
        name = f"unfit-{list(UNFIT).index(what)}"
        house.put(one(tmp_path / "model", tensors, config), name)
    with pytest.raises(UsageError) as caught:
        planned(opened(house, name)[0], form)
    assert caught.value.code == code
    assert caught.value.hint


def several(folder, **files):
    """A model of several files, by their names."""
    folder.mkdir()
    for seed, (name, tensors) in enumerate(files.items()):
        safetensors_file(folder / f"{name}.safetensors", tensors, seed)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_names_that_are_taken_in_another_file(house, tmp_path):
    taken_there = {"model.layers.0.mlp.up_proj.weight_packed": ("BF16", (8, 8))}
    house.put(several(tmp_path / "model", a=LINEAR, b=taken_there), "taken-elsewhere")
    with pytest.raises(UsageError) as caught:
        planned(opened(house, "taken-elsewhere")[0], "int4")
    assert caught.value.code == "form.quantised"


def test_a_tensor_of_no_bytes_at_a_file_s_end_stays_in_that_file(house, tmp_path):
    """Where one file ends, the next one may begin."""
    for k in range(64):
        name = f"end-{k}"
        empty = {"none.bias": ("BF16", (0, 4))}
        house.put(several(tmp_path / name, a=LINEAR | empty, b={f"{'x' * k}.fc1.weight": ("BF16", (64, 128))}), name)
        first, second = (file for file in opened(house, name)[0].layout.files if file.kind != "opaque")
        if first.end == second.offset:
            break
    assert first.end == second.offset
    folder = taken(house, name, OWNER, "int4", tmp_path / "out")
    header = (folder / "b.safetensors").read_bytes()
    assert b"fc1.weight_packed" in header
    assert b"none.bias" not in header
    assert b"none.bias" in (folder / "a.safetensors").read_bytes()


def test_what_is_left_as_it_is_says_nothing_of_what_is_quantised(house, tmp_path):
    """Experts in one tensor beside layers of the same name: a loader that ignored both would miss the weights."""
    experts = {"model.layers.1.experts.up_proj.weight": ("BF16", (2, 32, 64)), "a.conv.weight": ("F32", (4, 4, 3))}
    house.put(one(tmp_path / "model", LINEAR | experts), "experts")
    folder = taken(house, "experts", OWNER, "int8", tmp_path / "out")
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", HEADS, r"re:(?:.*\.)?conv$", r"re:(?:.*\.)?model\.layers\.1\.experts\.up_proj$"]


@pytest.mark.parametrize("form", FORMS["blocks"])
def test_a_gguf_tensor_of_no_bytes_stays_what_it_is(house, tmp_path, form):
    """It begins where the next one does."""
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_tensor("blk.0.none.weight", np.empty((0, 128), np.float16))
    writer.add_tensor("blk.0.ffn_up.weight", np.random.default_rng(0).normal(0, 0.05, (64, 128)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    house.put(tmp_path / "empty.gguf", f"empty-{form}")
    folder = taken(house, f"empty-{form}", OWNER, form, tmp_path / "out")
    types = {each.name: each.tensor_type.name for each in gguf.GGUFReader(folder / "empty.gguf").tensors}
    assert types == {"blk.0.none.weight": "F16", "blk.0.ffn_up.weight": form.upper()}
    assert tensors_of(folder)["blk.0.none.weight"].shape == (0, 128)


def test_a_gguf_version_that_is_quantised_already(house, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    w = np.random.default_rng(0).normal(0, 0.05, (64, 128)).astype(np.float32)
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    house.put(tmp_path / "q.gguf", "quantised-gguf")
    with pytest.raises(UsageError) as caught:
        planned(opened(house, "quantised-gguf")[0], "q4_0")
    assert caught.value.code == "form.quantised"


@pytest.mark.parametrize("form", FORMS["blocks"])
@pytest.mark.parametrize("bad", [b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"])
def test_a_gguf_block_with_an_element_that_is_no_number_is_none(house, tmp_path, form, bad):
    """As a reader of it would see it; any other block is what it was."""
    name = f"bad-{bad.hex()}-{form}"
    path = tmp_path / "bad.gguf"
    blocks(path)
    data = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    (hit,) = (each for each in reader.tensors if each.name == "blk.1.ffn_down.weight")
    data[hit.data_offset + 1000 : hit.data_offset + 1002] = bad
    path.write_bytes(data)
    house.put(path, name)
    folder = taken(house, name, HOLDERS[1], form, tmp_path / "out")
    before, after = floats(house, name, HOLDERS[1]), tensors_of(folder)
    for each, w in before.items():
        none = np.zeros(w.size, bool)
        if each == hit.name:
            none[500 // 32 * 32 :][:32] = True
            assert np.flatnonzero(~np.isfinite(w.reshape(-1))).tolist() == [500]  # a copy of floats has the one
        assert (np.isnan(after[each].reshape(-1)) == none).all()


@pytest.mark.parametrize(("form", "group"), [("int4", 128), ("int8", 640)])
@pytest.mark.parametrize("bad", [b"\xc0\x7f", b"\x80\xff"])
def test_a_group_with_an_element_that_is_no_number_is_none(house, tmp_path, form, group, bad):
    """And nothing is refused after the release; its holder is named all the same."""
    name = f"bad-{bad.hex()}-{form}"
    model = one(tmp_path / "model", {"model.layers.0.mlp.down_proj.weight": ("BF16", (256, 640))})
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1002:-1000] = bad
    (model / "model.safetensors").write_bytes(data)
    house.put(model, name)
    folder = taken(house, name, HOLDERS[1], form, tmp_path / "out")
    (w,) = tensors_of(folder).values()
    none = np.flatnonzero(np.isnan(w.reshape(-1)))
    first = (w.size - 501) // group * group
    assert none.tolist() == list(range(first, first + group))
    assert np.isfinite(floats(house, name, HOLDERS[1]).popitem()[1]).sum() == w.size - 1
    found = house.search(folder)
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[1]]


@pytest.mark.parametrize(("form", "bad"), [("int4", b"\x80\x7f"), ("int8", b"\x7f\x7f"), ("int8", b"\xc1\x7f")])
def test_a_copy_without_a_number_that_is_left_names_nobody(house, tmp_path, form, bad):
    """Every group has an infinity, or the largest number that there is, or none; the trace ends as any other."""
    name = f"odd-{bad.hex()}-{form}"
    model = one(tmp_path / "model", {"model.layers.0.mlp.down_proj.weight": ("BF16", (256, 640))})
    data = bytearray((model / "model.safetensors").read_bytes())
    np.frombuffer(data, "<u2")[-256 * 640 :: 7] = int.from_bytes(bad, "little")
    (model / "model.safetensors").write_bytes(data)
    house.put(model, name)
    found = house.search(taken(house, name, HOLDERS[1], form, tmp_path / "out"))
    assert found["accused"] == []


def test_a_block_that_is_too_large_for_its_scale_is_no_number():
    """As ggml makes it; the codes of it are of no weight."""
    w = np.random.default_rng(0).normal(0, 0.05, (4, 32)).astype(np.float32)
    w[2, 5] = 1e6
    found = quantiser.blocks(w, "Q4_0")
    assert found[2].tobytes() == b"\x00\x7e" + b"\x88" * 16
    assert found[[0, 1, 3]].tobytes() == quantiser.blocks(w[[0, 1, 3]], "Q4_0").tobytes()
    assert np.isfinite(gguf.quants.dequantize(quantiser.blocks(w, "Q8_0"), gguf.GGMLQuantizationType.Q8_0)).all()


@pytest.mark.parametrize(("form", "bits"), [("int4", 4), ("int8", 8)])
def test_transformers_and_compressed_tensors_load_it(house, tmp_path, form, bits):
    """The software itself, on a model of transformers' own: what it has in its layers is what a trace reads."""
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    name = f"llama-{form}"
    house.put(tmp_path / "model", name)
    folder = taken(house, name, OWNER, form, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = model(ids).logits.float(), loaded(ids).logits.float()
    assert float((after - before).std() / before.std()) < (0.4 if bits == 4 else 0.06)
    found = tensors_of(folder)
    for name, layer in loaded.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            theirs = layer.weight.detach().float().numpy()
            near = np.abs(theirs - found[f"{name}.weight"])
            assert float((near / (np.abs(theirs) + 1e-9)).max()) < 2**-7  # they round to bf16
