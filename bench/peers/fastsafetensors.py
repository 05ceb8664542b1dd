"""fastsafetensors on the CPU: its loader without GPUDirect, tensors as views over its own buffer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.reader import Reader, Setting, shards


class Fastsafetensors(Reader):
    name = "fastsafetensors"
    title = "fastsafetensors (CPU)"
    package = "fastsafetensors"
    own_form = False
    operations = frozenset({"load", "tensor", "first"})
    settings = ({}, {"max_threads": 2}, {"max_threads": 2, "bbuf_size_kb": 2048})
    # Its default for local disks is O_DIRECT, which would read past the warm page cache that everybody else has.
    environment = {"FASTSAFETENSORS_ODIRECT": "0"}

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("fastsafetensors") else "fastsafetensors is not installed"

    def prepare(self, place: Path) -> None:
        import fastsafetensors  # noqa: F401

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        loader, buffers = self._read([str(file) for file in shards(directory)], None, setting)
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        _, buffers = self._read([str(file) for file in shards(directory)], name, setting)
        return buffers.get_tensor(name)

    def _read(self, files: list[str], only: str | None, setting: Setting) -> Any:
        from fastsafetensors import SafeTensorsFileLoader

        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True, **setting)
        self.open.callback(loader.close)
        loader.add_filenames({0: files})
        if only is not None:
            loader.set_tensor_filter(lambda name: name == only)
        buffers = loader.copy_files_to_device()
        self.open.callback(buffers.close)
        return loader, buffers
