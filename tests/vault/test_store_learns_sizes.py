"""The store is shown nothing but sizes: no name, no shape, no configuration, no byte of weights or keys."""

from __future__ import annotations

import json

import pytest

from strongroom.core.limits import KIB
from vault.rooms import NAME, OWNER, REF, House, original, safetensors_file, write_model

MARK = "zyxwvut-secret-name"


@pytest.fixture(scope="module")
def secretive(tmp_path_factory):
    """A room with a model that has recognisable names and texts everywhere."""
    folder = tmp_path_factory.mktemp("secretive")
    model = write_model(folder / "model", seed=9)
    (model / f"{MARK}.txt").write_text(f"{MARK} " * 900)
    tensors = {f"{MARK}.weight": ("BF16", (120, 256)), f"{MARK}.bias": ("F32", (256,))}
    safetensors_file(model / "extra.safetensors", tensors, seed=10)
    house = House.build(folder / "room")
    house.put(model, f"acme/{MARK[:9]}")
    house.put(model)
    yield house, model
    house.close()


def everything(house: House) -> bytes:
    """Names and contents of all that the store holds, whatever it is."""
    files = sorted(path for path in house.store.rglob("*") if path.is_file())
    return b"\0".join(str(path.relative_to(house.store)).encode() + b"\0" + path.read_bytes() for path in files)


def test_no_name_and_no_text(secretive):
    house, model = secretive
    stored = everything(house)
    names = [MARK, MARK[:9], NAME, OWNER, "safetensors", "TinyForCausalLM", '"BF16"', "weight_map"]
    names += [path.name for path in model.iterdir()]
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        names += json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert len(names) > 15
    for name in names:
        assert len(name) > 5  # four bytes are somewhere in there by chance, once in a few thousand times
        assert name.encode() not in stored, name
    objects = " ".join(house.objects())
    assert not [name for name in ("acme", "tiny", "ana", "BF16") if name in objects]


def test_no_sixteen_bytes_of_any_file(secretive):
    house, model = secretive
    stored = everything(house)
    ref = REF
    windows = set()
    for image in (original(house, ref, model), house.read(ref)):
        windows |= {image[at : at + 16] for at in range(len(image) - 15)}
    # Gaps between files, and trailers, too, have stretches of zeros; what is beside them may be equal by chance.
    windows = {window for window in windows if window.count(0) < 8}
    assert len(windows) > 200_000
    found = [at for at in range(len(stored) - 15) if stored[at : at + 16] in windows]
    assert found == []


def test_no_key(secretive):
    house, _ = secretive
    bundle = house.vault.bundle(REF, OWNER)
    record = house.vault.record(house.vault.find(REF))
    room_key = house.vault.keys.room_key
    keys = [room_key, record.version_key, record.mark_root, record.mark_key, record.code_key, bundle.common_key]
    keys += [bundle.variant_key(position) for position in range(bundle.positions)]
    house.vault.db.scrub()
    outside = everything(house) + b"".join(path.read_bytes() for path in house.folder.glob("room.db*"))
    assert len(outside) > 500_000
    for key in keys:
        for form in (key, key.hex().encode()):
            assert form not in outside
    assert record.version.hex().encode() in outside  # this way of looking does find what is there


def test_equal_sizes_look_equal(tmp_path):
    """Two models with files of the same sizes, and other names, shapes, types and texts."""
    shapes = []
    for number, (text, tensors) in enumerate(
        [
            ("first model", {"a.weight": ("BF16", (256, 256)), "b.weight": ("F32", (64, 128))}),
            (
                "other words",
                {
                    "transformer.h.0.attention.query.weight": ("F16", (512, 64)),
                    "transformer.h.1.attention.query.weight": ("BF16", (32, 1024)),
                    "z": ("F32", (128, 64)),
                },
            ),
        ]
    ):
        model = tmp_path / f"model{number}"
        model.mkdir()
        safetensors_file(model / "model.safetensors", tensors, seed=number, header_bytes=4 * KIB)
        (model / ("config.json" if number else "blurb.json")).write_text(text)
        house = House.build(tmp_path / f"room{number}")
        house.put(model)
        kinds = {name: name.rpartition(".")[2] if "." in name else name.split("/")[0] for name in house.objects()}
        shapes.append(sorted((kinds[name], len(data)) for name, data in house.objects().items()))
        house.close()
    assert shapes[0] == shapes[1]


def test_putting_the_same_files_twice_shows_nothing_in_common(house, source):
    house.put(source)
    packs = [data for name, data in house.objects().items() if name.startswith("packs/")]
    assert len(packs) == 4
    blocks = [data[at : at + 16] for data in packs for at in range(0, len(data) - 6000, 16)]
    assert len(blocks) == len(set(blocks)) > 30_000
