"""Signed notes (C2SP signed-note): a text, and lines of signatures under it, each by a named key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, LimitExceeded, Tampered

ED25519 = 0x01
COSIGNATURE = 0x04  # timestamped Ed25519, C2SP tlog-cosignature
_DASH = "— "  # U+2014 and a space
_KEY_BYTES = 32
# Control characters but newlines; and lone surrogates, which is how Python carries arguments that are not UTF-8.
_UNWRITABLE = re.compile("[\x00-\x09\x0b-\x1f\ud800-\udfff]")

# Takes a public key, a signature and a message, and raises Tampered; strongroom.crypto.signatures.verify is one.
Verify = Callable[[bytes, bytes, bytes], None]


def _is_name(text: str) -> bool:
    """The name of a key: not empty, no space of any kind, no plus sign."""
    return bool(text) and "+" not in text and not any(char.isspace() for char in text) and is_text(text)


def is_text(text: str) -> bool:
    """Whether a note can have this text: it has a form in UTF-8, and no control character but newlines, which could
    make one reader see other lines than the next."""
    return not _UNWRITABLE.search(text)


@dataclass(frozen=True)
class VerifierKey:
    """A public key under its name. `algorithm`: ED25519 or COSIGNATURE; `public_key`: 32 bytes."""

    name: str
    algorithm: int
    public_key: bytes

    @property
    def key_id(self) -> bytes:
        """4 bytes: not a commitment to the key, only what says which one to try."""
        material = self.name.encode() + b"\n" + bytes([self.algorithm]) + self.public_key
        return hashlib.sha256(material).digest()[:4]

    def encode(self) -> str:
        """``name+0a1b2c3d+base64``, as verifiers are given it."""
        key = base64.b64encode(bytes([self.algorithm]) + self.public_key).decode()
        return f"{self.name}+{self.key_id.hex()}+{key}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """The reverse; Tampered ``note.key``, CannotVerify ``note.algorithm``."""
        name, _, rest = text.partition("+")
        key_id, _, encoded = rest.partition("+")
        material = _unbase64(encoded)
        if not _is_name(name) or not material:
            raise Tampered("note.key", f"{text!r:.80} is not a verifier key: name+hash+base64")
        if material[0] not in (ED25519, COSIGNATURE):
            raise CannotVerify(
                "note.algorithm",
                f"the key of {name!r:.80} is of the kind {material[0]}, which this release can't check",
            )
        key = cls(name, material[0], material[1:])
        if len(key.public_key) != _KEY_BYTES or key.key_id.hex() != key_id:
            raise Tampered(
                "note.key", f"the hash in the key of {name!r:.80} is not its own, or the key's size is wrong"
            )
        return key


@dataclass(frozen=True)
class Signature:
    """A signature line: the key's name and 4-byte identifier, and what the key's algorithm makes of it."""

    name: str
    key_id: bytes
    value: bytes

    def encode(self) -> str:
        return f"{_DASH}{self.name} {base64.b64encode(self.key_id + self.value).decode()}\n"

    @classmethod
    def decode(cls, line: str) -> Signature:
        """From a line without its newline; Tampered ``note.malformed``."""
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        data = _unbase64(encoded)
        if not line.startswith(_DASH) or not _is_name(name) or len(data) < 5:
            raise _malformed("a signature line is not one")
        return cls(name, data[:4], data[4:])


@dataclass(frozen=True)
class Note:
    """`text` ends in a newline. Nothing of it is trusted until `verify_note` says who signed."""

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        return (self.text + "\n" + "".join(each.encode() for each in self.signatures)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Note:
        """Tampered ``note.malformed``, LimitExceeded ``note.too_large``."""
        if len(data) > LIMITS.note:
            raise LimitExceeded("note.too_large", f"a note of {len(data)} bytes; at most {LIMITS.note} are read")
        try:
            whole = data.decode("utf-8")
        except UnicodeDecodeError:
            raise _malformed("it is not UTF-8") from None
        if not is_text(whole):
            raise _malformed("it has control characters")
        # The last empty line divides: the text may have others.
        text, blank, lines = whole.rpartition("\n\n")
        if not blank or not lines.endswith("\n"):
            raise _malformed("it has no signatures")
        found = lines[:-1].split("\n")
        if len(found) > LIMITS.note_signatures:
            raise LimitExceeded("note.signatures", f"a note with {len(found)} signatures")
        return cls(text + "\n", tuple(map(Signature.decode, found)))


def verify_note(note: Note, keys: Sequence[VerifierKey], verify: Verify) -> list[str]:
    """The names of those of `keys`, Ed25519 all, that signed the note, each once. Signatures of other keys are passed
    over, as the specification says; one that names a known key and is not valid is Tampered ``note.signature``, and so
    is a second one of the same key. CannotVerify ``note.algorithm`` for one of a known key of another algorithm."""
    known = {(key.name, key.key_id): key for key in keys}
    signed: set[tuple[str, bytes]] = set()
    names: list[str] = []
    for signature in note.signatures:
        # Name and key id together: a log that changes its key signs with the old and the new one, under one name.
        identity = (signature.name, signature.key_id)
        key = known.get(identity)
        if key is None:
            continue
        if key.algorithm != ED25519:
            raise CannotVerify(
                "note.algorithm", f"the key of {key.name!r:.80} is of the kind {key.algorithm}, not of those for notes"
            )
        try:
            verify(key.public_key, signature.value, note.text.encode())
        except Tampered:
            raise Tampered("note.signature", f"the signature of {key.name} is not of this note") from None
        if identity in signed:
            raise Tampered("note.signature", f"{key.name} signed twice")
        signed.add(identity)
        if key.name not in names:
            names.append(key.name)
    return names


def _unbase64(text: str) -> bytes:
    """The bytes, or none where it is not the one base64 text of any."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if base64.b64encode(data).decode() == text else b""


def _malformed(why: str) -> Tampered:
    return Tampered("note.malformed", f"these bytes are not a signed note: {why}")
