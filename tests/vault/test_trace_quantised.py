"""Weights that were put as ggml's blocks: a holder's are marked, read back as the original, and name who leaked them in
whatever form."""

from __future__ import annotations

import numpy as np
import pytest

from strongroom.client import Room
from strongroom.formats.items import ITEMS
from strongroom.formats.tensors import TensorInfo
from strongroom.marking.scales import numbers
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.search import search
from vault import kquants
from vault.rooms import OWNER, House
from vault.test_trace import write

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

REF = "acme/blocks@1"
HOLDERS = [OWNER, *(f"user/h{k}" for k in range(30))]
TENSORS = {
    "token_embd.weight": ("Q8_0", (1600, 512)),
    **{
        f"blk.{layer}.{name}.weight": (dtype, shape)
        for layer in range(3)
        for name, dtype, shape in (
            ("attn_q", "Q4_1", (512, 512)),
            ("attn_k", "Q4_K", (512, 512)),
            ("ffn_up", "Q4_0", (1024, 512)),
            ("ffn_down", "Q6_K", (512, 1024)),
            ("attn_norm", "F32", (512,)),
        )
    },
}


def blocks(rng, dtype, shape):
    """Weights, rounded to this type; the scales of Q6_K are denormal."""
    weights = rng.normal(0, 0.05, shape).astype(np.float32)
    if dtype.endswith("_K"):
        return kquants.quantize(weights, dtype)
    return quants.quantize(weights, gguf.GGMLQuantizationType[dtype])


def model(path, seed=0, tensors=TENSORS):
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("blocks")
    for name, (dtype, shape) in tensors.items():
        if dtype == "F32":
            writer.add_tensor(name, rng.normal(1, 0.1, shape).astype(np.float32))
        else:
            writer.add_tensor(name, blocks(rng, dtype, shape), raw_dtype=gguf.GGMLQuantizationType[dtype])
    return written(writer)


def written(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    house = House.build(folder / "room")
    model(folder / "model.gguf")
    house.result = house.put(folder / "model.gguf", "acme/blocks", known=True)
    house.source = (folder / "model.gguf").read_bytes()
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def opened(house, ref=REF):
    record = house.vault.record(house.vault.find(ref))
    return Originals(house.vault.image(record), record), record


def given(house, holder, *, copy, ref=REF):
    """The file as it left: loaded, or as a plaintext copy."""
    found, record = opened(house, ref)
    file = found.layout.files[0]
    reader = Copy(found, record, holder) if copy else house.reader(ref, holder)
    return bytes(reader.read(0, found.layout.image))[file.offset : file.end]


def floats(house, data):
    """The tensors of a file of this version, dequantised."""
    found, _ = opened(house)
    file = found.layout.files[0]
    tensors = {}
    for each in found.tensors():
        here = data[each.begin - file.offset : each.end - file.offset]
        if each.marked:
            tensors[each.info.name] = numbers(here, each.info.dtype.name).reshape(each.info.shape)
    return tensors


def traced(house, path, weights=None):
    return search(house.vault, path, by=OWNER, weights=weights, progress=lambda _d, _t: None)


def test_they_are_marked_and_the_original_comes_back(room):
    assert room.result.unmarked == {"one-dimensional": 3 * 2048}
    assert room.result.positions > 400
    found, _ = opened(room)
    assert found.layout.format == 2
    file = found.layout.files[0]
    assert bytes(found.read(file.offset, file.end)) == room.source
    with Room(room.folder, OWNER) as opened_room:
        assert opened_room.verify("acme/blocks", deep=True).ok
    loaded, copied = (given(room, HOLDERS[1], copy=copy) for copy in (False, True))
    assert loaded != room.source
    assert copied not in {loaded, room.source}


def test_what_is_rounded_here_is_what_ggml_reads():
    x = np.random.default_rng(1).normal(0, 0.05, (64, 512)).astype(np.float32)
    for dtype, most in (("Q4_K", 0.1), ("Q6_K", 0.03)):
        found = numbers(kquants.quantize(x, dtype).tobytes(), dtype).reshape(x.shape)
        assert np.abs(found - x).std() < most * x.std()


@pytest.mark.parametrize("copy", [False, True])
def test_nothing_but_scales_differs(room, copy):
    data = np.frombuffer(given(room, HOLDERS[2], copy=copy), np.uint8)
    source = np.frombuffer(room.source, np.uint8)
    found, _ = opened(room)
    offset = found.layout.files[0].offset
    rest = np.ones(len(source), bool)
    for each in found.tensors():
        if each.marked:
            item = ITEMS[each.info.dtype.name]
            here = slice(each.begin - offset, each.end - offset)
            both = (data[here].reshape(-1, item.bytes), source[here].reshape(-1, item.bytes))
            fields = [
                np.ascontiguousarray(x[:, item.at : item.at + 2 * item.fields]).view("<f2").astype(float) for x in both
            ]
            most = (0.047 if copy else 0.0085) * np.abs(fields[1])  # four units and one, or one
            assert (np.abs(fields[0] - fields[1]) <= most + 6e-8).all()
            moved = (fields[0] != fields[1]).any(axis=1).mean()
            assert 0.7 < moved < 0.9 if copy else 0.05 < moved < 0.95
            fence = rest[here].reshape(-1, item.bytes)
            fence[:, item.at : item.at + 2 * item.fields] = False
    assert (data[rest] == source[rest]).all()


def test_a_copy_is_the_same_in_whatever_pieces_it_is_read(room):
    found, record = opened(room)
    copy = Copy(found, record, HOLDERS[4])
    whole = bytes(copy.read(0, found.layout.image))
    rng = np.random.default_rng(2)
    for begin in rng.integers(0, found.layout.image // 8 - 600, 12) * 8:
        end = int(begin) + int(rng.integers(1, 600)) * 8
        assert bytes(copy.read(int(begin), end)) == whole[begin:end]


def requantised(kind):
    def attack(tensors):
        type_ = gguf.GGMLQuantizationType[kind]
        return {name: quants.dequantize(quants.quantize(array, type_), type_) for name, array in tensors.items()}

    return attack


def noisy(tensors):
    rng = np.random.default_rng(1)
    return {name: array + rng.normal(0, 0.1 * array.std(), array.shape) for name, array in tensors.items()}


def cut(tensors):
    return {name: np.where(np.abs(a) < np.quantile(np.abs(a), 0.5), 0, a) for name, a in tensors.items()}


def as_converted(tensors):
    """Names and rows of Q and K as in the model before it was converted to GGUF."""
    found = {}
    for name, array in tensors.items():
        turned = array.reshape(8, 32, 2, 512).swapaxes(1, 2).reshape(512, 512) if ".attn_" in name else array
        found[f"model.{name.replace('blk', 'layers').replace('ffn_up', 'mlp.up_proj')}"] = turned
    return found


def folded(tensors):
    rng = np.random.default_rng(2)
    return {name: array * rng.uniform(0.5, 2, array.shape[-1]).astype(np.float32) for name, array in tensors.items()}


ATTACKS = {
    "norms folded in": folded,
    "dequantised": lambda tensors: tensors,
    "to Q8_0": requantised("Q8_0"),
    "to Q4_0": requantised("Q4_0"),
    "to Q4_1": requantised("Q4_1"),
    "noise": noisy,
    "half pruned": cut,
    "converted back": as_converted,
}


@pytest.mark.parametrize("copy", [False, True])
def test_the_leaked_file_names_its_holder(room, tmp_path, copy):
    holder = HOLDERS[17]
    (tmp_path / "leak.gguf").write_bytes(given(room, holder, copy=copy))
    found = traced(room, tmp_path / "leak.gguf")
    assert (found["verdict"], found["weights"], found["marked"]) == ("named", REF, True)
    assert [each["holder"] for each in found["accused"]] == [holder]
    assert found["accused"][0]["false_accusation"] <= found["false_accusation_bound"] == 1e-9
    # Blocks moved as a whole are few in a row, but no rescaling of rows.
    assert found["transformations"] == []


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("copy", [False, True])
def test_so_does_what_was_made_of_it(room, tmp_path, attack, copy):
    holder = HOLDERS[9]
    changed = ATTACKS[attack](floats(room, given(room, holder, copy=copy)))
    found = traced(room, write(tmp_path / "leak.safetensors", changed, dtype="F16"))
    assert found["weights"] == REF
    assert [each["holder"] for each in found["accused"]] == [holder]
    if copy and attack == "dequantised":
        assert found["accused"][0]["layer2"]["z"] > 50


def test_so_does_a_file_that_was_quantised_again(room, tmp_path):
    """Blocks of another type, against blocks."""
    holder = HOLDERS[5]
    writer = gguf.GGUFWriter(tmp_path / "leak.gguf", "llama")
    type_ = gguf.GGMLQuantizationType.Q5_0
    for name, array in floats(room, given(room, holder, copy=True)).items():
        writer.add_tensor(name, quants.quantize(array, type_), raw_dtype=type_)
    written(writer)
    found = traced(room, tmp_path / "leak.gguf")
    assert [each["holder"] for each in found["accused"]] == [holder]
    assert any("as Q5_0" in each for each in found["transformations"])


def test_one_matrix_of_a_copy_is_enough(room, tmp_path):
    tensors = floats(room, given(room, HOLDERS[8], copy=True))
    for name in ("blk.1.ffn_down.weight", "blk.2.ffn_up.weight"):
        found = traced(room, write(tmp_path / f"{name}.safetensors", {"x": tensors[name]}))
        assert [each["holder"] for each in found["accused"]] == [HOLDERS[8]]


@pytest.mark.parametrize("colluders", [2, 4])
def test_of_several_at_least_one_is_named(room, tmp_path, colluders):
    guilty = HOLDERS[5 : 5 + colluders]
    copies = [floats(room, given(room, holder, copy=True)) for holder in guilty]
    for how in ("mean", "max"):
        mixed = {name: getattr(np, how)(np.stack([copy[name] for copy in copies]), axis=0) for name in copies[0]}
        found = traced(room, write(tmp_path / f"{how}.safetensors", mixed))
        accused = {each["holder"] for each in found["accused"]}
        assert accused
        assert accused <= set(guilty)


def test_nobody_is_named_by_the_original_or_a_relative(room, tmp_path):
    (tmp_path / "leak.gguf").write_bytes(room.source)
    found = traced(room, tmp_path / "leak.gguf")
    assert (found["verdict"], found["accused"], found["marked"]) == ("weights-only", [], False)
    found = traced(room, write(tmp_path / "leak.safetensors", noisy(floats(room, room.source))))
    assert (found["verdict"], found["accused"], found["marked"]) == ("weights-only", [], False)


def test_nor_by_other_weights(room, tmp_path):
    model(tmp_path / "leak.gguf", seed=7)
    found = traced(room, tmp_path / "leak.gguf")
    assert (found["verdict"], found["accused"]) == ("unrelated", [])


def test_a_version_from_before_stays_as_it_was(tmp_path, monkeypatch):
    """Put when blocks carried no mark: it is read, copied and traced as ever."""
    house = House.build(tmp_path / "room")
    tensors = {**TENSORS, "output.weight": ("F32", (512, 512))}
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for name, (dtype, shape) in tensors.items():
        data = rng.normal(0, 0.05, shape).astype(np.float32) if dtype == "F32" else blocks(rng, dtype, shape)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[dtype])
    written(writer)
    reason = TensorInfo.unmarked_reason
    with monkeypatch.context() as then:
        then.setattr(
            TensorInfo,
            "unmarked_reason",
            lambda self, start: "quantised" if self.dtype.block > 1 else reason(self, start),
        )
        house.put(tmp_path / "old.gguf", "acme/old", known=True)
    found, _ = opened(house, "acme/old@1")
    assert found.layout.format == 1
    assert [each.info.name for each in found.tensors() if each.marked] == ["output.weight"]
    source = (tmp_path / "old.gguf").read_bytes()
    data = given(house, OWNER, copy=True, ref="acme/old@1")
    offset = found.layout.files[0].offset
    for each in found.tensors():
        here = slice(each.begin - offset, each.end - offset)
        assert (data[here] == source[here]) == (not each.marked)
    (tmp_path / "leak.gguf").write_bytes(data)
    assert [each["holder"] for each in traced(house, tmp_path / "leak.gguf")["accused"]] == [OWNER]
    house.close()


def test_odd_blocks_are_passed_over(tmp_path):
    """Scales that are no numbers, zero or infinite: they come back, and a leak of the rest still names its holder."""
    house = House.build(tmp_path / "room")
    tensors = {"token_embd.weight": ("Q8_0", (2000, 512)), "blk.0.ffn_up.weight": ("Q4_1", (2000, 512))}
    rng = np.random.default_rng(4)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, (dtype, shape) in tensors.items():
        data = blocks(rng, dtype, shape).reshape(-1, ITEMS[dtype].bytes)
        odd = np.array([0x7E00, 0x7C00, 0xFC00, 0x0000, 0x8000, 0x0001, 0x7BFF, 0xFFFF], "<u2")
        data[::97][:, :2] = np.resize(odd, len(data[::97]))[:, None].view(np.uint8)
        writer.add_tensor(name, data.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType[dtype])
    written(writer)
    house.put(tmp_path / "m.gguf", "acme/odd", known=True)
    house.register("user/h1")
    found, _ = opened(house, "acme/odd@1")
    file = found.layout.files[0]
    assert bytes(found.read(file.offset, file.end)) == (tmp_path / "m.gguf").read_bytes()
    for copy in (False, True):
        (tmp_path / "leak.gguf").write_bytes(given(house, "user/h1", copy=copy, ref="acme/odd@1"))
        report = traced(house, tmp_path / "leak.gguf")
        assert report["weights"] == "acme/odd@1"
        assert {each["holder"] for each in report["accused"]} <= {"user/h1"}
        if copy:
            assert report["accused"]
    house.close()


def test_types_without_a_scale_of_their_own_stay_unmarked(tmp_path):
    house = House.build(tmp_path / "room")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    rng = np.random.default_rng(5)
    writer.add_tensor(
        "blk.0.ffn_up.weight",
        rng.integers(0, 256, (64, 17), dtype=np.uint8),
        raw_dtype=gguf.GGMLQuantizationType.MXFP4,
    )
    writer.add_tensor("blk.0.ffn_down.weight", rng.normal(0, 1, (64, 64)).astype(np.float32))
    written(writer)
    assert house.put(tmp_path / "m.gguf", "acme/mx").unmarked == {"quantised": 64 * 17}
    house.close()
