"""What tracing and copying take: `python -m bench.tracing_speed` prints a table for docs/reference/tracing.md.

Side by side, in turns, on a generated 2 GB model in LLaMA's shape: reading and hashing a found file, tracing it among
100,000 candidates whose stamps and code words are all scored, and a copy with the stamp beside one without.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
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

OWNER = "user/owner"
CANDIDATES = 100_000


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22, help="22 make 2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder with four times as much room")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="strongroom-tracing-", dir=given.work))
    try:
        generate(work / "model", Shape(given.layers), name="llama", title="LLaMA-shaped")
        vault, _ = Vault.init(work / "room", owner=OWNER, custody="solo")
        vault.put(ModelSource.scan(work / "model"), "bench", by=OWNER)
        shutil.rmtree(work / "model")
        record = vault.record(vault.find("bench"))
        holder = "user/h0"
        copy = Copy(Originals(vault.image(record), record), record, holder)
        (work / "leak").mkdir()
        for file in copy.files:
            if file.path.endswith(".safetensors"):
                with (work / "leak" / file.path).open("wb") as out:
                    for begin in range(file.offset // 8 * 8, file.offset + file.bytes, PIECE):
                        end = min(begin + PIECE, file.offset + file.bytes)
                        out.write(copy.read(begin, end)[max(0, file.offset - begin) :])
        people = [trace.Candidate(f"user/h{k}", f"user/h{k}") for k in range(CANDIDATES)]
        plain = ImageReader(vault.blobs, vault.bundle("bench", OWNER))

        def traced(candidates: int) -> Callable[[], None]:
            def run() -> None:
                chosen = [trace.Candidate(each.holder, each.person) for each in people[:candidates]]
                with (
                    mock.patch.object(trace, "candidates", return_value=chosen),
                    Suspect.opened(work / "leak") as suspect,
                ):
                    digests(Walk.of(work / "leak", follow_links=False))  # as every trace does, for its entry in the log
                    found = trace.trace(
                        vault, suspect, "leak", [], weights="bench@1", progress=lambda _done, _total: None
                    )
                if [each.holder for each in found.accused] != [holder]:
                    raise AssertionError(found.accused)

            return run

        jobs: dict[str, Callable[[], None]] = {
            "read and SHA-256": lambda: hashed(work / "leak"),
            "trace, 10 candidates": traced(10),
            f"trace, {CANDIDATES:,} candidates": traced(CANDIDATES),
            "copy without a stamp": lambda: written(plain.read, copy.image, work / "out"),
            "copy with marks and stamp": lambda: written(copy.read, copy.image, work / "out"),
        }
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(given.rounds):
            for name, job in jobs.items():
                begun = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - begun)
                print(name, round(times[name][-1], 2), flush=True)
        median = {name: statistics.median(values) for name, values in times.items()}
        base, unstamped = median["read and SHA-256"], median["copy without a stamp"]
        lines = [
            "## Speed",
            "",
            f"Written by `python -m bench.tracing_speed`: medians of {given.rounds}, a generated LLaMA-shaped model.",
            "",
            f"| {copy.image / 1e9:.1f} GB | s | × reading and hashing | × the copy without |",
            "|---|---:|---:|---:|",
            *(
                f"| {name} | {value:.2f} | {value / base:.1f} | {value / unstamped:.2f} |"
                for name, value in median.items()
            ),
            "",
            *(f"- {what}: {measured} ({'met' if met else '**missed**'})" for what, measured, met in _required(median)),
        ]
        page.write(page.TRACING, "speed", "\n".join(lines))
        print("\n".join(lines))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
