"""age by hand: decrypt every shard to a file, then load it. What people do who have no tool for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.peers.safetensors import Safetensors
from bench.reader import Setting, shards


class Age(Safetensors):
    """A process of age a shard, as many at a time as there are cores, then safetensors' full copy.

    The plaintext files are on disk for the length of the load, which is what is wrong with it.
    """

    name = "age"
    title = "age by hand (decrypt to files, then safetensors)"
    package = ""
    own_form = True
    operations = frozenset({"load"})

    @classmethod
    def missing(cls) -> str:
        return "" if shutil.which("age") and shutil.which("age-keygen") else "age is not installed (Debian: age)"

    def put(self, staged: Any, place: Path) -> None:
        subprocess.run(["age-keygen", "-o", place / "key"], check=True, capture_output=True)
        recipient = subprocess.run(["age-keygen", "-y", place / "key"], check=True, capture_output=True, text=True)
        _all([["age", "-r", recipient.stdout.strip(), "-o", place / f"{f.name}.age", f] for f in shards(staged)])

    def load(self, directory: Path, place: Path, setting: Setting) -> Mapping[str, Any]:
        plain = Path(tempfile.mkdtemp(prefix="plain-", dir=place))
        self.open.callback(shutil.rmtree, plain)
        _all([["age", "-d", "-i", place / "key", "-o", plain / f.stem, f] for f in shards(place, ".age")])
        return super().load(plain, place, setting)


def _all(commands: list[list[str | Path]]) -> None:
    """Run the commands, as many at a time as there are cores; fail if one fails."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
