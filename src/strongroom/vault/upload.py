"""A model that comes over the network, put as it comes: no plaintext of it is ever on the custodian's disk.

Nothing that its sender says is believed: names, headers, shards and pickles are judged here as those of a model on disk
are, and a version appears only if every file has the digest that was announced for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from strongroom.errors import Conflict, UsageError
from strongroom.formats.upload import Upload, UploadFile
from strongroom.vault.names import check_name
from strongroom.vault.pickles import pickle_evidence
from strongroom.vault.source import ModelSource, ReadInto, SourceFile
from strongroom.vault.sourcefile import Signature
from strongroom.vault.walk import refuse_pickle

# Of what is sent: the next bytes, into all of a buffer or some of it; how many, 0 at the end. Waits for them.
Receive = Callable[[memoryview], int]


@dataclass(frozen=True, slots=True)
class UploadSource(ModelSource):
    """The model that `upload` announces. Its files can be read once, in their order."""

    announced: dict[str, UploadFile] = field(default_factory=dict)
    heads: dict[str, bytes] = field(default_factory=dict, repr=False)
    receive: Receive = field(default=lambda _: 0, repr=False)

    @classmethod
    def begin(cls, upload: Upload, receive: Receive) -> UploadSource:
        """Receive the heads, and look them over. UsageError ``upload.*``, ``source.*`` and those of the parsers;
        LimitExceeded ``source.limit``; Conflict ``upload.interrupted``."""
        heads, files = {}, []
        for announced in upload.files:
            check_name(announced.path)
        for announced in upload.files:
            heads[announced.path] = head = bytes(_exactly(receive, announced.head))
            files.append(_look(announced, head))
        source = cls(
            Path(), tuple(files), announced={file.path: file for file in upload.files}, heads=heads, receive=receive
        )
        source.check(whole=len(files) > 1)
        return source

    @contextmanager
    def reading(self, file: SourceFile) -> Iterator[ReadInto]:
        head = self.heads[file.path]

        def read(offset: int, buffer: memoryview) -> int:
            if offset < len(head):
                piece = head[offset : offset + len(buffer)]
                buffer[: len(piece)] = piece
                return len(piece)
            return _some(self.receive, buffer) if offset < file.size else 0

        yield read

    def identity(self, file: SourceFile) -> tuple[int | str, ...]:
        return (self.announced[file.path].sha256,)

    def check_unchanged(self, digests: Sequence[str]) -> None:
        """Conflict ``source.changed`` unless every file has the digest that was announced."""
        for file, digest in zip(self.files, digests, strict=True):
            if digest != self.announced[file.path].sha256:
                raise Conflict(
                    "source.changed",
                    f"{file.path} is not the file that was announced: its SHA-256 is another",
                    hint="let downloads and training finish, then put it again",
                    path=file.path,
                )


def _look(announced: UploadFile, head: bytes) -> SourceFile:
    """The file, its kind and its tensors, of which only the beginning is there."""
    path = announced.path
    nothing = Signature(0, 0, announced.size, 0, 0)

    def read(offset: int, size: int) -> bytes:
        if min(offset + size, announced.size) > len(head):
            raise UsageError("upload.head", f"the header of {path} is longer than what was sent of it", path=path)
        return head[offset : offset + size]

    file = SourceFile(path, announced.size, "opaque", 0, (), nothing, Path()).parsed(
        lambda offset, size: read(offset, min(size, announced.size - offset))
    )
    if file.kind == "opaque":
        # What nobody has parsed has to be here whole: a pickle shows itself anywhere in it. What begins as a GGUF file
        # is none: the fifth opcode at the latest is a zero byte, which no pickle has.
        if len(head) < announced.size:
            raise UsageError(
                "upload.head",
                f"{path} holds no tensors, and was not sent whole before the others",
                path=path,
            )
        if evidence := pickle_evidence(path, io.BytesIO(head)):
            refuse_pickle(path, evidence, 1)
    return file


def _exactly(receive: Receive, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        done += _some(receive, view[done:])
    return data


def _some(receive: Receive, buffer: memoryview) -> int:
    """At least one byte. An end is no change of a file: what is stored by then is used by the next attempt."""
    if count := receive(buffer):
        return count
    raise Conflict("upload.interrupted", "the upload ended before all of it had come", hint="put it again: it goes on")
