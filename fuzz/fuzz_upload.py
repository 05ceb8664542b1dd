"""Any bytes into what a client says of an upload: only Strongroom's errors come out, and what is accepted has one
spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.upload import Upload, UploadFile


def seeds() -> dict[str, bytes]:
    """One of two files."""
    files = (UploadFile("config.json", 4, "0" * 64, 4), UploadFile("model.safetensors", 1 << 40, "f" * 64, 1 << 10))
    return {"two": Upload("model/tiny", "0.1", 4096, "aes-256-gcm", files, "signed", "0" * 64).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(Upload.decode, Upload.encode, json=True), seeds())
