"""A store in a local folder: one file an object.

Writing is done here and not by obstore's LocalStore because an object has to survive a power cut once `write` has
returned, and LocalStore never syncs: traced (obstore 0.12.1 with object_store 0.14.2), a put makes no fsync of file or
folder; object_store has an option for it (`LocalFileSystem::with_fsync`, off by default) that obstore does not expose.
Reading is done here because obstore returns memory of its own, one allocation and one copy more than `preadv` straight
into the caller's buffer.

::

    FOLDER/packs/ab/abcd…      an object, mode 0600, never changed
    FOLDER/tmp/…               being written, or left behind by a process that was killed; locked while being written

Whoever can write FOLDER can put a link in the place of any folder in it. So each folder below FOLDER is opened from the
one above it without following links, and files are made, read, linked and removed through its descriptor, never through
a path: otherwise ``tmp`` linked to a home folder would have `sweep` empty that. FOLDER itself may be a link; it is the
caller's to name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
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
_TEMPORARY = re.compile(r"[0-9a-f]{32}", re.ASCII)  # what `write` names its files in tmp; sweep touches no others
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
        self._synced: set[str] = (
            set()
        )  # folders ("" the store's own) whose entry in their parent is known to be durable
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
        parent, leaf = _split(check_name(name))
        with contextlib.ExitStack() as stack:
            temporary = secrets.token_hex(16)
            try:
                tmp = stack.enter_context(self._inside(_TMP, make=True))
                descriptor = os.open(temporary, _WRITE, 0o600, dir_fd=tmp)
            except OSError as error:
                _fail(error, name, writing=True)
            try:
                with contextlib.suppress(OSError):  # says to sweep() that somebody is at it; some file systems can't
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = _write_all(descriptor, chunks, name)
                try:
                    os.fsync(descriptor)
                    for last in (False, False, True):
                        try:
                            with self._inside(parent, make=True) as folder:
                                self._publish(tmp, temporary, folder, leaf, descriptor, name)
                            break
                        except FileNotFoundError:  # another's `check` has removed the folder, empty by then
                            if last:
                                raise
                except OSError as error:
                    _fail(error, name, writing=True)
            finally:
                # Whatever happened, the temporary name goes; if even that fails, sweep() removes it later.
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=tmp)
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        return size

    def _publish(self, tmp: int, temporary: str, folder: int, leaf: str, descriptor: int, name: str) -> None:
        try:
            # A hard link, not a rename: it refuses an existing name in the same step, so of two writers one wins.
            os.link(temporary, leaf, src_dir_fd=tmp, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            if not self._same(folder, leaf, descriptor):
                raise Conflict(
                    "store.exists",
                    f"the store already has an object {name} with other content; objects are never overwritten",
                    object=name,
                ) from None
            # The other writer may not have come to its own sync yet.
        os.fsync(folder)

    def _same(self, folder: int, leaf: str, descriptor: int) -> bool:
        """Whether the file `leaf` in `folder` has the bytes of `descriptor`, and is durable when this returns."""
        other = os.open(leaf, _READ, dir_fd=folder)
        try:
            status = os.fstat(other)
            size = os.fstat(descriptor).st_size
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return False
            ours, theirs = memoryview(bytearray(MIB)), memoryview(bytearray(MIB))
            for at in range(0, size, MIB):
                count = min(MIB, size - at)
                _read_exactly(descriptor, at, ours[:count], leaf)
                _read_exactly(other, at, theirs[:count], leaf)
                if ours != theirs:
                    return False
            os.fsync(other)
            return True
        finally:
            os.close(other)

    @contextlib.contextmanager
    def _inside(self, folder: str, *, make: bool = False) -> Iterator[int]:
        """A descriptor of `folder` ("" the store's own), come to through real folders only; `make` those missing.

        OSError where there is none; Tampered where a link stands in for one.
        """
        if make:
            self._make_root()
        descriptor = os.open(self._folder, _FOLDER)
        try:
            path = ""
            for part in folder.split("/") if folder else ():
                path = f"{path}/{part}" if path else part
                deeper = self._make(descriptor, part, path) if make else _enter(descriptor, part, path)
                descriptor, above = deeper, descriptor
                os.close(above)
            yield descriptor
        finally:
            os.close(descriptor)

    def _make(self, above: int, part: str, path: str) -> int:
        """Open the folder `part` of `above`, made if it is missing, its name durable."""
        if path in self._synced:
            with contextlib.suppress(FileNotFoundError):
                return _enter(above, part, path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=above)
        # One that exists is synced too: whoever made it may not have come to that yet.
        os.fsync(above)
        descriptor = _enter(above, part, path)
        self._synced.add(path)
        return descriptor

    def _make_root(self) -> None:
        if "" in self._synced and self._folder.is_dir():
            return
        _make_parents(self._folder.parent)
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(0o700)
        # Where somebody made it for us inside a folder that we may not read, its durability is theirs.
        with contextlib.suppress(PermissionError):
            _sync_folder(self._folder.parent)
        self._synced.add("")

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
        parent, leaf = _split(check_name(name))
        try:
            with self._inside(parent) as folder:
                status = os.stat(leaf, dir_fd=folder, follow_symlinks=False)
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
        parent, leaf = _split(check_name(name))
        try:
            with self._inside(parent) as folder:
                file = _OpenFile(os.open(leaf, _READ, dir_fd=folder))
            status = os.fstat(file.descriptor)
        except OSError as error:
            _fail(error, name)
        file.identity = (status.st_dev, status.st_ino)
        _check_regular(status, name)
        return file

    # -- the folder ----------------------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        parent, leaf = _split(check_name(name))
        self._forget(name)
        try:
            with self._inside(parent) as folder:
                os.unlink(leaf, dir_fd=folder)
                os.fsync(folder)  # deleting is part of shredding: it has to last, too
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return  # there is no such object
        except OSError as error:
            _fail(error, name, writing=True)

    def list(self, folder: str = "") -> Iterator[tuple[str, int]]:
        return self._walk(check_folder(folder))

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        try:
            with self._inside(folder) as descriptor:
                folders, files = _entries(descriptor, f"{folder}/" if folder else "")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            _fail(error, folder)
        yield from files
        for deeper in folders:
            yield from self._walk(deeper)

    def leftovers(self) -> Sequence[tuple[str, int]]:
        try:
            with self._inside(_TMP) as tmp:
                return [(f"{_TMP}/{name}", size) for name, size in _leftovers(tmp, 0.0)]
        except FileNotFoundError:
            return []
        except OSError as error:
            _fail(error, _TMP)

    def sweep(self, older_than_s: float = 3600.0) -> int:
        removed = 0
        try:
            with self._inside(_TMP) as tmp:
                for name, _ in _leftovers(tmp, older_than_s):
                    with contextlib.suppress(BlockingIOError, FileNotFoundError):
                        # Either it is being written, or it is gone: another process published it or swept it.
                        _remove_unlocked(tmp, name)
                        removed += 1
        except FileNotFoundError:
            return 0
        except OSError as error:
            _fail(error, _TMP, writing=True)
        return removed

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


class _OpenFile:
    """A read descriptor that lives as long as somebody refers to it."""

    __slots__ = ("descriptor", "identity", "used")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.identity = (0, 0)
        self.used = False

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: modules may be gone at exit
        close(self.descriptor)


def _split(name: str) -> tuple[str, str]:
    """The folder of an object ("" the store's own) and its name in there."""
    parent, _, leaf = name.rpartition("/")
    return parent, leaf


def _enter(above: int, part: str, path: str) -> int:
    """Open the folder `part` of the folder `above`; Tampered where a link stands there, which is never followed."""
    try:
        return os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except OSError as error:
        # Which of the two a link gives, with both flags, is up to the system; a plain file gives ENOTDIR, too.
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        if not stat.S_ISLNK(os.stat(part, dir_fd=above, follow_symlinks=False).st_mode):
            raise
    raise _linked(path)


def _linked(path: str) -> Tampered:
    return Tampered(
        "store.not_a_folder",
        f"at {path} the store has a link where a folder was expected; links in a store are never followed",
        hint="put the folder itself back; to keep a store on another disk, link or mount the whole store",
        folder=path,
    )


def _entries(folder: int, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
    """The folders in `folder`, and its objects with their sizes in bytes; what is not ours is left out."""
    folders: list[str] = []
    files: list[tuple[str, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if not _is_name(name):
                continue  # tmp, or nothing of ours
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_file(follow_symlinks=False):
                    files.append((name, entry.stat(follow_symlinks=False).st_size))
                elif _is_linked_folder(entry):
                    # Left out, all that was in the folder would look deleted.
                    raise _linked(name)
            except FileNotFoundError:
                continue  # deleted since it was listed
    return folders, files


def _is_linked_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link in a circle, or to where we may not look
        return False


def _leftovers(tmp: int, older_than_s: float) -> list[tuple[str, int]]:
    """Name and size in bytes of the temporary files in the folder `tmp` that are at least so old."""
    before = time.time() - older_than_s
    found = []
    with os.scandir(tmp) as entries:
        for entry in entries:
            if not _TEMPORARY.fullmatch(entry.name):
                continue  # never made by write(), so not ours to remove
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_mtime <= before:
                    found.append((entry.name, status.st_size))
    return found


def _remove_unlocked(tmp: int, name: str) -> None:
    """Remove `name` from the folder `tmp`; BlockingIOError where somebody holds its lock."""
    descriptor = os.open(name, _READ, dir_fd=tmp)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=tmp)
    finally:
        os.close(descriptor)


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
