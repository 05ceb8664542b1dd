"""One measurement in a fresh child process: wall seconds, peak memory, and a check of what was read.

The child (`python -m bench.measure CASE`) imports everything, performs the same operation once on a tiny model, resets
the kernel's mark of its peak memory and only then takes the time. It checks the result afterwards and prints one line
of JSON.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.limit import Floor, Limit
from bench.ours import Strongroom, StrongroomTorch
from bench.peers import PEERS
from bench.reader import Reader, bits

READERS: dict[str, type[Reader]] = {
    reader.name: reader for reader in (Limit, Floor, Strongroom, StrongroomTorch, *PEERS)
}
MIB = 1 << 20
TIMEOUT = 900
REUSED, FRESH = MEMORY = ("reused", "fresh")
FRESH_AFTER = 6.0
TENSOR_MEMORY = 128 * MIB  # twice the largest tensor: touching gigabytes right before costs a read of 64 MiB its caches


@dataclass(frozen=True)
class Case:
    """What to measure: a reader, an operation (load, tensor, put) and where model and the reader's form of it lie.

    `tensor` is the name for the operation tensor, and the one that is compared with the original after a load.
    `tiny_directory` and `tiny_place` are the warm-up's; without them there is none. `memory` is the state that free
    memory is brought into: one of `MEMORY`, or empty to leave it as it is.
    """

    reader: str
    operation: str
    directory: str
    place: str
    tensor: str
    setting: dict[str, Any] = field(default_factory=dict)
    tiny_directory: str = ""
    tiny_place: str = ""
    memory: str = ""


@dataclass(frozen=True)
class Sample:
    """Seconds of wall time, and of user and system time over all threads and children; memory in bytes.

    `sync` is what making it durable took after a put.

    `baseline` is the resident memory right before (the interpreter, its imports, and a serialiser's staged tensors),
    `peak` the kernel's VmHWM after, nothing subtracted.
    """

    seconds: float
    cpu: float
    sync: float
    baseline: int
    peak: int
    stored: int


class Failed(Exception):
    """The child did not deliver; the message is the end of what it said."""


def measure(case: Case) -> Sample:
    """Warm the page cache with the files the case reads, run the child and return what it measured."""
    if case.operation == "put" or not READERS[case.reader].own_form:
        warm(Path(case.directory))
    if case.operation == "put":
        os.sync()  # what earlier puts left unwritten is not this one's to wait for
    else:
        warm(Path(case.place))
    child = subprocess.run(
        [sys.executable, "-m", "bench.measure", json.dumps(asdict(case))],
        env=environment(READERS[case.reader]),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if child.returncode or not child.stdout.strip():
        raise Failed(f"{case.reader} {case.operation}: {last_words(child)}")
    return Sample(**json.loads(child.stdout.strip().splitlines()[-1]))


def last_words(child: subprocess.CompletedProcess[str]) -> str:
    """The last unindented line of what a failed child said: of a traceback the exception itself."""
    lines = [line for line in (child.stderr or child.stdout).splitlines() if line and not line[0].isspace()]
    return lines[-1][:400] if lines else f"exit status {child.returncode}"


def environment(reader: type[Reader]) -> dict[str, str]:
    """The child's variables: this tree's src first, and no reader may look anything up on a network."""
    paths = [str(Path("src").resolve()), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    return os.environ | offline | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | reader.environment


def warm(folder: Path) -> None:
    """Read every file once, so that all readers find theirs in the page cache."""
    block = bytearray(8 * MIB)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb", buffering=0) as source:
            while source.readinto(block):
                pass


def run(case: Case) -> Sample:
    """The child's side."""
    kind = READERS[case.reader]
    place, directory = Path(case.place), Path(case.directory)
    reader = kind()
    reader.prepare(place)
    if case.tiny_directory:
        _rehearse(kind, case)
    staged = reader.stage(directory) if case.operation == "put" else None
    gc.collect()
    _prepare_memory(case)
    _reset_peak()
    baseline = _status("VmRSS")

    cpu, start = _cpu(), time.perf_counter()
    result = _operate(reader, case, staged)
    seconds, cpu = time.perf_counter() - start, _cpu() - cpu

    peak = _status("VmHWM")
    sync = 0.0
    if case.operation == "put":
        start = time.perf_counter()
        for file in (path for path in place.rglob("*") if path.is_file()):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        sync = time.perf_counter() - start
    else:
        _check(kind, case, result)
    reader.open.close()
    stored = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) if kind.own_form else 0
    return Sample(seconds, cpu, sync, baseline, peak, stored)


def _prepare_memory(case: Case) -> None:
    """Bring the memory that the operation is about to take into a known state.

    A virtual machine gives memory that lies free for some seconds back to its host (free page reporting of the balloon
    device), and gets it again page by page when it is touched: a load into such memory takes up to twenty times as long
    as one into memory that was freed a moment ago, whoever reads. "reused": touched and freed right before.
    "fresh": the same, and then left lying for `FRESH_AFTER` seconds.
    """
    if not case.memory:
        return
    size = TENSOR_MEMORY
    if case.operation == "load":
        size = 2 * sum(file.stat().st_size for file in Path(case.directory).iterdir())
    for _ in range(2):  # the second time puts what the first has taken from the host at the head of the free lists
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, size, mmap.PAGESIZE):
                memory[at] = 1
    if case.memory == FRESH:
        time.sleep(FRESH_AFTER)


def _operate(reader: Reader, case: Case, staged: Any) -> Any:
    if case.operation == "put":
        return reader.put(staged, Path(case.place))
    if case.operation == "load":
        return reader.load(Path(case.directory), Path(case.place), case.setting)
    return reader.tensor(Path(case.directory), Path(case.place), case.tensor, case.setting)


def _rehearse(kind: type[Reader], case: Case) -> None:
    """The same operation on the tiny model with a reader of its own, so that lazy imports are done."""
    reader = kind()
    directory = Path(case.tiny_directory)
    if case.operation == "put":
        with tempfile.TemporaryDirectory(dir=Path(case.place).parent) as scratch:
            reader.prepare(Path(scratch))
            reader.put(reader.stage(directory), Path(scratch))
            reader.open.close()
        return
    reader.prepare(Path(case.tiny_place))
    if case.operation == "load":
        reader.load(directory, Path(case.tiny_place), case.setting)
    else:
        reader.tensor(directory, Path(case.tiny_place), case.tensor, case.setting)
    reader.open.close()


def _check(kind: type[Reader], case: Case, result: Any) -> None:
    """Compare one tensor with the original: bit for bit, or within one unit in the last place where marked."""
    import numpy as np

    from bench.model import read_tensor

    got = bits(result[case.tensor] if case.operation == "load" else result)
    wanted = read_tensor(Path(case.directory), case.tensor)
    if got.shape != wanted.shape:
        raise ValueError(f"{case.tensor} has shape {got.shape}, not {wanted.shape}")
    # bf16 is sign and magnitude: neighbours of one sign differ by one as integers, and marks never cross zero.
    apart = int(np.abs(got.astype(np.int32) - wanted.astype(np.int32)).max(initial=0))
    if apart > (1 if kind.marked else 0):
        raise ValueError(f"{case.tensor} differs from the original by {apart} units in the last place")


def _reset_peak() -> None:
    """Set VmHWM back to the present resident memory (Linux: 5 into clear_refs), so that imports don't count."""
    Path("/proc/self/clear_refs").write_text("5")


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(asdict(run(Case(**json.loads(sys.argv[1]))))))
