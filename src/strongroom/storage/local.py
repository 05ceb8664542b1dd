"""A store in a local folder: one file an object.

Writing is done here and not by obstore's LocalStore because an object has to survive a power cut once `write` has
returned, and LocalStore never syncs: traced (obstore 0.12.1 with object_store 0.14.2), a put makes no fsync of file or
folder; object_store has an option for it (`LocalFileSystem::with_fsync`, off by default) that obstore does not expose.
Reading is done here because obstore returns memory of its own, one allocation and one copy more than `preadv` straight
into the caller's buffer.

::

    FOLDER/packs/ab/abcd…      an object, mode 0600, never changed
    FOLDER/tmp/…               being written, or left behind by a process that was killed; locked while being written
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from strongroom.core.limits import MIB
from strongroom.errors import BackendError, Conflict, LimitExceeded, NotFound, StrongroomError, Tampered, Truncated
from strongroom.storage.blobs import check_folder, check_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

# O_NOFOLLOW: a link planted in the store must not lead a read to another file. O_NONBLOCK: nor may a FIFO planted there
# hang it; on a regular file the flag has no effect.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_TMP = "tmp"
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "rootfs"})


class LocalBlobs:
    """`Blobs` in `folder`. Thread-safe; any number of processes may use the same folder.

    Up to `descriptors` files are kept open for reading. An object that was opened before it was deleted or replaced
    behind the store's back stays readable as it was until `size` is asked, which looks at the folder itself.
    """

    near = True

    def __init__(self, folder: str | os.PathLike[str], *, create: bool = True, descriptors: int = 256) -> None:
        self._folder = Path(folder).absolute()
        self._descriptors = max(1, descriptors)
        self._open_files: dict[str, _OpenFile] = {}
        self._synced: set[Path] = set()  # folders whose own entry in their parent is known to be durable
        self._lock = threading.Lock()
        if not create and not self._folder.is_dir():
            raise BackendError(
                "store.not_there",
                f"there is no folder {self._folder}",
                hint="mount the disk that holds the store, or correct the store's path",
            )

    @property
    def url(self) -> str:
        return self._folder.as_uri()

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, name: str, chunks: Iterable[Buffer]) -> int:
        target = self._path(name)
        temporary = self._folder / _TMP / secrets.token_hex(16)
        try:
            self._make_folder(temporary.parent)
            descriptor = os.open(temporary, _WRITE, 0o600)
        except OSError as error:
            _fail(error, name, writing=True)
        try:
            with contextlib.suppress(OSError):  # says to sweep() that somebody is at it; some file systems can't
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = _write_all(descriptor, chunks, name)
            try:
                os.fsync(descriptor)
                self._make_folder(target.parent)
                self._publish(temporary, target, descriptor, name)
            except OSError as error:
                _fail(error, name, writing=True)
        finally:
            # Whatever happened, the temporary name goes; if even that fails, sweep() removes it later.
            with contextlib.suppress(OSError):
                temporary.unlink()
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return size

    def _publish(self, temporary: Path, target: Path, descriptor: int, name: str) -> None:
        try:
            # A hard link, not a rename: it refuses an existing name in the same step, so of two writers one wins.
            os.link(temporary, target, follow_symlinks=False)
        except FileExistsError:
            if not self._same(target, descriptor):
                raise Conflict(
                    "store.exists",
                    f"the store already has an object {name} with other content; objects are never overwritten",
                    object=name,
                ) from None
            # The other writer may not have come to its own sync yet.
        _sync_folder(target.parent)

    def _same(self, target: Path, descriptor: int) -> bool:
        """Whether the file at `target` has the bytes of `descriptor`, and is durable when this returns."""
        other = os.open(target, _READ)
        try:
            status = os.fstat(other)
            size = os.fstat(descriptor).st_size
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return False
            ours, theirs = memoryview(bytearray(MIB)), memoryview(bytearray(MIB))
            for at in range(0, size, MIB):
                count = min(MIB, size - at)
                _read_exactly(descriptor, at, ours[:count], target.name)
                _read_exactly(other, at, theirs[:count], target.name)
                if ours != theirs:
                    return False
            os.fsync(other)
            return True
        finally:
            os.close(other)

    def _make_folder(self, folder: Path) -> None:
        """Make `folder` and those above it where missing, and make their names durable."""
        if folder in self._synced and folder.is_dir():
            return
        if folder != self._folder:
            self._make_folder(folder.parent)
        else:
            _make_parents(folder.parent)
        # One that exists is synced too: whoever made it may not have come to that yet.
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        try:
            _sync_folder(folder.parent)
        except PermissionError:
            if folder != self._folder:
                raise
            # Somebody made it for us inside a folder that we may not read: its durability is theirs.
        self._synced.add(folder)

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, name: str, *, limit: int) -> bytes:
        file = self._open(name)  # not kept: small objects are read once
        try:
            size = os.fstat(file.descriptor).st_size
            if size > limit:
                raise LimitExceeded(
                    "store.too_large",
                    f"the object {name} has {size} bytes; at most {limit} are expected",
                    object=name,
                    size=size,
                    limit=limit,
                )
            data = bytearray(size)
            _read_exactly(file.descriptor, 0, memoryview(data), name)
        except OSError as error:
            _fail(error, name)
        return bytes(data)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        # The hot path: one dict lookup and one system call. `file` holds the descriptor open even if it is evicted
        # meanwhile: the last reference closes it, so a descriptor number is never reused under a running read.
        file = self._open_files.get(name)
        if file is None:
            file = self._keep(name)
        else:
            file.used = True
        try:
            if os.preadv(file.descriptor, (buffer,), offset) != buffer.nbytes:
                _read_exactly(file.descriptor, offset, buffer.cast("B"), name)
        except OSError as error:
            _fail(error, name)

    def read_ranges_into(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        for offset, buffer in ranges:
            self.read_into(name, offset, buffer)

    def size(self, name: str) -> int:
        try:
            status = self._path(name).lstat()
        except OSError as error:
            self._forget(name)
            _fail(error, name)
        file = self._open_files.get(name)
        if file is not None and file.identity != (status.st_dev, status.st_ino):
            self._forget(name)
        _check_regular(status, name)
        return status.st_size

    def _keep(self, name: str) -> _OpenFile:
        file = self._open(name)
        with self._lock:
            files = self._open_files
            while len(files) >= self._descriptors:
                # Second chance: the oldest goes unless it was read since it last came up. As good as least recently
                # used here, and a hit costs no lock and no reordering.
                oldest, candidate = next(iter(files.items()))
                del files[oldest]
                if candidate.used:
                    candidate.used = False
                    files[oldest] = candidate
            files[name] = file
        return file

    def _forget(self, name: str) -> None:
        with self._lock:
            self._open_files.pop(name, None)

    def _open(self, name: str) -> _OpenFile:
        path = self._path(name)
        try:
            file = _OpenFile(os.open(path, _READ))
            status = os.fstat(file.descriptor)
        except OSError as error:
            _fail(error, name)
        file.identity = (status.st_dev, status.st_ino)
        _check_regular(status, name)
        return file

    # -- the folder ----------------------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        path = self._path(name)
        self._forget(name)
        try:
            path.unlink()
            _sync_folder(path.parent)  # deleting is part of shredding: it has to last, too
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return  # there is no such object
        except OSError as error:
            _fail(error, name, writing=True)

    def list(self, folder: str = "") -> Iterator[tuple[str, int]]:
        prefix = check_folder(folder)
        return self._walk(self._folder / prefix, f"{prefix}/" if prefix else "")

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            _fail(error, prefix)
        for entry in found:
            name = prefix + entry.name
            if not _is_name(name):
                continue  # tmp, or nothing of ours
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(folder / entry.name, f"{name}/")
                elif entry.is_file(follow_symlinks=False):
                    yield name, entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue  # deleted since it was listed
            except OSError as error:
                _fail(error, name)

    def leftovers(self) -> Sequence[tuple[str, int]]:
        return [(f"{_TMP}/{entry.name}", entry.stat(follow_symlinks=False).st_size) for entry in self._leftovers(0.0)]

    def sweep(self, older_than_s: float = 3600.0) -> int:
        removed = 0
        for entry in self._leftovers(older_than_s):
            try:
                descriptor = os.open(entry.path, _READ)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(entry.path).unlink()
                    removed += 1
                finally:
                    os.close(descriptor)
            except (BlockingIOError, FileNotFoundError):
                continue  # being written, or gone: another process published it or swept it
            except OSError as error:
                _fail(error, f"{_TMP}/{entry.name}", writing=True)
        return removed

    def _leftovers(self, older_than_s: float) -> Sequence[os.DirEntry[str]]:
        before = time.time() - older_than_s
        found = []
        try:
            with os.scandir(self._folder / _TMP) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode) and status.st_mtime <= before:
                            found.append(entry)
        except FileNotFoundError:
            return []
        except OSError as error:
            _fail(error, _TMP)
        return found

    def check(self) -> dict[str, Any]:
        name = f"check/{secrets.token_hex(16)}"
        probe = secrets.token_bytes(64)
        self.write(name, [probe])
        try:
            sound = self.read(name, limit=len(probe)) == probe
        finally:
            self.delete(name)
        with contextlib.suppress(OSError):
            (self._folder / "check").rmdir()
        try:
            space = os.statvfs(self._folder)
            kind = _file_system(self._folder)
        except OSError as error:
            _fail(error, str(self._folder))
        problems = [] if sound else ["what was written does not read back"]
        if kind in _IN_MEMORY:
            problems.append(f"the folder is on {kind}, which is memory: everything is lost when the machine restarts")
        return {
            "url": self.url,
            "kind": "local",
            "file_system": kind,
            "writable": sound,
            "durable": kind not in _IN_MEMORY,
            "free_bytes": space.f_bavail * space.f_frsize,
            "leftovers": len(self.leftovers()),
            "problems": problems,
        }

    def close(self) -> None:
        with self._lock:
            self._open_files.clear()

    def _path(self, name: str) -> Path:
        return self._folder / check_name(name)


class _OpenFile:
    """A read descriptor that lives as long as somebody refers to it."""

    __slots__ = ("descriptor", "identity", "used")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.identity = (0, 0)
        self.used = False

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules may be gone at exit
        close(self.descriptor)


def _make_parents(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_parents(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, _FOLDER)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, chunks: Iterable[Buffer], name: str) -> int:
    size = 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            try:
                written = os.write(descriptor, view)
            except OSError as error:  # only ours: what `chunks` raises is the caller's
                _fail(error, name, writing=True)
            size += written
            view = view[written:]
    return size


def _read_exactly(descriptor: int, offset: int, buffer: memoryview, name: str) -> None:
    """Fill `buffer`, however little a single read returns (network file systems, signals)."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, (buffer[done:],), offset + done)
        if count == 0:
            raise Truncated(
                "store.short_read",
                f"the object {name} ends at byte {offset + done}; {len(buffer)} bytes from {offset} on were expected",
                object=name,
                offset=offset,
                expected=len(buffer),
                got=done,
            )
        done += count


def _check_regular(status: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise NotFound("store.missing", f"the store has no object {name} (it is a folder)", object=name)
    if not stat.S_ISREG(status.st_mode):
        raise Tampered(
            "store.not_a_file",
            f"at {name} the store has a link, device or pipe; only plain files were ever written there",
            object=name,
        )


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except StrongroomError:
        return False
    return True


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, from /proc; "unknown" where there is none."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts:
        head, _, tail = line.partition(" - ")
        if head.split()[2] == wanted and tail:
            return tail.split()[0]
    return "unknown"


def _fail(error: OSError, name: str, *, writing: bool = False) -> NoReturn:
    """Raise what an operating system error means to the caller."""
    code, doing = error.errno or 0, "writing" if writing else "reading"
    text = f"{doing} {name}: {error.strerror or type(error).__name__}"
    reason = errno.errorcode.get(code, str(code))
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise BackendError(
            "store.full",
            text,
            hint="free space in the store, or raise the quota, and run the command again",
            errno=reason,
        ) from None
    if not writing and code in (errno.ENOENT, errno.ENOTDIR):
        raise NotFound("store.missing", f"the store has no object {name}", object=name) from None
    if code == errno.ELOOP:
        raise Tampered(
            "store.not_a_file", f"at {name} the store has a link; none was ever written there", object=name
        ) from None
    if code in (errno.ENOTDIR, errno.EISDIR):
        raise Conflict(
            "store.exists", f"{name} can't be stored: a part of its name is an object already", object=name
        ) from None
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        if writing:
            raise BackendError(
                "store.read_only", text, hint="make the store's folder writable for this user", errno=reason
            ) from None
        raise BackendError(
            "store.refused", text, hint="give this user the right to read the store's folder", errno=reason
        ) from None
    if code in (errno.EMFILE, errno.ENFILE):
        raise BackendError(
            "store.failed", text, hint="raise the limit on open files (ulimit -n)", errno=reason
        ) from None
    raise BackendError(
        "store.failed", text, hint="look at the disk: dmesg, smartctl; then strongroom fsck", errno=reason
    ) from None
