"""Models that are put over the network (spec/http.md, section 7): the bytes go from the connection straight to put."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from strongroom.errors import Conflict, LimitExceeded, UsageError
from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement
from strongroom.formats.suites import Suite
from strongroom.formats.upload import Upload
from strongroom.policy.speaker import Speaker
from strongroom.server.stream import LENGTH, Stream, check_length
from strongroom.vault.sent import Sent
from strongroom.vault.upkeep import Recorded
from strongroom.vault.upload import UploadSource
from strongroom.vault.vault import PutResult, Vault

_AT_A_TIME = 2

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
        stream = Stream(request)
        head = await stream.head()
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
            check_length(request, LENGTH + len(head) + upload.size)
            return upload, said

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

    def _put(self, by: Speaker, upload: Upload, said: Sent, stream: Stream) -> PutResult:
        with self._vault.custodian.refusing(by, "put"):
            return self._vault.put(
                UploadSource.begin(upload, stream.receive),
                upload.name,
                by=said,
                share=upload.share,
                positions=upload.positions,
                suite=Suite[upload.suite.upper()],
            )
