"""What a trace withstands: `python -m bench.tracing` writes docs/reference/tracing.md.

Copies of real models are attacked as leakers do, alone and together, and traced among 100,000 people who had none.
Beside each attack is what it costs the model: one that ruins the weights is no use to a thief.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import leaks, page
from bench.leaks import Array, Attack
from strongroom.cli import demo_model, demo_thief
from strongroom.marking.code import Code
from strongroom.marking.decode import Decoding, marked_bound
from strongroom.marking.elements import STEPS, values
from strongroom.marking.matched import bound
from strongroom.marking.stamp import Stamp
from strongroom.vault.comparison import Comparison
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.source import ModelSource
from strongroom.vault.suspect import Suspect
from strongroom.vault.vault import Vault

TEXT = Path(__file__).with_name("text.txt")
OWNER = "user/owner"
INNOCENT = 100_000
TRAINED = "all weights trained"
STAMPS = 32  # innocent stamps that are scored in full beside the guilty ones
CODE = 4 * 2 * 2  # as in spec/mark.md, section 8: layers, looks and the first pass; times candidates and ways
Tensors = dict[str, Array]


# -- the bench -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One attack: its cost in quality, and what the trace says of the guilty and of the best innocent."""

    attack: str
    copies: bool
    colluders: int
    quality: str
    words: tuple[float, float]
    stamps: tuple[float, float]
    innocent: float
    innocent_z: float
    marked: float
    named: int
    seconds: float


@dataclass
class Model:
    """A room with one real model in it, and everything that a trace of it takes."""

    kind: str
    folder: Path
    vault: Vault
    people: int = INNOCENT
    holders: list[str] = field(default_factory=lambda: [f"user/h{k}" for k in range(32)])

    def __post_init__(self) -> None:
        vault = self.vault
        self.record = vault.record(vault.find("bench"))
        self.originals = Originals(vault.image(self.record), self.record)
        self.placed = list(self.originals.tensors())
        self.code = Code(self.record.code_key, self.originals.layout.positions, self.record.colluders)
        self.p = self.code.biases / 65536
        names = [*self.holders, *(f"user/innocent-{k}" for k in range(self.people))]
        self.words = np.empty((len(names), self.code.positions), np.uint8)
        for k, name in enumerate(names):
            word = np.frombuffer(self.code.word(name), np.uint8)
            self.words[k] = np.unpackbits(word, bitorder="little")[: self.code.positions]
        self.dtype = next(each.info.dtype.name for each in self.placed if each.marked)
        self.shapes = {each.info.name: each.info.shape for each in self.placed}
        starts, length = self.originals.layout.marked_starts, self.originals.layout.marked
        self.where: dict[str, NDArray[np.bool_]] = {}
        for each in (each for each in self.placed if each.marked):
            at = each.begin + np.arange(each.info.elements) * (each.info.size // each.info.elements)
            number = np.searchsorted(starts, at, "right") - 1
            ends = np.concatenate([[0], starts + length])
            self.where[each.info.name] = at < ends[number + 1]

    def plain(self) -> Iterator[tuple[str, Array]]:
        """Name and elements of each float tensor as the owner has it."""
        for each in self.placed:
            dtype = each.info.dtype.name
            if dtype in STEPS:
                yield (
                    each.info.name,
                    values(np.frombuffer(self.originals.read(each.begin, each.end), STEPS[dtype].integer), dtype),
                )

    def given(self, holder: str, *, copies: bool) -> Callable[[int, int], memoryview]:
        """How the image reads that left: a plaintext copy, or what was loaded."""
        if copies:
            return Copy(self.originals, self.record, holder).read
        word = self.code.word(holder)

        def read(begin: int, end: int) -> memoryview:
            out = memoryview(bytearray(end - begin))
            for _ in self.originals.read_given(begin, end, word, out):
                pass
            return out

        return read

    def tensors(self, holders: Sequence[str], *, copies: bool) -> Iterator[tuple[str, tuple[int, ...], Array]]:
        """Name, shape and (holders, elements) of each float tensor."""
        reads = [self.given(holder, copies=copies) for holder in holders]
        for each in self.placed:
            dtype = each.info.dtype.name
            if dtype in STEPS:
                parts = [
                    values(np.frombuffer(read(each.begin, each.end), STEPS[dtype].integer), dtype) for read in reads
                ]
                yield each.info.name, each.info.shape, np.stack(parts)

    def trace(self, path: Path, guilty: int, attack: str, quality: str, *, copies: bool) -> Row:
        """Trace `path` among the first `guilty` holders and everybody else."""
        begun = time.perf_counter()
        people = [*self.holders[:guilty], *(f"user/innocent-{k}" for k in range(STAMPS))]
        stamps = [Stamp(self.record.stamp_key, holder) for holder in people]
        with Suspect.opened(path) as suspect:
            comparison = Comparison(self.originals, suspect)
            if comparison.explained < 0.9:
                comparison.deepen(lambda _done, _total: None)
            found = comparison.gather(stamps, everything=copies, progress=lambda _d, _t: None)
            z = found.matched.scores()
        took = time.perf_counter() - begun
        estimates = found.estimator.done()
        rest = np.arange(len(self.holders), len(self.words))
        chosen = np.concatenate([np.arange(guilty), rest])
        decoding = Decoding(estimates, self.words[chosen], self.p)
        scores = np.array([score.log10_p for score in decoding.scores()])
        if not len(scores):
            scores = np.zeros(len(chosen))
        limit = -9 - math.log10(len(chosen) * CODE)
        ways = math.log10(len(decoding.decoders(0)))
        by_stamp = np.array([bound(float(each)) for each in z])
        named = (scores[:guilty] <= limit - ways) | (by_stamp[:guilty] <= limit)
        wrong = (scores[guilty:] <= limit - ways).sum() + (by_stamp[guilty:] <= limit).sum()
        if wrong:
            raise AssertionError(f"{attack}: {wrong} innocents were named")
        return Row(
            attack,
            copies,
            guilty,
            quality,
            (float(scores[:guilty].max(initial=-math.inf)), float(scores[:guilty].min(initial=0))),
            (float(z[:guilty].min(initial=math.inf)), float(z[:guilty].max(initial=0))),
            float(scores[guilty:].min()),
            float(z[guilty:].max()),
            marked_bound(estimates),
            int(named.sum()),
            took,
        )


class Quality:
    """What an attack costs: perplexity of SmolLM2 on a text, or how MiniLM's embeddings turn."""

    def __init__(self, kind: str, folder: Path) -> None:
        import torch
        import transformers

        self._kind = kind
        auto = transformers.AutoModelForCausalLM if kind == "smollm2" else transformers.AutoModel
        self._model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text = TEXT.read_text()
        if kind == "smollm2":
            self._tokens = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
        else:
            sentences = [each.strip() for each in text.replace("\n", " ").split(".") if len(each) > 40][:64]
            self._batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        self._original = self._measure()

    def _measure(self) -> Any:
        import torch

        with torch.inference_mode():
            if self._kind == "smollm2":
                return math.exp(float(self._model(self._tokens, labels=self._tokens).loss))
            hidden = self._model(**self._batch).last_hidden_state.mean(1)
            return torch.nn.functional.normalize(hidden, dim=1).numpy()

    def of(self, tensors: Mapping[str, Array]) -> str:
        """Of a model with these tensors in the places of its own."""
        import torch

        state = self._model.state_dict()
        before = {name: state[name].clone() for name in tensors if name in state}
        with torch.no_grad():
            for name in before:
                state[name].copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
            found = self._measure()
            for name, value in before.items():
                state[name].copy_(value)
        if self._kind == "smollm2":
            return f"{100 * (found / self._original - 1):+.2f} %"
        return f"{float((found * self._original).sum(1).mean()):.4f}"


def write(tensors: Mapping[str, Array], path: Path, dtype: str) -> Path:
    """A safetensors file in the model's own type."""
    import torch
    from safetensors.torch import save_file

    kind = torch.bfloat16 if dtype == "BF16" else torch.float32
    save_file({name: torch.from_numpy(np.ascontiguousarray(a)).to(kind) for name, a in tensors.items()}, path)
    return path


def single(
    model: Model, quality: Quality, sister: Tensors, names: Sequence[str] | None, left: Sequence[bool]
) -> Iterator[Row]:
    """One leaker, alone: with what was loaded, or a copy, as `left` says."""
    path = model.folder / "leak.safetensors"
    for copies in left:
        own = {name: stack[0].reshape(shape) for name, shape, stack in model.tensors(model.holders[:1], copies=copies)}
        attacks = leaks.alone(model.shapes, model.where, sister)
        for attack in names or (*attacks, TRAINED, f"{TRAINED}, int4"):
            if attack.startswith(TRAINED):
                leaked = trained(model, own)
                if attack != TRAINED:
                    leaked = {name: leaks.int_(4, 128)(name, a) for name, a in leaked.items()}
            else:
                change = attacks[attack]
                leaked = {name: changed for name, a in own.items() if (changed := change(name, a)) is not None}
            whole = len(leaked) == len(own) and all(leaked[name].shape == own[name].shape for name in own)
            cost = quality.of(leaked) if whole else "in part"
            row = model.trace(write(leaked, path, model.dtype), 1, attack, cost, copies=copies)
            print(row, flush=True)
            yield row


def trained(model: Model, own: Tensors) -> Tensors:
    """The same after a real, short training run of all weights."""
    folder = model.folder / "trained"
    shutil.copytree(model.folder / "model", folder, dirs_exist_ok=True)
    write(own, folder / "model.safetensors", model.dtype)
    found, _, _ = demo_thief.trained(model.kind, folder)
    shutil.rmtree(folder)
    return {name: np.asarray(value, np.float32) for name, value in found.items() if name in own}


def several(
    model: Model, quality: Quality, counts: Sequence[int], left: Sequence[bool], *, whole: bool
) -> Iterator[Row]:
    """Colluders, in each way; the mean, or with `whole` every way, once more after what else a leaker does."""
    segment = model.originals.layout.marked // STEPS[model.dtype].integer.itemsize
    path = model.folder / "leak.safetensors"
    after: dict[str, Attack] = {"": lambda _, a: a, "int4": leaks.int_(4, 128)}
    more: dict[str, Attack] = {
        "int8": leaks.int_(8, 128),
        "noise 0.03": leaks.noise(0.03),
        "pruned 50 %": leaks.prune(0.5),
    }
    for copies in left:
        for count in counts:
            for way in leaks.WAYS:
                rng = np.random.default_rng(count)
                mixed = {
                    name: leaks.together(stack, way, rng, segment).reshape(shape)
                    for name, shape, stack in model.tensors(model.holders[:count], copies=copies)
                }
                then = {**after, **more} if whole else after if way == "mean" else {"": after[""]}
                for what, change in then.items():
                    leaked = {name: changed for name, a in mixed.items() if (changed := change(name, a)) is not None}
                    attack = f"{way}, then {what}" if what else way
                    row = model.trace(
                        write(leaked, path, model.dtype), count, attack, quality.of(leaked), copies=copies
                    )
                    print(row, flush=True)
                    yield row


@dataclass
class Unaccused:
    """Files that never left the room: how many were traced, and the best score that anybody reached by chance."""

    what: str
    count: int = 0
    log10: float = 0.0
    z: float = 0.0
    marked: float = 0.0


def innocent(model: Model, seeds: int) -> Iterator[Unaccused]:
    """What comes from elsewhere: other weights, unmarked ones that were changed, and copies out of another room."""
    own = dict(model.plain())
    path = model.folder / "leak.safetensors"
    elsewhere, _ = Vault.init(model.folder / "other", owner=OWNER, custody="solo")
    elsewhere.put(ModelSource.scan(model.folder / "model"), "bench", by=OWNER)
    other = Model(model.kind, model.folder, elsewhere, people=0)
    changes: list[Attack] = [
        lambda _, a: a,
        leaks.noise(0.03),
        leaks.noise(0.3),
        leaks.int_(4, 128),
        leaks.ggml("Q8_0"),
        leaks.prune(0.5),
        leaks.adapter(0.1),
        leaks.moved(3),
    ]
    for what in ("independent weights", "unmarked weights, changed", "copies out of another room"):
        found = Unaccused(what)
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            leaked: Tensors = {}
            if what.startswith("independent"):
                for name, a in own.items():
                    leaked[name] = rng.normal(0, max(float(a.std()), 1e-4), model.shapes[name]).astype(np.float32)
            elif what.startswith("unmarked"):
                change = changes[seed % len(changes)]
                for name, a in own.items():
                    nudged = a * (1 + rng.normal(0, 1e-3 * (seed // len(changes)), a.shape).astype(np.float32))
                    if (changed := change(name, nudged.reshape(model.shapes[name]))) is not None:
                        leaked[name] = changed
            else:
                holder = [f"user/elsewhere-{seed}"]
                leaked = {name: stack[0].reshape(shape) for name, shape, stack in other.tensors(holder, copies=True)}
            row = model.trace(write(leaked, path, model.dtype), 0, what, "", copies=True)
            found.count += 1
            found.log10, found.z = min(found.log10, row.innocent), max(found.z, row.innocent_z)
            found.marked = min(found.marked, row.marked)
        print(found, flush=True)
        yield found


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
        f"Written by `python -m bench.tracing` (`make bench-tracing`) on one machine: {_machine()}.",
        "",
        f"Each leak was traced among {INNOCENT:,} people who were given nothing. Somebody is named when the bound on "
        "an innocent scoring so high, times all candidates and all that was tried, is at most 1e-9; columns have the "
        "bound before that, as a power of ten. *Code word* is what `load` leaves, *stamp* what `copy` adds. In no line "
        f"was anybody innocent named; of stamps {STAMPS} innocent ones were scored in each line. Settings are the "
        "defaults (share 1/8).",
        "",
        "Not in these tables: a disguise by a rotated residual stream, mixed heads and folded norms, also with the "
        "words in another order, which is undone (`tests/vault/test_disguised.py`).",
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


def _room(kind: str, folder: Path, model: Path) -> Model:
    vault, _ = Vault.init(folder / "room", owner=OWNER, custody="solo")
    vault.put(ModelSource.scan(model), "bench", by=OWNER)
    return Model(kind, folder, vault)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["smollm2", "minilm"])
    parser.add_argument("--colluders", nargs="*", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--left", nargs="*", default=["loaded", "copied"], help="how it left the room")
    parser.add_argument("--attacks", nargs="*", help="of one leaker; default: all")
    parser.add_argument("--whole", action="store_true", help="every way of colluding, each with all that follows it")
    parser.add_argument("--seeds", type=int, default=100, help="files of each kind that never left the room")
    parser.add_argument("--work", type=Path, help="a folder with some gigabytes of room")
    parser.add_argument(
        "--rows", type=Path, help="a file of rows: those of earlier runs are kept, those of this one added"
    )
    given = parser.parse_args()
    left = [each == "copied" for each in given.left]
    work = Path(tempfile.mkdtemp(prefix="strongroom-tracing-", dir=given.work))
    kept = (
        json.loads(given.rows.read_text())
        if given.rows and given.rows.exists()
        else {"shapes": {}, "rows": {}, "unaccused": []}
    )

    def keep() -> None:
        if given.rows:
            given.rows.write_text(json.dumps(kept, indent=1))

    try:
        for kind in given.models:
            with demo_model.original(kind) as original:
                model = _room(kind, work / kind, original.folder)
                shutil.copytree(original.folder, model.folder / "model")
                layout = model.originals.layout
                kept["shapes"][kind] = f"{layout.positions:,} positions of {layout.marked:,} bytes."
                quality = Quality(kind, original.folder)
                one: Iterable[Row] = []
                if given.attacks != []:
                    sister = trained(model, {name: a.reshape(model.shapes[name]) for name, a in model.plain()})
                    one = single(model, quality, sister, given.attacks, left)
                for row in chain(one, several(model, quality, given.colluders, left, whole=given.whole)):
                    key = (row.attack, row.copies, row.colluders)
                    rows = [
                        each
                        for each in kept["rows"].get(kind, [])
                        if (each["attack"], each["copies"], each["colluders"]) != key
                    ]
                    kept["rows"][kind] = [*rows, vars(row)]
                    keep()
        if given.seeds:
            with demo_model.original("minilm") as original:
                part = _part(original.folder, work / "part" / "model")
                kept["unaccused"] = [vars(each) for each in innocent(_room("minilm", work / "part", part), given.seeds)]
                keep()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = {kind: [Row(**each) for each in rows] for kind, rows in kept["rows"].items()}
    page.write(page.TRACING, "tables", report(found, kept["shapes"], [Unaccused(**each) for each in kept["unaccused"]]))
    print(page.TRACING)


if __name__ == "__main__":
    main()
