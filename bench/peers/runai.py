"""Run:ai Model Streamer on the CPU; every tensor it yields belongs to the caller."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.reader import Reader, Setting, shards


class Runai(Reader):
    name = "runai"
    title = "run:ai model streamer (CPU)"
    package = "runai-model-streamer"
    own_form = False
    operations = frozenset({"load", "tensor", "first"})
    settings = ({}, {"RUNAI_STREAMER_CONCURRENCY": "2"})
    environment = {"RUNAI_STREAMER_LOG_LEVEL": "ERROR"}

    @classmethod
    def missing(cls) -> str:
        return "" if importlib.util.find_spec("runai_model_streamer") else "runai-model-streamer is not installed"

    def prepare(self, place: Path) -> None:
        import runai_model_streamer  # noqa: F401

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        return self._stream(directory, setting, None)

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        return self._stream(directory, setting, [name])[name]

    def _stream(self, directory: Path, setting: Setting, names: list[str] | None) -> dict[str, Any]:
        from runai_model_streamer import SafetensorsStreamer

        os.environ.update(setting)
        streamer = self.open.enter_context(SafetensorsStreamer())
        streamer.stream_files([str(file) for file in shards(directory)], device="cpu", tensor_names=names, owned=True)
        return dict(streamer.get_tensors())
