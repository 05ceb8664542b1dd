"""Any bytes into the list of found files that are to be traced: only Strongroom's errors come out, and what is accepted
has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.suspect import FoundFile, FoundFiles


def seeds() -> dict[str, bytes]:
    """A file, a folder, and a text."""
    files = (FoundFile("a/config.json", 4, "0" * 64), FoundFile("a/model.safetensors", 1 << 40, "f" * 64))
    return {
        "file": FoundFiles("leak", files[:1], "signed").encode(),
        "folder": FoundFiles("leak", files, "signed").encode(),
        "text": FoundFiles("leak", files[:1], "signed", text=True).encode(),
    }


if __name__ == "__main__":
    fuzz(one_spelling(FoundFiles.decode, FoundFiles.encode, json=True), seeds())
