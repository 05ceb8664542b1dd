"""Debts: what answers had beyond all that their worker had drawn, until it is charged (spec/gateway.md, section 5).

They are on disk before the end of their answers goes out, so that a worker which is killed while the counters can't be
reached owes nothing less. Each is charged once under an identifier of its own, however often it is paid; nothing that
is in such a file gives anything back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strongroom.core import canonical
from strongroom.core.files import sync_folder
from strongroom.core.ids import Ref
from strongroom.errors import BackendError, StrongroomError, Tampered
from strongroom.formats.entry import ID
from strongroom.watch.counters import LAST, Key
from strongroom.watch.relayed import MOST
from strongroom.watch.rules import SCOPES, WINDOWS, window_at

_COUNTERS = 1000  # of one debt: a custodian takes 1,024
_LINE = 4 << 20  # bytes of one, at most: whoever makes a larger file shall not have all memory
_RAISED = 1 << 16  # counters whose alarms are to be looked at
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # a link, a folder, a socket
_KINDS = (str, str, int, str, str, int)

Pay = Callable[[str, Mapping[Key, int]], None]


@dataclass(frozen=True)
class _Debt:
    asked: str
    bits: Mapping[Key, int]

    @classmethod
    def decode(cls, line: bytes) -> _Debt:
        """UsageError, ValueError, KeyError, TypeError for what is none."""
        value = canonical.decode(line, what="debt")
        if not isinstance(value, dict) or value.keys() != {"asked", "bits"} or not ID(value["asked"]):
            raise ValueError
        rows = value["bits"]
        if not 1 <= len(rows) <= _COUNTERS:
            raise ValueError
        bits = dict(map(_counted, rows))
        if len(bits) < len(rows):  # else one row of a counter would take the place of another
            raise ValueError
        return cls(value["asked"], bits)

    def encode(self) -> bytes:
        value = {"asked": self.asked, "bits": [[*key, amount] for key, amount in self.bits.items()]}
        return canonical.encode(value) + b"\n"


class Debts:
    """Those of one worker, whatever settings it answers under. With a `folder` they are in a file there, beside those
    of other workers of the `room`; what workers that have ended left is taken over. Thread-safe.

    BackendError ``records.unwritable``; Tampered ``budget.owed`` for a file that has something else in it."""

    def __init__(self, folder: Path | None = None, room: str = "") -> None:
        self._folder, self._room = folder, room
        self._lock = threading.Lock()  # held for moments
        self._writing = threading.Lock()  # held while a disk is written to; taken before the other
        self._paying = threading.Lock()  # held while the counters are asked; taken before both
        self._pending: deque[_Debt] = deque()
        self._unwritten: list[_Debt] = []
        self._raised: dict[Key, None] = {}
        self._path: Path | None = None  # of the file that is locked and written to, once there is one
        self._file = -1
        self._failure: BackendError | None = None
        # Others wait for the network, and are many: nobody's answer waits behind them for this.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="debts")
        if folder is not None:
            try:
                self._take_over(folder)
            except BaseException:
                self.close()  # what it has taken over is for whoever is started next
                raise

    def check(self) -> None:
        """BackendError ``records.unwritable``: nothing is answered whose surplus could be lost."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # told many, for as long as the disk is full

    def add(self, bits: Mapping[Key, int]) -> None:
        """Owe these. At once: nothing is on disk yet."""
        left = dict(bits)
        while left:
            part = {key: min(left[key], MOST) for key in [*left][:_COUNTERS]}
            debt = _Debt(secrets.token_hex(16), part)
            with self._lock:
                self._pending.append(debt)
                self._unwritten.append(debt)
            left = {key: more for key, amount in left.items() if (more := amount - part.get(key, 0))}

    def written(self) -> Future[None]:
        """Done when all that was added is on disk. BackendError ``records.unwritable``."""
        return self._writer.submit(self.write)

    def write(self) -> None:
        """As `written`, in this thread."""
        with self._writing:
            with self._lock:
                taken, self._unwritten = self._unwritten, []
            if taken and self._folder is not None and self._failure is None:
                try:
                    if self._path is None:
                        self._begin(self._folder)
                    _write(self._file, b"".join([each.encode() for each in taken]))
                except OSError as error:
                    # A line may be there in part: this file ends here.
                    self._failure = _unwritable(self._folder, error)
        self.check()

    def settle(self, pay: Pay) -> None:
        """Pay all of them. Whatever `pay` raises: this one, and those behind it, are paid later."""
        if not self._pending:
            return
        with self._paying:
            with suppress(BackendError):  # it is charged all the same
                self.write()
            while self._pending:
                debt = self._pending[0]
                pay(debt.asked, debt.bits)
                with self._lock:
                    self._pending.popleft()
                    self._raised |= dict.fromkeys(debt.bits)
                    while len(self._raised) > _RAISED:
                        del self._raised[next(iter(self._raised))]
            self._empty()

    def raised(self, keys: Iterable[Key]) -> set[Key]:
        """Which of these have had debts paid since they were asked about last."""
        with self._lock:
            return {key for key in keys if self._raised.pop(key, self) is None}

    @property
    def owed(self) -> int:
        """Bits that are in no counter yet, or are not known to be: of the counter that lacks most."""
        sums: dict[Key, int] = {}
        with self._lock:
            for debt in self._pending:
                for key, amount in debt.bits.items():
                    sums[key] = sums.get(key, 0) + amount
        return max(sums.values(), default=0)

    @property
    def path(self) -> Path | None:
        """The file that has them, if there is one."""
        return self._path

    def close(self) -> None:
        """What is owed stays in the file, for the next worker that starts."""
        self._writer.shutdown()
        with suppress(BackendError):
            self.write()
        with self._writing:
            if self._path is not None:
                with suppress(OSError):
                    if not self._pending or not os.fstat(self._file).st_size:
                        self._path.unlink()
                os.close(self._file)
            self._path, self._folder = None, None

    # -- the file ------------------------------------------------------------------------------------------------

    def _begin(self, folder: Path) -> None:
        """Under a name that nobody looks for until it is locked: else another worker that starts would take it over."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = secrets.token_hex(16)
        begun, path = folder / f".{name}.new", folder / f"{self._room}.{name}.owed"
        self._file = os.open(begun, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            begun.rename(path)
            sync_folder(folder)
        except OSError:
            os.close(self._file)
            begun.unlink(missing_ok=True)
            raise
        self._path = path

    def _empty(self) -> None:
        """Nothing is owed: what is in the file was charged. Where that can't be done it is paid again, under the same
        identifiers."""
        with self._writing:
            with self._lock:
                if self._pending:
                    return
                self._unwritten.clear()
            if self._path is not None:  # what has come since is not in it yet
                with suppress(OSError):
                    os.ftruncate(self._file, 0)

    def _take_over(self, folder: Path) -> None:
        try:
            for path in _files(folder, f"{self._room}.*.owed"):
                with _locked(path) as file:
                    if file is not None:
                        self._take(path, file)
        except OSError as error:
            raise _unwritable(folder, error) from None

    def _take(self, path: Path, file: int) -> None:
        found = _read(path, file)
        self._pending += found
        self._unwritten += found
        self.write()
        path.unlink()


def _files(folder: Path, pattern: str) -> list[Path]:
    """Not by `Path.glob`, which passes over a folder that it may not read: nobody would know what is owed there."""
    try:
        return sorted(path for path in folder.iterdir() if path.match(pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """The file, if nobody holds it and it is there still; else None. Tampered ``budget.owed`` for what is no file,
    and might be waited for without an end."""
    try:
        # To write, too: over NFS nobody has such a lock who can only read.
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise _forged(path, "") if error.errno in _NO_FILE else error from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _forged(path, "")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = path.stat().st_ino == os.fstat(file).st_ino
        except (BlockingIOError, FileNotFoundError):  # a worker's that runs, or that has taken it over meanwhile
            there = False
        yield file if there else None
    finally:
        os.close(file)


def _read(path: Path, file: int) -> list[_Debt]:
    """Tampered ``budget.owed``."""
    with os.fdopen(os.dup(file), "rb") as lines:
        return list(_debts(path, lines))


def _debts(path: Path, lines: Any) -> Iterator[_Debt]:
    for number, line in enumerate(iter(lambda: lines.readline(_LINE), b""), 1):
        if not line.endswith(b"\n") and len(line) < _LINE:
            return  # it was being written when its worker ended, and its answer has not gone out whole
        try:
            yield _Debt.decode(line[:-1])
        except (StrongroomError, ValueError, KeyError, TypeError):
            raise _forged(path, f"line {number} of ") from None


def _forged(path: Path, which: str) -> Tampered:
    return Tampered(
        "budget.owed",
        f"{which}{path} is nothing that a worker of the gateway has written there: it has what was given out and is in "
        "no budget yet",
        hint=f"keep what it is for whoever looks into it: mv {path.name} {path.name}.kept in {path.parent}; "
        "then start the gateway again",
    )


def _counted(row: Any) -> tuple[Key, int]:
    """A counter that an answer may have, and no other row of the table: the clock is there, too."""
    if [type(each) for each in row] != [*_KINDS]:
        raise ValueError
    key, bits = Key(*row[:5]), row[5]
    if key.scope not in SCOPES or key.period not in WINDOWS or not 0 <= key.start < LAST:
        raise ValueError
    if window_at(key.period, key.start)[0] != key.start or not 1 <= bits <= MOST:
        raise ValueError
    Ref.parse(key.ref)
    return key, bits


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    os.fdatasync(file)


def _unwritable(folder: Path, error: OSError) -> BackendError:
    return BackendError(
        "records.unwritable",
        f"can't keep what is owed to budgets in {folder}: {error.strerror}",
        hint="make room on the disk, or --records FOLDER with one that can be written; then start the gateway again",
    )
