"""What tracing and copying take: `python -m bench.tracing_speed` prints a table for docs/reference/tracing.md.

Side by side, in turns, on a generated 2 GB model in LLaMA's shape: reading and hashing a found file, tracing it among
100,000 candidates whose stamps and code words are all scored, and a copy with the stamp beside one without; the same
trace with nothing in the page cache; and how much memory it takes, beside that of a file a tenth as large.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from bench import page
from bench.model import Shape, generate
from strongroom.client.ahead import Ahead
from strongroom.formats.copybundle import PIECE
from strongroom.storage.reader import ImageReader
from strongroom.vault import trace
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.source import ModelSource
from strongroom.vault.suspect import Suspect, digests
from strongroom.vault.vault import Vault
from strongroom.vault.walk import Walk

OWNER, HOLDER = "user/owner", "user/h0"
CANDIDATES = 100_000
READ = "read and SHA-256"


def hashed(folder: Path) -> None:
    """Read all files of a folder, in pieces that stay in the cache, and hash them."""
    for path in sorted(folder.iterdir()):
        digest, buffer = hashlib.sha256(), bytearray(1 << 20)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])


def written(read: Callable[[int, int], memoryview], size: int, path: Path) -> None:
    """An image, in the pieces of a copy, to a file; the next ones are read meanwhile, as a copy's are."""
    count = -(-size // PIECE)

    def piece(number: int) -> memoryview:
        return read(number * PIECE, min((number + 1) * PIECE, size))

    with path.open("wb", buffering=0) as out, Ahead(piece, count) as ahead:
        for number in range(count):
            out.write(ahead.take(number))


def _required(median: dict[str, float]) -> list[tuple[str, str, bool]]:
    """What has to be reached, what was, and whether that is enough."""
    read, few, many, plain, stamped = median.values()
    return [
        ("a trace takes at most 4 times as long as reading and hashing", f"{few / read:.1f}", few <= 4 * read),
        (f"{CANDIDATES:,} candidates take at most 20 s more", f"{many - few:.1f} s", many - few <= 20),
        ("a stamped copy takes at most twice as long as one without", f"{stamped / plain:.2f}", stamped <= 2 * plain),
    ]


def dropped(*folders: Path) -> None:
    """Take the pages of all their files out of the page cache."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # a page that is not written yet would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@dataclass
class Leaked:
    """A room with a generated model in it, and a leaked copy, both on disk."""

    work: Path

    @property
    def leak(self) -> Path:
        return self.work / "leak"

    @classmethod
    def made(cls, work: Path, layers: int) -> Leaked:
        generate(work / "model", Shape(layers), name="llama", title="LLaMA-shaped")
        vault, _ = Vault.init(work / "room", owner=OWNER, custody="solo")
        vault.put(ModelSource.scan(work / "model"), "bench", by=OWNER)
        shutil.rmtree(work / "model")
        found = cls(work)
        copy = found.copy(vault)
        found.leak.mkdir()
        for file in copy.files:
            if file.path.endswith(".safetensors"):
                with (found.leak / file.path).open("wb") as out:
                    for begin in range(file.offset // 8 * 8, file.offset + file.bytes, PIECE):
                        end = min(begin + PIECE, file.offset + file.bytes)
                        out.write(copy.read(begin, end)[max(0, file.offset - begin) :])
        return found

    def vault(self) -> Vault:
        return Vault(self.work / "room")

    def copy(self, vault: Vault) -> Copy:
        record = vault.record(vault.find("bench"))
        return Copy(Originals(vault.image(record), record), record, HOLDER)

    def trace(self, candidates: int) -> None:
        chosen = [trace.Candidate(f"user/h{k}", f"user/h{k}") for k in range(candidates)]
        with mock.patch.object(trace, "candidates", return_value=chosen), Suspect.opened(self.leak) as suspect:
            digests(Walk.of(self.leak, follow_links=False))  # as every trace does, for its entry in the log
            found = trace.trace(self.vault(), suspect, "leak", [], weights="bench@1", progress=lambda _d, _t: None)
        if [each.holder for each in found.accused] != [HOLDER]:
            raise AssertionError(found.accused)


Taken = dict[str, tuple[float, float]]  # medians of seconds, on the clock and of all threads together


def taken(jobs: Mapping[str, Callable[[], None]], rounds: int, before: Callable[[], None] = lambda: None) -> Taken:
    """What each of `jobs` takes, in turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            before()
            begun, spent = time.perf_counter(), time.process_time()
            job()
            times[name].append((time.perf_counter() - begun, time.process_time() - spent))
            print(name, *(round(each, 2) for each in times[name][-1]), flush=True)
    return {
        name: (statistics.median(each for each, _ in found), statistics.median(each for _, each in found))
        for name, found in times.items()
    }


def warm(leaked: Leaked, rounds: int) -> str:
    """The part of the page with everything in the page cache."""
    vault = leaked.vault()
    copy, plain = leaked.copy(vault), ImageReader(vault.blobs, vault.bundle("bench", OWNER))
    found = taken(
        {
            READ: lambda: hashed(leaked.leak),
            "trace, 10 candidates": lambda: leaked.trace(10),
            f"trace, {CANDIDATES:,} candidates": lambda: leaked.trace(CANDIDATES),
            "copy without a stamp": lambda: written(plain.read, copy.image, leaked.work / "out"),
            "copy with marks and stamp": lambda: written(copy.read, copy.image, leaked.work / "out"),
        },
        rounds,
    )
    (leaked.work / "out").unlink()
    median = {name: seconds for name, (seconds, _) in found.items()}
    base, unstamped = median[READ], median["copy without a stamp"]
    lines = [
        "## Speed",
        "",
        f"Written by `python -m bench.tracing_speed`: medians of {rounds}, a generated LLaMA-shaped model.",
        "",
        f"| {copy.image / 1e9:.1f} GB | s | × reading and hashing | × the copy without |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {value:.2f} | {value / base:.1f} | {value / unstamped:.2f} |" for name, value in median.items()),
        "",
        *(f"- {what}: {measured} ({'met' if met else '**missed**'})" for what, measured, met in _required(median)),
    ]
    return "\n".join(lines)


def cold(leaked: Leaked, rounds: int) -> str:
    """The part with nothing in the page cache: neither the leak nor the room's packs."""
    found = taken(
        {READ: lambda: hashed(leaked.leak), "trace, 10 candidates": lambda: leaked.trace(10)},
        rounds,
        before=lambda: dropped(leaked.leak, leaked.work / "room"),
    )
    seconds, spent = found[READ]
    size = sum(path.stat().st_size for path in leaked.leak.iterdir())
    lines = [
        "### From the disk",
        "",
        "Written by `python -m bench.tracing_speed --parts cold`: nothing of the leak or of the room's packs was in "
        f"the page cache before each; medians of {rounds}, in turns, with {os.getloadavg()[0]:.0f} at work on "
        f"{os.cpu_count()} cores. The reading is of the leak alone; a trace reads the room's own packs, too.",
        "",
        f"| {size / 1e9:.1f} GB, cold | s | × | s of CPU | × |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {clock:.2f} | {clock / seconds:.1f} | {cpu:.2f} | {cpu / spent:.1f} |"
            for name, (clock, cpu) in found.items()
        ),
    ]
    return "\n".join(lines)


def peak(work: Path) -> tuple[int, int]:
    """In a process of its own, resident bytes: before a trace, and at most during it."""
    leaked = Leaked(work)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is the present size again
    before = _resident("VmRSS")
    leaked.trace(10)
    return before, _resident("VmHWM")


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def memory(each: Sequence[Leaked]) -> str:
    """The part that says how much memory a trace takes, of suspects of several sizes."""
    lines = ["| suspect | at most, resident | before the trace |", "|---:|---:|---:|"]
    for leaked in each:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            before, after = pool.submit(peak, leaked.work).result()
        size = sum(path.stat().st_size for path in leaked.leak.iterdir())
        lines.append(f"| {size / 1e6:,.0f} MB | {after / 1e6:,.0f} MB | {before / 1e6:,.0f} MB |")
        print(lines[-1], flush=True)
    said = "Written by `python -m bench.tracing_speed --parts memory`: 10 candidates, in a process of its own."
    return "\n".join(["### Memory", "", said, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22, help="22 make 2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=["warm", "cold", "memory"], choices=["warm", "cold", "memory"])
    parser.add_argument("--work", type=Path, help="a folder with four times as much room; on a disk, for what is cold")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="strongroom-tracing-", dir=given.work))
    try:
        large = Leaked.made(work / "large", given.layers)
        if "warm" in given.parts:
            page.write(page.TRACING, "speed", warm(large, given.rounds))
        if "cold" in given.parts:
            page.write(page.TRACING, "cold", cold(large, given.rounds))
        if "memory" in given.parts:
            small = Leaked.made(work / "small", max(1, given.layers // 10))
            page.write(page.TRACING, "memory", memory([small, large]))
        print(page.TRACING)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
