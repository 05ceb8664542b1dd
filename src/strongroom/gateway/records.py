"""What was asked and answered, one line a request, chained by hash and on disk within a second (spec/gateway.md,
section 6).

No prompt and no answer is in a record. The log gets the newest hash of the chain each few seconds, so who edits a
record, or takes one away, contradicts the log.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from strongroom.core.canonical import decode
from strongroom.errors import BackendError, StrongroomError, Tampered
from strongroom.gateway.appending import Appending

_EVERY = 0.25  # seconds between two writes
_ENTRY_EVERY = 10.0  # seconds between two entries of the log
_PREFIX = b"strongroom/1 inference\x00"
FIRST = "0" * 64

Append = Callable[[str, dict[str, Any]], int]


@dataclass
class _Sums:
    requests: int = 0
    refused: int = 0
    tokens: int = 0
    bits: int = 0

    def add(self, requests: int, refused: int, tokens: int, bits: int) -> None:
        self.requests += requests
        self.refused += refused
        self.tokens += tokens
        self.bits += bits


@dataclass
class _Unwritten:
    lines: list[bytes] = field(default_factory=list)
    sums: dict[tuple[str, str], _Sums] = field(default_factory=dict)


class Records:
    """The chain of one worker, in ``FOLDER/STREAM.jsonl``. `append` puts an `inference` entry into the log; `settings`
    is the digest of the settings, `stream` a name that is there already. BackendError ``records.unwritable``."""

    def __init__(
        self,
        folder: Path,
        append: Append,
        settings: str,
        *,
        stream: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.stream = stream or secrets.token_hex(16)
        self.path = folder / f"{self.stream}.jsonl"
        self._append, self._settings, self._clock = append, settings, clock
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        except OSError as error:
            raise BackendError(
                "records.unwritable", f"can't write records in {folder}: {error.strerror}", hint="--records FOLDER"
            ) from None
        self._count, self._head, self._written_head, self._written = 0, FIRST, FIRST, 0
        self._unwritten = _Unwritten()
        # Of what was written and not entered, by settings and version.
        self._sums: dict[tuple[str, str], _Sums] = {}
        self._lock = threading.Lock()
        self._wake, self._due = threading.Event(), threading.Event()
        self._appending = Appending(self._file, self._wake)
        self._failure: BackendError | None = None
        self._closing = self._ended = False
        self._capture = ""
        # What the log is to be told: first the records of before are written.
        self._asked: list[tuple[str, str, Future[None]]] = []
        self._announced: list[tuple[str, str, Future[None]]] = []
        self._entered_at = time.monotonic()
        # Two: the log may be somewhere else and slow to answer, and nothing may wait for it to be on disk.
        self._threads = [
            threading.Thread(target=self._run, name="records", daemon=True),
            threading.Thread(target=self._account, name="accounts", daemon=True),
        ]
        for each in self._threads:
            each.start()

    def check(self) -> None:
        """BackendError ``records.unwritable``: nothing is answered that can't be recorded."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # told many, for as long as the disk is full

    def add(self, record: dict[str, Any], settings: str = "") -> tuple[int, str]:
        """The record, without `stream`, `n`, `at` and `before`, which are put in here; `settings` is the digest of
        those that it came under, where they are others than those of the start. Returns at once, with its number and
        its hash."""
        if self._failure is not None:
            self.check()
        with self._lock:
            record["at"], record["before"] = int(self._clock() * 1000), self._head
            record["n"], record["stream"] = self._count, self.stream
            line = orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
            self._head = digest(line)
            self._count += 1
            unwritten, about = self._unwritten, (settings or self._settings, record["ref"])
            unwritten.lines.append(line)
            sums = unwritten.sums.get(about)
            if sums is None:
                sums = unwritten.sums[about] = _Sums()
            sums.requests += 1
            sums.refused += record["status"] >= 400
            sums.tokens += record["tokens"]
            sums.bits += record["bits"]
            return self._count - 1, self._head

    def announce(self, capture: str, settings: str = "") -> None:
        """From now on the log's entries say to which key prompts and answers are sealed (empty: to none), under
        settings of this digest; back when the first of them is there. Not on the event loop. Whatever keeps the log
        from being written."""
        told = Future[None]()
        with self._lock:
            if self._ended or (not self._asked and not self._announced and capture == self._capture):
                return  # of a stream that has ended there are no later entries
            self._asked.append((capture, settings or self._settings, told))
        self._wake.set()
        told.result()

    async def durable(self) -> None:
        """Back when everything that was added is on disk."""
        await self._appending.durable()
        self.check()

    def close(self) -> None:
        """Write what is left, and tell the log."""
        self._closing = True
        self._wake.set()
        for each in self._threads:
            each.join()
        os.close(self._file)

    # -- the threads ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(_EVERY)
            self._wake.clear()
            last = self._closing
            with self._lock:
                asked, self._asked = self._asked, []
            self._write()
            with self._lock:  # none came while these were written, and nobody waits for what nobody would do
                self._announced += asked
                self._ended = last and not self._unwritten.lines and not self._asked
            self._due.set()

    def _account(self) -> None:
        last = False
        while not last:
            self._due.wait()
            self._due.clear()
            last = self._ended
            if self._announced:
                self._tell()
            if self._sums and (last or time.monotonic() - self._entered_at >= _ENTRY_EVERY):
                self._enter()

    def _write(self) -> None:
        waiting = self._appending.waiting()
        with self._lock:
            taken, self._unwritten = self._unwritten, _Unwritten()
            head, count = self._head, self._count
        written = bool(taken.lines) and self._failure is None
        if written:
            try:
                self._appending.write(b"".join([line + b"\n" for line in taken.lines]))
            except OSError as error:
                # A line may be there in part: this chain ends here, and nothing more is answered.
                written = False
                self._failure = BackendError(
                    "records.unwritable",
                    f"can't write {self.path.name}: {error.strerror}",
                    hint="make room on the disk, then start the gateway again",
                )
        # With the lines, so that an entry counts what is in the chain up to its head; and what could not be written has
        # left the room all the same.
        with self._lock:
            if written:
                self._written_head, self._written = head, count
            for about, sums in taken.sums.items():
                self._sums.setdefault(about, _Sums()).add(**vars(sums))
        self._appending.tell(waiting)

    def _enter(self) -> None:
        """An entry for each version and settings. What can't be entered now is later, with what comes until then."""
        with self._lock:
            taken, self._sums = self._sums, {}
            head = self._written, self._written_head
        for (settings, ref), sums in taken.items():
            try:
                self._append(ref, self._body(settings, sums, *head))
            except Exception:  # noqa: BLE001 - whatever it is, the sums are not lost
                with self._lock:
                    self._sums.setdefault((settings, ref), _Sums()).add(**vars(sums))
        self._entered_at = time.monotonic()

    def _tell(self) -> None:
        with self._lock:
            announced, self._announced = self._announced, []
        for capture, settings, told in announced:
            before, self._capture = self._capture, capture
            with self._lock:
                head = self._written, self._written_head
            try:
                self._append("", self._body(settings, _Sums(), *head))
            except BaseException as error:  # noqa: BLE001 - it is whoever waits that has to know
                self._capture = before
                told.set_exception(error)
            else:
                told.set_result(None)

    def _body(self, settings: str, sums: _Sums, written: int, head: str) -> dict[str, Any]:
        return {
            "gateway": self.stream,
            "records": written,
            "head": head,
            "settings": settings,
            **vars(sums),
            **({"capture": self._capture} if self._capture else {}),
        }


def digest(line: bytes) -> str:
    """The hash of a record's line, in hexadecimal."""
    return hashlib.sha256(_PREFIX + line).hexdigest()


def verify(
    lines: Iterable[bytes], entries: Iterable[dict[str, Any]], each: Callable[[dict[str, Any]], None] = lambda _: None
) -> int:
    """Check a chain against the bodies of the `inference` entries of its stream; how many records there are. `each` is
    given every record that follows from the one before, in their order.

    Tampered ``records.tampered`` where a record does not follow from the one before, or an entry names another hash.
    """
    told = list(entries)
    named = {body["head"] for body in told}
    heads = {FIRST: 0}
    before, count = FIRST, 0
    for line in lines:
        try:
            record = decode(line, what="record")
        except StrongroomError as error:
            raise Tampered("records.tampered", f"record {count} is not a record: {error.message}") from None
        if not isinstance(record, dict) or record.get("n") != count or record.get("before") != before:
            raise Tampered("records.tampered", f"record {count} does not follow from the one before")
        before, count = digest(line), count + 1
        if before in named:
            heads[before] = count
        each(record)
    for body in told:
        if heads.get(body["head"]) != body["records"]:
            raise Tampered(
                "records.tampered", f"the log has a chain of {body['records']} records with another end than these"
            )
    return count
