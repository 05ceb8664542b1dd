"""A folder whose files are in memory, for code that insists on a path."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.errors import BackendError
from strongroom.load.weights import Weights

if TYPE_CHECKING:
    from types import TracebackType

_CONFIG = 1 << 24  # bytes: no configuration is larger
_CODE = frozenset({"use_kernels", "kernel_config", "trust_remote_code"})
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class MemoryFolder:
    """Files of a version under a path, as long as this is open: links to anonymous memory of this process.

    Configurations (files whose names end in config.json) come without what names code to fetch (`without_code`).

    On the disk there is nothing but the links, which the folder takes with it when it is closed. Other processes of the
    same user can follow them while this process lives. `paths` are the files to show; `heads` are files of which only
    so many first bytes are shown, followed by zeros up to their size.
    """

    def __init__(self, weights: Weights, paths: Iterable[str], *, heads: Mapping[str, int] | None = None) -> None:
        self._fds: list[int] = []
        try:
            self.path = Path(tempfile.mkdtemp(prefix="strongroom-"))
        except OSError as error:
            raise BackendError("folder.temporary", f"can't make a temporary folder: {error.strerror}") from None
        try:
            for path in paths:
                self._link(weights, path, None)
            for path, size in (heads or {}).items():
                self._link(weights, path, size)
        except OSError as error:
            self.close()
            raise BackendError("folder.temporary", f"can't link to memory: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the links and free the memory, except what still has it open."""
        shutil.rmtree(self.path, ignore_errors=True)
        while self._fds:
            os.close(self._fds.pop())

    def _link(self, weights: Weights, path: str, head: int | None) -> None:
        file = weights.file_entry(path)
        if head is None and path.endswith("config.json") and file.bytes <= _CONFIG:
            whole = bytearray(file.bytes)
            weights.reader.read_range(file.offset, memoryview(whole))
            if (kept := without_code(bytes(whole))) != whole:
                self._show(path, kept)
                return
        fd = os.memfd_create("strongroom-file", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fds.append(fd)
        shown = file.bytes if head is None else min(head, file.bytes)
        if file.bytes:
            os.ftruncate(fd, file.bytes)
            with mmap.mmap(fd, file.bytes) as memory, memoryview(memory) as view, view[:shown] as part:
                weights.reader.read_range(file.offset, part)
        self._seal(path, fd)

    def _show(self, path: str, data: bytes) -> None:
        fd = os.memfd_create("strongroom-file", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fds.append(fd)
        with open(fd, "wb", closefd=False) as stream:
            stream.write(data)
        self._seal(path, fd)

    def _seal(self, path: str, fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        target = self.path / path  # layouts hold relative paths without '..' only
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")


def without_code(data: bytes) -> bytes:
    """A configuration without what names code that transformers would fetch and run, at any depth: which kernels
    compute attention or experts (a repository on a hub; by some names of its own, too, where a package is missing), and
    that this is wanted. Whoever may put weights does not choose what runs where they are loaded. `auto_map` stays: the
    loaders never ask for what it names, and say so. As it is if there is nothing of the kind, or it is no JSON."""
    try:
        value = json.loads(data)
        kept = _without(value)
    except (ValueError, RecursionError):
        return data
    return data if kept == value else json.dumps(kept).encode()


def _without(value: Any) -> Any:
    if isinstance(value, list):
        return [_without(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _without(each) for name, each in value.items() if not _names_code(name)}


def _names_code(name: str) -> bool:
    # How a cache is kept is no code.
    return name in _CODE or ("implementation" in name and "cache" not in name)
