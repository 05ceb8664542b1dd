"""safetensors with a full copy into memory: what a loader that owns its weights does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.reader import Reader, Setting, shards


class Safetensors(Reader):
    """safe_open maps the file; a clone of every tensor is the copy (torch copies large tensors on all cores)."""

    name = "safetensors"
    title = "safetensors, full copy (mmap + clone)"
    package = "safetensors"
    own_form = False
    operations = frozenset({"load", "tensor", "first"})

    def prepare(self, place: Path) -> None:
        import safetensors  # noqa: F401
        import torch  # noqa: F401

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        from safetensors import safe_open

        tensors = {}
        for file in shards(directory):
            with safe_open(file, framework="pt", device="cpu") as source:
                for name in source.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensors[name] = source.get_tensor(name).clone()
        return tensors

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        from safetensors import safe_open

        for file in shards(directory):
            with safe_open(file, framework="pt", device="cpu") as source:
                if name in source.keys():  # noqa: SIM118
                    return source.get_tensor(name).clone()
        raise KeyError(name)


class SafetensorsHuge(Safetensors):
    """The same with torch told to ask for huge pages: not the default, shown so that nobody has to wonder."""

    name = "safetensors-thp"
    title = "safetensors, full copy, torch with THP_MEM_ALLOC_ENABLE=1"
    operations = frozenset({"load"})
    environment = {"THP_MEM_ALLOC_ENABLE": "1"}
