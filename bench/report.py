"""The page: tables of medians and ratios, and what must be reached."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.measure import FRESH_AFTER, MIB, READERS, Sample
from bench.model import Model
from bench.ours import Strongroom, StrongroomTorch
from bench.perplexity import Quality
from bench.reader import Setting

OURS, LIKE = Strongroom.name, StrongroomTorch.name
"""`LIKE` is our reader that gives torch tensors, as the peers do: every comparison of time with a peer uses it."""


LOAD_FRESH = "load-fresh"
"""The operation load into memory that the machine has to get from its host first, beside the series of load itself."""

METHOD = """\
- {rounds} rounds ({put_rounds} for puts). In each, all readers take their turns in shuffled order, so that noise hits
  everybody alike; the tables give medians over rounds.
- Each measurement is a fresh process that first does the same to a tiny model, so that imports and thread pools are not
  in the figure. All files are in the page cache.
- Time ends when every tensor lies in memory that the caller owns. A tensor is then compared with the original, bit for
  bit; ours within the one unit in the last place that a mark may take.
- CPU time is that of all threads and child processes, user and system; it suffers least from neighbours.
- Peak memory is the kernel's VmHWM of the process, nothing subtracted: mapped file pages count. *Of it for the load* is
  what came on top of interpreter and imports.
- Before each load, memory of twice the model is touched and freed. *Reused memory*: the load follows at once. *Fresh
  memory*: it follows {fresh_after:.0f} seconds later. A virtual machine gives free memory back to its host within
  seconds (free page reporting) and gets it again page by page: then memory costs more than reading, whoever reads. On a
  machine that does not, both are the same.
- The limit reads the same bytes with pread into newly mapped private memory with huge pages on all cores, without
  format or cryptography. Copying out of a mapping can beat pread, so a reader may come out below the limit.
- Settings that were tried before the rounds, the fastest kept: {settings}. Other readers ran with their defaults.
- fastsafetensors would read local disks past the page cache (O_DIRECT); here it reads through it like everybody else.
- age decrypts one file a core at a time to plaintext files, which are then loaded: its peak memory leaves out age's own
  processes and the plaintext in the page cache."""


@dataclass
class Series:
    """The samples of one reader at one operation on one model, one a round."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def best(self) -> float:
        return min(sample.seconds for sample in self.samples)

    @property
    def cpu(self) -> float:
        """Median of user and system time, all threads and child processes."""
        return statistics.median(sample.cpu for sample in self.samples)

    @property
    def durable(self) -> float:
        return statistics.median(sample.seconds + sample.sync for sample in self.samples)

    @property
    def peak(self) -> float:
        """MiB, nothing subtracted; the highest of the rounds."""
        return max(sample.peak for sample in self.samples) / MIB

    @property
    def growth(self) -> float:
        """MiB above what the process held before; the highest of the rounds."""
        return max(sample.peak - sample.baseline for sample in self.samples) / MIB

    @property
    def stored(self) -> float:
        return self.samples[-1].stored / MIB


@dataclass
class Results:
    """Everything that a run measured, keyed by (model, operation, reader)."""

    rounds: int
    put_rounds: int
    quick: bool
    machine: dict[str, str] = field(default_factory=dict)
    models: list[Model] = field(default_factory=list)
    series: dict[tuple[str, str, str], Series] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    quality: Quality | None = None

    def of(self, operation: str, reader: str, model: str = "llama") -> Series | None:
        return self.series.get((model, operation, reader))

    def raw(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "machine": self.machine,
            "settings": self.settings,
            "skipped": self.skipped,
            "quality": asdict(self.quality) if self.quality else None,
            "samples": [
                {"model": model, "operation": operation, "reader": reader, **asdict(sample)}
                for (model, operation, reader), series in self.series.items()
                for sample in series.samples
            ],
        }


@dataclass(frozen=True)
class Requirement:
    """`text` states the bound, `measured` the figure; `met` is None where the run did not measure it."""

    text: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "missed"


def requirements(results: Results) -> list[Requirement]:
    """The bounds that the project set itself, on the generated model and by medians of this run."""
    llama = next((model for model in results.models if model.name == "llama"), None)
    size = llama.bytes / MIB if llama else 0.0

    def ratio(text: str, above: tuple[str, str], below: tuple[str, str], *, most: float = 0, least: float = 0) -> None:
        first, second = results.of(*above), results.of(*below)
        if first is None or second is None:
            listed.append(Requirement(text, "—", None))
            return
        value = first.median / second.median
        met = value <= most if most else value >= least
        listed.append(Requirement(text, f"{value:.2f} (of the best of each: {first.best / second.best:.2f})", met))

    listed: list[Requirement] = []
    for operation, memory in (("load", "reused"), (LOAD_FRESH, "fresh")):
        load, ours = f"whole-model load, {memory} memory", (operation, LIKE)
        ratio(f"{load}: at most 0.8 of the time of safetensors' full copy", ours, (operation, "safetensors"), most=0.8)
        slow = (operation, "tensorizer-encrypted")
        ratio(f"{load}: at least 3.5 times as fast as tensorizer encrypted", slow, ours, least=3.5)
        ratio(f"{load}: faster than cryptotensors", (operation, "cryptotensors"), ours, least=1)
        ratio(f"{load}: faster than fastsafetensors", (operation, "fastsafetensors"), ours, least=1)
        ratio(f"{load}: at most 1.5 times the machine's limit", ours, (operation, "limit"), most=1.5)
    for reader in (OURS, LIKE):
        series = results.of("load", reader)
        text = "whole-model load: peak memory at most the model + 128 MiB, " + (
            "the whole process counted (NumPy reader)"
            if reader == OURS
            else "above the interpreter with torch (torch reader)"
        )
        if series is None:
            listed.append(Requirement(text, "—", None))
        else:
            over = (series.peak if reader == OURS else series.growth) - size
            listed.append(Requirement(text, f"model {over:+,.0f} MiB", over <= 128))

    text = "one 64 MiB tensor: at most 1.5 times its share of our whole-model time + 20 ms"
    one, whole = results.of("tensor", LIKE), results.of("load", LIKE)
    if one is None or whole is None:
        listed.append(Requirement(text, "—", None))
    else:
        bound = 1.5 * whole.median * 64 / size + 0.020
        listed.append(Requirement(text, f"{1000 * one.median:.0f} ms of {1000 * bound:.0f} ms", one.median <= bound))

    text = "put: at least as fast as tensorizer's encrypted serialisation (which leaves its bytes in the page cache)"
    ratio(text, ("put", "tensorizer-encrypted"), ("put", OURS), least=1)
    put = results.of("put", OURS)
    text = "put: memory flat, at most 512 MiB above the interpreter"
    listed.append(
        Requirement(text, f"{put.growth:,.0f} MiB", put.growth <= 512) if put else Requirement(text, "—", None)
    )

    change = results.quality.change if results.quality else None
    text = "marks: SmolLM2's perplexity changes by less than 0.2 %"
    listed.append(
        Requirement(text, "—", None) if change is None else Requirement(text, f"{change:+.3f} %", abs(change) < 0.2)
    )
    return listed


def write(results: Results) -> str:
    """The whole page as Markdown."""
    blocks = [
        "# Benchmark",
        "Written by `python -m bench` (`make bench`); every figure comes from one run on one machine. Absolute times "
        "vary from machine to machine, ratios less.",
    ]
    if results.quick:
        blocks.append("**A quick run on a small model: it shows that the bench works, not how fast anything is.**")
    blocks += ["## Must reach", _must_reach(results), *_reachable(results)]
    blocks += ["## Machine", _bullets(results.machine)]
    for model in results.models:
        title = f"{model.title} ({model.tensors} bf16 tensors)"
        blocks += [f"## Whole-model load: {title}, reused memory", _load(results, model, "load")]
        if results.of(LOAD_FRESH, LIKE, model.name):
            blocks += [f"## Whole-model load: {title}, fresh memory", _load(results, model, LOAD_FRESH)]
    blocks += [
        "## One tensor of 64 MiB",
        "From opening to the tensor in memory that the caller owns, out of the generated model.",
        _latency(results, "tensor"),
        "## First tensor",
        "From opening to the first norm of the generated model (4 KiB).",
        _latency(results, "first"),
        "## Put",
        "Peers serialise tensors that are already in memory; Strongroom starts from the files on disk, marks, hashes, "
        "encrypts, and has everything durable when it returns. *Durable* adds an fsync of every file written.",
        _put(results),
        "## Quality",
        _quality(results),
        "## How it is measured",
        _method(results),
    ]
    if results.skipped:
        blocks += ["## Not measured", _bullets(results.skipped)]
    return "\n\n".join(blocks) + "\n"


def _must_reach(results: Results) -> str:
    rows = [[each.text, each.measured, f"**{each.verdict}**"] for each in requirements(results)]
    return _table(["required", "measured", ""], rows)


def _reachable(results: Results) -> list[str]:
    """How far the same hash and the same cipher get in a loop that does nothing else."""
    said = []
    for operation, memory in (("load", "reused"), (LOAD_FRESH, "fresh")):
        floor, limit, ours = (results.of(operation, name) for name in ("floor", "limit", LIKE))
        slow = results.of(operation, "tensorizer-encrypted")
        if floor and limit and ours and slow:
            said.append(
                f"In {memory} memory BLAKE3 and AES-256-GCM alone, in a bare loop without format and marks, take "
                f"{floor.median / limit.median:.2f} times the machine's limit and are {slow.median / floor.median:.2f} "
                f"times as fast as tensorizer encrypted; Strongroom takes {ours.median / floor.median:.2f} times as "
                "long as that loop."
            )
    return said


def _load(results: Results, model: Model, operation: str) -> str:
    like, limit = results.of(operation, LIKE, model.name), results.of(operation, "limit", model.name)
    rows = []
    for name, series in _by_median(results, operation, model.name):
        rows.append(
            [
                READERS[name].title,
                f"{series.median:.3f}",
                f"{series.best:.3f}",
                f"{model.bytes / series.median / 1e9:.2f}",
                f"{series.cpu:.2f}",
                _ratio(series, like),
                _ratio(series, limit),
                f"{series.peak:,.0f}",
                f"{series.growth:,.0f}",
            ]
        )
    heads = [
        "reader",
        "median s",
        "best s",
        "GB/s",
        "CPU s",
        "× strongroom (torch)",
        "× limit",
        "peak MiB",
        "of it for the load",
    ]
    return _table(heads, rows)


def _latency(results: Results, operation: str) -> str:
    like = results.of(operation, LIKE)
    rows = [
        [READERS[name].title, f"{1000 * series.median:.1f}", f"{1000 * series.best:.1f}", _ratio(series, like)]
        for name, series in _by_median(results, operation, "llama")
    ]
    return _table(["reader", "median ms", "best ms", "× strongroom (torch)"], rows)


def _put(results: Results) -> str:
    ours = results.of("put", OURS)
    rows = []
    for name, series in _by_median(results, "put", "llama"):
        rows.append(
            [
                READERS[name].title,
                f"{series.median:.2f}",
                f"{series.best:.2f}",
                f"{series.durable:.2f}",
                _ratio(series, ours),
                f"{series.stored:,.0f}",
                f"{series.growth:,.0f}",
            ]
        )
    heads = ["writer", "median s", "best s", "durable, median s", "× strongroom", "stored MiB", "memory taken MiB"]
    return _table(heads, rows)


def _quality(results: Results) -> str:
    quality = results.quality
    if quality is None:
        return "Not measured."
    said = [
        "SmolLM2-135M on the first chapter of *Alice's Adventures in Wonderland* ",
        f"({quality.tokens:,} tokens, windows of 1,024): perplexity of the original {quality.original:.4f}",
    ]
    if quality.marked is None or quality.divergence is None or quality.agreement is None:
        said.append("; marked weights not measured.")
    else:
        said += [
            f", as a holder reads it {quality.marked:.4f} ({quality.change:+.3f} %); mean Kullback-Leibler divergence ",
            f"{quality.divergence:.1e} nats, same most likely token at {100 * quality.agreement:.2f} % of positions.",
        ]
    return "".join(said)


def _method(results: Results) -> str:
    settings = "; ".join(f"{name}: {setting or 'defaults'}" for name, setting in sorted(results.settings.items()))
    return METHOD.format(
        rounds=results.rounds, put_rounds=results.put_rounds, settings=settings or "none", fresh_after=FRESH_AFTER
    )


def _by_median(results: Results, operation: str, model: str) -> list[tuple[str, Series]]:
    found = [(key[2], series) for key, series in results.series.items() if key[:2] == (model, operation)]
    return sorted(found, key=lambda item: item[1].median)


def _ratio(series: Series, base: Series | None) -> str:
    return f"{series.median / base.median:.2f}" if base else "—"


def _bullets(values: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def _table(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not measured."
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
