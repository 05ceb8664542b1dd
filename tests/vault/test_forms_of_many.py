"""Plans of quantised copies of what is no model but was put as one: as many files as there may be, files of a few bytes
that name all tensors, wide alignments. A custodian plans in memory and time that go with what was put."""

from __future__ import annotations

import json
from collections.abc import Mapping

import gguf
import numpy as np
import pytest

from strongroom.core.limits import Limits
from strongroom.errors import UsageError
from strongroom.formats.layout import Layout
from strongroom.vault import formpacked, forms
from strongroom.vault.forms import planned
from strongroom.vault.originals import Originals
from strongroom.vault.quantised import Quantised


class Held(Originals):
    """The originals of files that are in memory, and never were in a room: nothing of them is marked."""

    marked = False

    def __init__(self, files: Mapping[str, bytes]) -> None:
        placed = [(path, _kind(path), len(data), _data_start(path, data)) for path, data in files.items()]
        entries = Layout.place(placed)
        self._image = memoryview(bytearray(entries[-1].end))
        for entry in entries:
            self._image[entry.offset : entry.end] = files[entry.path]
        self.layout = Layout(len(self._image), entries, (), 4096, 4096, ())

    @property
    def image(self) -> int:
        return len(self._image)

    def read(self, begin: int, end: int) -> memoryview:
        return self._image[begin:end]


def _kind(path: str) -> str:
    ending = path.rpartition(".")[2]
    return ending if ending in ("safetensors", "gguf") else "opaque"


def _data_start(path: str, data: bytes) -> int:
    if _kind(path) == "safetensors":
        return 8 + int.from_bytes(data[:8], "little")
    if _kind(path) == "gguf":
        return gguf_header(data).data_start
    return 0


def gguf_header(data: bytes):
    from strongroom.formats.gguf import parse_header

    return parse_header(lambda at, size: data[at : at + size], len(data))


def weights(*names: str) -> bytes:
    """A safetensors file of linear layers of 32 weights each."""
    header = {
        name: {"dtype": "BF16", "shape": [1, 32], "data_offsets": [64 * k, 64 * k + 64]} for k, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(64 * len(names))


def literal(plan: forms.Plan) -> int:
    """Bytes that it has in memory."""
    return sum(len(part.source) for part in plan.parts if isinstance(part.source, bytes))


@pytest.mark.parametrize("folders", [False, True])
def test_a_file_is_not_compared_with_every_tensor_of_the_others(monkeypatch, folders):
    """Of 100,000 files, as many as there may be, that would be hours."""
    looked = []
    folder, among = formpacked._folder, formpacked.among
    monkeypatch.setattr(formpacked, "_folder", lambda path: looked.append(1) or folder(path))
    monkeypatch.setattr(formpacked, "among", lambda each, begins: looked.append(1) or among(each, begins))
    count = 300
    files = {}
    for k in range(count):
        where = f"d{k:03}/" if folders else ""
        files[f"{where}m{k:03}.safetensors"] = weights(f"a{k}.q_proj.weight", f"b{k}.q_proj.weight")
        files[f"{where}config.json"] = b"{}"
    originals = Held(files)
    tensors = [Seen(each) for each in originals.tensors()]
    monkeypatch.setattr(Seen, "seen", 0)
    for file in originals.layout.files:
        if file.kind == "safetensors":
            assert [each.info.name[0] for each in forms.of_file(tensors, file)] == ["a", "b"]
    assert Seen.seen < 100 * count
    plan = planned(originals, "int4")
    assert len(looked) < 20 * count
    assert len(plan.files) == len(files)


class Seen:
    """A tensor that counts how often it is asked where it begins."""

    seen = 0

    def __init__(self, placed) -> None:
        self._placed, self.info, self.end = placed, placed.info, placed.end

    @property
    def begin(self) -> int:
        Seen.seen += 1
        return self._placed.begin


def test_short_files_that_name_all_tensors_do_not_fill_the_memory(monkeypatch):
    """Each would be written anew with all of their names in it."""
    index = json.dumps({"weight_map": {"x": "model.safetensors"}}).encode()
    files = {"model.safetensors": weights(*(f"{k}.q_proj.weight" for k in range(100))), "config.json": b"{}"}
    one = literal(planned(Held(files | {"0.safetensors.index.json": index}), "int4"))
    monkeypatch.setattr(formpacked, "_ANEW", 20 * one)
    planned(Held(files | {f"{k}.safetensors.index.json": index for k in range(10)}), "int4")
    with pytest.raises(UsageError) as caught:
        planned(Held(files | {f"{k}.safetensors.index.json": index for k in range(1000)}), "int4")
    assert caught.value.code == "form.config"


def test_no_header_is_larger_than_a_reader_takes(monkeypatch):
    """A tensor that is quantised becomes three."""
    files = {"model.safetensors": weights(*(f"{k}.q_proj.weight" for k in range(100))), "config.json": b"{}"}
    originals = Held(files)
    most = Limits(safetensors_header=originals.layout.files[1].data_start)
    monkeypatch.setattr(formpacked, "LIMITS", most)
    with pytest.raises(UsageError) as caught:
        planned(originals, "int4")
    assert caught.value.code == "form.header"


def test_what_lies_between_tensors_takes_no_memory(tmp_path):
    """Of a file with a wide alignment that is almost all of it."""
    path, wide = tmp_path / "wide.gguf", 1 << 16
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(wide)
    rng = np.random.default_rng(0)
    for k in range(20):
        writer.add_tensor(f"blk.{k}.ffn_up.weight", rng.normal(0, 0.05, (8, 32)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    originals = Held({"wide.gguf": path.read_bytes()})
    plan = planned(originals, "q4_0")
    assert plan.image > 20 * wide
    assert literal(plan) <= 2 * wide  # the header, up to where the tensors begin
    image = bytes(Quantised(originals, plan).read(0, plan.image))
    (file,) = plan.files
    (tmp_path / "out.gguf").write_bytes(image[file.offset :][: file.bytes])
    found = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert [each.data_offset % wide for each in found] == [0] * 20
    rest = bytearray(image)
    for each in found:
        rest[file.offset + each.data_offset : file.offset + each.data_offset + each.n_bytes] = bytes(each.n_bytes)
    assert not any(rest[file.offset + gguf_header(path.read_bytes()).data_start :])
