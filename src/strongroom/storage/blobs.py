"""The store: named, immutable objects of ciphertext, in a local folder or an object store.

The store is not trusted: it never sees a key, and whatever it answers is checked against signed digests by whoever
asked. What is asked of it is durability (an object whose `write` returned survives a power cut) and atomicity (a name
shows the whole object or nothing). Names are random identifiers, so an object is written once and never changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from strongroom.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_NAME = 512  # object stores take 1024 bytes, less the prefix in the URL
OBJECT_STORES = ("s3", "gs", "az")

# Lower case only: on a file system that folds case, two names must not be one file. A part begins with a letter or a
# digit, so neither "." nor ".." nor a hidden file can be named.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}(/[a-z0-9][a-z0-9._-]{0,127}){0,15}", re.ASCII)


class Blobs(Protocol):
    """A store of immutable objects. All methods may be called from several threads at once.

    A name is one or more parts joined by ``/``; a part is ``[a-z0-9][a-z0-9._-]*``, so that no name leads out of the
    store. The first part ``tmp`` is the store's own. A name must not be a folder of another name. Offsets
    and sizes are bytes.

    Errors of every method: UsageError for a malformed name, NotFound ("store.missing"), BackendError (store.full,
    store.read_only, store.refused, store.unreachable, store.failed), Tampered ("store.not_a_file") where something that
    is no plain object stands at the name.
    """

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""

    @property
    def near(self) -> bool:
        """Whether a read costs microseconds (a folder) and not a round trip over a network."""

    def write(self, name: str, chunks: Iterable[Buffer]) -> int:
        """Store `chunks` one after another as `name`; the object's size. Durable when it returns.

        The name appears whole or not at all, also when the process is killed or `chunks` raises. A chunk is consumed
        before the next is asked for, so the caller may reuse its memory. Writing a name again succeeds if the content
        is the same (a retry, a resumed put) and is refused with Conflict("store.exists") if it is not.
        """

    def read(self, name: str, *, limit: int) -> bytes:
        """The whole of a small object; LimitExceeded("store.too_large") above `limit` bytes."""

    def size(self, name: str) -> int:
        """The object's size; asks the store itself and drops whatever is remembered about an object since replaced."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, contiguous) from byte `offset`; Truncated("store.short_read") if the object ends."""

    def read_ranges_into(self, name: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """`read_into` for many (offset, buffer) of one object, in as few and as parallel requests as the store likes.

        When it raises, the contents of all the buffers are undefined.
        """

    def delete(self, name: str) -> None:
        """Remove an object; no error if there is none."""

    def list(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """Name and size of every object below `folder` ("" for all), in no particular order."""

    def leftovers(self) -> Sequence[tuple[str, int]]:
        """What killed writes left behind (a label and bytes each); never part of any object."""

    def sweep(self, older_than_s: float = 3600.0) -> int:
        """Remove leftovers untouched for that many seconds and not being written; how many."""

    def check(self) -> dict[str, Any]:
        """What ``doctor`` shows: url, kind, writable, durable, free_bytes (None: no limit known), problems (texts).

        Writes, reads and deletes a small object; BackendError, as any write has it, if that is not possible.
        """

    def close(self) -> None:
        """Let go of descriptors, threads and connections; they come back when the store is used again."""


def open_blobs(url: str | os.PathLike[str], *, create: bool = True) -> Blobs:
    """The store at a path, ``file:///path``, ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.

    Credentials and endpoints of object stores come from the environment (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``).
    Opening talks to no network. With `create` false a local folder has to exist already (BackendError
    "store.not_there"), so that a disk that is not mounted is not mistaken for an empty store.

    UsageError for a scheme or a URL that no store has.
    """
    text = os.fspath(url)
    if "\0" in text or not text:
        raise UsageError(
            "store.malformed_url", "a store is a folder or a URL; the one given is empty or has a zero byte"
        )
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme in OBJECT_STORES:
        from strongroom.storage.objects import ObjectBlobs

        return ObjectBlobs(text)
    if scheme == "https":
        from strongroom.storage.served import ServedBlobs

        return ServedBlobs(text)
    if scheme and scheme != "file":
        raise UsageError(
            "store.unknown_scheme",
            f"no store speaks {scheme}://",
            hint="use a folder, file://, s3://, gs:// or az://",
        )
    from strongroom.storage.local import LocalBlobs

    return LocalBlobs(_path_of(text) if scheme else text, create=create)


def check_name(name: str) -> str:
    """`name` if it is the name of an object (see Blobs); UsageError("store.malformed_name") otherwise."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name) or name.split("/", 1)[0] == "tmp":
        raise UsageError(
            "store.malformed_name",
            f"{name[:80]!r} is not the name of an object: parts of a-z, 0-9, '.', '_' and '-', joined by '/', "
            f"at most {MAX_NAME} bytes, the first not 'tmp'",
        )
    return name


def check_folder(folder: str) -> str:
    """The folder without its trailing slash, "" for the whole store; UsageError("store.malformed_name") otherwise."""
    return check_name(folder.removesuffix("/")) if folder else ""


def _path_of(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no IPv6 address
        parts = urlsplit("file://malformed")
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path or "\0" in path:
        raise UsageError("store.malformed_url", f"{url!r}: a local folder is file:///absolute/path")
    return path
