"""Memory stays flat: what a put or a verify needs does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import strongroom
from strongroom.core.limits import MIB

SIZE = 600 * MIB
LIMIT = 512 * MIB

CHILD = """
import json, sys
from pathlib import Path
import numpy, sqlalchemy, strongroom
from strongroom.vault.fsck import fsck
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault

def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])

room, model = Path(sys.argv[1]), Path(sys.argv[2])
before = peak()
vault, _ = Vault.init(room, owner="user/ana", custody="solo")
result = vault.put(ModelSource.scan(model), "acme/large", by="user/ana")
put = peak() - before
report = vault.verify(result.ref)
deep = vault.verify(result.ref, deep=True)
vault.rotate(result.ref, by="user/ana")
print(json.dumps({"put": put, "all": peak() - before, "ok": report.ok and deep.ok, "bytes": result.bytes}))
"""


def test_put_verify_and_rotate_of_600_mib(tmp_path):
    """The file is sparse, so that it costs no time to make; the room reads, marks, encrypts and writes all of it."""
    rows = SIZE // (2 * 4096)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}}).encode()
    header += b" " * (-len(header) % 8)
    model = tmp_path / "model.safetensors"
    with model.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for at in range(0, rows * 8192, 16 * MIB):  # here and there something that can be marked
            file.seek(8 + len(header) + at)
            file.write(bytes(range(1, 61)) * 1000)
        file.truncate(8 + len(header) + rows * 8192)
    env = {**os.environ, "PYTHONPATH": str(Path(strongroom.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "room", model], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    assert told["bytes"] > SIZE
    assert told["put"] < LIMIT
    assert told["all"] < LIMIT
