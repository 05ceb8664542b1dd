"""The forms in which a copy of floats may leave quantised, and of what their files are made (spec/release.md, section
5): a plan, which reads headers and configurations and no weights."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from strongroom.errors import UsageError
from strongroom.formats.copybundle import CopiedFile
from strongroom.formats.layout import FileEntry, Layout
from strongroom.formats.tensors import TensorInfo
from strongroom.marking.stamp import of_adapter
from strongroom.vault.originals import Originals, Placed

_AS_PUT = "strongroom copy without --quantise writes the version as it was put"
FLOATS = ("BF16", "F16", "F32")  # what is quantised
KINDS = {"int4": "safetensors", "int8": "safetensors", "q4_0": "gguf", "q8_0": "gguf"}  # of the weights' files


@dataclass(frozen=True)
class Made:
    """What a quantiser makes of a tensor: of each `group` of its elements `size` bytes, which are codes or scales of
    `bits` bits' packing, or (0) blocks of the type `block`."""

    tensor: Placed
    group: int
    size: int
    bits: int = 0
    scales: bool = False
    block: str = ""


# These bytes; those of the holder's own image from there on; what is made; zeros, which take no memory.
Source = bytes | int | Made | None


class Content(NamedTuple):
    """The content of one file: sizes and sources, one behind the other; where its tensors start."""

    data_start: int
    parts: list[tuple[int, Source]]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.parts)


class Part(NamedTuple):
    """Bytes `begin` to `end` of the image of a quantised copy."""

    begin: int
    end: int
    source: bytes | int | Made


@dataclass(frozen=True)
class Plan:
    """The files of a quantised copy, and the parts of its image, in order; what lies between them is zero."""

    image: int
    files: tuple[CopiedFile, ...]
    parts: tuple[Part, ...]


def planned(originals: Originals, form: str) -> Plan:
    """How a version leaves in `form`, which is one of `KINDS`. UsageError ``form.*`` where it can't."""
    from strongroom.vault.formgguf import block_files
    from strongroom.vault.formpacked import packed_files

    kinds = {file.kind for file in originals.layout.files} - {"opaque"}
    if kinds != {KINDS[form]}:
        has = " and ".join(sorted(kinds)) or "no weights"
        others = sorted(name for name, kind in KINDS.items() if kinds == {kind})
        which = f"strongroom copy REF --to PRINCIPAL --out DIR --quantise {' or '.join(others)}"
        hint = which if others else _AS_PUT
        raise UsageError("form.kind", f"{form} is of versions put as {KINDS[form]}; this one has {has}", hint=hint)
    if any(of_adapter(each.info.name) for each in originals.tensors()):
        unfit("form.adapter", "an adapter is not quantised: it is small, and is added to weights that are")
    made = packed_files(originals, form) if KINDS[form] == "safetensors" else block_files(originals, form)
    return _placed(originals.layout.files, made)


def quantisable(info: TensorInfo, group: int) -> None:
    """UsageError unless a tensor can be quantised: floats, in rows of whole groups."""
    if info.dtype.name not in FLOATS:
        unfit("form.quantised", f"the tensor {info.name!r:.100} is of type {info.dtype.name}: it is no float any more")
    if info.shape[-1] % group:
        unfit("form.shape", f"rows of {info.name!r:.100} have {info.shape[-1]} elements, no multiple of {group}")


def unfit(code: str, message: str) -> NoReturn:
    """UsageError: a version that can't leave in the form that was asked for."""
    raise UsageError(code, message, hint=_AS_PUT)


def among(each: Placed, begins: Container[int]) -> bool:
    """Whether a tensor is one of those that begin there: one of no bytes begins where another does."""
    return each.begin in begins and each.info.elements > 0


def of_file(tensors: Sequence[Placed], file: FileEntry) -> list[Placed]:
    """Of all tensors, in the order of their bytes, those that lie in a file: found without a look at each of them, as
    there may be as many files."""
    # Behind its header: a tensor of no bytes may end the file before it, right where this one begins.
    begin = file.offset + file.data_start
    first = bisect_left(tensors, begin, key=lambda each: each.begin)
    stop = bisect_right(tensors, file.end, key=lambda each: each.begin)
    return [each for each in tensors[first:stop] if each.end <= file.end]


def _placed(files: Sequence[FileEntry], made: Mapping[str, Content]) -> Plan:
    contents = {
        file.path: made.get(file.path) or Content(file.data_start, [(file.bytes, file.offset)] if file.bytes else [])
        for file in files
    }
    entries = Layout.place(
        [(file.path, file.kind, contents[file.path].bytes, contents[file.path].data_start) for file in files]
    )
    parts: list[Part] = []
    for entry in entries:
        at = entry.offset
        for size, source in contents[entry.path].parts:
            if source is not None:
                parts.append(Part(at, at + size, source))
            at += size
    image = entries[-1].end if entries else 0
    return Plan(image, tuple(CopiedFile(each.path, each.offset, each.bytes) for each in entries), tuple(parts))
