"""Searches of found files (spec/http.md, section 9): the files are in memory and nowhere else, and so is what is found,
in the one process that took them."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from strongroom.core.limits import MIB
from strongroom.errors import Conflict, LimitExceeded, NotFound, StrongroomError
from strongroom.formats.suspect import FoundFile, FoundFiles
from strongroom.policy.speaker import Speaker
from strongroom.server.memory import Memory, Take
from strongroom.server.problem import FAULT, described
from strongroom.server.stream import LENGTH, Stream, check_length
from strongroom.vault.memoryfile import memory_file, seal_memory, write_memory
from strongroom.vault.names import check_name
from strongroom.vault.search import Search, begun, found
from strongroom.vault.sourcefile import SourceFile
from strongroom.vault.suspect import Suspect, as_found
from strongroom.vault.text import Text
from strongroom.vault.vault import Vault
from strongroom.vault.walk import Walk

_LOG = logging.getLogger("strongroom.server")
_UNASKED = 120.0  # seconds after which a search that nobody asks about is given up
_KEPT_FOR = 900.0  # seconds that the outcome of one is kept
_KEPT = 16  # outcomes that are kept: a report has a line for each principal and each tensor

# The principal whose call a request is, of which these bytes are the body.
Caller = Callable[[Request, bytes], Speaker]
Clock = Callable[[], float]


class _Job:
    """One search: how far it is, and what came of it."""

    def __init__(self, search: Search, by: str, clock: Clock) -> None:
        self.id = secrets.token_hex(16)  # whoever guesses it is not its principal all the same
        self.by, self.digest, self._clock = by, search.statement.digest, clock
        self.done = self.total = 0
        self.report: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.asked = clock()
        self.stopped = False  # by whoever began it
        self.ended: float | None = None  # when it did

    def check(self) -> None:
        """Conflict ``trace.stopped`` once it is to stop, or nobody has asked about it for long: that is one who has
        gone."""
        if self.stopped:
            raise Conflict("trace.stopped", "the search was stopped by whoever began it", hint="trace it again")
        if self._clock() - self.asked > _UNASKED:
            raise Conflict(
                "trace.stopped",
                f"nobody has asked about the search for {_UNASKED:.0f} seconds, so it was given up",
                hint="trace it again",
            )

    def progress(self, done: int, total: int) -> None:
        self.check()
        self.done, self.total = done, total

    def end(self, *, report: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> None:
        self.report, self.error, self.ended = report, error, self._clock()

    def as_json(self) -> dict[str, Any]:
        if self.ended is None:
            return {"state": "running", "done": self.done, "total": self.total, "report": None, "error": None}
        state = "done" if self.error is None else "failed"
        return {"state": state, "done": self.done, "total": self.total, "report": self.report, "error": self.error}


class Traces:
    """The searches of one server. `memory`: what they may take of it together; `seconds`: how long each may align what
    it was sent, so that nobody has one of a few places for hours."""

    def __init__(
        self,
        vault: Vault,
        caller: Caller,
        memory: Memory,
        *,
        seconds: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._vault, self._caller, self._memory, self._clock = vault, caller, memory, clock
        self._jobs: dict[str, _Job] = {}
        self._coming: set[str] = set()  # the digests of statements whose files are on their way
        self._lock = threading.Lock()
        self._forgetting: threading.Timer | None = None

    def check(self, request: Request, head: bytes) -> dict[str, int]:
        """Whether what `head` announces would be searched, as far as it can be said before it comes."""
        by = self._caller(request, head)
        with self._vault.custodian.refusing(by, "trace"):
            announced, _ = self._announced(by, head)
        return {"files": len(announced.files), "bytes": announced.size}

    async def receive(self, request: Request) -> dict[str, str]:
        """Take in the files, and begin to search them."""
        stream = Stream(request)
        head = await stream.head()
        # Nothing more is read before it is known who sends it, and that it will be searched.
        by = await run_in_threadpool(self._caller, request, head)
        coming: list[str] = []
        try:
            announced, search = await run_in_threadpool(self._begun, by, head, request, coming)
            job = await run_in_threadpool(self._take, by, announced, search, stream)
        finally:
            with self._lock:
                self._coming.difference_update(coming)
        return {"id": job.id}

    def show(self, request: Request, body: bytes) -> dict[str, Any]:
        """How far a search is, for whoever began it; NotFound ``trace.unknown``, also for everybody else."""
        return self._asked(request, body).as_json()

    def stop(self, request: Request, body: bytes) -> dict[str, Any]:
        """Have a search end at its next step, for whoever began it; errors and answer as `show`. What has ended already
        stays as it is."""
        job = self._asked(request, body)
        job.stopped = True
        return job.as_json()

    def _asked(self, request: Request, body: bytes) -> _Job:
        by, identifier = self._caller(request, body), request.path_params["trace"]
        self._forget()
        with self._lock:
            job = self._jobs.get(identifier)
        if job is None or job.by != by.path:
            raise NotFound(
                "trace.unknown",
                "there is no such search of yours in this server: it ended too long ago, or another server has it",
                hint="trace it again",
            )
        job.asked = self._clock()
        return job

    def _begun(self, by: Speaker, head: bytes, request: Request, coming: list[str]) -> tuple[FoundFiles, Search]:
        """What is announced, which is on its way from now on: its statement is noted in `coming`, and nobody else
        begins the same."""
        with self._vault.custodian.refusing(by, "trace"):
            announced, search = self._announced(by, head)
            check_length(request, LENGTH + len(head) + announced.size)
            digest = search.statement.digest
            with self._lock:
                self._check_new(digest)
                self._coming.add(digest)
                coming.append(digest)
            return announced, search

    def _announced(self, by: Speaker, head: bytes) -> tuple[FoundFiles, Search]:
        announced = FoundFiles.decode(head)
        search = begun(self._vault, announced, by)
        with self._lock:
            self._check_new(search.statement.digest)
        for file in announced.files:
            check_name(file.path)
        self._memory.check(announced.size)
        return announced, search

    def _check_new(self, digest: str) -> None:
        """Conflict ``statement.replayed`` where a search by this statement is going on, or its files are coming."""
        if digest in self._coming or any(job.digest == digest and job.ended is None for job in self._jobs.values()):
            raise Conflict("statement.replayed", "this very search is going on already", hint="sign a new statement")

    def _take(self, by: Speaker, announced: FoundFiles, search: Search, stream: Stream) -> _Job:
        with self._vault.custodian.refusing(by, "trace"), ExitStack() as stack:
            take = stack.enter_context(self._memory.held(announced.size))
            files = [_received(file, stream, stack) for file in announced.files]
            job = _Job(search, by.path, self._clock)
            held = stack.pop_all()
            work = (job, by, search, files, take, held)
            thread = threading.Thread(target=self._search, args=work, name="strongroom-search", daemon=True)
            try:
                with self._lock:
                    self._jobs[job.id] = job
                thread.start()
            except RuntimeError:  # the system has no more threads
                held.close()
                with self._lock:
                    del self._jobs[job.id]
                raise LimitExceeded("server.busy", "there is no thread for a search", hint="try again") from None
            return job

    def _search(
        self, job: _Job, by: Speaker, search: Search, files: list[SourceFile], take: Take, stack: ExitStack
    ) -> None:
        report: dict[str, Any] | None = None
        error: dict[str, Any] | None = FAULT
        try:
            # How far it came says something already: one that is given up is recorded, too, as a refusal.
            with (
                stack,
                self._vault.custodian.refusing(by, "trace"),
                self._opened(search, files, take, job) as suspect,
            ):
                report = found(self._vault, search, suspect, job.progress, self._seconds)
            error = None
        except StrongroomError as raised:
            error = described(raised)
        except BaseException:  # noqa: BLE001 - it is in the log, and its principal is told that there was one
            _LOG.exception("a search failed")  # libraries in Rust panic, which is no Exception
        # Once its memory is free: whoever hears of the end may begin the next.
        job.end(report=report, error=error)
        self._forget()

    @staticmethod
    def _opened(
        search: Search, files: list[SourceFile], take: Take, job: _Job
    ) -> AbstractContextManager[Suspect | Text]:
        with as_found():
            walk = Walk.held(files)
        if search.text:
            return Text.of(walk, check=job.check)
        return Suspect.of(walk, search.name, take=take, check=job.check)

    def _forget(self) -> None:
        """Drop outcomes that are too old, or too many; see to it that this happens if nobody asks for anything."""
        with self._lock:
            ended = sorted((job.ended, job.id) for job in self._jobs.values() if job.ended is not None)
            late = self._clock() - _KEPT_FOR
            for place, (when, identifier) in enumerate(ended):
                if when <= late or place < len(ended) - _KEPT:
                    del self._jobs[identifier]
            if self._forgetting is None and any(job.ended is not None for job in self._jobs.values()):
                self._forgetting = threading.Timer(_KEPT_FOR / 10, self._again)
                self._forgetting.daemon = True
                self._forgetting.start()

    def _again(self) -> None:
        with self._lock:
            self._forgetting = None
        self._forget()


def _received(file: FoundFile, stream: Stream, stack: ExitStack) -> SourceFile:
    """One file, in memory as long as `stack` is not left; Conflict ``source.changed``, ``upload.interrupted``,
    LimitExceeded ``trace.memory``."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(MIB, max(1, file.size))))
    try:
        memory = memory_file(stack)
        while done < file.size:
            count = stream.receive(buffer[: min(len(buffer), file.size - done)])
            if not count:
                raise Conflict(
                    "upload.interrupted", "the files ended before all of them had come", hint="trace it again"
                )
            digest.update(buffer[:count])
            write_memory(memory, buffer[:count], done)
            done += count
    except OSError as error:
        raise LimitExceeded(
            "trace.memory", f"the custodian has no memory for {file.path}: {os.strerror(error.errno or 0)}"
        ) from None
    if digest.hexdigest() != file.sha256:
        raise Conflict(
            "source.changed",
            f"{file.path} is not the file that was announced: its SHA-256 is another",
            hint="trace it again, once nothing changes it",
            path=file.path,
        )
    seal_memory(memory)
    return SourceFile.in_memory(file.path, memory)
