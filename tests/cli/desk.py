"""The command line as a person or a script starts it, in a folder with a model and a room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = [sys.executable, "-m", "strongroom.cli"]
TIMEOUT = 550  # seconds: the longest of them is the whole story of the demo


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which has to be one JSON object and nothing else."""
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> dict[str, Any]:
        """The error in stdout's JSON, after a check of its shape."""
        assert set(self.json) == {"error"}
        error = self.json["error"]
        assert set(error) == {"code", "message", "hint", "evidence", "exit_code"}
        assert error["exit_code"] == self.code
        return error


def environment(**changes: str) -> dict[str, str]:
    """This process's own without anything that would say which room to use."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STRONGROOM_")}
    return kept | {"LOGNAME": "Ana.Example"} | changes


def strongroom(*arguments: str, cwd: Path, given: str = "", env: dict[str, str] | None = None) -> Ended:
    child = subprocess.run(
        [*PROGRAM, *arguments],
        cwd=cwd,
        env=env or environment(),
        input=given,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert "Traceback" not in child.stderr, child.stderr
    return Ended(child.returncode, child.stdout, child.stderr)


def write_model(folder: Path, seed: int = 1) -> None:
    """Six float16 matrices and a norm, 1.6 MB: enough for a few dozen marked segments."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for layer in range(6):
        values = rng.normal(0, 0.05, (256, 512)).astype("<f2").tobytes()
        header[f"layers.{layer}.weight"] = {
            "dtype": "F16",
            "shape": [256, 512],
            "data_offsets": [len(data), len(data) + len(values)],
        }
        data += values
    norm = np.ones(512, "<f4").tobytes()
    header["norm"] = {"dtype": "F32", "shape": [512], "data_offsets": [len(data), len(data) + len(norm)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data + norm)
    (folder / "config.json").write_text('{"model_type": "tiny"}\n')


@dataclass(frozen=True)
class Desk:
    """A folder to work in: `model`, and `room` with acme/tiny@1 in it."""

    folder: Path
    run: Callable[..., Ended]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def room(self) -> Path:
        return self.folder / "room"

    def objects(self) -> list[Path]:
        """The store's objects, largest first."""
        found = (path for path in (self.room / "store").rglob("*") if path.is_file())
        return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def desk_in(folder: Path) -> Desk:
    def run(*arguments: str, **how: Any) -> Ended:
        return strongroom(*arguments, cwd=folder, **how)

    return Desk(folder, run)


Call = Callable[..., Ended]
"""`call(desk, *arguments)`: as `desk.run`, in this very process."""
