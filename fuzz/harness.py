"""What every fuzz target does besides its one input: write its seeds, or run with them.

python fuzz/fuzz_X.py --seeds CORPUS      write the seed corpus
python fuzz/fuzz_X.py [CORPUS] -max_total_time=60
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from json import loads
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports():
    from strongroom.core import canonical
    from strongroom.errors import StrongroomError


def fuzz(one_input: Callable[[bytes], None], seeds: Mapping[str, bytes]) -> None:
    """Run `one_input` under atheris, from `seeds` unless a corpus is named on the command line."""
    if sys.argv[1:2] == ["--seeds"]:
        _write(Path(sys.argv[2]), seeds)
        return
    corpus = []
    if all(argument.startswith("-") for argument in sys.argv[1:]):  # no corpus named: a temporary one
        corpus.append(tempfile.mkdtemp(prefix="corpus-"))
        _write(Path(corpus[0]), seeds)
    atheris.Setup([*sys.argv, *corpus], one_input)
    atheris.Fuzz()


def one_spelling(
    decode: Callable[[bytes], Any], encode: Callable[[Any], bytes], *, json: bool = False
) -> Callable[[bytes], None]:
    """One input of a parser: it refuses with our errors only, and what it accepts has no other spelling. `json`: of
    canonical JSON, whose spelling a fuzzer would seldom meet: JSON is tried in it, too."""

    def one_input(data: bytes) -> None:
        for each in (data, in_canonical_form(data)) if json else (data,):
            try:
                value = decode(each)
            except StrongroomError:
                continue
            if encode(value) != each:
                raise AssertionError(value)

    return one_input


def in_canonical_form(data: bytes) -> bytes:
    """What JSON says, as the formats spell it; nothing of what is no JSON."""
    try:
        return canonical.encode(loads(data))
    except (TypeError, ValueError, RecursionError):
        return b""


def _write(folder: Path, seeds: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds.items():
        (folder / name).write_bytes(data)
