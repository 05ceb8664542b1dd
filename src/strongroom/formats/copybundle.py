"""Copy bundles (spec/release.md, section 4): what one holder needs to fetch one plaintext copy, and no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, LimitExceeded, Tampered
from strongroom.formats.entry import COUNT, DIGEST, FLAG, ID, TEXT, conforms
from strongroom.formats.layout import check_path
from strongroom.formats.suites import FORMAT

PIECE = 8 << 20


@dataclass(frozen=True)
class CopiedFile:
    """A file of a copy, and where it lies in the image, in bytes."""

    path: str
    offset: int
    bytes: int


def _files(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 3 and TEXT(each[0]) and COUNT(each[1]) and COUNT(each[2])
        for each in value
    )


_MEMBERS = {
    "format": COUNT,
    "room": ID,
    "version": ID,
    "revision": COUNT,
    "manifest": DIGEST,
    "signer": DIGEST,
    "ref": TEXT,
    "holder": TEXT,
    "key": DIGEST,
    "piece": COUNT,
    "image": COUNT,
    "files": _files,
    "marked": FLAG,
}


@dataclass(frozen=True)
class CopyBundle:
    """`key` opens the pieces of the copy, `piece` bytes of the image each; secret, and not shown by `repr`. `marked`:
    whether anything in it says whose it is."""

    room: bytes
    version: bytes
    revision: int
    manifest_digest: bytes
    signer: bytes
    ref: str
    holder: str
    key: bytes = field(repr=False)
    piece: int
    image: int
    files: tuple[CopiedFile, ...]
    marked: bool

    def encode(self) -> bytes:
        return canonical.encode(
            {
                "format": FORMAT,
                "room": self.room.hex(),
                "version": self.version.hex(),
                "revision": self.revision,
                "manifest": self.manifest_digest.hex(),
                "signer": self.signer.hex(),
                "ref": self.ref,
                "holder": self.holder,
                "key": self.key.hex(),
                "piece": self.piece,
                "image": self.image,
                "files": [[file.path, file.offset, file.bytes] for file in self.files],
                "marked": self.marked,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> CopyBundle:
        """Parse a bundle; Tampered ``copy.malformed``, CannotVerify ``copy.unknown_format``, LimitExceeded."""
        if len(data) > LIMITS.bundle:
            raise LimitExceeded("copy.too_large", f"a copy bundle of {len(data)} bytes; at most {LIMITS.bundle}")
        value = canonical.decode(data, what="the copy bundle")
        if not isinstance(value, dict) or not conforms(value, _MEMBERS):
            raise Tampered("copy.malformed", "what came is no copy bundle")
        if value["format"] != FORMAT:
            raise CannotVerify(
                "copy.unknown_format",
                f"a copy bundle of format {value['format']}",
                hint="install a newer Strongroom, as docs/how-to/install.md says",
            )
        files = tuple(CopiedFile(*each) for each in value["files"])
        _check(files, value["image"], value["piece"])
        return cls(
            bytes.fromhex(value["room"]),
            bytes.fromhex(value["version"]),
            value["revision"],
            bytes.fromhex(value["manifest"]),
            bytes.fromhex(value["signer"]),
            value["ref"],
            value["holder"],
            bytes.fromhex(value["key"]),
            value["piece"],
            value["image"],
            files,
            value["marked"],
        )


def _check(files: tuple[CopiedFile, ...], image: int, piece: int) -> None:
    """Tampered unless the files lie one behind the other in the image, under names that may be written below a
    folder."""
    end = 0
    try:
        for file in files:
            check_path(file.path)
            if file.offset < end:
                raise ValueError("files overlap")
            end = file.offset + file.bytes
        if end > image or image > LIMITS.image or not 4096 <= piece <= LIMITS.segment_max:
            raise ValueError("sizes that no copy has")
        if len(files) > LIMITS.files or len({file.path for file in files}) != len(files):
            raise ValueError("too many files, or a path twice")
    except (ValueError, UnicodeEncodeError) as error:
        raise Tampered("copy.malformed", f"what came is no copy bundle: {error}") from None
