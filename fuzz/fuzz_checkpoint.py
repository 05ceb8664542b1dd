"""Any bytes into a checkpoint and the cosignatures under it: only Strongroom's errors come out, and what is accepted
has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.checkpoint import (
        Checkpoint,
        cosignature,
        cosignature_message,
        decode_cosignature,
        verify_cosignature,
    )
    from strongroom.formats.note import COSIGNATURE, Note, VerifierKey

KEY = VerifierKey("witness.example/w1", COSIGNATURE, bytes(32))


def decode(data: bytes) -> Checkpoint:
    """The text as it comes out of files and arguments, bytes that are not UTF-8 included."""
    return Checkpoint.decode(data.decode("utf-8", "surrogateescape"))


def encode(checkpoint: Checkpoint) -> bytes:
    """The reverse."""
    return checkpoint.encode().encode("utf-8", "surrogateescape")


def cosigned(data: bytes) -> None:
    """The same bytes as a note whose cosignatures are looked at."""
    try:
        note = Note.decode(data)
        verify_cosignature(note, KEY, lambda _key, _signature, _message: None)
        found = [decode_cosignature(each.value) for each in note.signatures]
    except StrongroomError:
        return
    for each, (seconds, signature) in zip(note.signatures, found, strict=True):
        if cosignature(KEY, seconds, signature).value != each.value:
            raise AssertionError(each)


def one_input(data: bytes) -> None:
    """Both of them."""
    one_spelling(decode, encode)(data)
    cosigned(data)


def seeds() -> dict[str, bytes]:
    """A text with an extension line, and a cosigned note."""
    text = Checkpoint("example.com/log", 20852163, bytes(range(32)), ("an extension",)).encode()
    line = cosignature(KEY, 1679315147, (cosignature_message(text, 0) + bytes(64))[:64])
    return {"text": text.encode(), "note": Note(text, (line,)).encode()}


if __name__ == "__main__":
    fuzz(one_input, seeds())
