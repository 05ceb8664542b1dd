"""One file that is put: what it is, where its tensors lie, and how it is opened again without being another file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from strongroom.core.limits import LIMITS
from strongroom.errors import Conflict, LimitExceeded, UsageError
from strongroom.formats import gguf, safetensors
from strongroom.formats.tensors import TensorInfo

Kind = Literal["safetensors", "gguf", "opaque"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Signature(NamedTuple):
    """What `stat` says of a file: equal signatures, unchanged content."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Signature:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source.

    `path` is relative, POSIX; `data_start` is the offset of the first tensor byte (0 where `kind` is opaque); offsets
    in `tensors` are those of the file. `location` is where its bytes are; `memory` is the descriptor that holds them
    where they are in memory only.
    """

    path: str
    size: int
    kind: Kind
    data_start: int
    tensors: tuple[TensorInfo, ...]
    signature: Signature
    location: Path
    memory: int | None = None

    @classmethod
    def scan(cls, path: str, location: Path) -> SourceFile:
        """The file at `location`, to be known as `path`, kind and tensors not looked at yet.

        UsageError ``source.special`` for what is not a regular file, ``source.unreadable``.
        """
        try:
            status = location.lstat()
        except OSError as error:
            raise unreadable(path, error) from None
        # Opening a pipe waits for ever, opening a device can do anything: not even that.
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(
                "source.special",
                f"{path} is {_kind_of(status.st_mode)}, not a regular file",
                hint="a model is made of regular files: remove it",
                path=path,
            )
        return cls(path, status.st_size, "opaque", 0, (), Signature.of(status), location)

    @classmethod
    def in_memory(cls, path: str, memory: int) -> SourceFile:
        """The content of the memory file `memory` (a descriptor that outlives this object), to be known as `path`."""
        status = os.fstat(memory)
        location = Path(f"/proc/self/fd/{memory}")
        return cls(path, status.st_size, "opaque", 0, (), Signature.of(status), location, memory)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A read-only descriptor, at its start, of the very file that was scanned.

        Conflict ``source.changed`` if another file is there now, or its content changed; UsageError
        ``source.unreadable``.
        """
        # Between scan and use somebody may put a link to another file in its place: a link is not followed, and the
        # inode and its times are compared.
        follow = 0 if self.memory is not None else os.O_NOFOLLOW
        try:
            fd = os.open(self.location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | follow)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise self._changed() from None
            raise unreadable(self.path, error) from None
        try:
            if Signature.of(os.fstat(fd)) != self.signature:
                raise self._changed()
            yield fd
        finally:
            os.close(fd)

    def read(self, fd: int, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer only at the end; UsageError ``source.unreadable``."""
        pieces = []
        try:
            while size > 0 and (piece := os.pread(fd, min(size, 1 << 30), offset)):
                pieces.append(piece)
                offset += len(piece)
                size -= len(piece)
        except OSError as error:
            raise unreadable(self.path, error) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def parsed(self, read: Callable[[int, int], bytes], *, suffix: str | None = None, torn: bool = False) -> SourceFile:
        """The same with kind and tensors as its content has them, of which ``read(offset, size)`` returns `size` bytes,
        fewer only at the end; UsageError, LimitExceeded. `suffix`: that of its format, if its name is not to say.
        `torn`: what lies behind the end of a file that was cut off is left out, and no error."""
        head = read(0, 64)
        suffix = suffix or self.path.lower().rpartition(".")[2]
        if suffix in ("safetensors", "gguf") and head.startswith(_LFS_POINTER):
            raise UsageError(
                "source.lfs_pointer",
                f"{self.path} is a Git LFS pointer, not the file itself",
                hint="git lfs pull, or download the file",
                path=self.path,
            )
        try:
            if suffix == "safetensors":
                needed = safetensors.header_bytes_needed(head[:8], self.size)
                document = safetensors.parse_header(read(0, needed), self.size, torn=torn)
                return self._holding("safetensors", document.data_start, document.tensors.values())
            if suffix == "gguf" or head.startswith(gguf.MAGIC):
                header = gguf.parse_header(read, self.size, torn=torn)
                return self._holding("gguf", header.data_start, header.tensors.values())
        except (UsageError, LimitExceeded) as error:
            # The parser knows bytes; its caller wants to know which file.
            if "path" in error.evidence:
                raise
            message = f"{self.path}: {error.message}"
            raise type(error)(error.code, message, hint=error.hint, **error.evidence, path=self.path) from None
        return self

    def _holding(self, kind: Kind, data_start: int, tensors: Iterable[TensorInfo]) -> SourceFile:
        return replace(self, kind=kind, data_start=data_start, tensors=tuple(tensors))

    def _changed(self) -> Conflict:
        return Conflict(
            "source.changed",
            f"{self.path} changed since it was looked at",
            hint="let downloads and training finish, then put it again",
            path=self.path,
        )


def unreadable(path: str, error: OSError) -> UsageError:
    """The error for a file or folder that the system does not let us read."""
    what = error.strerror or type(error).__name__
    return UsageError("source.unreadable", f"{path} cannot be read: {what}", hint="check its permissions", path=path)


def check_limits(files: Iterable[SourceFile]) -> None:
    """LimitExceeded ``source.limit`` for more files, tensors or bytes than a version can hold."""
    files = list(files)
    for what, count, limit in (
        ("files", len(files), LIMITS.files),
        ("tensors", sum(len(file.tensors) for file in files), LIMITS.tensors),
        ("bytes", sum(file.size for file in files), LIMITS.image),
    ):
        if count > limit:
            raise LimitExceeded("source.limit", f"the model has {count} {what}; a version holds at most {limit}")


def _kind_of(mode: int) -> str:
    names = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a directory"))
    return next((name for test, name in names if test(mode)), "a device")
