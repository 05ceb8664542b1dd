"""What a trace withstands: `python -m bench.tracing` writes docs/reference/tracing.md.

Copies of real models are attacked as leakers do, alone and together, and traced among 100,000 people who had none.
Beside each attack is what it costs the model: one that ruins the weights is no use to a thief.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from bench import leaks, page
from bench.tracing_room import INNOCENT, OWNER, STAMPS, Elsewhere, Model, Row, Thief, Unaccused, write
from strongroom.cli import demo_model
from strongroom.formats.layout import Layout, markable_bytes
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault

_OTHERS = 4  # files that never left the room, in one job


# -- the work, in pieces that any process can do -----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Some rows of one model: a leaker's attacks, a way of colluding, or with `seeds` files that never left."""

    copies: bool
    colluders: int
    what: str
    whole: bool = False
    seeds: tuple[int, int] = (0, 0)


_thief: Thief | None = None
_elsewhere: Elsewhere | None = None


def _ready(kind: str, folder: Path, device: str) -> None:
    """Begin a process: open the room that is there."""
    global _thief, _elsewhere  # noqa: PLW0603 - what a process of a pool has is global
    model = Model(kind, folder, Vault(folder / "room"))
    if (folder / "other").exists():
        _elsewhere = Elsewhere(model, Model(kind, folder, Vault(folder / "other"), people=0))
    else:
        _thief = Thief(model, device)


def _do(job: Job) -> Sequence[Row | Unaccused]:
    if _elsewhere is not None:
        return [_elsewhere.traced(job.what, range(*job.seeds))]
    assert _thief is not None
    if job.colluders == 1:
        return list(_thief.alone(job.what, copies=job.copies))
    return list(_thief.together(job.what, job.colluders, copies=job.copies, whole=job.whole))


def done(
    jobs: Sequence[Job], processes: int, kind: str, folder: Path, device: str
) -> Iterator[Sequence[Row | Unaccused]]:
    """What each job found, as they end."""
    if processes > 1:
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # for those that begin now
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _ready, (kind, folder, device)) as pool:
        for each in as_completed([pool.submit(_do, job) for job in jobs]):
            print(*each.result(), sep="\n", flush=True)
            yield each.result()


# -- the page ----------------------------------------------------------------------------------------------------------


def table(found: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| attack | colluders | cost | code word, log10 of the bound: weakest … strongest | stamp, z "
        "| best innocent: log10, z | named |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        words = f"{row.words[0]:.1f}" if row.colluders == 1 else f"{row.words[0]:.1f} … {row.words[1]:.1f}"
        stamps = f"{row.stamps[0]:.1f}" if row.colluders == 1 else f"{row.stamps[0]:.1f} … {row.stamps[1]:.1f}"
        lines.append(
            f"| {row.attack} | {row.colluders} | {row.quality} | {words} | {stamps if row.copies else ''} | "
            f"{row.innocent:.1f}, {row.innocent_z:.1f} | {row.named} of {row.colluders} |"
        )
    return "\n".join(lines)


TITLES = {
    "smollm2": ("SmolLM2-135M-Instruct, bf16", "change of perplexity on 1,024 tokens"),
    "minilm": ("all-MiniLM-L6-v2, fp32", "mean cosine of 64 embeddings with the original's"),
}


def report(found: Mapping[str, Sequence[Row]], shapes: Mapping[str, str], unaccused: Sequence[Unaccused]) -> str:
    parts = [
        "Written by `python -m bench.tracing` (`make bench-tracing`; `--rows FILE` gathers the rows of several runs).",
        "",
        f"Each leak was traced among {INNOCENT:,} people who were given nothing. Somebody is named when the bound on "
        "an innocent scoring so high, times all candidates and all that was tried, is at most 1e-9; columns have the "
        "bound before that, as a power of ten. *Code word* is what `load` leaves, *stamp* what `copy` adds. In no line "
        f"was anybody innocent named; of stamps {STAMPS} innocent ones were scored in each line. Settings are the "
        "defaults.",
        "",
        "Not in these tables: a disguise by a rotated residual stream, mixed heads and folded norms, also with the "
        "words in another order, or two thirds of them gone at random (nine tenths without rounding), which is undone "
        "(`tests/vault/test_disguised.py`). So is one at 4 bits (groups of 64) without three of ten words, "
        "whichever were tried: the longest, those most like another, to which most are alike, or most like the "
        "mean of all. Of SmolLM2's embedding 99.95 % of the words that were left were found, and 0.002 % were "
        "taken for one that was gone; a whole model without its longest words, disguised in every way and at 4 "
        "bits, named its holder (1e-299, 65 s of CPU).",
        "",
    ]
    for kind, rows in found.items():
        title, cost = TITLES[kind]
        parts += [f"## {title}", "", f"{shapes[kind]} Cost: {cost}.", ""]
        for copies, what in ((False, "Loaded (code word alone)"), (True, "A plaintext copy (code word and stamp)")):
            for alone, who in ((True, "one leaker"), (False, "several")):
                chosen = [row for row in rows if row.copies == copies and (row.colluders == 1) == alone]
                if chosen:
                    parts += [f"### {what}, {who}", "", table(chosen), ""]
    if unaccused:
        parts += [
            "## What never left the room",
            "",
            "Two layers of MiniLM (3.5 million weights), traced as above. Nobody was named.",
            "",
            "| what | files | best innocent: log10, z | marks of the room, log10 of the bound |",
            "|---|---:|---:|---:|",
            *(
                f"| {each.what} | {each.count} | {each.log10:.1f}, {each.z:.1f} | {each.marked:.1f} |"
                for each in unaccused
            ),
            "",
        ]
    return "\n".join(parts)


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def _room(folder: Path, model: Path, name: str = "room") -> Vault:
    vault, _ = Vault.init(folder / name, owner=OWNER, custody="solo")
    vault.put(ModelSource.scan(model), "bench", by=OWNER)
    return vault


def _part(original: Path, folder: Path) -> Path:
    """Two layers of a model, as a model."""
    from safetensors.torch import load_file

    folder.mkdir(parents=True)
    shutil.copy(original / "config.json", folder)
    tensors = load_file(original / "model.safetensors")
    chosen = {
        name: tensor.float().numpy() for name, tensor in tensors.items() if ".layer.0." in name or ".layer.1." in name
    }
    write(chosen, folder / "model.safetensors", "F32")
    return folder


@dataclass
class Kept:
    """The rows of this run, and of those before it, in a file if it has one."""

    file: Path | None
    shapes: dict[str, str]
    rows: dict[str, list[Row]]
    unaccused: list[Unaccused]

    @classmethod
    def of(cls, file: Path | None) -> Kept:
        if file is None or not file.exists():
            return cls(file, {}, {}, [])
        had = json.loads(file.read_text())
        rows = {kind: [Row(**each) for each in found] for kind, found in had["rows"].items()}
        return cls(file, had["shapes"], rows, [Unaccused(**each) for each in had["unaccused"]])

    def add(self, kind: str, found: Iterable[Row | Unaccused]) -> None:
        for each in found:
            if isinstance(each, Row):
                before = [row for row in self.rows.get(kind, []) if row.what != each.what]
                self.rows[kind] = sorted([*before, each], key=lambda row: row.place)
            else:
                counts = {had.what: had for had in self.unaccused}
                counts[each.what] = counts[each.what].and_(each) if each.what in counts else each
                self.unaccused = [counts[what] for what in Elsewhere.KINDS if what in counts]
        self.write()

    def write(self) -> None:
        if self.file:
            rows = {kind: [vars(row) for row in found] for kind, found in self.rows.items()}
            unaccused = [vars(each) for each in self.unaccused]
            self.file.write_text(json.dumps({"shapes": self.shapes, "rows": rows, "unaccused": unaccused}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["smollm2", "minilm"])
    parser.add_argument("--colluders", nargs="*", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--left", nargs="*", default=["loaded", "copied"], help="how it left the room")
    parser.add_argument("--attacks", nargs="*", help="of one leaker; default: all")
    parser.add_argument("--ways", nargs="*", default=leaks.WAYS, help="of colluding")
    parser.add_argument("--whole", action="store_true", help="every way of colluding, each with all that follows it")
    parser.add_argument("--seeds", type=int, default=100, help="files of each kind that never left the room")
    parser.add_argument("--processes", type=int, default=1, help="each takes a few gigabytes")
    parser.add_argument("--device", default="cpu", help="where perplexities are computed, as torch names it")
    parser.add_argument("--work", type=Path, help="a folder with some gigabytes of room")
    parser.add_argument(
        "--rows", type=Path, help="a file of rows: those of earlier runs are kept, those of this one added"
    )
    given = parser.parse_args()
    of_all = ("models", "colluders", "left", "attacks", "ways", "seeds")
    whole = all(getattr(given, name) == parser.get_default(name) for name in of_all)
    work = Path(tempfile.mkdtemp(prefix="strongroom-tracing-", dir=given.work))
    kept = Kept.of(given.rows)
    try:
        for kind in given.models:
            with demo_model.original(kind) as original:
                vault = _room(work / kind, original.folder)
                shutil.copytree(original.folder, work / kind / "model")
            model = Model(kind, work / kind, vault)
            layout = model.originals.layout
            share = Layout.default_share(markable_bytes(layout.runs), layout.positions)
            kept.shapes[kind] = (
                f"{layout.positions:,} positions of {layout.marked:,} bytes, {share} of the matrices. "
                f"Traced on {_machine()}."
            )
            alone = [*list(leaks.alone(model.shapes, {}, {})), leaks.TRAINED]
            alone = alone if given.attacks is None else given.attacks
            if alone:
                model.make_sister()
            jobs = [
                job
                for copies in (each == "copied" for each in given.left)
                for job in (
                    *(Job(copies, 1, attack) for attack in alone),
                    *(Job(copies, count, way, given.whole) for count in given.colluders for way in given.ways),
                )
            ]
            jobs.sort(key=lambda job: -job.colluders)  # the longest first
            for found in done(jobs, given.processes, kind, model.folder, given.device):
                kept.add(kind, found)
        if given.seeds:
            with demo_model.original("minilm") as original:
                part = _part(original.folder, work / "part" / "model")
            for name in ("room", "other"):
                _room(work / "part", part, name)
            Model("minilm", work / "part", Vault(work / "part" / "room"))  # leaves the words for all processes
            jobs = [
                Job(True, 0, what, seeds=(first, min(first + _OTHERS, given.seeds)))
                for what in Elsewhere.KINDS
                for first in range(0, given.seeds, _OTHERS)
            ]
            kept.unaccused = []
            for found in done(jobs, given.processes, "minilm", work / "part", "cpu"):
                kept.add("minilm", found)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = report(kept.rows, kept.shapes, kept.unaccused)
    if given.rows is None and not whole:  # a few rows do not take the place of all on the page
        print(found)
        return
    page.write(page.TRACING, "tables", found)
    print(page.TRACING)


if __name__ == "__main__":
    main()
