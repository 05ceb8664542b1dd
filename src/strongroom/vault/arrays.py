"""What was found as what it is: NumPy's arrays, in archives too, and weights under another name (spec/mark.md, 3)."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import LimitExceeded, UsageError
from strongroom.formats.npy import MAGIC, parse_npy
from strongroom.vault.memoryfile import memory_file, seal_memory, write_memory
from strongroom.vault.sourcefile import SourceFile

_SUFFIX = ".npy"
_ARCHIVE = ".npz"
_LOCAL = 30  # bytes of a zip member's own header, before its name


def with_arrays(file: SourceFile, stack: ExitStack, take: Callable[[int], None]) -> Iterator[SourceFile]:
    """`file` with the arrays that it holds as its tensors; and a memory file for each that was compressed, for which
    `take` is asked. Weights under any other name by how they begin, and all else as it is.

    UsageError ``npy.malformed``, ``npy.unsupported``, ``source.unreadable``; LimitExceeded ``npy.limit``.
    """
    lower = file.path.lower()
    if lower.endswith(_SUFFIX):
        with file.opened() as fd:
            yield replace(file, tensors=(parse_npy(_named(file.path), partial(file.read, fd), file.size),))
    elif lower.endswith(_ARCHIVE):
        yield from _archived(file, stack, take)
    else:
        yield _by_content(file)


def _by_content(file: SourceFile) -> SourceFile:
    """`file`, whatever it is called, as what it begins like: whoever leaks weights renames them."""
    if file.kind != "opaque":
        return file
    with file.opened() as fd:
        head = file.read(fd, 0, 9)
        if head.startswith(MAGIC):
            return replace(file, tensors=(parse_npy(file.path, partial(file.read, fd), file.size),))
        if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= LIMITS.safetensors_header:
            with contextlib.suppress(UsageError, LimitExceeded):
                return file.parsed(partial(file.read, fd), suffix="safetensors")
    return file


def _archived(file: SourceFile, stack: ExitStack, take: Callable[[int], None]) -> Iterator[SourceFile]:
    tensors = []
    with file.opened() as fd, os.fdopen(os.dup(fd), "rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                members = [each for each in archive.infolist() if each.filename.lower().endswith(_SUFFIX)]
                if len(members) > LIMITS.tensors:
                    raise _limit(file, f"{len(members)} arrays")
                # A bomb is small and becomes large: weights hardly shrink.
                grown = sum(each.file_size for each in members if each.compress_type != zipfile.ZIP_STORED)
                if grown > 4 * file.size + MIB:
                    raise _limit(file, f"{grown} bytes of arrays in {file.size}")
                for each in members:
                    if each.compress_type != zipfile.ZIP_STORED:
                        yield _unpacked(archive, each, stack, take)
                        continue
                    local = file.read(fd, each.header_offset, _LOCAL)
                    begin = each.header_offset + _LOCAL + int.from_bytes(local[26:28], "little")
                    begin += int.from_bytes(local[28:30], "little")
                    if each.flag_bits & 1 or len(local) < _LOCAL or begin + each.file_size > file.size:
                        raise zipfile.BadZipFile("a member is encrypted, or not whole")
                    info = parse_npy(_named(each.filename), partial(_within, file, fd, begin), each.file_size)
                    tensors.append(replace(info, begin=begin + info.begin, end=begin + info.end))
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
            raise UsageError(
                "npy.malformed",
                f"{file.path}: it is no archive of arrays ({error})",
                hint="it is damaged: leave it out",
            ) from None
    yield replace(file, tensors=tuple(tensors))


def _unpacked(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, stack: ExitStack, take: Callable[[int], None]
) -> SourceFile:
    take(member.file_size)
    memory, done = memory_file(stack), 0
    with archive.open(member) as stream:
        while done <= member.file_size and (piece := stream.read(MIB)):
            write_memory(memory, piece, done)
            done += len(piece)
    seal_memory(memory)
    found = SourceFile.in_memory(member.filename, memory)
    with found.opened() as fd:
        return replace(found, tensors=(parse_npy(_named(member.filename), partial(found.read, fd), found.size),))


def _within(file: SourceFile, fd: int, begin: int, offset: int, size: int) -> bytes:
    return file.read(fd, begin + offset, size)


def _named(path: str) -> str:
    """What an array is called: what its file is, without the folder and the ending."""
    return path.rpartition("/")[2][: -len(_SUFFIX)]


def _limit(file: SourceFile, what: str) -> LimitExceeded:
    return LimitExceeded(
        "npy.limit", f"{file.path} would hold {what}", hint="it is no ordinary set of weights: leave it out"
    )
