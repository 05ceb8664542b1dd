"""A found file, read and never believed: its tensors as numbers, one at a time (spec/mark.md, section 3)."""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strongroom.core.limits import MIB
from strongroom.core.settings import Settings
from strongroom.errors import StrongroomError, UsageError
from strongroom.formats.suspect import FoundFile
from strongroom.formats.tensors import DTYPES, Dtype, TensorInfo
from strongroom.marking.elements import STEPS, values
from strongroom.marking.quantiser import unpacked
from strongroom.marking.scales import dequantised
from strongroom.vault.convert import Take, converted_parts, freely, to_convert
from strongroom.vault.packedtensors import Packing, put_together
from strongroom.vault.source import ModelSource
from strongroom.vault.sourcefile import SourceFile
from strongroom.vault.walk import Walk

PIECE = 1 << 22  # elements of a tensor that are compared at a time
WHOLE = 1 << 28  # elements of the largest tensor that is read whole, as one that was moved about has to be
_HASHED = MIB  # bytes at a time: what is hashed was just read into the cache
_LARGEST = 1e9  # no weight is: beyond it sums of squares would be infinite, and say nothing of all the others
_FLOAT8 = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_PARSED = ("safetensors", "gguf", "npy", "convert")
_NAMED = "a file of weights, or the folder that it was found in: strongroom trace FILE"
_HINTS = {
    "source.missing": _NAMED,
    "source.empty": _NAMED,
    "source.link": "a link in a find is not followed: trace the file that it leads to, or a copy of it in its place",
    "source.special": "only regular files are looked at: take it out of the folder, then trace it again",
    "source.lfs_pointer": "the weights themselves are somewhere else: trace those",
    "source.missing_shard": "trace what there is without that index: its tensors are compared all the same",
    "source.changed": "trace a copy of it that nothing changes",
    "source.unreadable": "check its permissions, then trace it again",
    "source.name": "rename it in a copy, and trace that: what is recorded is the content's SHA-256",
    "source.limit": "trace a part of it",
    "convert.protocol": "write its tensors to safetensors, in a sandbox of your own, and trace that",
    "convert.refused": "do not load this file with anything; trace what else there is without it",
}
_INTEGERS = {"I8": "<i1", "U8": "<u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}


@dataclass(frozen=True)
class SuspectTensor:
    """One tensor of a suspect: what it is called there, and where it is; of one that is packed, how, and where its
    scales are."""

    info: TensorInfo
    file: SourceFile
    packing: Packing | None = None
    scales: SourceFile | None = None

    @property
    def name(self) -> str:
        return self.info.name


def readable(dtype: Dtype) -> bool:
    """Whether elements of this type become numbers: of safetensors' packed types they don't, of ggml's blocks they
    do."""
    name = dtype.name
    return name in STEPS or name in _FLOAT8 or name in _INTEGERS or (dtype.block > 1 and name not in DTYPES)


def unstopped() -> None:
    """The `check` of what nobody ends before its end."""


@contextmanager
def as_found() -> Iterator[None]:
    """What is wrong with files in this block is said as of a find: those who put a model can get it again, or leave
    something out; whoever has found one can't."""
    try:
        yield
    except StrongroomError as error:
        kind, _, what = error.code.partition(".")
        if kind in _PARSED and what in ("malformed", "big_endian", "unreadable", "limit"):
            error.hint = (
                "it is damaged, or not what it seems: trace another copy of it, or what else there is without it"
            )
        error.hint = _HINTS.get(error.code, error.hint)
        raise


class Suspect:
    """The tensors of found files. Open with `opened`, or, of files that are looked over already, with `of`."""

    def __init__(self, source: ModelSource, check: Callable[[], None] = unstopped) -> None:
        self._source, self._check = source, check
        tensors: dict[str, SuspectTensor] = {}
        taken: Counter[str] = Counter()
        for file in source.files:
            for info in file.tensors:
                if readable(info.dtype):
                    tensors[_free(info.name, tensors, taken)] = SuspectTensor(info, file)
        # Wherever they lie: whoever cuts a model into other files has no regard for what belongs together.
        infos = {name: tensor.info for name, tensor in tensors.items()}
        for three, info, packing in list(put_together(infos, partial(self._two, tensors))):
            codes, scales, _ = (tensors.pop(each) for each in three)
            tensors[_free(info.name, tensors, taken)] = SuspectTensor(info, codes.file, packing, scales.file)
        self.tensors: Mapping[str, SuspectTensor] = tensors

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Suspect]:
        """The suspect at `path`; errors of `Walk.of`, and as `of`."""
        with cls.of(Walk.of(path, follow_links=False, model=False), path.name) as found:
            yield found

    @classmethod
    @contextmanager
    def of(
        cls, walk: Walk, name: str, *, take: Take = freely, check: Callable[[], None] = unstopped
    ) -> Iterator[Suspect]:
        """The suspect `name`; pickles are converted in the sandbox, in memory that `take` grants; nothing is executed.
        `check` is called at every read, and what it raises ends that.

        UsageError ``suspect.empty`` if it has no tensor that can be read, and what `converted_parts` raises.
        """
        with ExitStack() as stack:
            with as_found():
                source = stack.enter_context(converted_parts(walk, take=take))
            found = cls(source, check)
            if not found.tensors:
                raise UsageError(
                    "suspect.empty",
                    f"{name!r:.200} has no tensor that can be read",
                    hint="trace a safetensors, GGUF, PyTorch or NumPy file, or the folder of a model",
                )
            yield found

    @property
    def bytes(self) -> int:
        return sum(tensor.info.size for tensor in self.tensors.values())

    def read(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[np.float32]:
        """float32, flat: elements `begin` to `end` (whole blocks, where there are any) of a tensor, row-major. What is
        not finite, or no weight, is NaN."""
        self._check()
        tensor = self.tensors[name]
        info, dtype = tensor.info, tensor.info.dtype
        end = info.elements if end is None else end
        if end <= begin:  # a tensor of no elements, of whatever type
            return np.empty(0, np.float32)
        low, high = begin // dtype.block, -(-end // dtype.block)
        with np.errstate(all="ignore"):
            try:
                if tensor.packing is not None and tensor.scales is not None:
                    within = low * dtype.block, high * dtype.block
                    found = self._unpacked(tensor.file, tensor.scales, tensor.packing, *within)
                else:
                    found = numbers_of(self._blocks(tensor.file, info, low, high), dtype)
            except UsageError as error:
                raise UsageError(error.code, f"{tensor.name!r:.100}: {error.message}", hint=error.hint) from None
        return weights_of(found)

    def _blocks(self, file: SourceFile, info: TensorInfo, low: int, high: int) -> memoryview:
        """Blocks `low` to `high` of what a file has as a tensor: its elements, where they are no blocks."""
        width = info.dtype.block_bytes
        buffer = memoryview(bytearray((high - low) * width))
        with self._source.reading(file) as read:
            done = 0
            while done < len(buffer) and (step := read(info.begin + low * width + done, buffer[done:])):
                done += step
        return buffer

    def _unpacked(
        self, file: SourceFile, other: SourceFile, packing: Packing, begin: int, end: int
    ) -> NDArray[np.float32]:
        """Elements `begin` to `end` of a packed tensor: its codes are in `file`, its scales in the other."""
        group, words = packing.group, 32 // packing.bits
        low, high = begin // group, -(-end // group)
        scales = numbers_of(self._blocks(other, packing.scales, low, high), packing.scales.dtype)
        first = low * group // words
        data = self._blocks(file, packing.codes, first, -(-high * group // words))
        skip = (low * group - first * words) * packing.bits // 8
        size = group * packing.bits // 8
        codes = np.frombuffer(data, np.uint8, (high - low) * size, skip).reshape(-1, size)
        return unpacked(codes, scales, packing.bits).reshape(-1)[begin - low * group : end - low * group]

    def _two(self, tensors: Mapping[str, SuspectTensor], name: str) -> tuple[int, ...]:
        """The two integers that a tensor of that type has; none where they can't be read."""
        try:
            return tuple(
                int(each) for each in np.frombuffer(self._blocks(tensors[name].file, tensors[name].info, 0, 2), "<i8")
            )
        except StrongroomError:
            return ()


def _free(name: str, tensors: Mapping[str, SuspectTensor], taken: Counter[str]) -> str:
    """A key for a tensor of this name, which others in the find may have, too: whoever puts something of the same name
    beside what he has taken hides nothing."""
    free = name
    while free in tensors:
        taken[name] += 1
        free = f"{taken[name] + 1}:{name}"
    return free


def searched(walk: Walk) -> list[SourceFile]:
    """The files that are searched, as they were found: not a pickle whose tensors are there as safetensors, too. In the
    order of their paths' UTF-8 bytes."""
    return sorted([*walk.files, *to_convert(walk)], key=lambda file: file.path.encode("utf-8"))


def digests(walk: Walk) -> tuple[FoundFile, ...]:
    """Path, size and SHA-256 of each file that is searched, by which it is known again: not of what a pickle becomes.
    Errors of `ModelSource.reading`."""
    source, ended = ModelSource(walk.root, tuple(searched(walk))), threading.Event()

    def found(file: SourceFile) -> FoundFile:
        digest, buffer, done = hashlib.sha256(), memoryview(bytearray(_HASHED)), 0
        with source.reading(file) as read:
            while not ended.is_set() and (step := read(done, buffer)):
                digest.update(buffer[:step])
                done += step
        return FoundFile(file.path, file.size, digest.hexdigest())

    # Several files at once: of hashing and reading that is half of the time on two cores.
    with ThreadPoolExecutor(Settings.from_environment().workers, "strongroom-digest") as pool:
        try:
            return tuple(pool.map(found, source.files))
        except BaseException:
            ended.set()  # nobody waits for the others
            raise


def weights_of(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """NaN for what is not finite, or no weight."""
    with np.errstate(all="ignore"):
        if numbers.size and not float(np.abs(numbers).max()) < _LARGEST:
            return np.where(np.abs(numbers) < _LARGEST, numbers, np.float32(np.nan))
    return numbers


def numbers_of(data: memoryview, dtype: Dtype) -> NDArray[np.float32]:
    """float32, flat: whole elements, or blocks, of a `readable` type; errors as `dequantised`."""
    name = dtype.name
    if name in STEPS:
        return values(np.frombuffer(data, STEPS[name].integer), name)
    if name in _FLOAT8:
        ml_dtypes = importlib.import_module("ml_dtypes")
        return np.frombuffer(data, getattr(ml_dtypes, _FLOAT8[name])).astype(np.float32)
    if name in _INTEGERS:
        return np.frombuffer(data, _INTEGERS[name]).astype(np.float32)
    return dequantised(data, name)
