"""Strongroom itself, through its public Python interface only: marked, encrypted, verified.

This is the one module that knows the names of that interface; see docs/reference for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.reader import Reader, Setting

WEIGHTS = "bench/model"
REF = f"{WEIGHTS}@1"


class Strongroom(Reader):
    """The whole model as NumPy views over one buffer; the process never imports torch."""

    name = "strongroom"
    title = "**strongroom**, marked and verified (NumPy)"
    package = "strongroom"
    marked = True
    framework = "numpy"

    @classmethod
    def missing(cls) -> str:
        if importlib.util.find_spec("strongroom") is None:
            return "the package strongroom can't be imported"
        import strongroom

        wanted = [name for name in ("Room", "open", "safe_open") if not hasattr(strongroom, name)]
        return f"strongroom has no {', '.join(wanted)}" if wanted else ""

    def prepare(self, place: Path) -> None:
        import strongroom  # noqa: F401

    def put(self, staged: Any, place: Path) -> None:
        import strongroom

        room, _ = strongroom.Room.init(place / "room", custody="solo")
        with room:
            room.put(staged, WEIGHTS)

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        return self._weights(place).read()

    def tensor(self, directory: Path, place: Path, name: str, setting: Setting) -> Any:
        import strongroom

        with strongroom.safe_open(REF, framework=self.framework, room=place / "room") as file:
            return file.get_tensor(name)

    def _weights(self, place: Path) -> Any:
        import strongroom

        room = self.open.enter_context(strongroom.open(place / "room"))
        return self.open.enter_context(room.load(REF))


class StrongroomTorch(Strongroom):
    """The same read with the result as torch tensors over the same memory: what the torch peers give."""

    name = "strongroom-torch"
    title = "**strongroom**, marked and verified (torch)"
    form = "strongroom"
    operations = frozenset({"load", "tensor", "first"})
    framework = "pt"

    def prepare(self, place: Path) -> None:
        import torch  # noqa: F401

        import strongroom  # noqa: F401

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        return self._weights(place).torch()
