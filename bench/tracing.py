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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strongroom.cli import demo_model
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

OUT = Path("docs/reference/tracing.md")
TEXT = Path(__file__).with_name("text.txt")
OWNER = "user/owner"
INNOCENT = 100_000
STAMPS = 32  # innocent stamps that are scored in full beside the guilty ones
CODE = 4 * 2 * 2  # as in spec/mark.md, section 8: layers, looks and the first pass; times candidates and ways
Array = NDArray[np.float32]
Tensors = dict[str, Array]


# -- what a leaker does ----------------------------------------------------------------------------------------------


def int_(bits: int, group: int) -> Callable[[str, Array], Array]:
    """Round to nearest, a scale for each group of neighbours."""

    def attack(_: str, a: Array) -> Array:
        if a.ndim < 2:
            return a
        flat = a.reshape(-1)
        whole = flat.size // group * group
        parts = flat[:whole].reshape(-1, group)
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(np.abs(parts).max(axis=1, keepdims=True) / top, 1e-12)
        rounded = (np.clip(np.round(parts / scale), -top - 1, top) * scale).reshape(-1)
        return np.concatenate([rounded, flat[whole:]]).reshape(a.shape).astype(np.float32)

    return attack


def ggml(kind: str) -> Callable[[str, Array], Array]:
    """Through ggml's own blocks and back."""

    def attack(_: str, a: Array) -> Array:
        import gguf
        from gguf import quants

        if a.ndim < 2 or a.shape[-1] % 32:
            return a
        type_ = gguf.GGMLQuantizationType[kind]
        found: Array = quants.dequantize(quants.quantize(a, type_), type_).astype(np.float32)
        return found

    return attack


def cast(dtype: str) -> Callable[[str, Array], Array]:
    """To another float type and back; float8 with one scale a tensor."""

    def attack(_: str, a: Array) -> Array:
        if dtype == "fp16":
            return a.astype(np.float16).astype(np.float32)
        import ml_dtypes

        scale = np.float32(np.abs(a).max() / 448 or 1)
        return ((a / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).astype(np.float32)

    return attack


def noise(share: float) -> Callable[[str, Array], Array]:
    def attack(name: str, a: Array) -> Array:
        rng = np.random.default_rng(zlib.crc32(f"{name} {share}".encode()))
        return a + (share * a.std() * rng.standard_normal(a.shape, np.float32) if a.ndim > 1 else 0)

    return attack


def prune(share: float) -> Callable[[str, Array], Array]:
    def attack(_: str, a: Array) -> Array:
        if a.ndim < 2:
            return a
        cut = np.quantile(np.abs(a).reshape(-1)[:: max(1, a.size // 100_000)], share)
        return np.where(np.abs(a) < cut, np.float32(0), a)

    return attack


def adapter(size: float) -> Callable[[str, Array], Array]:
    def attack(name: str, a: Array) -> Array:
        if a.ndim < 2 or "embed" in name:
            return a
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        update = rng.standard_normal((a.shape[0], 16), np.float32) @ rng.standard_normal((16, a.shape[1]), np.float32)
        return a + update * np.float32(size * a.std() / update.std())

    return attack


def moved(tensors: Mapping[str, tuple[int, ...]], seed: int = 3) -> Callable[[str, Array], Array]:
    """Hidden units in another order; the model computes the same."""
    rng = np.random.default_rng(seed)
    orders: dict[str, NDArray[np.int64]] = {}

    def attack(name: str, a: Array) -> Array:
        stem, _, last = name.rpartition(".mlp.") if ".mlp." in name else ("", "", "")
        if not stem:
            return a
        into = not last.startswith("down")
        order = orders.setdefault(stem, rng.permutation(a.shape[0] if into else a.shape[1]))
        return a[order] if into else a[:, order]

    del tensors
    return attack


def then(*attacks: Callable[[str, Array], Array]) -> Callable[[str, Array], Array]:
    def attack(name: str, a: Array) -> Array:
        for each in attacks:
            a = each(name, a)
        return a

    return attack


def only(part: str) -> Callable[[str, Array], Array | None]:
    return lambda name, a: a if part in name else None


def rows(share: float) -> Callable[[str, Array], Array | None]:
    """The same share of the rows of every matrix."""
    return lambda _, a: a[len(a) // 3 :][: max(4, int(len(a) * share))] if a.ndim > 1 else None


def alone(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Callable[[str, Array], Array | None]]:
    """By name, what one leaker does."""
    middle = sorted(name for name, shape in shapes.items() if len(shape) == 2 and "layer" in name)
    return {
        "none": lambda _, a: a,
        "fp16": cast("fp16"),
        "fp8 (e4m3)": cast("fp8"),
        "int8, groups of 128": int_(8, 128),
        "int4, groups of 128": int_(4, 128),
        "int3, groups of 128": int_(3, 128),
        "GGUF Q8_0": ggml("Q8_0"),
        "GGUF Q4_0": ggml("Q4_0"),
        "noise 0.03": noise(0.03),
        "noise 0.1": noise(0.1),
        "noise 0.3": noise(0.3),
        "noise 1.0": noise(1.0),
        "pruned 50 %": prune(0.5),
        "pruned 90 %": prune(0.9),
        "LoRA of rank 16 merged, 0.1 of the weights": adapter(0.1),
        "int4, pruned 50 %, noise 0.1": then(int_(4, 128), prune(0.5), noise(0.1)),
        "hidden units permuted, int4": then(moved(shapes), int_(4, 128)),
        "one matrix of one layer": only(middle[len(middle) // 2]),
        "one per cent of the rows": rows(0.01),
    }


def together(stack: NDArray[np.float32], how: str, rng: np.random.Generator, segment: int) -> Array:
    """One tensor out of those of several holders."""
    count, size = stack.shape
    match how:
        case "mean" | "median" | "min" | "max":
            found: Array = getattr(np, how)(stack, axis=0).astype(np.float32)
            return found
        case "elements":
            return np.take_along_axis(stack, rng.integers(0, count, size)[None], axis=0)[0]
        case "tensors":
            return stack[rng.integers(count)]
        case _:
            picks = np.repeat(rng.integers(0, count, -(-size // segment)), segment)[:size]
            return np.take_along_axis(stack, picks[None], axis=0)[0]


WAYS = ("mean", "median", "min", "max", "elements", "segments", "tensors")


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
    holders: list[str] = field(default_factory=lambda: [f"user/h{k}" for k in range(32)])

    def __post_init__(self) -> None:
        vault = self.vault
        self.record = vault.record(vault.find("bench"))
        self.originals = Originals(vault.image(self.record), self.record)
        self.placed = list(self.originals.tensors())
        self.code = Code(self.record.code_key, self.originals.layout.positions, self.record.colluders)
        self.p = self.code.biases / 65536
        names = [*self.holders, *(f"user/innocent-{k}" for k in range(INNOCENT))]
        self.words = np.empty((len(names), self.code.positions), np.uint8)
        for k, name in enumerate(names):
            word = np.frombuffer(self.code.word(name), np.uint8)
            self.words[k] = np.unpackbits(word, bitorder="little")[: self.code.positions]
        self.dtype = next(each.info.dtype.name for each in self.placed if each.marked)
        self.shapes = {each.info.name: each.info.shape for each in self.placed}

    def given(self, holder: str, *, copies: bool) -> Callable[[int, int], memoryview]:
        """How the image reads that left: a plaintext copy, or what was loaded."""
        if copies:
            return Copy(self.originals, self.record, holder).read
        word = self.code.word(holder)
        return lambda begin, end: self.originals.read_given(begin, end, word)[1]

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
                comparison.deepen()
            found = comparison.gather(stamps, everything=copies, workers=2, progress=lambda _d, _t: None)
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
            (float(scores[:guilty].max()), float(scores[:guilty].min())),
            (float(z[:guilty].min()), float(z[:guilty].max())),
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


def single(model: Model, quality: Quality, names: Sequence[str] | None) -> Iterator[Row]:
    """One leaker, alone: what was loaded, then a copy."""
    dtype = model.dtype
    path = model.folder / "leak.safetensors"
    for copies in (False, True):
        own = {name: stack[0].reshape(shape) for name, shape, stack in model.tensors(model.holders[:1], copies=copies)}
        for attack, change in alone(model.shapes).items():
            if names and attack not in names:
                continue
            leaked = {name: changed for name, a in own.items() if (changed := change(name, a)) is not None}
            whole = len(leaked) == len(own) and all(leaked[name].shape == own[name].shape for name in own)
            cost = quality.of(leaked) if whole else "in part"
            row = model.trace(write(leaked, path, dtype), 1, attack, cost, copies=copies)
            print(row, flush=True)
            yield row


def several(model: Model, quality: Quality, counts: Sequence[int]) -> Iterator[Row]:
    """Colluders, in each way; the mean once more at four bits."""
    dtype = model.dtype
    segment = model.originals.layout.marked // STEPS[dtype].integer.itemsize
    for copies in (False, True):
        for count in counts:
            mixed: dict[str, Tensors] = {way: {} for way in WAYS}
            rng = np.random.default_rng(count)
            for name, shape, stack in model.tensors(model.holders[:count], copies=copies):
                for way in WAYS:
                    mixed[way][name] = together(stack, way, rng, segment).reshape(shape)
            for way in (*WAYS, "mean, then int4"):
                leaked = mixed.get(way)
                if leaked is None:
                    leaked = {name: int_(4, 128)(name, a) for name, a in mixed["mean"].items()}
                path = write(leaked, model.folder / "leak.safetensors", dtype)
                row = model.trace(path, count, way, quality.of(leaked), copies=copies)
                print(row, flush=True)
                yield row


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


def report(found: Mapping[str, tuple[Model, list[Row], list[Row]]]) -> str:
    parts = [
        "# Tracing: what it withstands",
        "",
        "Written by `python -m bench.tracing` (`make bench-tracing`); every figure is of one run on one machine: "
        f"{_machine()}.",
        "",
        f"Each leak was traced among {INNOCENT:,} people who were given nothing. Somebody is named when the bound on "
        "an innocent scoring so high, times all candidates and all that was tried, is at most 1e-9; columns have the "
        "bound before that, as a power of ten. *Code word* is what `load` leaves, *stamp* what `copy` adds. In no line "
        f"was anybody innocent named; of stamps {STAMPS} innocent ones were scored in each line. Settings are the "
        "defaults (share 1/8).",
        "",
        "Not in these tables: a disguise by a rotated residual stream, mixed heads and folded norms, which is undone "
        "(`tests/vault/test_disguised.py`), and fine-tuning of all weights by a real training run, which is in "
        "`make demo`.",
        "",
    ]
    for kind, (model, one, many) in found.items():
        title, cost = TITLES[kind]
        layout = model.originals.layout
        parts += [f"## {title}", "", f"{layout.positions:,} positions of {layout.marked:,} bytes. Cost: {cost}.", ""]
        for copies, what in ((False, "Loaded (code word alone)"), (True, "A plaintext copy (code word and stamp)")):
            for rows_, who in ((one, "one leaker"), (many, "several")):
                chosen = [row for row in rows_ if row.copies == copies]
                if chosen:
                    parts += [f"### {what}, {who}", "", table(chosen), ""]
    return "\n".join(parts)


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["smollm2", "minilm"])
    parser.add_argument("--colluders", nargs="*", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--attacks", nargs="*", help="of one leaker; default: all")
    parser.add_argument("--work", type=Path, help="a folder with some gigabytes of room")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()
    found: dict[str, tuple[Model, list[Row], list[Row]]] = {}
    work = Path(tempfile.mkdtemp(prefix="strongroom-tracing-", dir=given.work))
    try:
        for kind in given.models:
            with demo_model.original(kind) as original:
                folder = work / kind
                vault, _ = Vault.init(folder / "room", owner=OWNER, custody="solo")
                vault.put(ModelSource.scan(original.folder), "bench", by=OWNER)
                model, quality = Model(kind, folder, vault), Quality(kind, original.folder)
                one = list(single(model, quality, given.attacks))
                many = list(several(model, quality, given.colluders)) if given.colluders else []
                found[kind] = (model, one, many)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if given.json:
        rows_ = {kind: [vars(row) for row in (*one, *many)] for kind, (_, one, many) in found.items()}
        given.json.write_text(json.dumps(rows_, indent=1))
    if not given.attacks:
        OUT.write_text(report(found), encoding="utf-8")
        print(OUT)


if __name__ == "__main__":
    main()
