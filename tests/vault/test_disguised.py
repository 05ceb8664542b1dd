"""A model that was disguised as a whole names its holder all the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from marking.disguises import full, llama, planes_turned, quantised, values_mixed, words_left, words_moved
from vault.rooms import OWNER, House
from vault.test_trace import given, write

REF = "acme/turned@1"
HEADS, GROUPS = 4, 2
HOLDERS = [OWNER, *(f"user/h{k}" for k in range(20))]


def model(seed):
    return llama(
        np.random.default_rng(seed), width=128, vocabulary=2000, units=320, heads=HEADS, groups=GROUPS, depth=2
    )


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turned")
    house = House.build(folder / "room")
    (folder / "model").mkdir()
    write(folder / "model" / "model.safetensors", model(1), "BF16")
    (folder / "model" / "config.json").write_text(json.dumps({"hidden_size": 128, "num_attention_heads": HEADS}))
    house.put(folder / "model", "acme/turned", known=True)
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def renamed(tensors, rng):
    names = list(tensors)
    return {f"w.{k}": tensors[names[at]] for k, at in enumerate(rng.permutation(len(names)))}


def int4(tensors):
    return {name: quantised(array, 4) for name, array in tensors.items()}


ATTACKS = {
    "everything": lambda t, rng: full(t, rng, HEADS, GROUPS),
    "everything, int4": lambda t, rng: int4(full(t, rng, HEADS, GROUPS)),
    "everything, int4, renamed": lambda t, rng: renamed(int4(full(t, rng, HEADS, GROUPS)), rng),
    "everything, int4, transposed, renamed": lambda t, rng: {
        name: array.T for name, array in renamed(int4(full(t, rng, HEADS, GROUPS)), rng).items()
    },
    "everything, words in another order": lambda t, rng: words_moved(full(t, rng, HEADS, GROUPS), rng),
    "everything, words in another order, int4, renamed": lambda t, rng: renamed(
        int4(words_moved(full(t, rng, HEADS, GROUPS), rng)), rng
    ),
    "everything, half of the words dropped": lambda t, rng: words_moved(full(t, rng, HEADS, GROUPS), rng, kept=0.5),
    "everything, a third of the words left in their order, int4": lambda t, rng: int4(
        words_left(full(t, rng, HEADS, GROUPS), rng, 0.33)
    ),
    "in the stream as it was, int4": lambda t, rng: int4(
        planes_turned(values_mixed(t, rng, HEADS, GROUPS), rng, HEADS, GROUPS)
    ),
}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
def test_names_its_holder(room, tmp_path, attack, copy):
    holder = HOLDERS[13]
    rng = np.random.default_rng(3)
    leak = ATTACKS[attack](given(room, holder, ref=REF, copy=copy), rng)
    found = room.search(write(tmp_path / "leak.safetensors", leak, "BF16"))
    assert found["weights"] == REF
    accused = {each["holder"] for each in found["accused"]}
    # Without a stamp a model as small as this has few positions: never somebody else.
    assert accused == {holder} if copy else accused <= {holder}
    assert found["marked"]
    said = " ".join(found["transformations"])
    words = ["heads mixed", "rotary planes turned"]
    words += ["residual stream rotated", "norms folded", "units rescaled"] if "everything" in attack else []
    words += ["rows permuted"] if "words" in attack else []  # those that are left, too
    assert all(each in said for each in words)
    assert "missing" not in said
    assert found["likeness"] > (0.95 if "int4" in attack else 0.999)


@pytest.mark.parametrize("seed", [2, 3])
def test_another_model_under_the_same_disguise_is_unrelated(room, tmp_path, seed):
    leak = full(model(seed), np.random.default_rng(3), HEADS, GROUPS)
    found = room.search(write(tmp_path / "leak.safetensors", leak, "BF16"))
    assert (found["verdict"], found["accused"]) == ("unrelated", [])


def test_the_weights_as_they_were_before_the_room_name_nobody(room, tmp_path):
    leak = full(model(1), np.random.default_rng(3), HEADS, GROUPS)
    found = room.search(write(tmp_path / "leak.safetensors", leak, "BF16"))
    assert (found["verdict"], found["accused"], found["marked"]) == ("weights-only", [], False)


@pytest.mark.parametrize("text", ["", "[]", '{"hidden_size": "x"}', '{"hidden_size": 128, "num_attention_heads": 0}'])
def test_a_config_that_says_nothing_of_heads(tmp_path, text):
    """Then sizes that heads usually have are tried."""
    house = House.build(tmp_path / "room")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "model.safetensors", model(1), "BF16")
    (tmp_path / "model" / "config.json").write_text(text)
    house.put(tmp_path / "model", "acme/turned", known=True)
    leak = full(given(house, OWNER, ref=REF, copy=True), np.random.default_rng(3), HEADS, GROUPS)
    found = house.search(write(tmp_path / "leak.safetensors", leak, "BF16"))
    house.close()
    assert [each["holder"] for each in found["accused"]] == [OWNER]
    assert "missing" not in " ".join(found["transformations"])


def test_quantised_by_ggml(room, tmp_path):
    gguf = pytest.importorskip("gguf")
    quants = pytest.importorskip("gguf.quants")
    type_ = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(tmp_path / "leak.gguf", "llama")
    leak = full(given(room, HOLDERS[5], ref=REF, copy=True), np.random.default_rng(3), HEADS, GROUPS)
    for name, array in leak.items():
        if array.ndim == 2:
            writer.add_tensor(name, quants.quantize(array.astype(np.float32), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = room.search(tmp_path / "leak.gguf")
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[5]]
