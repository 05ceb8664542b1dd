"""An adapter that was merged into weights of the room names its holder."""

from __future__ import annotations

import numpy as np
import pytest

from strongroom.vault.suspect import Suspect
from strongroom.vault.trace import trace
from vault.rooms import OWNER, House
from vault.test_trace import given, quantised, write

BASE, ADAPTER = "acme/base@1", "acme/adapter@1"
HOLDERS = [OWNER, *(f"user/h{k}" for k in range(40))]
RANK, WIDTH, VALUES, LAYERS = 4, 256, 128, 6
SCALE = 2.0  # alpha over rank


def base(seed):
    rng = np.random.default_rng(seed)
    found = {"model.embed_tokens.weight": rng.normal(0, 0.02, (1000, WIDTH))}
    for layer in range(LAYERS):
        for what, rows in (("q", WIDTH), ("v", VALUES), ("o", WIDTH)):
            found[f"model.layers.{layer}.self_attn.{what}_proj.weight"] = rng.normal(0, 0.02, (rows, WIDTH))
    return {name: array.astype(np.float32) for name, array in found.items()}


def adapter(seed):
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(LAYERS):
        for what, rows in (("q", WIDTH), ("v", VALUES)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{what}_proj"
            found[f"{at}.lora_A.weight"] = rng.uniform(-1, 1, (RANK, WIDTH)) / np.sqrt(WIDTH)
            found[f"{at}.lora_B.weight"] = rng.normal(0, 0.01, (rows, RANK))
    return {name: array.astype(np.float32) for name, array in found.items()}


def merged(weights, factors):
    found = dict(weights)
    for name in [name for name in factors if "lora_A" in name]:
        at = name.removeprefix("base_model.model.").replace(".lora_A", "")
        found[at] = weights[at] + SCALE * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    return found


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    house = House.build(folder / "room")
    for name, tensors, file in (("base", base(1), "model"), ("adapter", adapter(1), "adapter_model")):
        (folder / name).mkdir()
        write(folder / name / f"{file}.safetensors", tensors, "BF16")
        house.put(folder / name, f"acme/{name}", known=True)
    for holder in HOLDERS[1:]:
        house.register(holder)
    yield house
    house.close()


def about(room, path, ref=None):
    with Suspect.opened(path) as suspect:
        return trace(room.vault, suspect, path.name, [], weights=ref, progress=lambda *_: None)


CASTS = {
    "F32": lambda t: t,
    "BF16": lambda t: t,
    "int8": lambda t: {name: quantised(array, 8) for name, array in t.items()},
}


@pytest.mark.parametrize("ref", [None, ADAPTER])
@pytest.mark.parametrize("cast", CASTS)
def test_names_whom_the_adapter_was_given(room, tmp_path, cast, ref):
    leak = CASTS[cast](merged(base(1), given(room, HOLDERS[17], ref=ADAPTER, copy=True)))
    found = about(room, write(tmp_path / "leak.safetensors", leak, "BF16" if cast == "BF16" else "F32"), ref)
    assert (found.weights, [each.holder for each in found.accused]) == (ADAPTER, [HOLDERS[17]])
    assert f"merged into {BASE} ({4 * LAYERS} of {4 * LAYERS} tensors)" in found.transformations


def test_into_a_copy_of_somebody_else(room, tmp_path):
    """Each version names its own."""
    weights = given(room, HOLDERS[5], ref=BASE, copy=True)
    path = write(tmp_path / "l.safetensors", merged(weights, given(room, HOLDERS[17], ref=ADAPTER, copy=True)), "BF16")
    for ref, holder in ((ADAPTER, HOLDERS[17]), (BASE, HOLDERS[5])):
        assert [each.holder for each in about(room, path, ref).accused] == [holder]
    assert about(room, path).accused


@pytest.mark.parametrize("other", [lambda t: t, lambda t: merged(t, adapter(2))])
def test_weights_without_it_are_not_it(room, tmp_path, other):
    path = write(tmp_path / "leak.safetensors", other(base(1)), "BF16")
    found = about(room, path, ADAPTER)
    assert (found.verdict, found.accused) == ("unrelated", [])
    assert about(room, path).weights == BASE


def test_an_adapter_from_before_the_room_names_nobody(room, tmp_path):
    found = about(room, write(tmp_path / "leak.safetensors", merged(base(1), adapter(1)), "BF16"), ADAPTER)
    assert (found.verdict, found.accused, found.marked) == ("weights-only", [], False)


@pytest.mark.parametrize("odd", [np.nan, np.inf, 3e38])
def test_a_factor_with_an_element_that_is_no_number_ends_no_trace(tmp_path, odd):
    """Whoever puts an adapter does not choose what else can be traced."""
    house = House.build(tmp_path / "room")
    factors = adapter(1)
    for array in factors.values():
        array[0, 0] = odd
    for name, tensors, file in (("base", base(1), "model"), ("adapter", factors, "adapter_model")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{file}.safetensors", tensors, "F32")
        house.put(tmp_path / name, f"acme/{name}", known=True)
    house.register(HOLDERS[17])
    leak = write(
        tmp_path / "leak.safetensors", merged(given(house, HOLDERS[17], ref=BASE, copy=True), adapter(2)), "F32"
    )
    assert [each.holder for each in about(house, leak).accused] == [HOLDERS[17]]
    assert about(house, leak, ADAPTER).accused == []
    house.close()
