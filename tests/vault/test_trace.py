"""A found file names its holder, whatever was done to it; and nobody who did not have it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zipfile

import gguf
import numpy as np
import pytest
from bench import ggml

from strongroom.client import Room
from strongroom.errors import Denied, NotFound, StrongroomError, UsageError
from strongroom.marking.stamp import Stamp
from strongroom.vault import trace
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.search import search
from strongroom.vault.suspect import Suspect
from vault.rooms import OWNER, House, safetensors_file

REF = "acme/traced@1"
HOLDERS = [OWNER, *(f"user/h{k}" for k in range(40))]
TENSORS = {
    "model.embed_tokens.weight": ("BF16", (800, 256)),
    **{
        f"model.layers.{layer}.{name}.weight": (dtype, shape)
        for layer in range(3)
        for name, dtype, shape in (
            ("self_attn.q_proj", "BF16", (256, 256)),
            ("mlp.up_proj", "F32", (512, 256)),
            ("mlp.down_proj", "F16", (256, 512)),
            ("input_layernorm", "F32", (256,)),
        )
    },
}
NUMPY = {"BF16": None, "F16": np.float16, "F32": np.float32}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A room with two versions of one shape; forty people could hold them."""
    folder = tmp_path_factory.mktemp("traced")
    house = House.build(folder / "room")
    for seed, name in enumerate(("traced", "other")):
        model = folder / name
        model.mkdir()
        safetensors_file(model / "model.safetensors", TENSORS, seed)
        house.put(model, f"acme/{name}", known=True)
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def given(house, holder, *, ref=REF, copy=False):
    """The tensors of a version as they left: loaded, or in a plaintext copy."""
    record = house.vault.record(house.vault.find(ref))
    originals = Originals(house.vault.image(record), record)
    found = {}
    reader = house.reader(ref, holder)
    image = bytes(Copy(originals, record, holder).read(0, originals.layout.image))
    for each in originals.tensors():
        data = image[each.begin : each.end] if copy else bytes(reader.read(each.begin, each.end))
        if each.info.dtype.name == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(data, NUMPY[each.info.dtype.name]).astype(np.float32)
        found[each.info.name] = array.reshape(each.info.shape)
    return found


def write(path, tensors, dtype="F32"):
    """A safetensors file of these arrays."""
    header, parts, at = {}, [], 0
    for name, array in tensors.items():
        values = np.ascontiguousarray(array, np.float32)
        if dtype == "BF16":
            data = ((values.view(np.uint32) + 0x8000) >> 16).astype("<u2").tobytes()
        else:
            data = values.astype(NUMPY[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    return path


def traced(house, path, **options):
    return search(house.vault, path, by=OWNER, weights=options.pop("weights", None), progress=lambda _d, _t: None)


RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def reseeded(monkeypatch):
    """The same numbers in each test, in whatever order they run."""
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(5))


def quantised(array, bits, group=64):
    if array.ndim < 2:
        return array
    flat = array.reshape(-1, group)
    scale = np.abs(flat).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1) + 1e-30
    return (np.round(flat / scale) * scale).reshape(array.shape)


def renamed(tensors):
    names = list(tensors)
    return {f"w.{k}": tensors[names[at]] for k, at in enumerate(RNG.permutation(len(names)))}


def permuted(tensors):
    found = dict(tensors)
    for layer in range(3):
        order = RNG.permutation(512)
        up, down = f"model.layers.{layer}.mlp.up_proj.weight", f"model.layers.{layer}.mlp.down_proj.weight"
        found[up], found[down] = found[up][order], found[down][:, order]
    return found


def folded(tensors):
    factor = RNG.uniform(0.3, 3, 256).astype(np.float32)
    return {
        name: array * factor if array.shape[-1] == 256 and array.ndim == 2 else array for name, array in tensors.items()
    }


def each_(function):
    return lambda tensors: {name: function(array) for name, array in tensors.items()}


def noise(size):
    return each_(lambda array: array + RNG.normal(0, size * array.std(), array.shape))


def pruned(share):
    return each_(lambda array: np.where(np.abs(array) < np.quantile(np.abs(array), share), 0, array))


def dropped(tensors):
    """The first layer is gone, and the others moved up."""
    found = {}
    for name, array in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if parts[2] == "0":
                continue
            parts[2] = str(int(parts[2]) - 1)
        found[".".join(parts)] = array
    return found


def adapted(tensors):
    """A LoRA of rank 4, merged in."""
    return {
        name: array
        + (
            0.1 * array.std() / 2 * RNG.normal(size=(len(array), 4)) @ RNG.normal(size=(4, array.shape[-1]))
            if array.ndim == 2
            else 0
        )
        for name, array in tensors.items()
    }


ATTACKS = {
    "nothing": lambda tensors: tensors,
    "int8": each_(lambda array: quantised(array, 8)),
    "int4": each_(lambda array: quantised(array, 4)),
    "noise": noise(0.1),
    "half pruned": pruned(0.5),
    "renamed": renamed,
    "transposed and renamed": lambda tensors: renamed({name: array.T for name, array in tensors.items()}),
    "units permuted": permuted,
    "units permuted, int8, renamed": lambda tensors: renamed(each_(lambda a: quantised(a, 8))(permuted(tensors))),
    "norms folded in": folded,
    "a layer dropped": dropped,
    "an adapter merged in": adapted,
    "merged with another": each_(lambda array: 0.7 * array + 0.3 * RNG.normal(0, array.std(), array.shape)),
    "one matrix": lambda tensors: {"x": tensors["model.embed_tokens.weight"]},
    "some rows": each_(lambda array: array[len(array) // 4 : len(array) * 3 // 4] if array.ndim == 2 else array),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_stamped_copy_names_its_holder(room, tmp_path, attack):
    holder = HOLDERS[17]
    path = write(tmp_path / "leak.safetensors", ATTACKS[attack](given(room, holder, copy=True)))
    found = traced(room, path)
    assert found["verdict"] == "named"
    assert [each["holder"] for each in found["accused"]] == [holder]
    assert found["weights"] == REF
    assert found["accused"][0]["false_accusation"] <= found["false_accusation_bound"] == 1e-9


WEAK = {"noise", "merged with another", "one matrix", "some rows", "half pruned", "a layer dropped", "int4"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_loaded_names_its_holder_or_nobody(room, tmp_path, attack):
    """Without a stamp a model as small as this has few positions: never somebody else."""
    holder = HOLDERS[3]
    found = traced(room, write(tmp_path / "leak.safetensors", ATTACKS[attack](given(room, holder))))
    assert found["verdict"] in ({"named", "weights-only"} if attack in WEAK else {"named"})
    assert {each["holder"] for each in found["accused"]} <= {holder}
    assert found["weights"] == REF


@pytest.mark.parametrize("how", ["mean", "median", "min", "max", "elements", "tensors"])
@pytest.mark.parametrize("colluders", [2, 4])
def test_of_several_at_least_one_is_named(room, tmp_path, how, colluders):
    guilty = HOLDERS[5 : 5 + colluders]
    copies = [given(room, holder, copy=True) for holder in guilty]
    mixed = {}
    for name in copies[0]:
        stack = np.stack([copy[name] for copy in copies])
        match how:
            case "elements":
                pick = RNG.integers(0, colluders, stack[0].shape)
                mixed[name] = np.take_along_axis(stack, pick[None], axis=0)[0]
            case "tensors":
                mixed[name] = stack[RNG.integers(colluders)]
            case _:
                mixed[name] = getattr(np, how)(stack, axis=0)
    found = traced(room, write(tmp_path / "leak.safetensors", mixed))
    accused = {each["holder"] for each in found["accused"]}
    assert accused
    assert accused <= set(guilty)


class TestNobody:
    def test_is_named_by_weights_that_are_not_ours(self, room, tmp_path):
        safetensors_file(tmp_path / "leak.safetensors", TENSORS, 99)
        found = traced(room, tmp_path / "leak.safetensors")
        assert (found["verdict"], found["accused"], found["weights"]) == ("unrelated", [], "")
        assert found["likeness"] < 0.05

    def test_is_named_by_the_weights_as_they_were_before_the_room(self, room, tmp_path):
        safetensors_file(tmp_path / "leak.safetensors", TENSORS, 0)
        found = traced(room, tmp_path / "leak.safetensors")
        assert (found["verdict"], found["accused"], found["weights"]) == ("weights-only", [], REF)
        assert not found["marked"]

    def test_is_named_by_a_relative(self, room, tmp_path):
        """Another fine-tune of what was put: thirty of them."""
        safetensors_file(tmp_path / "base.safetensors", TENSORS, 0)
        with Suspected(tmp_path / "base.safetensors") as base:
            for _ in range(30):
                path = tmp_path / "leak.safetensors"
                path.unlink(missing_ok=True)
                found = traced(room, write(path, noise(0.02)(base)))
                assert (found["verdict"], found["marked"]) == ("weights-only", False)

    def test_is_named_by_another_rooms_copy(self, room, tmp_path):
        """The same weights, put into another room: marks of other keys."""
        model = tmp_path / "model"
        model.mkdir()
        safetensors_file(model / "model.safetensors", TENSORS, 0)
        other = House.build(tmp_path / "other")
        other.put(model, "acme/traced", share="1/2")
        path = write(tmp_path / "leak.safetensors", given(other, OWNER, ref="acme/traced@1", copy=True))
        other.close()
        found = traced(room, path)
        assert (found["verdict"], found["marked"]) == ("weights-only", False)


class Suspected:
    """The tensors of a safetensors file, as numbers."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        from strongroom.vault.suspect import Suspect

        with Suspect.opened(self.path) as suspect:
            return {name: suspect.read(name).reshape(each.info.shape) for name, each in suspect.tensors.items()}

    def __exit__(self, *_):
        pass


BAD = {
    "three bytes": lambda path: path.with_suffix(".safetensors").write_bytes(b"abc"),
    "nothing": lambda path: path.with_suffix(".safetensors").write_bytes(b""),
    "a header that lies": lambda path: path.with_suffix(".safetensors").write_bytes(
        (1 << 60).to_bytes(8, "little") + b"{}"
    ),
    "no tensors": lambda path: path.with_suffix(".safetensors").write_bytes((2).to_bytes(8, "little") + b"{}"),
    "a malformed GGUF": lambda path: path.with_suffix(".gguf").write_bytes(b"GGUF" + b"\xff" * 60),
    "a text": lambda path: path.with_suffix(".txt").write_text("hello"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_model_is_a_clear_error(room, tmp_path, name):
    BAD[name](tmp_path / "leak")
    (path,) = tmp_path.iterdir()
    with pytest.raises(UsageError) as caught:
        traced(room, path)
    assert caught.value.hint


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.05])
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_of_a_file_that_was_cut_off_what_is_left_is_read(room, tmp_path, kind, kept):
    tensors = given(room, HOLDERS[2], copy=True)
    path = tmp_path / f"leak.{kind}"
    if kind == "safetensors":
        write(path, tensors)
    else:
        writer = gguf.GGUFWriter(path, "llama")
        for name, array in tensors.items():
            writer.add_tensor(name, array.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    os.truncate(path, int(path.stat().st_size * kept))
    found = traced(room, path)
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[2]]


def test_a_file_that_ends_in_its_header_is_a_clear_error(room, tmp_path):
    path = write(tmp_path / "leak.safetensors", given(room, HOLDERS[2], copy=True))
    os.truncate(path, 100)
    with pytest.raises(UsageError, match="its header would end"):
        traced(room, path)


def test_a_pickle_is_never_run(room, tmp_path):
    torch = pytest.importorskip("torch")

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"model.embed_tokens.weight": torch.zeros(800, 256), "x": Bomb()}, tmp_path / "leak.pt")
    with pytest.raises(StrongroomError):
        traced(room, tmp_path / "leak.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_of_tensors_is_read_in_the_sandbox(room, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in given(room, HOLDERS[9], copy=True).items()}
    torch.save(tensors, tmp_path / "leak.pt")
    assert [each["holder"] for each in traced(room, tmp_path / "leak.pt")["accused"]] == [HOLDERS[9]]


def test_a_zip_that_grows_without_end(room, tmp_path):
    with zipfile.ZipFile(tmp_path / "leak.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(64 << 20))
    with pytest.raises(StrongroomError):
        traced(room, tmp_path / "leak.pt")


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, -math.inf, 3e38, 1e-42])
def test_of_all_the_same_numbers_nobody_is_named(room, tmp_path, value):
    same = {name: np.full(shape, value, np.float32) for name, (_, shape) in TENSORS.items()}
    found = traced(room, write(tmp_path / "leak.safetensors", same))
    assert (found["verdict"], found["accused"]) == ("unrelated", [])


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_some_odd_numbers_are_passed_over(room, tmp_path, value):
    tensors = given(room, HOLDERS[2], copy=True)
    for array in tensors.values():
        array.reshape(-1)[::97] = value
    found = traced(room, write(tmp_path / "leak.safetensors", tensors))
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[2]]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K"])
def test_quantised_by_ggml(room, tmp_path, kind):
    path = tmp_path / "leak.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    type_ = gguf.GGMLQuantizationType[kind]
    names = {"embed_tokens": "token_embd", "q_proj": "attn_q", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, array in given(room, HOLDERS[8], copy=True).items():
        if array.ndim < 2:
            continue
        parts = name.split(".")
        layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        data = ggml.quantize(array, kind)
        writer.add_tensor(f"{layer}{names[parts[-2]]}.weight", data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = traced(room, path)
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[8]]
    assert any(kind in each for each in found["transformations"])


@pytest.mark.parametrize("how", ["npz", "compressed", "npy", "fortran"])
def test_arrays_of_numpy(room, tmp_path, how):
    tensors = given(room, HOLDERS[3], copy=True)
    if how in ("npz", "compressed"):
        (np.savez if how == "npz" else np.savez_compressed)(tmp_path / "leak.npz", **tensors)
        leak = tmp_path / "leak.npz"
    else:
        leak = tmp_path / "leak"
        leak.mkdir()
        for name, array in tensors.items():
            np.save(leak / f"{name}.npy", np.asfortranarray(array) if how == "fortran" else array)
    found = traced(room, leak)
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[3]]
    assert any("transposed" in each for each in found["transformations"]) == (how == "fortran")


def test_weights_under_another_name(room, tmp_path):
    leak = write(tmp_path / "leak.safetensors", given(room, HOLDERS[3], copy=True)).rename(tmp_path / "holiday.jpg")
    assert [each["holder"] for each in traced(room, leak)["accused"]] == [HOLDERS[3]]


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(64 << 20))


def torn(path):
    np.savez(path, a=np.zeros((64, 64), np.float32))
    path.write_bytes(path.read_bytes()[:-400])


def objects(path):
    np.savez(path, a=np.array([print], object), allow_pickle=True)


def liar(path):
    """Its own header says that it begins where it does not."""
    np.savez(path, a=np.zeros((64, 64), np.float32))
    data = bytearray(path.read_bytes())
    data[28:30] = b"\xff\xff"
    path.write_bytes(data)


def encrypted(path):
    np.savez(path, a=np.zeros((64, 64), np.float32))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize("made", [bomb, torn, objects, liar, encrypted], ids=lambda made: made.__name__)
def test_archives_that_are_no_weights(room, tmp_path, made):
    made(tmp_path / "leak.npz")
    with pytest.raises(StrongroomError) as caught:
        traced(room, tmp_path / "leak.npz")
    assert caught.value.hint


class TestCustody:
    @pytest.fixture
    def leak(self, room, tmp_path):
        return write(tmp_path / "leak.safetensors", given(room, OWNER, copy=True))

    def test_the_log_has_it_before_anybody_is_told(self, room, leak):
        found = traced(room, leak, weights=REF)
        entry = room.vault.custodian.ledger.proven(found["entry"], found["entry"] + 1)[0]
        body = json.loads(entry)["body"]
        assert (body["verdict"], body["accused"]) == ("named", [OWNER])
        assert body["suspect"] == found["suspect"]["files"][0]["sha256"]

    def test_who_may_not_is_refused_before_anything_is_read(self, room, leak):
        room.vault.identities.create("user/pia")
        with pytest.raises((Denied, StrongroomError)) as caught:
            search(room.vault, leak.with_name("missing"), by="user/h1", weights=REF, progress=lambda _d, _t: None)
        assert not isinstance(caught.value, NotFound)

    def test_of_weights_that_are_not_there(self, room, leak):
        for weights in ("acme/none", "acme/traced@9"):
            with pytest.raises(NotFound):
                traced(room, leak, weights=weights)

    def test_as_a_method_of_a_room(self, room, leak):
        with Room(room.folder, OWNER) as opened:
            found = opened.trace(leak)
        assert found["accused"][0]["holder"] == OWNER
        json.dumps(found)


def test_a_folder_of_shards_some_of_which_are_missing(room, tmp_path):
    tensors = given(room, HOLDERS[4], copy=True)
    names = list(tensors)
    (tmp_path / "leak").mkdir()
    write(tmp_path / "leak" / "model-00002-of-00004.safetensors", {name: tensors[name] for name in names[3:6]})
    write(tmp_path / "leak" / "model-00004-of-00004.safetensors", {name: tensors[name] for name in names[8:]})
    found = traced(room, tmp_path / "leak")
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[4]]
    assert any("missing" in each for each in found["transformations"])
    shutil.rmtree(tmp_path / "leak")


@pytest.mark.parametrize("attack", ["nothing", "int4", "units permuted, int8, renamed"])
def test_among_more_people_than_are_scored_in_full(room, tmp_path, monkeypatch, attack):
    monkeypatch.setattr(trace, "_FEW", 4)
    holder = HOLDERS[31]
    path = write(tmp_path / "leak.safetensors", ATTACKS[attack](given(room, holder, copy=True)))
    found = traced(room, path)
    assert [each["holder"] for each in found["accused"]] == [holder]
    assert found["accused"][0]["layer2"]["z"] > 20


def model_of(folder, tensors):
    """A model directory of these arrays."""
    folder.mkdir()
    write(folder / "model.safetensors", tensors)
    return folder


def test_equal_tensors_make_nobody_innocent_suspicious(tmp_path):
    """Sixty-four of them: were their chips the same, an innocent's scores would add up instead of cancelling out."""
    one = RNG.normal(0, 0.05, (64, 512)).astype(np.float32)
    house = House.build(tmp_path / "room")
    model = model_of(tmp_path / "model", {f"layers.{k}.weight": one for k in range(64)})
    house.put(model, "acme/traced", known=True, share="1/8")
    for holder in HOLDERS[1:]:
        house.register(holder)
    path = write(tmp_path / "leak.safetensors", given(house, HOLDERS[4], copy=True))
    found = traced(house, path)
    house.close()
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[4]]
    assert max(-each["stamp_log10_p"] for each in found["scores"] if not each["holder"]) < 6


def test_a_tensor_of_another_version_beside_the_leak_hides_nothing(room, tmp_path):
    leak = each_(lambda array: quantised(array, 3))(given(room, HOLDERS[6], copy=True))
    safetensors_file(tmp_path / "other.safetensors", TENSORS, 1)
    with Suspected(tmp_path / "other.safetensors") as other:
        decoy = dict(list(other.items())[:2])
    leak |= {f"module.{name}": array for name, array in decoy.items()}
    found = traced(room, write(tmp_path / "leak.safetensors", leak))
    assert (found["weights"], [each["holder"] for each in found["accused"]]) == (REF, [HOLDERS[6]])


def test_a_copy_names_whose_path_it_was_when_it_was_taken(tmp_path):
    """One desk's principal, which passes from one person to another."""
    folder, desk = tmp_path / "room", "user/desk"
    with Room.init(folder, owner=OWNER, custody="solo")[0] as owner:
        model = tmp_path / "model"
        model.mkdir()
        safetensors_file(model / "model.safetensors", TENSORS, 0)
        owner.put(model, "acme/traced", share="1/2")
        for path in ("user/amy", "user/ben"):
            owner.principal_add(path, roles=["researcher"])
        owner.principal_add(desk, roles=["researcher"], person="user/amy")
        with Room(folder, desk) as room:
            room.copy(REF, desk, tmp_path / "first")
        owner.principal_change(desk, state="removed")
        (folder / "identities" / "user" / "desk.key").rename(tmp_path / "amys.key")
        owner.principal_add(desk, roles=["researcher"], person="user/ben")
        found = owner.trace(tmp_path / "first", weights=REF)
        (accused,) = found["accused"]
        assert (accused["holder"], accused["person"]) == (desk, "user/amy")
        assert [each["person"] for each in accused["releases"]] == ["user/amy"]
        # The word is the path's: once both have had a copy, the report has both, each with its release.
        with Room(folder, desk) as room:
            room.copy(REF, desk, tmp_path / "second")
        (accused,) = owner.trace(tmp_path / "first", weights=REF)["accused"]
        assert [each["person"] for each in accused["releases"]] == ["user/amy", "user/ben"]


def test_what_nobody_is_told_changes_nothing_that_is(room, tmp_path):
    """Whether somebody is found decides about the second look: a report that has no names says nothing of it."""
    leaks = {
        "copy": given(room, HOLDERS[3], copy=True),
        "loaded": given(room, HOLDERS[3]),
        "noisy": noise(0.1)(given(room, HOLDERS[3], copy=True)),
    }
    found = {}
    for name, leak in leaks.items():
        with Suspect.opened(write(tmp_path / f"{name}.safetensors", leak)) as suspect:
            seen = []
            options = {"weights": REF, "progress": lambda done, _, seen=seen: seen.append(done)}
            result = trace.trace(room.vault, suspect, name, [], named=lambda _: False, **options)
            known = trace.trace(room.vault, suspect, name, [], **{**options, "progress": lambda _d, _t: None})
        assert result.withheld
        assert not known.withheld
        assert not result.accused
        assert all((each.z, each.sigma, each.log10_p) == (0, 0, 0) for each in result.candidates)
        assert result.marked_log10_p == known.marked_log10_p
        found[name] = (result.elements, result.positions_used, len(seen))
    assert len(set(found.values())) == 1


def test_nobody_is_scored_by_name_but_who_is_accused(room, tmp_path):
    """Else a file could be changed, score by score, until it names whom one likes."""
    found = traced(room, write(tmp_path / "leak.safetensors", given(room, HOLDERS[11], copy=True)))
    assert [each["holder"] for each in found["scores"] if each["holder"]] == [HOLDERS[11]]
    others = [each for each in found["scores"] if not each["holder"]]
    assert len(others) == found["candidates"] - 1
    for name in ("log10_p", "stamp_log10_p"):
        values = [each[name] for each in others]
        assert values == sorted(values)
        assert all(value == round(value) for value in values)
    text = json.dumps({**found, "accused": [], "by": ""})  # who asked is no candidate
    assert not [holder for holder in HOLDERS if holder != HOLDERS[11] and f'"{holder}"' in text]


def test_a_stamp_is_its_holders_alone(room):
    record = room.vault.record(room.vault.find(REF))
    chips = [Stamp(record.stamp_key, holder).chips(b"12345678", 0, 64).tobytes() for holder in HOLDERS]
    assert len(set(chips)) == len(HOLDERS)
