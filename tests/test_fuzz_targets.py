"""Fuzz targets run on what they begin with, and on that damaged: one that a change has left behind is noticed at once.

atheris itself comes with `make fuzz`; here each target is handed its seeds by what stands for it.
"""

from __future__ import annotations

import contextlib
import random
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"


def _damaged(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return chance.choice((data[:at], data[:at] + b"\0" + data[at + 1 :], data + data[at:], data[at:]))


@pytest.mark.parametrize("target", sorted(FUZZ.glob("fuzz_*.py")), ids=lambda path: path.stem)
def test_takes_its_seeds(target, monkeypatch, tmp_path):
    given = SimpleNamespace(runs=0)

    def setup(arguments, one_input):
        given.corpus, given.one_input = Path(arguments[-1]), one_input

    def fuzz():
        chance = random.Random(0)
        for seed in sorted(given.corpus.iterdir()):
            data = seed.read_bytes()
            for each in (data, *(_damaged(data, chance) for _ in range(20))):
                given.one_input(each)
            given.runs += 1

    standing_in = SimpleNamespace(instrument_imports=contextlib.nullcontext, Setup=setup, Fuzz=fuzz)
    monkeypatch.setitem(sys.modules, "atheris", standing_in)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(str(FUZZ))
    monkeypatch.setattr(sys, "argv", [str(target)])
    try:
        runpy.run_path(str(target), run_name="__main__")
    finally:
        sys.modules.pop("harness", None)
    assert given.runs
