"""What is said of a model before its bytes are sent to a served room (spec/http.md, section 7)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, UsageError

FORMAT = 1
_MEMBERS = {"format", "name", "share", "positions", "suite", "files", "statement", "salt"}
_FILE_MEMBERS = {"path", "size", "sha256", "head"}
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file that comes: `sha256` in hexadecimal, `head` the number of its first bytes, which are sent before any
    rest."""

    path: str
    size: int
    sha256: str
    head: int


@dataclass(frozen=True, slots=True)
class Upload:
    """The announcement of an upload; `files` in the order of their paths' UTF-8 bytes. `statement`: the envelope of the
    signed put; `salt`, in hexadecimal: with `files_digest`, what it commits to."""

    name: str
    share: str
    positions: int
    suite: str
    files: tuple[UploadFile, ...]
    statement: str = field(repr=False)
    salt: str = field(repr=False)

    @property
    def digest(self) -> str:
        """The `files_digest` of all files."""
        return files_digest((file.path, file.sha256) for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def heads(self) -> int:
        """Bytes of all heads."""
        return sum(file.head for file in self.files)

    def encode(self) -> bytes:
        """Canonical JSON; LimitExceeded ``upload.too_large``."""
        files = [{name: getattr(file, name) for name in _FILE_MEMBERS} for file in self.files]
        value = {name: getattr(self, name) for name in _MEMBERS - {"format", "files"}}
        data = canonical.encode({**value, "format": FORMAT, "files": files})
        _check_size(len(data))
        return data

    @classmethod
    def decode(cls, data: bytes) -> Upload:
        """The reverse: UsageError ``upload.malformed``, LimitExceeded ``upload.too_large``."""
        _check_size(len(data))
        try:
            value = canonical.decode(data, what="an upload")
        except Exception:  # noqa: BLE001 - it comes from a client: a mistake of its, and no damage to what is kept
            raise _malformed("it is not canonical JSON") from None
        if not isinstance(value, dict) or value.keys() != _MEMBERS or value.pop("format") != FORMAT:
            raise _malformed("it does not have exactly the members of one")
        texts = ("name", "share", "suite", "statement", "salt")
        if not all(isinstance(value[name], str) for name in texts) or not _count(value["positions"]):
            raise _malformed("a member is of another type")
        if not _DIGEST.fullmatch(value["salt"]):
            raise _malformed("its salt is not one")
        if not isinstance(value["files"], list) or not value["files"]:
            raise _malformed("it names no files")
        files = tuple(_file(item) for item in value["files"])
        paths = [file.path.encode("utf-8", "surrogatepass") for file in files]
        if any(first >= second for first, second in pairwise(paths)):
            raise _malformed("its files are not in the order of their paths, each once")
        upload = cls(**{**value, "files": files})
        if upload.heads > LIMITS.upload_heads:
            raise LimitExceeded(
                "upload.heads",
                f"headers, and files without tensors, have {upload.heads} bytes; at most {LIMITS.upload_heads} are "
                "taken over the network",
                hint="leave out what is no part of the model, or put it on the room's host",
            )
        return upload


def files_digest(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 in hexadecimal over canonical JSON of paths and digests, in the order of the paths' UTF-8 bytes: what a
    signed put commits to (spec/ledger.md, section 4)."""
    ordered = sorted(([path, digest] for path, digest in files), key=lambda item: item[0].encode())
    return hashlib.sha256(canonical.encode(ordered)).hexdigest()


def _file(item: Any) -> UploadFile:
    if not isinstance(item, dict) or item.keys() != _FILE_MEMBERS or not isinstance(item["path"], str):
        raise _malformed("a file does not have exactly the members of one")
    if not isinstance(item["sha256"], str) or not _DIGEST.fullmatch(item["sha256"]):
        raise _malformed("the digest of a file is not one")
    if not _count(item["size"]) or not _count(item["head"]) or not item["head"] <= item["size"] <= LIMITS.image:
        raise _malformed("the size of a file is not one, or smaller than its head")
    return UploadFile(**item)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= canonical.MAX_INTEGER


def _check_size(size: int) -> None:
    if size > LIMITS.upload:
        raise LimitExceeded(
            "upload.too_large",
            f"the list of files has {size} bytes; at most {LIMITS.upload} are taken over the network",
            hint="put it on the room's host",
        )


def _malformed(why: str) -> UsageError:
    return UsageError("upload.malformed", f"an upload is malformed: {why}")
