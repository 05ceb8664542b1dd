"""A holder's plaintext copy: the files of a version, marked with the holder's code word, in a folder.

The one place where plaintext weights reach a disk: that is what an approved copy is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from strongroom.core.limits import MIB
from strongroom.errors import BackendError, Tampered, UsageError
from strongroom.storage.reader import ImageReader

_PIECE = 32 * MIB
_ROOM_LEFT = 16 * MIB


def check_copy(ref: str, to: str, principal: str, folder: Path) -> Path:
    """`folder`, if `principal` may have a copy for `to` written there; UsageError ``copy.other``, ``copy.exists``."""
    if to != principal:
        raise UsageError(
            "copy.other",
            f"a copy carries its holder's code word, so {to} has to take it",
            hint=f"strongroom copy {ref} --to {to} --out DIR --as {to}",
        )
    if folder.exists():
        raise UsageError("copy.exists", f"{folder} is there already", hint="--out with a new folder")
    return folder


def write_copy(
    reader: ImageReader, folder: Path, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[tuple[str, int]]:
    """Write every file of the version below the new `folder`; paths and sizes of what was written.

    Each piece is verified before it is written, and memory stays flat. All or nothing: a folder that is half-written
    when something fails is removed. BackendError ``copy.write``, and what the reader raises.
    """
    files = reader.layout.files
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
                for begin in range(file.offset, file.offset + file.bytes, _PIECE):
                    piece = reader.read(begin, min(begin + _PIECE, file.offset + file.bytes))
                    out.write(piece)
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
