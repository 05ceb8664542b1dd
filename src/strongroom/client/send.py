"""Sending a model to a served room: what is announced, and the bytes (spec/http.md, section 7)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from strongroom.core.limits import MIB
from strongroom.core.progress import Progress
from strongroom.errors import Conflict
from strongroom.formats.statement import Voice
from strongroom.formats.upload import Upload, UploadFile
from strongroom.vault.sent import Sent
from strongroom.vault.source import ModelSource, ReadInto, SourceFile

_PIECE = 4 * MIB


def announce(source: ModelSource, name: str, share: str, positions: int, suite: str, by: Voice) -> Upload:
    """Read `source` once, to say what will come, signed by `by`. Errors of `ModelSource.reading`; LimitExceeded
    ``upload.*``."""
    files = []
    for file in source.files:
        digest = hashlib.sha256()
        with source.reading(file) as read:
            for piece in pieces(read, 0, file):
                digest.update(piece)
        head = file.size if file.kind == "opaque" else file.data_start
        files.append(UploadFile(file.path, file.size, digest.hexdigest(), head))
    said = Sent.of(by, name, [(file.path, file.sha256) for file in files])
    statement, salt = said.statement.envelope, said.files.salt.hex()
    return Upload(name, share, positions, suite, tuple(files), statement, salt)


def body(source: ModelSource, upload: Upload, head: bytes, progress: Progress) -> Iterator[memoryview]:
    """What is sent: the length of `head`, which is `upload` encoded, `head`, the heads of all files, then their rests.
    A piece is good until the next one is asked for."""
    yield memoryview(len(head).to_bytes(4, "big"))
    yield memoryview(head)
    done = 0
    for begins in (True, False):
        for file, announced in zip(source.files, upload.files, strict=True):
            begin, end = (0, announced.head) if begins else (announced.head, announced.size)
            with source.reading(file) as read:
                for piece in pieces(read, begin, file, end):
                    yield piece
                    done += len(piece)
                    progress(done, upload.size)


def pieces(read: ReadInto, begin: int, file: SourceFile, end: int | None = None) -> Iterator[memoryview]:
    """The bytes of `file` from `begin` to before `end`; Conflict ``source.changed`` where there are fewer."""
    end = file.size if end is None else end
    buffer = memoryview(bytearray(min(_PIECE, max(end - begin, 1))))
    while begin < end:
        step = read(begin, buffer[: min(len(buffer), end - begin)])
        if step == 0:
            raise Conflict("source.changed", f"{file.path} became shorter while it was read", hint="put it again")
        yield buffer[:step]
        begin += step
