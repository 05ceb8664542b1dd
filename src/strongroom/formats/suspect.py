"""What is said of found files before their bytes are sent to a served room (spec/http.md, section 9)."""

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
from strongroom.formats.statement import Statement

FORMAT = 1
_MEMBERS = {"format", "name", "files", "statement"}
_FILE_MEMBERS = {"path", "size", "sha256"}
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME_MAX = 255
_HINT = "trace the files with tensors by themselves, or trace on the room's own host"


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that comes: `size` in bytes, `sha256` in hexadecimal."""

    path: str
    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """As a report names it."""
        return {"path": self.path, "bytes": self.size, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """The announcement of found files, in the order of their paths' UTF-8 bytes; `name` is what they are called
    together, `statement` the envelope of the signed trace of them. `text`: they are text that a model wrote."""

    name: str
    files: tuple[FoundFile, ...]
    statement: str = field(repr=False)
    text: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def said(self, by: str) -> Statement:
        """The statement; UsageError ``trace.other`` unless it is a trace of these very files by `by`."""
        statement = Statement.decode(self.statement)
        if (statement.kind, statement.by) != ("trace", by) or statement.body["suspect"] != suspect_digest(self.files):
            raise UsageError("trace.other", "the signed statement in the list of files is not about these files")
        return statement

    def encode(self) -> bytes:
        """Canonical JSON; LimitExceeded ``trace.too_large``."""
        _check_files(len(self.files))
        files = [{name: getattr(file, name) for name in _FILE_MEMBERS} for file in self.files]
        value: dict[str, Any] = {"format": FORMAT, "name": self.name, "files": files, "statement": self.statement}
        if self.text:
            value["text"] = True
        data = canonical.encode(value)
        _check_size(len(data))
        return data

    @classmethod
    def decode(cls, data: bytes) -> FoundFiles:
        """The reverse: UsageError ``trace.malformed``, LimitExceeded ``trace.too_large``."""
        _check_size(len(data))
        try:
            value = canonical.decode(data, what="a list of found files")
        except Exception:  # noqa: BLE001 - it comes from a client: a mistake of its, and no damage to what is kept
            raise _malformed("it is not canonical JSON") from None
        if not isinstance(value, dict) or value.keys() - {"text"} != _MEMBERS or value["format"] != FORMAT:
            raise _malformed("it does not have exactly the members of one")
        name, files, text = value["name"], value["files"], "text" in value
        if text and value["text"] is not True:
            raise _malformed("a member is of another type")
        if not isinstance(name, str) or not isinstance(value["statement"], str):
            raise _malformed("a member is of another type")
        if not 0 < len(name) <= _NAME_MAX or not name.isprintable():
            raise _malformed("the name of it all is empty, too long, or can't be shown")
        if not isinstance(files, list) or not files:
            raise _malformed("it names no files")
        _check_files(len(files))
        found = tuple(_file(item) for item in files)
        paths = [file.path.encode("utf-8", "surrogatepass") for file in found]
        if any(first >= second for first, second in pairwise(paths)):
            raise _malformed("its files are not in the order of their paths, each once")
        return cls(name, found, value["statement"], text)


def suspect_digest(files: Iterable[FoundFile]) -> str:
    """What is known of found files by the log, in hexadecimal: the SHA-256 of a single one, or that of the canonical
    list of paths and digests (spec/ledger.md, section 4)."""
    listed = [[file.path, file.sha256] for file in files]
    return str(listed[0][1]) if len(listed) == 1 else hashlib.sha256(canonical.encode(listed)).hexdigest()


def _file(item: Any) -> FoundFile:
    if not isinstance(item, dict) or item.keys() != _FILE_MEMBERS or not isinstance(item["path"], str):
        raise _malformed("a file does not have exactly the members of one")
    if not isinstance(item["sha256"], str) or not _DIGEST.fullmatch(item["sha256"]):
        raise _malformed("the digest of a file is not one")
    if type(item["size"]) is not int or not 0 <= item["size"] <= LIMITS.image:
        raise _malformed("the size of a file is not one")
    return FoundFile(**item)


def _check_files(count: int) -> None:
    if count > LIMITS.suspect_files:
        raise LimitExceeded(
            "trace.too_large",
            f"{count} files; at most {LIMITS.suspect_files} are searched at a time over the network",
            hint=_HINT,
        )


def _check_size(size: int) -> None:
    if size > LIMITS.upload:
        raise LimitExceeded(
            "trace.too_large",
            f"the list of files has {size} bytes; at most {LIMITS.upload} are taken over the network",
            hint=_HINT,
        )


def _malformed(why: str) -> UsageError:
    return UsageError("trace.malformed", f"the list of found files is malformed: {why}")
