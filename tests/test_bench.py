"""The benches measure what is there today: run small, the page that they write has every figure."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"\| (append 200 bytes|SQLite|PostgreSQL)[^|]*\| ([\d,]+) \|")


@pytest.mark.server
def test_durable_appends_on_a_disk_of_stated_slowness(tmp_path):
    out = tmp_path / "page.md"
    out.write_text("# Kept\n\n<!-- appends -->\n\nold\n\n<!-- end of appends -->\n\nkept, too\n")
    small = ["--only", "appends", "--rounds", "1", "--seconds", "0.2", "--out", str(out), "--work", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "bench.custody", *small], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    page = out.read_text()
    assert page.startswith("# Kept\n")
    assert page.endswith("kept, too\n")
    assert "old" not in page
    as_it_is, slowed = page.split("With 2 ms added")
    assert len(_ROW.findall(as_it_is)) == 7
    if shutil.which("cc") is None:
        assert "Not measured" in slowed
        return
    rates = {match[0]: int(match[2].replace(",", "")) for match in _ROW.finditer(slowed)}
    assert len(rates) == 7
    # What is committed one by one waits 2 ms or more each time, or the library that adds them was not loaded.
    assert max(rate for row, rate in rates.items() if "64 writers" not in row) <= 500


def test_each_bench_finds_what_it_measures():
    """Those that take hours are run by hand: what they import has moved by then, unless somebody looks."""
    look = "import importlib, pkgutil, bench\nfor each in pkgutil.walk_packages(bench.__path__, 'bench.'):\n    "
    look += "each.name == 'bench.__main__' or importlib.import_module(each.name)"
    subprocess.run([sys.executable, "-c", look], cwd=ROOT, check=True)
