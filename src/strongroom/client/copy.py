"""A holder's plaintext copy: the files of a version, with the holder's marks and stamp, in a folder.

The one place where plaintext weights reach a disk: that is what an approved copy is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, Self

from strongroom.client.ahead import Ahead
from strongroom.client.anyroom import AnyRoom
from strongroom.client.receive import Received
from strongroom.core.limits import MIB
from strongroom.crypto.copying import TAG_BYTES, CopyCipher
from strongroom.errors import BackendError, Tampered, Truncated, UsageError
from strongroom.formats.copybundle import CopiedFile, CopyBundle
from strongroom.formats.entry import FORMS

_PIECE = 8 * MIB
_ROOM_LEFT = 16 * MIB


def check_copy(ref: str, to: str, principal: str, folder: Path, form: str | None) -> Path:
    """`folder`, if `principal` may have a copy for `to` in `form` written there; UsageError ``copy.other``,
    ``copy.exists``, ``copy.form``."""
    if form is not None and form not in FORMS:
        raise UsageError(
            "copy.form", f"there is no form {form!r:.40}: {', '.join(FORMS)}", hint="strongroom copy --help"
        )
    if to != principal:
        raise UsageError(
            "copy.other",
            f"a copy carries its holder's marks, so {to} has to take it",
            hint=f"{to} runs: strongroom copy {ref} --to {to} --out {folder}; for one of your own: --to {principal}",
        )
    if folder.exists():
        raise UsageError("copy.exists", f"{folder} is there already", hint="--out with a new folder")
    return folder


class CopyReader:
    """The image of one plaintext copy, fetched from the custodian piece by piece; each is checked before it is handed
    out. As a context the next pieces are fetched while those before them are used. For one thread."""

    def __init__(self, room: AnyRoom, received: Received, bundle: CopyBundle) -> None:
        self._room, self._received, self._bundle = room, received, bundle
        self._cipher = CopyCipher(bundle.key, received.leaf, bundle.image)
        self._ahead = Ahead(self._fetch, -(-bundle.image // bundle.piece))
        self._last: tuple[int, bytes] = (-1, b"")

    def __enter__(self) -> Self:
        self._ahead.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ahead.__exit__(*raised)

    @property
    def files(self) -> tuple[CopiedFile, ...]:
        return self._bundle.files

    def read(self, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of the image. Tampered ``copy.tampered``, Truncated ``copy.truncated``."""
        size = self._bundle.piece
        parts = [
            self._piece(number)[max(begin - number * size, 0) : end - number * size]
            for number in range(begin // size, -(-end // size))
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, number: int) -> bytes:
        if self._last[0] != number:
            self._last = (number, self._ahead.take(number))
        return self._last[1]

    def _fetch(self, number: int) -> bytes:
        sealed = self._room.read_copy(self._received.store, f"copies/{self._received.index}/{number}")
        expected = min(self._bundle.piece, self._bundle.image - number * self._bundle.piece)
        if len(sealed) != expected + TAG_BYTES:
            raise Truncated("copy.truncated", f"piece {number} of the copy did not come whole")
        return self._cipher.open(number, sealed)


def take_copy(
    room: AnyRoom, received: Received, folder: Path, form: str | None, progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the copy that was released into the new `folder`: what is told of it, and what its holder signs. Errors of
    `CopyReader` and `write_copy`."""
    bundle = received.bundle
    assert isinstance(bundle, CopyBundle)  # noqa: S101 - `receive` has asked for one
    with CopyReader(room, received, bundle) as reader:
        written = write_copy(reader, folder, progress=progress)
    size = sum(count for _, count in written)
    told = {"ref": bundle.ref, "to": bundle.holder, "form": form, "files": [path for path, _ in written]}
    signed = {"holder": bundle.holder, "release": received.index, "files": len(written)}
    return {**told, "bytes": size, "carries_marks": bundle.marked}, {"ref": bundle.ref, **signed, "bytes": size}


class Copied(Protocol):
    """What `write_copy` writes: files, and any range of the image that they lie in."""

    @property
    def files(self) -> Sequence[CopiedFile]: ...
    def read(self, begin: int, end: int) -> bytes: ...


def write_copy(
    reader: Copied, folder: Path, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[tuple[str, int]]:
    """Write every file of the version below the new `folder`; paths and sizes of what was written.

    Each piece is verified before it is written, and memory stays flat. All or nothing: a folder that is half-written
    when something fails is removed. BackendError ``copy.write``, and what the reader raises.
    """
    files = reader.files
    total = sum(file.bytes for file in files)
    temporary = folder.with_name(f".{folder.name}.{os.urandom(8).hex()}")  # nobody else's: it is removed at the end
    done = 0
    try:
        temporary.mkdir(mode=0o700, parents=True)
        if shutil.disk_usage(temporary).free < total + _ROOM_LEFT:
            raise BackendError("copy.full", f"{folder.parent} has no room for {total} bytes", hint="--out elsewhere")
        for file in files:
            path = temporary.joinpath(*_parts(file.path))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("xb") as out:
                os.fchmod(out.fileno(), 0o600)
                begin, end = file.offset, file.offset + file.bytes
                while begin < end:
                    # Cut where the image's pieces are: each is then written as it is.
                    piece = reader.read(begin, min(end, (begin // _PIECE + 1) * _PIECE))
                    out.write(piece)
                    begin += len(piece)
                    done += len(piece)
                    progress(done, total)
                out.flush()
                os.fsync(out.fileno())
        temporary.rename(folder)
    except OSError as error:
        raise BackendError("copy.write", f"can't write the copy: {error.strerror}", hint="--out elsewhere") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [(file.path, file.bytes) for file in files]


def _parts(path: str) -> tuple[str, ...]:
    """The parts of a file's path. The index is sealed and checked; still nothing is written outside the folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise Tampered("copy.path", f"the version has a file of the impossible name {path!r:.80}")
    return parts
