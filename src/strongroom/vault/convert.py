"""Pickled weights become safetensors without running them and without touching a disk.

Each pickle is read by a child process (`strongroom.vault.unpickle`) that has no network, cannot write a file or start a
program, and loads tensors only (``torch.load(weights_only=True)``). It hands them back in a memory file whose header
and size the parent wrote, and which the parent reads with the same strict parser as any other source. So three things
have to fail before a hostile pickle does anything: torch's allow-list, the sandbox, the parser.

Tied tensors (two names, one storage) are written out under each name: dropping one, as safetensors' own converter does,
needs the model's code to know which name its loader can do without.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import LimitExceeded, UsageError
from strongroom.formats.safetensors import encode_header
from strongroom.formats.tensors import DTYPES
from strongroom.vault.arrays import with_arrays
from strongroom.vault.child import Answer, Child
from strongroom.vault.memoryfile import memory_file, seal_memory, write_memory
from strongroom.vault.names import check_collisions, shown
from strongroom.vault.pickles import SUFFIXES
from strongroom.vault.shards import INDEX_MAX, read_index
from strongroom.vault.source import ModelSource
from strongroom.vault.sourcefile import SourceFile
from strongroom.vault.walk import Walk

_INDEX_SUFFIX = ".index.json"
Take = Callable[[int], None]


def freely(_: int) -> None:
    """Memory as it is needed."""


@contextmanager
def converted(path: Path, *, follow_links: bool = False) -> Iterator[ModelSource]:
    """The model at `path` with its pickles as safetensors files in memory, for as long as the context lasts.

    ``pytorch_model.bin`` becomes ``model.safetensors``, shards and index likewise, ``x.pt`` becomes ``x.safetensors``;
    a pickle beside a safetensors file of that name is left out. A model without pickles is scanned as it is.

    Errors of `ModelSource.scan`, and UsageError ``convert.refused`` (it would call something), ``convert.unreadable``,
    ``convert.protocol`` (as pickles are written that are not read here), ``convert.unfit`` (it holds more than
    tensors), ``convert.no_torch``, ``convert.no_sandbox``; LimitExceeded ``convert.limit``.
    """
    walk = Walk.of(path, follow_links=follow_links)
    present = {file.path for file in walk.files}
    renamed = {file.path: safetensors_name(file.path) for file, _ in walk.pickles}
    wanted = to_convert(walk)
    # The others are there already, as the publisher's own conversion.
    walk.skipped.extend(path for path, name in renamed.items() if name in present)
    with ExitStack() as stack:
        made = [_convert(file, renamed[file.path], stack) for file in wanted]
        sizes = {file.path: sum(tensor.size for tensor in file.tensors) for file in made}
        walk.files.extend(made)
        files = [kept for file in walk.files if (kept := _reindexed(file, present, renamed, sizes, walk, stack))]
        yield ModelSource.of(walk.root, files, walk.skipped, walk.followed)


def to_convert(walk: Walk) -> list[SourceFile]:
    """The pickles that have no safetensors file of their name beside them, in their order; UsageError
    ``source.collision`` if one would be in another file's place."""
    present = {file.path for file in walk.files}
    wanted = [file for file, _ in walk.pickles if safetensors_name(file.path) not in present]
    # Before the work, not after it.
    check_collisions([*present, *(safetensors_name(file.path) for file in wanted)])
    return sorted(wanted, key=lambda file: file.path)


@contextmanager
def converted_parts(walk: Walk, *, take: Take = freely) -> Iterator[ModelSource]:
    """What was found, with its pickles as safetensors files in memory and NumPy's arrays as tensors, for as long as the
    context lasts: shards may be missing, and indices say nothing, for it may be a part of a model. `take` is asked for
    memory, in bytes, before it is used, and may refuse. Errors as `converted` and `with_arrays`."""
    with ExitStack() as stack:
        made = [_convert(file, safetensors_name(file.path), stack, take) for file in to_convert(walk)]
        read = [each for file in walk.files for each in with_arrays(file, stack, take)]
        yield ModelSource(walk.root, tuple(sorted([*read, *made], key=lambda file: file.path.encode("utf-8"))))


def safetensors_name(path: str) -> str:
    """What the pickle `path` is called once it is a safetensors file: the name that loaders look for."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    if not dot or "." + suffix.lower() not in SUFFIXES:
        stem = name
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return f"{folder}{slash}{stem}.safetensors"


def _reindexed(
    file: SourceFile,
    present: set[str],
    renamed: dict[str, str],
    sizes: dict[str, int],
    walk: Walk,
    stack: ExitStack,
) -> SourceFile | None:
    """`file`, or if it is the index of converted shards, that of their new names; None if it is not needed."""
    stem, _, _ = file.path.partition(_INDEX_SUFFIX)
    if not file.path.endswith(_INDEX_SUFFIX) or "." + stem.rpartition(".")[2] not in SUFFIXES:
        return file
    name = safetensors_name(stem) + _INDEX_SUFFIX
    if name in present:
        walk.skipped.append(file.path)
        return None
    if file.size > INDEX_MAX:
        raise LimitExceeded("source.limit", f"{file.path} is larger than {INDEX_MAX} bytes")
    with file.opened() as fd:
        weight_map = read_index(file.path, file.read(fd, 0, file.size))
    folder = file.path.rpartition("/")[0]
    places = {shard: f"{folder}/{shard}" if folder else shard for shard in weight_map.values()}
    if missing := sorted(shard for shard, place in places.items() if place not in renamed):
        raise UsageError(
            "source.missing_shard",
            f"{missing[0][:300]!r} is missing; {file.path!r} names it",
            hint="download the model again; all its shards belong in one directory",
            shard=missing[0][:300],
            named_by=file.path,
        )
    new = {shard: renamed[place] for shard, place in places.items()}
    index = {
        "metadata": {"total_size": sum(sizes.get(place, 0) for place in set(new.values()))},
        "weight_map": {tensor: new[shard].rpartition("/")[2] for tensor, shard in weight_map.items()},
    }
    memory = memory_file(stack)
    write_memory(memory, json.dumps(index, ensure_ascii=False, indent=2).encode())
    seal_memory(memory)
    return SourceFile.in_memory(name, memory)


def _convert(file: SourceFile, name: str, stack: ExitStack, take: Take = freely) -> SourceFile:
    memory = memory_file(stack)
    with file.opened() as source:
        with contextlib.closing(_reader(file, source, memory)) as child:
            begin, size = _prepare(file, memory, child.hear("tensors"), take)
            child.say({"begin": begin, "size": size})
            child.hear("done")
        with file.opened():  # the tensors were read through a mapping: what changed meanwhile is neither old nor new
            pass
    seal_memory(memory)
    result = SourceFile.in_memory(name, memory)
    with result.opened() as fd:
        return result.parsed(partial(result.read, fd))


def _prepare(file: SourceFile, memory: int, tensors: Any, take: Take = freely) -> tuple[int, int]:
    """Write the header of what the child announces, make room for it, and say where the tensors begin and end."""
    try:
        table = [(str(name), str(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in tensors]
        if any(n < 0 for _, _, shape in table for n in shape) or len(dict(entry[:2] for entry in table)) < len(table):
            raise ValueError("a size below zero, or a name twice")
        size = sum(math.prod(shape) * DTYPES[dtype].block_bytes for _, dtype, shape in table)
        head = encode_header(table, {"format": "pt"})
    except (TypeError, ValueError, KeyError):
        raise _refusal(file, "convert.unreadable", "its tensors have no names, or no sizes") from None
    # A tensor may repeat four bytes a billion times by its strides. Tied weights at most double a model.
    if len(table) > LIMITS.tensors or size > 4 * file.size + MIB:
        raise LimitExceeded(
            "convert.limit",
            f"{file.path} would grow from {file.size} to {size} bytes",
            hint="it is not an ordinary set of weights: do not use it",
            path=file.path,
        )
    take(len(head) + size)
    os.ftruncate(memory, len(head) + size)
    write_memory(memory, head)
    return len(head), len(head) + size


def _reader(file: SourceFile, source: int, memory: int) -> Child:
    """The process that reads one pickle."""
    if importlib.util.find_spec("torch") is None:
        raise _no_torch("torch is not installed")
    seconds = 120 + file.size // (10 * MIB)
    return Child(
        "strongroom.vault.unpickle",
        memory=8 * file.size + 1024 * MIB,
        seconds=seconds,
        patience=5 * seconds,
        most=LIMITS.safetensors_header,
        explain=partial(_explained, file),
        descriptors=(source, memory),
    )


def _explained(file: SourceFile, answer: Answer) -> UsageError:
    message = shown(str(answer.get("message", "")).partition("\n")[0]) or "it is damaged"
    match answer["error"]:
        case "no_torch":
            return _no_torch(f"torch cannot be imported ({message})")
        case "refused":
            wants = shown(str(answer.get("wants", "")))
            what = f"to read it would mean to call {wants}" if wants else "it does more than hold tensors"
            return _refusal(file, "convert.refused", what, wants=wants)
        case "protocol":
            return _refusal(file, "convert.protocol", "it is pickled in a way that PyTorch's safe reader does not read")
        case "no_sandbox" | "unfit" | "memory" as reason:
            return _refusal(file, f"convert.{reason}", message)
        case _:
            return _refusal(file, "convert.unreadable", f"it is no pickle of tensors, or damaged ({message})")


def _no_torch(what: str) -> UsageError:
    return UsageError(
        "convert.no_torch",
        f"{what}; reading a pickle of weights safely takes it",
        hint='pip install "strongroom[convert]"',
    )


def _refusal(file: SourceFile, code: str, what: str, **evidence: str) -> UsageError:
    hints = {
        "convert.refused": "do not load this file with anything; ask its publisher for safetensors",
        "convert.no_sandbox": "convert on a Linux machine that permits user namespaces or seccomp filters",
        "convert.protocol": "write its tensors to safetensors, in a sandbox of your own: torch.save's default is read",
        "convert.unfit": "remove it if it belongs to training (optimizer, arguments, random state)",
    }
    return UsageError(
        code,
        f"{file.path} was not converted: {what}",
        hint=hints.get(code, "fetch the file again, or ask its publisher for safetensors"),
        path=file.path,
        **evidence,
    )
