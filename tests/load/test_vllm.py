"""The vLLM plugin: what feeds a model is tested here always; its registration where vLLM is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from strongroom.errors import UsageError
from strongroom.load.grant import VARIABLE, Grant, hold, variable
from strongroom.load.vllm import load_into, model_folder, ref_of, register, weights_iterator

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class TinyModel(torch.nn.Module):
    """With `load_weights` as vLLM's models have it: it takes an iterator and says what it used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.layer = torch.nn.Linear(8, 8)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            with torch.no_grad():
                parameters[name].copy_(tensor)
            loaded.add(name)
        return loaded


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    tensors = TinyModel().state_dict()
    half = len(tensors) // 2
    shards = {
        "model-00001-of-00002.safetensors": list(tensors)[:half],
        "model-00002-of-00002.safetensors": list(tensors)[half:],
    }
    for path, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / path)
    index = {"metadata": {}, "weight_map": {name: path for path, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "original").mkdir()
    save_file({"embed.weight": torch.zeros(3)}, folder / "original" / "consolidated.safetensors")
    return folder


def test_the_iterator_has_the_tensors_of_the_model_and_no_others(model, make_reader):
    expected = load_file(model / "model-00001-of-00002.safetensors") | load_file(
        model / "model-00002-of-00002.safetensors"
    )
    found = dict(weights_iterator(make_reader(model, share="0")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_a_model_is_filled(model, make_reader):
    reader = make_reader(model, share="0")
    filled = TinyModel()
    load_into(filled, reader)
    for name, tensor in weights_iterator(reader):
        assert torch.equal(filled.state_dict()[name], tensor)


def test_a_model_that_is_not_filled_is_refused(model, make_reader):
    reader = make_reader(model)
    larger = TinyModel()
    larger.head = torch.nn.Linear(8, 50)
    with pytest.raises(UsageError) as error:
        load_into(larger, reader)
    assert error.value.code == "vllm.incomplete"
    load_into(larger, reader, strict=False)
    larger.head.quant_method = type("Method", (), {"process_weights_after_loading": None})()
    load_into(larger, reader)


def test_the_folder_shows_configuration_and_tokenizer_from_memory_to_other_processes_too(model, make_reader):
    with model_folder(make_reader(model)) as folder:
        shown = sorted(path.name for path in folder.iterdir())
        assert shown == ["config.json", "model.safetensors.index.json", "tokenizer.json"]
        for path in folder.iterdir():
            assert path.is_symlink()
            assert str(path.readlink()).startswith("/proc/")
            assert path.read_bytes() == (model / path.name).read_bytes()
            with pytest.raises(PermissionError):
                path.write_bytes(b"other")
        read = [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())", str(folder / "config.json")]
        assert subprocess.run(read, capture_output=True, text=True, check=True).stdout == '{"model_type": "llama"}\n'
    assert not folder.exists()


def test_which_weights_are_meant(room, model, monkeypatch):
    assert ref_of({"ref": "acme/tiny@1"}) == "acme/tiny@1"
    for wrong in ({"ref": 1}, {"path": "x"}, {"ref": "a", "concurrency": 1}):
        with pytest.raises(UsageError) as error:
            ref_of(wrong)
        assert error.value.code == "vllm.option"
    with pytest.raises(UsageError) as error:
        ref_of({})
    assert error.value.code == "vllm.which"
    grant = Grant(room.vault.blobs.url, room.vault.bundle(room.put(model), "user/ana").encode())
    for grants, expected in (([grant], "acme/tiny@1"), ([grant, grant], None)):
        fd = hold(grants)
        monkeypatch.setenv(VARIABLE, variable(fd))
        try:
            if expected:
                assert ref_of({}) == ref_of(None) == expected
            else:
                with pytest.raises(UsageError):
                    ref_of({})
        finally:
            os.close(fd)


def test_without_vllm_registering_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError) as error:
        register()
    assert error.value.code == "vllm.missing"


REGISTERED = """
import sys, types
import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from strongroom.load.vllm import register
register()
register()
loader = get_model_loader(LoadConfig(load_format="strongroom"))
sys.path.insert(0, sys.argv[1])
from test_vllm import TinyModel
model, config = TinyModel(), types.SimpleNamespace(quantization=None)
loader.download_model(config)
loader.load_weights(model, config)
print(float(sum(parameter.double().sum() for parameter in model.parameters())))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_finds_the_loader_and_fills_a_model_with_it(room, model):
    ref = room.put(model, share="0")
    expected = sum(float(tensor.double().sum()) for _, tensor in weights_iterator(room.reader(ref)))
    fd = hold([Grant(room.vault.blobs.url, room.vault.bundle(ref, "user/ana").encode())])
    env = {**os.environ, VARIABLE: variable(fd), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", REGISTERED, str(Path(__file__).parent)],
            env=env,
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected)
