"""The command line, in a folder with a model and a room: as a person or a script starts it, or without a process of its
own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from strongroom.cli.main import execute

PROGRAM = [sys.executable, "-m", "strongroom.cli"]
TIMEOUT = 550  # seconds: the longest of them is the whole story of the demo
ENDLESS = {"run", "infer", "serve", "gateway", "witness"}  # they become another program, or end with the process


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


def here(*arguments: str, cwd: Path, given: str = "", env: dict[str, str] | None = None) -> Ended:
    """As `strongroom`, in this very process: without the second that one takes to start."""
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8", write_through=True) for data in (given.encode(), b"", b"")]
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, environment() if env is None else env, clear=True),
        mock.patch.object(sys, "stdin", streams[0]),
        contextlib.redirect_stdout(streams[1]),
        contextlib.redirect_stderr(streams[2]),
    ):
        code = execute(arguments)
    out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])
    assert "Traceback" not in err, err
    return Ended(code, out, err)


def command(*arguments: str, **how: Any) -> Ended:
    """`here`, or as a process where it takes one."""
    return (strongroom if ENDLESS & {*arguments} else here)(*arguments, **how)


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
    """A folder to work in: `model`, and `room` with acme/tiny@1 in it. `run` is a command, in a process of its own only
    where it takes one."""

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
        return command(*arguments, cwd=folder, **how)

    return Desk(folder, run)
