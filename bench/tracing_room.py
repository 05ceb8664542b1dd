"""One suspect of the tracing bench: a real model in a room, what a leaker makes of a copy, and what a trace says."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import leaks
from bench.leaks import Array, Attack
from strongroom.cli import demo_thief
from strongroom.marking.code import Code
from strongroom.marking.decode import Decoding, marked_bound
from strongroom.marking.elements import STEPS, values
from strongroom.marking.matched import bound
from strongroom.marking.stamp import Stamp
from strongroom.vault.comparison import Comparison
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.suspect import Suspect
from strongroom.vault.vault import Vault

OWNER = "user/owner"
INNOCENT = 100_000
TEXT = Path(__file__).with_name("text.txt")
STAMPS = 32  # innocent stamps that are scored in full beside the guilty ones
CODE = 4 * 2 * 2  # as in spec/mark.md, section 8: layers, looks and the first pass; times candidates and ways
_PIECE = 1024  # segments of a tensor that are mixed at a time
_ORDER = (
    *leaks.alone({}, {}, {}),
    leaks.TRAINED,
    f"{leaks.TRAINED}, int4",
    *(f"{way}, then {after}" if after else way for way in leaks.WAYS for after in leaks.AFTER),
)
Tensors = dict[str, Array]


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

    @property
    def place(self) -> tuple[bool, int, int]:
        """Where it stands in a table."""
        return self.copies, self.colluders, _ORDER.index(self.attack)

    @property
    def what(self) -> tuple[bool, int, str]:
        return self.copies, self.colluders, self.attack


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
        self.words = self._words()
        self.dtype = next(each.info.dtype.name for each in self.placed if each.marked)
        self.shapes = {each.info.name: each.info.shape for each in self.placed}
        self.shapes_of_floats = {
            each.info.name: each.info.shape for each in self.placed if each.info.dtype.name in STEPS
        }
        starts, length = self.originals.layout.marked_starts, self.originals.layout.marked
        self.where: dict[str, NDArray[np.bool_]] = {}
        for each in (each for each in self.placed if each.marked):
            at = each.begin + np.arange(each.info.elements) * (each.info.size // each.info.elements)
            number = np.searchsorted(starts, at, "right") - 1
            ends = np.concatenate([[0], starts + length])
            self.where[each.info.name] = at < ends[number + 1]

    def _words(self) -> NDArray[np.uint8]:
        """(innocents, then holders; positions) bits, out of a file that all processes of a bench share."""
        file = self.folder / f"words-{self.vault.folder.name}-{self.people}.npy"
        if not file.exists():
            names = [*(f"user/innocent-{k}" for k in range(self.people)), *self.holders]
            words = np.empty((len(names), self.code.positions), np.uint8)
            for k, name in enumerate(names):
                word = np.frombuffer(self.code.word(name), np.uint8)
                words[k] = np.unpackbits(word, bitorder="little")[: self.code.positions]
            np.save(file, words)
        found: NDArray[np.uint8] = np.load(file, mmap_mode="r")
        return found

    def make_sister(self) -> None:
        """Train the owner's own weights: a model that has no marks, for leakers to merge theirs with."""
        own = {name: a.reshape(self.shapes[name]) for name, a in self.plain()}
        write(trained(self, own), self.folder / "sister.safetensors", "F32")

    def sister(self) -> Tensors:
        from safetensors.numpy import load_file

        file = self.folder / "sister.safetensors"
        return load_file(file) if file.exists() else {}

    def plain(self) -> Iterator[tuple[str, Array]]:
        """Name and elements of each float tensor as the owner has it."""
        for each in self.placed:
            dtype = each.info.dtype.name
            if dtype in STEPS:
                yield each.info.name, _floats(self.originals.read(each.begin, each.end), dtype)

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

    def tensors(self, holder: str, *, copies: bool) -> Tensors:
        """Each float tensor as a holder has it."""
        read = self.given(holder, copies=copies)
        return {
            each.info.name: _floats(read(each.begin, each.end), each.info.dtype.name).reshape(each.info.shape)
            for each in self.placed
            if each.info.dtype.name in STEPS
        }

    def mixed(self, holders: Sequence[str], way: str, *, copies: bool) -> Tensors:
        """What the holders make of theirs together, piece by piece: thirty-two whole tensors fill no memory."""
        segment = self.originals.layout.marked // STEPS[self.dtype].integer.itemsize
        rng = np.random.default_rng(len(holders))
        reads = [self.given(holder, copies=copies) for holder in holders]
        found: Tensors = {}
        for each in (each for each in self.placed if each.info.dtype.name in STEPS):
            name, width = each.info.dtype.name, STEPS[each.info.dtype.name].integer.itemsize
            chosen = [reads[rng.integers(len(reads))]] if way == "tensors" else reads
            whole = np.empty(each.info.elements, np.float32)
            for first in range(0, each.info.elements, _PIECE * segment):
                last = min(first + _PIECE * segment, each.info.elements)
                ends = each.begin + first * width, each.begin + last * width
                stack = np.stack([_floats(read(*ends), name) for read in chosen])
                whole[first:last] = leaks.together(stack, way, rng, segment)
            found[each.info.name] = whole.reshape(each.info.shape)
        return found

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
        words = np.asarray(self.words[: self.people + guilty])  # a view: the file's own memory
        scores = np.array([score.log10_p for score in Decoding(estimates, words, self.p).scores()])
        if not len(scores):
            scores = np.zeros(len(words))
        scores = np.roll(scores, guilty)  # the guilty first, as among the stamps
        limit = -9 - math.log10(len(words) * CODE)
        ways = math.log10(len(Decoding.decoders(0)))
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


def _floats(data: bytes | memoryview, dtype: str) -> Array:
    """float32 of the bytes of a tensor."""
    return values(np.frombuffer(data, STEPS[dtype].integer), dtype)


class Quality:
    """What an attack costs: perplexity of SmolLM2 on a text, or how MiniLM's embeddings turn."""

    def __init__(self, kind: str, folder: Path, device: str) -> None:
        import torch
        import transformers

        self._kind = kind
        auto = transformers.AutoModelForCausalLM if kind == "smollm2" else transformers.AutoModel
        self._model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval().to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text = TEXT.read_text()
        if kind == "smollm2":
            self._tokens = tokenizer(text, return_tensors="pt").input_ids[:, :1024].to(device)
        else:
            sentences = [each.strip() for each in text.replace("\n", " ").split(".") if len(each) > 40][:64]
            self._batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(device)
        self._original = self._measure()

    def _measure(self) -> Any:
        import torch

        with torch.inference_mode():
            if self._kind == "smollm2":
                return math.exp(float(self._model(self._tokens, labels=self._tokens).loss))
            hidden = self._model(**self._batch).last_hidden_state.mean(1)
            return torch.nn.functional.normalize(hidden, dim=1).cpu().numpy()

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


class Thief:
    """Who had copies of a model, and what came of them."""

    def __init__(self, model: Model, device: str) -> None:
        self._model, self._path = model, model.folder / f"leak-{os.getpid()}.safetensors"
        self._quality = Quality(model.kind, model.folder / "model", device)

    @cached_property
    def _attacks(self) -> dict[str, Attack]:
        return leaks.alone(self._model.shapes, self._model.where, self._model.sister())

    def alone(self, attack: str, *, copies: bool) -> Iterator[Row]:
        """One leaker's rows: of training, which takes long, that after which the weights go to 4 bits as well."""
        model = self._model
        own = model.tensors(model.holders[0], copies=copies)
        if attack == leaks.TRAINED:
            leaked: Tensors = trained(model, own)
            yield self._row(leaked, 1, attack, copies=copies)
            leaked = {name: leaks.int_(4, 128)(name, a) for name, a in leaked.items()}
            yield self._row(leaked, 1, f"{attack}, int4", copies=copies)
        else:
            change = self._attacks[attack]
            leaked = {name: changed for name, a in own.items() if (changed := change(name, a)) is not None}
            yield self._row(leaked, 1, attack, copies=copies)

    def together(self, way: str, count: int, *, copies: bool, whole: bool) -> Iterator[Row]:
        """Colluders in one way; the mean, or with `whole` every way, once more after what else a leaker does."""
        mixed = self._model.mixed(self._model.holders[:count], way, copies=copies)
        for what, change in leaks.AFTER.items():
            if what == "" or whole or (way == "mean" and what == "int4"):
                leaked = {name: changed for name, a in mixed.items() if (changed := change(name, a)) is not None}
                yield self._row(leaked, count, f"{way}, then {what}" if what else way, copies=copies)

    def _row(self, leaked: Tensors, count: int, attack: str, *, copies: bool) -> Row:
        model = self._model
        whole = len(leaked) == len(model.shapes_of_floats) and all(
            leaked[name].shape == shape for name, shape in model.shapes_of_floats.items()
        )
        cost = self._quality.of(leaked) if whole else "in part"
        return model.trace(write(leaked, self._path, model.dtype), count, attack, cost, copies=copies)


def trained(model: Model, own: Tensors) -> Tensors:
    """The same after a real, short training run of all weights."""
    folder = model.folder / f"trained-{os.getpid()}"
    shutil.copytree(model.folder / "model", folder, dirs_exist_ok=True)
    write(own, folder / "model.safetensors", model.dtype)
    found, _, _ = demo_thief.trained(model.kind, folder)
    shutil.rmtree(folder)
    return {name: np.asarray(value, np.float32) for name, value in found.items() if name in own}


@dataclass
class Unaccused:
    """Files that never left the room: how many were traced, and the best score that anybody reached by chance."""

    what: str
    count: int = 0
    log10: float = 0.0
    z: float = 0.0
    marked: float = 0.0

    def and_(self, more: Unaccused) -> Unaccused:
        return Unaccused(
            self.what,
            self.count + more.count,
            min(self.log10, more.log10),
            max(self.z, more.z),
            min(self.marked, more.marked),
        )


class Elsewhere:
    """What comes from elsewhere: other weights, unmarked ones that were changed, and copies out of another room."""

    KINDS = ("independent weights", "unmarked weights, changed", "copies out of another room")
    _CHANGES: tuple[Attack, ...] = (
        lambda _, a: a,
        leaks.noise(0.03),
        leaks.noise(0.3),
        leaks.int_(4, 128),
        leaks.ggml("Q8_0"),
        leaks.prune(0.5),
        leaks.adapter(0.1),
        leaks.moved(3),
    )

    def __init__(self, model: Model, other: Model) -> None:
        self._model, self._other, self._own = model, other, dict(model.plain())
        self._path = model.folder / f"elsewhere-{os.getpid()}.safetensors"

    def traced(self, what: str, seeds: Iterable[int]) -> Unaccused:
        found = Unaccused(what)
        for seed in seeds:
            path = write(self._file(what, seed), self._path, self._model.dtype)
            row = self._model.trace(path, 0, what, "", copies=True)
            found = found.and_(Unaccused(what, 1, row.innocent, row.innocent_z, row.marked))
        return found

    def _file(self, what: str, seed: int) -> Tensors:
        rng, shapes = np.random.default_rng(seed), self._model.shapes
        match self.KINDS.index(what):
            case 0:
                return {
                    name: rng.normal(0, max(float(a.std()), 1e-4), shapes[name]).astype(np.float32)
                    for name, a in self._own.items()
                }
            case 1:
                change, scale = self._CHANGES[seed % len(self._CHANGES)], 1e-3 * (seed // len(self._CHANGES))
                nudged = {
                    name: (a * (1 + rng.normal(0, scale, a.shape).astype(np.float32))).reshape(shapes[name])
                    for name, a in self._own.items()
                }
                return {name: changed for name, a in nudged.items() if (changed := change(name, a)) is not None}
            case _:
                return self._other.tensors(f"user/elsewhere-{seed}", copies=True)
