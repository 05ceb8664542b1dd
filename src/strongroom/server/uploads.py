"""Models that are put over the network (spec/http.md, section 7): the bytes go from the connection straight to put."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from anyio import from_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from strongroom.core.limits import LIMITS
from strongroom.errors import Conflict, LimitExceeded, UsageError
from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement
from strongroom.formats.suites import Suite
from strongroom.formats.upload import Upload
from strongroom.policy.speaker import Speaker
from strongroom.vault.sent import Sent
from strongroom.vault.upkeep import Recorded
from strongroom.vault.upload import UploadSource
from strongroom.vault.vault import PutResult, Vault

_PIECE_TIME = 60.0  # seconds in which the next bytes have to come
_RATE = 16 * 1024  # bytes in a second that an upload has to come at, after the first minute: it holds one of few slots
_AT_A_TIME = 2
_LENGTH = 4

# The principal whose call a request is, of which these bytes are the body.
Caller = Callable[[Request, bytes], Speaker]


class Uploads:
    """The uploads of one server, of which there are few at a time: each holds a thread, and some tens of MiB."""

    def __init__(self, vault: Vault, caller: Caller) -> None:
        self._vault, self._caller = vault, caller
        self._slots = threading.BoundedSemaphore(_AT_A_TIME)

    def check(self, request: Request, head: bytes) -> dict[str, int]:
        """Whether what `head` announces would be taken, as far as it can be said before it comes."""
        by = self._caller(request, head)
        with self._vault.custodian.refusing(by, "put"):
            upload, _, _ = self._announced(by, head)
        return {"files": len(upload.files), "bytes": upload.size}

    async def receive(self, request: Request) -> PutResult:
        """Take in a whole upload; the version that it has become."""
        stream = _Stream(request)
        try:
            # As a whole: nobody knows yet who sends it.
            async with asyncio.timeout(_PIECE_TIME):
                head = await self._head(stream)
        except TimeoutError:
            raise LimitExceeded(
                "server.too_slow",
                f"the list of files has to come within {_PIECE_TIME:.0f} seconds",
                hint="put it again",
            ) from None
        # Nothing more is read before it is known who sends it.
        by = await run_in_threadpool(self._caller, request, head)
        begun = await run_in_threadpool(self._begun, by, head, request)
        if isinstance(begun, PutResult):
            return begun
        upload, said = begun
        with self._slot():
            return await run_in_threadpool(self._put, by, upload, said, stream)

    def _begun(self, by: Speaker, head: bytes, request: Request) -> tuple[Upload, Sent] | PutResult:
        """What is put; or, of a put that is in the log already, its answer once more."""
        with self._vault.custodian.refusing(by, "put"):
            upload, said, done = self._announced(by, head)
            if done is not None:
                return self._vault.put_before(done.index, done.entry)
            _check_length(request, _LENGTH + len(head) + upload.size)
            return upload, said

    async def _head(self, stream: _Stream) -> bytes:
        length = int.from_bytes(await stream.exactly(_LENGTH), "big")
        if length > LIMITS.upload:
            raise LimitExceeded("upload.too_large", f"the list of files has {length} bytes; at most {LIMITS.upload}")
        return await stream.exactly(length)

    def _announced(self, by: Speaker, head: bytes) -> tuple[Upload, Sent, Recorded | None]:
        """What `head` says, and its entry, if that very statement is in the log already."""
        self._vault.custodian.authorise(by, "put")
        upload = Upload.decode(head)
        if upload.suite.upper() not in Suite.__members__:
            raise UsageError("put.suite", f"there is no suite {upload.suite!r:.40}", hint="--suite blake3 or sha256")
        self._vault.check_put(upload.name, upload.positions)
        said = self._said(by, upload)
        try:
            self._vault.custodian.identify(said.statement)
        except Conflict as error:
            return upload, said, self._vault.custodian.before(said.statement, error)
        return upload, said, None

    def _said(self, by: Speaker, upload: Upload) -> Sent:
        """What the caller has signed, which is what the log will quote: of these files, under this name, just now."""
        statement = Statement.decode(upload.statement)
        files = Private("files", upload.digest, bytes.fromhex(upload.salt))
        if (statement.kind, statement.by) != ("put", by.path) or statement.body != {
            "name": upload.name,
            "files": files.commitment,
        }:
            raise UsageError("upload.other", "the signed statement in the list of files is not about these files")
        return Sent(statement, files, self._vault.clock())

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._slots.acquire(blocking=False):
            raise LimitExceeded(
                "server.busy",
                f"{_AT_A_TIME} models are being put through this server already",
                hint="wait, then try again",
            )
        try:
            yield
        finally:
            self._slots.release()

    def _put(self, by: Speaker, upload: Upload, said: Sent, stream: _Stream) -> PutResult:
        with self._vault.custodian.refusing(by, "put"):
            return self._vault.put(
                UploadSource.begin(upload, stream.receive),
                upload.name,
                by=said,
                share=upload.share,
                positions=upload.positions,
                suite=Suite[upload.suite.upper()],
            )


def _check_length(request: Request, expected: int) -> None:
    """UsageError ``upload.length`` unless as many bytes are on their way as were announced: else the sender would learn
    after gigabytes that some are missing, or that nobody reads the last ones."""
    said = request.headers.get("content-length", "")
    if not said.isascii() or not said.isdigit() or int(said[:20]) != expected:
        raise UsageError(
            "upload.length",
            f"the files that are announced make a body of {expected} bytes, and the request says "
            f"{said[:20] or 'no length'}",
            hint=f"Content-Length: {expected}",
        )


class _Stream:
    """The body of a request: for the event loop until it is known who speaks, then for the thread that puts."""

    def __init__(self, request: Request) -> None:
        self._pieces = request.stream().__aiter__()
        self._piece = memoryview(b"")
        self._begun, self._received = time.monotonic(), 0

    async def exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not self._piece and not await self._next():
                raise UsageError("upload.malformed", "the upload ends within its head")
            wanted = size - len(data)
            data += self._piece[:wanted]
            self._piece = self._piece[wanted:]
        return bytes(data)

    def receive(self, buffer: memoryview) -> int:
        """Some bytes, into `buffer`; 0 at the end. Called in a thread."""
        if not self._piece and not from_thread.run(self._next):
            return 0
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    async def _next(self) -> bool:
        """Whether more has come."""
        late = self._begun + _PIECE_TIME + self._received / _RATE - time.monotonic()
        try:
            async with asyncio.timeout(min(_PIECE_TIME, late)):
                while not self._piece:
                    self._piece = memoryview(await anext(self._pieces))
            self._received += len(self._piece)
        except StopAsyncIteration:
            return False
        except TimeoutError:
            raise LimitExceeded(
                "server.too_slow",
                f"the upload comes too slowly: at least {_RATE // 1024} KiB a second, and no pause of "
                f"{_PIECE_TIME:.0f} seconds",
                hint="put it again: it goes on",
            ) from None
        except ClientDisconnect:
            raise Conflict("upload.interrupted", "the connection ended before the upload did") from None
        return True
