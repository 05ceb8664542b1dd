"""An adapter is a version of its own, of small tensors alone: a copy of it that turns up names its holder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from marking.disguises import invertible
from vault.rooms import OWNER, House
from vault.test_trace import given, quantised, write

REF = "acme/adapter@1"
HOLDERS = [OWNER, *(f"user/h{k}" for k in range(50))]  # more than are scored in full
RANK, WIDTH, LAYERS = 4, 256, 8


def adapter(seed, rank=RANK):
    """What PEFT saves of a LoRA on Q and V: 32,768 elements, and none of its tensors has more than 1,024."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(LAYERS):
        for what in "qv":
            at = f"base_model.model.model.layers.{layer}.self_attn.{what}_proj"
            found[f"{at}.lora_A.weight"] = rng.uniform(-1, 1, (rank, WIDTH)) / np.sqrt(WIDTH)
            found[f"{at}.lora_B.weight"] = rng.normal(0, 0.01, (WIDTH, rank))
    return {name: array.astype(np.float32) for name, array in found.items()}


@pytest.fixture(scope="module", params=["F32", "BF16"])
def room(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    house = House.build(folder / "room")
    (folder / "model").mkdir()
    write(folder / "model" / "adapter_model.safetensors", adapter(1), request.param)
    (folder / "model" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK}))
    house.put(folder / "model", "acme/adapter", known=True)
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def factored_again(tensors, seed=3):
    """The same product of other factors, far from the first."""
    found, rng = {}, np.random.default_rng(seed)
    for name, array in tensors.items():
        if "lora_A" in name:
            m = invertible(rng, len(array))
            found[name] = m @ array
            b = name.replace("lora_A", "lora_B")
            found[b] = tensors[b] @ np.linalg.inv(m)
    return found


def other_rank(tensors, rank):
    """The same product, as its singular values have it, of so many of them: the strongest, or zeros besides."""
    found = {}
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        u, strengths, v = np.linalg.svd(tensors[other] @ tensors[name], full_matrices=False)
        root = np.sqrt(np.where(np.arange(len(strengths)) < RANK, strengths, 0))[:rank]
        found[name], found[other] = root[:, None] * v[:rank], u[:, :rank] * root
    return found


CASTS = {
    "as it is": lambda t: t,
    "int8, rows": lambda t: {name: quantised(array, 8, array.shape[1]) for name, array in t.items()},
    "int8, groups of 64": lambda t: {name: quantised(array, 8) for name, array in t.items()},
    "int4, groups of 64": lambda t: {name: quantised(array, 4) for name, array in t.items()},
    "factored again": factored_again,
    "factored again, by singular values": lambda t: other_rank(t, RANK),
    "factored again, to twice the rank": lambda t: other_rank(t, 2 * RANK),
    "factored again, to twice the rank, int8": lambda t: CASTS["int8, groups of 64"](other_rank(t, 2 * RANK)),
    "factored again, to three ranks of four": lambda t: other_rank(t, 3),
    "factored again, to one rank of four, int8": lambda t: CASTS["int8, groups of 64"](other_rank(t, 1)),
    "factored again, int8, rows": lambda t: CASTS["int8, rows"](factored_again(t)),
}
LEAST = {
    **dict.fromkeys(CASTS, 30),
    "as it is": 100,
    "int4, groups of 64": 8.5,
    "factored again, to one rank of four, int8": 20,
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_copy_names_its_holder(room, tmp_path, cast, dtype):
    leak = CASTS[cast](given(room, HOLDERS[17], ref=REF, copy=True))
    found = room.search(write(tmp_path / "adapter_model.safetensors", leak, dtype))
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[17]]
    assert found["accused"][0]["layer2"]["z"] > LEAST[cast]
    assert found["accused"][0]["false_accusation"] <= 1e-9
    assert ("factored again" in " ".join(found["transformations"])) == ("factored" in cast)
    assert found["elements"] == 2 * 2 * LAYERS * RANK * WIDTH


def test_factors_of_any_matrix_are_not_taken_for_rows_that_moved(room, tmp_path):
    """Some row of M A is like some row of A by chance: what such rows explain is a part of it."""
    leak, rng = given(room, HOLDERS[17], ref=REF, copy=True), np.random.default_rng(4)
    for name in [name for name in leak if "lora_A" in name]:
        m, b = rng.normal(size=(RANK, RANK)), name.replace("lora_A", "lora_B")
        leak[name], leak[b] = m @ leak[name], leak[b] @ np.linalg.inv(m)
    found = room.search(write(tmp_path / "adapter_model.safetensors", leak, "F32"))
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[17]]
    done = " ".join(found["transformations"])
    assert "factored again" in done
    assert "permuted" not in done
    assert "missing" not in done


def test_rows_that_moved_are_not_taken_for_other_factors(room, tmp_path):
    leak, order = given(room, HOLDERS[17], ref=REF, copy=True), np.array([2, 0, 3, 1])
    for name in [name for name in leak if "lora_A" in name]:
        b = name.replace("lora_A", "lora_B")
        leak[name], leak[b] = leak[name][order], leak[b][:, order]
    found = room.search(write(tmp_path / "adapter_model.safetensors", leak, "F32"))
    assert [each["holder"] for each in found["accused"]] == [HOLDERS[17]]
    assert "factored again" not in " ".join(found["transformations"])


@pytest.mark.parametrize("holder", [HOLDERS[0], HOLDERS[33]])
def test_what_was_only_loaded_names_nobody_else(room, tmp_path, holder):
    """There are too few positions for a code word."""
    leak = given(room, holder, ref=REF)
    found = room.search(write(tmp_path / "adapter_model.safetensors", leak, "F32"))
    assert {each["holder"] for each in found["accused"]} <= {holder}


def test_an_adapter_as_it_was_before_the_room_names_nobody(room, tmp_path):
    found = room.search(write(tmp_path / "adapter_model.safetensors", adapter(1), "BF16"))
    assert (found["verdict"], found["accused"], found["marked"]) == ("weights-only", [], False)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_another_adapter_of_another_rank_is_unrelated(room, tmp_path, rank):
    for leak in (adapter(2, rank), other_rank(adapter(2), rank)):
        found = room.search(write(tmp_path / "adapter_model.safetensors", leak, "BF16"))
        assert (found["verdict"], found["accused"]) == ("unrelated", [])


@pytest.mark.parametrize("rank", [RANK, 16])
def test_another_adapter_of_the_same_shape_is_unrelated(tmp_path, rank):
    """Though each column of so narrow a matrix is like some column of any other."""
    house = House.build(tmp_path / "room")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "adapter_model.safetensors", adapter(1, rank), "BF16")
    house.put(tmp_path / "model", "acme/adapter", known=True)
    found = house.search(write(tmp_path / "adapter_model.safetensors", adapter(2, rank), "BF16"))
    house.close()
    assert (found["verdict"], found["accused"]) == ("unrelated", [])
