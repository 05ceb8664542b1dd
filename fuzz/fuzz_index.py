"""Any bytes into an index: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from fractions import Fraction

    from strongroom.formats.index import Index
    from strongroom.formats.layout import Layout, Run


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    files = Layout.place([("a/config.json", "opaque", 100, 0), ("w.safetensors", "safetensors", 300_000, 800)])
    runs = [Run(files[1].offset + 800, files[1].end, "BF16")]
    layout = Layout.plan(files, runs, share=Fraction(1, 8), positions=64)
    return {"whole": Index(layout, ("0" * 64,) * 2, {}).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(Index.decode, Index.encode), seeds())
