"""Versions in which nothing can be marked: what leaves of them is known again, and said to have no mark."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from cli.desk import desk_in
from vault.rooms import safetensors_file, write_model

REF = "acme/int8@1"
SHAPES = {"model.layers.0.weight": ("I8", (256, 128)), "model.layers.1.weight": ("I8", (64, 256))}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A room of one person, with a version of integers, one of a few floats, and one that is marked."""
    made = desk_in(tmp_path_factory.mktemp("unmarked"))
    for name in ("ints", "few"):
        (made.folder / name).mkdir()
    safetensors_file(made.folder / "ints" / "model.safetensors", SHAPES, 1)
    safetensors_file(made.folder / "few" / "model.safetensors", {"x": ("F32", (8, 16)), "y": ("F32", (16, 8))}, 2)
    write_model(made.folder / "model")
    assert made.run("init", "--owner", "user/olga", "--custody", "solo").code == 0
    for name, ref in (("ints", "acme/int8"), ("few", "acme/few"), ("model", "acme/tiny")):
        assert made.run("put", name, ref).code == 0
    return made


@pytest.mark.parametrize(("name", "ref"), [("ints", REF), ("few", "acme/few@1")])
def test_what_is_found_of_it_is_known_again_and_carries_no_marks(desk, name, ref):
    found = desk.run("trace", name, "--json").json
    assert (found["verdict"], found["weights"], found["accused"]) == ("weights-only", ref, [])
    assert (found["carries_marks"], found["marked"]) == (False, False)
    ended = desk.run("trace", name, "--weights", ref, "--report", f"{name}.html")
    assert ended.code == 13
    said = f"These are the weights of {ref} or of a relative. This version carries no marks, so nobody can be named."
    assert ended.out.startswith(said)
    assert said in (desk.folder / f"{name}.html").read_text()
    assert "request" not in ended.err


def test_renamed_and_as_floats_it_is_known_too(desk, tmp_path):
    data = (desk.folder / "ints" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, parts, at = json.loads(data[8 : 8 + length]), [], 0
    made = {}
    for k, (name, (_, shape)) in enumerate(SHAPES.items()):
        begin, end = header[name]["data_offsets"]
        values = np.frombuffer(data[8 + length :][begin:end], np.int8).astype(np.float32) * np.float32(0.01)
        made[f"t{k}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + values.nbytes]}
        parts.append(values.tobytes())
        at += values.nbytes
    text = json.dumps(made).encode()
    (tmp_path / "leak.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    found = desk.run("trace", str(tmp_path / "leak.safetensors"), "--json").json
    assert (found["verdict"], found["weights"]) == ("weights-only", REF)


@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_other_integers_are_unrelated(desk, tmp_path, dtype):
    """All of one sign they are far from being at right angles."""
    rng = np.random.default_rng(7)
    header, parts, at = {}, [], 0
    for name, (_, shape) in SHAPES.items():
        values = rng.integers(0, 127, int(np.prod(shape)), dtype=np.uint8)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + values.nbytes]}
        parts.append(values.tobytes())
        at += values.nbytes
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    shutil.copytree(desk.folder / "ints", tmp_path / "ints")
    found = desk.run("trace", str(tmp_path / "x.safetensors"), "--json").json
    assert (found["verdict"], found["carries_marks"]) == ("unrelated", False)


def test_a_version_that_is_marked_says_so(desk):
    assert desk.run("trace", "model", "--json").json["carries_marks"]


@pytest.mark.parametrize(("ref", "marked"), [(REF, False), ("acme/few@1", False), ("acme/tiny@1", True)])
def test_a_copy_says_whether_it_is_marked(desk, ref, marked):
    folder = ref.partition("/")[2]
    ended = desk.run("copy", ref, "--to", "user/olga", "--out", f"out-{folder}")
    assert ended.code == 0
    assert ("marked for user/olga" in ended.out) == marked
    assert ("without a mark" in ended.out) == (not marked)
    assert ("the weights name its holder" in ended.err) == marked
    assert ("nothing in it says whose copy it is" in ended.err) == (not marked)
    assert desk.run("copy", ref, "--to", "user/olga", "--out", f"j-{folder}", "--json").json["carries_marks"] == marked
