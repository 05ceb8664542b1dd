"""A store in an object store: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

Objects up to `WHOLE_PUT` bytes (every pack, by default) are one conditional request: created if there is none of that
name, refused by the server otherwise. Larger ones are multipart uploads, whose existence is checked beforehand only: in
that window two writers of one name could overwrite each other, which random names make a matter of one in 2^128.

An upload that is cut off shows nothing under its name, but its parts may stay in the bucket unseen and be charged for:
give the bucket a lifecycle rule that aborts incomplete multipart uploads.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from strongroom.core.limits import KIB, MIB
from strongroom.errors import BackendError, Conflict, LimitExceeded, NotFound, Truncated, UsageError
from strongroom.storage.blobs import check_folder, check_name

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig
    from typing_extensions import Buffer

WHOLE_PUT = 128 * MIB  # the largest object sent as one conditional request, and the memory that a write may take
PART = 8 * MIB  # of a multipart upload; four are under way at once
REQUEST = 4 * MIB  # the most that one ranged read asks for
GAP = 64 * KIB  # ranges closer than this are read as one: a round trip costs more than the bytes between them

# Where the environment may send requests other than the provider's own address.
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "GOOGLE_BASE_URL",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)
_URL = re.compile(r"(s3|gs|az)://([a-z0-9][a-z0-9._-]{1,253})((?:/[A-Za-z0-9][A-Za-z0-9._-]*)*)/?", re.ASCII)


class ObjectBlobs:
    """`Blobs` below ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``. Thread-safe.

    Credentials, region and endpoint come from the environment: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
    ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` and the rest of that family, ``GOOGLE_*``, ``AZURE_*``.
    Plain HTTP is spoken to the loopback interface only.

    Reads run on `readers` threads. A request that fails with a server error, a dropped connection or (for reads) no
    answer within `timeout_s` is repeated up to `retries` times within `retry_s` seconds.
    """

    near = False

    def __init__(
        self, url: str, *, readers: int = 16, timeout_s: float = 60.0, retries: int = 6, retry_s: float = 60.0
    ) -> None:
        match = _URL.fullmatch(url)
        if match is None:
            # Not shown: it may hold a password.
            raise UsageError(
                "store.malformed_url",
                "the store's URL is not s3://bucket/prefix (or gs://, az://) without user and query",
                hint="credentials and endpoint come from the environment, such as AWS_ENDPOINT_URL",
            )
        self._url = url.rstrip("/")
        self._bucket = match[2]
        retry: RetryConfig = {
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=retry_s),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
        }
        try:
            self._reader = _connect(self._url, timeout_s, retry)
            # One request carries up to WHOLE_PUT bytes: ten times the time of a read, 1.7 Mbit/s by default.
            self._writer = _connect(self._url, timeout_s * 10, retry)
        except (BaseError, ValueError) as error:
            raise UsageError(
                "store.misconfigured",
                f"the store {self._url}: {_first_line(error)}",
                hint="see the variables of its provider",
            ) from None
        self._conditional = True
        self._readers = readers
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._url

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, name: str, chunks: Iterable[Buffer]) -> int:
        check_name(name)
        rest = iter(chunks)
        head = bytearray()
        for chunk in rest:
            head += memoryview(chunk).cast("B")  # copied: the caller may reuse its memory
            if len(head) > WHOLE_PUT:
                return self._write_parts(name, head, rest)
        return self._write_whole(name, head)

    def _write_whole(self, name: str, body: bytearray) -> int:
        if self._conditional:
            try:
                obstore.put(self._writer, name, body, mode="create", use_multipart=False)
                return len(body)
            except AlreadyExistsError:
                # Also the answer when our own first try got through but its answer was lost.
                return self._expect_same(name, [body])
            except (BaseError, OSError) as error:
                if not _not_implemented(error):
                    self._fail(error, name)
                self._conditional = False  # an old server: look first, as for large objects
        if self._exists(name):
            return self._expect_same(name, [body])
        with self._errors(name):
            obstore.put(self._writer, name, body, use_multipart=False)
        return len(body)

    def _write_parts(self, name: str, head: bytearray, rest: Iterator[Buffer]) -> int:
        if self._exists(name):
            return self._expect_same(name, chain([head], rest))
        raised: list[BaseException] = []
        size = 0

        def parts() -> Iterator[bytes]:
            nonlocal size
            try:
                for part in _parts(head, rest):
                    size += len(part)
                    yield part
            except BaseException as error:
                raised.append(error)
                raise

        try:
            obstore.put(self._writer, name, parts(), use_multipart=True, chunk_size=PART, max_concurrency=4)
        except (BaseError, OSError) as error:
            if raised:
                raise raised[0] from None  # what `chunks` raised is the caller's, not the store's
            self._fail(error, name)
        return size

    def _expect_same(self, name: str, chunks: Iterable[Buffer]) -> int:
        """The size of the object `name` if it has the bytes of `chunks`; Conflict if it has others."""
        try:
            size, at = self.size(name), 0
        except NotFound:
            raise BackendError(
                "store.busy", f"another writer is busy with {name}", hint="run the command again", object=name
            ) from None
        same = True
        theirs = memoryview(bytearray(REQUEST))
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for begin in range(0, len(view), REQUEST):
                ours = view[begin : begin + REQUEST]
                same = same and at + len(ours) <= size
                if not same:
                    break
                self.read_into(name, at, theirs[: len(ours)])
                same = theirs[: len(ours)] == ours
                at += len(ours)
            if not same:
                break
        if not same or at != size:
            raise Conflict(
                "store.exists",
                f"the store already has an object {name} with other content; objects are never overwritten",
                object=name,
            )
        return size

    def _exists(self, name: str) -> bool:
        try:
            self.size(name)
        except NotFound:
            return False
        return True

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, name: str, *, limit: int) -> bytes:
        size = self.size(name)
        if size > limit:
            raise LimitExceeded(
                "store.too_large",
                f"the object {name} has {size} bytes; at most {limit} are expected",
                object=name,
                size=size,
                limit=limit,
            )
        data = bytearray(size)
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def size(self, name: str) -> int:
        check_name(name)
        with self._errors(name):
            return obstore.head(self._reader, name)["size"]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        check_name(name)
        if buffer.nbytes > REQUEST:
            self.read_ranges_into(name, [(offset, buffer)])
        elif buffer.nbytes:
            self._fetch(name, [(offset, buffer.cast("B"))])

    def read_ranges_into(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        check_name(name)
        requests = _coalesced(ranges)
        if len(requests) < 2:
            for request in requests:
                self._fetch(name, request)
            return
        pool = self._threads()
        futures = [pool.submit(self._fetch, name, request) for request in requests]
        try:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
            # Not before the last has ended: none may write to the caller's memory after we are back.
            concurrent.futures.wait(futures)
        for future in futures:
            if not future.cancelled():
                future.result()

    def _fetch(self, name: str, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """One request for `pieces`, which are in order of their offsets and close together."""
        start = pieces[0][0]
        end = max(offset + len(view) for offset, view in pieces)
        with self._errors(name):
            data = memoryview(obstore.get_range(self._reader, name, start=start, end=end))
        if len(data) != end - start:
            raise Truncated(
                "store.short_read",
                f"the store answered with {len(data)} bytes of {name} from byte {start}; {end - start} were asked for",
                object=name,
                offset=start,
                expected=end - start,
                got=len(data),
            )
        for offset, view in pieces:
            view[:] = data[offset - start : offset - start + len(view)]

    def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(self._readers, "strongroom-store")
            return self._pool

    # -- the bucket ----------------------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        check_name(name)
        with suppress(NotFound), self._errors(name):
            obstore.delete(self._writer, name)

    def list(self, folder: str = "") -> Iterator[tuple[str, int]]:
        return self._walk(check_folder(folder))

    def _walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self._errors(prefix):
            pages = iter(obstore.list(self._reader, prefix=prefix or None, chunk_size=1000))
        while True:
            with self._errors(prefix):
                page = next(pages, None)
            if page is None:
                return
            for entry in page:
                with suppress(UsageError):  # nothing of ours
                    yield check_name(entry["path"]), entry["size"]

    def leftovers(self) -> Sequence[tuple[str, int]]:
        return []  # an object store shows no unfinished upload; see the module's docstring

    def sweep(self, older_than_s: float = 3600.0) -> int:  # noqa: ARG002 - the protocol's; there is nothing to sweep
        return 0

    def check(self) -> dict[str, Any]:
        name = f"check/{secrets.token_hex(16)}"
        probe = secrets.token_bytes(64)
        self.write(name, [probe])
        try:
            sound = self.read(name, limit=len(probe)) == probe
            refuses = self._refuses_overwriting(name)
        finally:
            self.delete(name)
        problems = [] if sound else ["what was written does not read back"]
        if not refuses:
            problems.append("the server has no conditional writes: that nothing is overwritten is only checked before")
        return {
            "url": self.url,
            "kind": "objects",
            "writable": sound,
            "durable": True,  # the service's promise
            "free_bytes": None,
            "conditional_writes": refuses,
            "problems": problems,
        }

    def _refuses_overwriting(self, name: str) -> bool:
        try:
            obstore.put(self._writer, name, secrets.token_bytes(64), mode="create", use_multipart=False)
        except AlreadyExistsError:
            return True
        except (BaseError, OSError) as error:
            if not _not_implemented(error):
                self._fail(error, name)
        return False

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    # -- errors --------------------------------------------------------------------------------------------------

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            self._fail(error, name)

    def _fail(self, error: Exception, name: str) -> NoReturn:
        """Raise what an answer of the store means to the caller; of its text only what holds no secret."""
        status, reason, text = _status(error), _reason(error), _first_line(error)
        evidence: dict[str, Any] = {"object": name, "status": status, "reason": reason}
        if reason in ("NoSuchBucket", "ContainerNotFound"):
            raise BackendError(
                "store.not_there",
                f"there is no bucket {self._bucket}",
                hint="make the bucket, or correct the URL",
                **evidence,
            ) from None
        if isinstance(error, FileNotFoundError) or reason in ("NoSuchKey", "BlobNotFound"):
            raise NotFound("store.missing", f"the store has no object {name}", **evidence) from None
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403)
        if refused or reason == "AccessDenied":
            raise BackendError(
                "store.refused",
                f"the store refuses access to {name}: {reason or text}",
                hint="check the credentials in the environment and what they allow on this bucket",
                **evidence,
            ) from None
        if isinstance(error, AlreadyExistsError | PreconditionError):
            raise Conflict("store.exists", f"the store already has an object {name}", **evidence) from None
        if isinstance(error, InvalidPathError):
            raise UsageError("store.malformed_name", f"the store takes no object {name}", **evidence) from None
        if status == 416:
            raise Truncated(
                "store.short_read", f"the object {name} ends before the bytes asked for", **evidence
            ) from None
        if status == 507 or reason in ("QuotaExceeded", "XMinioStorageFull"):
            raise BackendError(
                "store.full", text, hint="free space in the store, or raise the quota", **evidence
            ) from None
        if status is None or status == 429 or status >= 500:
            raise BackendError(
                "store.unreachable",
                f"the store {self._url} does not serve {name}: {text}",
                hint="see whether the endpoint is up and reachable, and run the command again",
                **evidence,
            ) from None
        raise BackendError("store.failed", text, hint="strongroom doctor", **evidence) from None


def _connect(url: str, timeout_s: float, retry: RetryConfig) -> ObjectStore:
    client: ClientConfig = {
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(5.0, timeout_s)),
        "allow_http": _plain_http(),
        "allow_invalid_certificates": False,  # whatever the environment says
        "user_agent": "strongroom",
    }
    return obstore.store.from_url(url, client_options=client, retry_config=retry)


def _plain_http() -> bool:
    """Whether the environment names an endpoint without TLS; UsageError if that is not this machine.

    Without TLS whoever sits on the way reads which versions are fetched when, and can hold objects back.
    """
    plain = False
    for variable in _ENDPOINTS:
        endpoint = os.environ.get(variable, "")
        if not endpoint.lower().startswith("http://"):
            continue
        if not _is_loopback(endpoint):
            raise UsageError(
                "store.insecure_endpoint",
                f"{variable} names an endpoint without TLS that is not on this machine",
                hint="use an https:// endpoint",
            )
        plain = True
    return plain


def _is_loopback(endpoint: str) -> bool:
    try:
        host = urlsplit(endpoint).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parts(head: bytearray, rest: Iterator[Buffer]) -> Iterator[bytes]:
    """Copies of `head` and `rest` in pieces of PART bytes, the last one shorter."""
    pending = head
    for chunk in chain([b""], rest):
        pending += memoryview(chunk).cast("B")
        whole = len(pending) - len(pending) % PART
        for at in range(0, whole, PART):
            yield bytes(pending[at : at + PART])
        del pending[:whole]
    if pending:
        yield bytes(pending)


def _coalesced(ranges: Sequence[tuple[int, memoryview]]) -> Sequence[Sequence[tuple[int, memoryview]]]:
    """The ranges as requests of at most REQUEST bytes: long ones cut, those close to one another joined."""
    pieces = []
    for offset, buffer in ranges:
        view = buffer.cast("B")
        pieces += [(offset + at, view[at : at + REQUEST]) for at in range(0, len(view), REQUEST)]
    pieces.sort(key=lambda piece: piece[0])
    requests: list[list[tuple[int, memoryview]]] = []
    start = end = 0
    for offset, view in pieces:
        reach = max(end, offset + len(view))
        if requests and offset <= end + GAP and reach - start <= REQUEST:
            requests[-1].append((offset, view))
            end = reach
        else:
            requests.append([(offset, view)])
            start, end = offset, offset + len(view)
    return requests


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = re.sub(r"\?[^\s]*", "?…", line)  # a query may hold a signature or a shared access token
    return line.split("<?xml", 1)[0].rstrip(": ")[:300]


def _status(error: Exception) -> int | None:
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def _reason(error: Exception) -> str | None:
    """The provider's own word for what went wrong, such as NoSuchBucket or SlowDown."""
    found = re.search(r"<Code>(\w{1,64})</Code>|\(code: (\w{1,64})\)", str(error))
    return found[1] or found[2] if found else None


def _not_implemented(error: Exception) -> bool:
    return isinstance(error, NotSupportedError) or _status(error) == 501 or _reason(error) == "NotImplemented"
