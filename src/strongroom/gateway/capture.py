"""Prompts and answers that are kept, sealed to a key that the gateway does not have (spec/gateway.md, section 9), in
``FOLDER/STREAM.sealed`` beside the records of ``STREAM.jsonl``."""

from __future__ import annotations

import base64
import fcntl
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from strongroom.crypto.capture import CaptureSealer, commitment
from strongroom.errors import BackendError
from strongroom.gateway.appending import Appending
from strongroom.gateway.flight import Flight
from strongroom.gateway.settings import Capture as Wanted

_EVERY = 0.25  # seconds between two writes


@dataclass(frozen=True)
class Captured:
    """What one request and its answer were, until they are sealed. `commitment` is for its record: to that, and to whom
    it is sealed for."""

    content: bytes
    commitment: dict[str, str]


class Capture:
    """What one worker captures. BackendError ``capture.unwritable``."""

    def __init__(self, wanted: Wanted, records: Path) -> None:
        self._sealer = CaptureSealer(bytes.fromhex(wanted.key))
        self._who, self._models = frozenset(wanted.who), frozenset(wanted.models)
        self.key_id = self._sealer.key_id
        self.path = records.with_suffix(".sealed")
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with _alone(self._file):  # that of the settings before may be in the middle of a line
                size = os.fstat(self._file).st_size
                torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        except OSError as error:
            raise _unwritable(self.path, error) from None
        if torn:  # of the settings before, when the disk was full: what came behind it would be a part of that line
            os.close(self._file)
            raise _unwritable(self.path, "it ends in a part of a line")
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._unwritten: list[tuple[Captured, int, str]] = []
        self._appending = Appending(self._file, self._wake)
        self._failure: BackendError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def wants(self, flight: Flight) -> bool:
        """Whether this one is to be kept: of a chosen principal and a chosen version."""
        if self._who and flight.caller.principal not in self._who:
            return False
        return not self._models or flight.ref in self._models or flight.ref.partition("@")[0] in self._models

    def check(self) -> None:
        """BackendError ``capture.unwritable``: nothing is answered that was to be kept and can't be."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def take(self, flight: Flight) -> Captured | None:
        """What went upstream of a request, and what its caller got; None where nothing did, or it is not wanted."""
        if not flight.body or not self.wants(flight):
            return None
        asked = {name: value for name, value in flight.body.items() if name != "strongroom"}
        texts = flight.meter.text or {}
        answers = ["".join(texts[index]) for index in sorted(texts)]
        value = {"route": flight.route, "ref": flight.ref, "asked": asked, "answers": answers}
        content = secrets.token_bytes(32) + orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        return Captured(content, {"content": commitment(content), "key": self.key_id})

    def add(self, captured: Captured, number: int, record: str) -> None:
        """Seal it for the record with this number and hash. Returns at once."""
        with self._lock:
            self._unwritten.append((captured, number, record))

    async def durable(self) -> None:
        """Back when everything that was added is on disk."""
        await self._appending.durable()
        self.check()

    def close(self) -> None:
        """Write what is left."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        os.close(self._file)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wake.wait(_EVERY)
            self._wake.clear()
            last = self._closing
            waiting = self._appending.waiting()
            with self._lock:
                taken, self._unwritten = self._unwritten, []
            if taken and self._failure is None:
                try:
                    lines = b"".join(self._line(*each) for each in taken)
                    with _alone(self._file):
                        self._appending.write(lines)
                except Exception as error:  # noqa: BLE001 - whatever it is, nobody must take it for kept
                    self._failure = _unwritable(self.path, error)
            self._appending.tell(waiting)
            if last and not self._unwritten:
                return

    def _line(self, captured: Captured, number: int, record: str) -> bytes:
        sealed = self._sealer.seal(captured.content, bytes.fromhex(record))
        value = {"n": number, "record": record, "key": self.key_id, "sealed": base64.b64encode(sealed).decode()}
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS) + b"\n"


@contextmanager
def _alone(file: int) -> Iterator[None]:
    """Hold the file, which every other `Capture` of it waits for."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _unwritable(path: Path, error: Exception | str) -> BackendError:
    return BackendError(
        "capture.unwritable",
        f"can't keep what was to be captured in {path.name}: {error.strerror if isinstance(error, OSError) else error}",
        hint="make room on the disk, or leave [capture] out of the settings, then start the gateway again",
    )
