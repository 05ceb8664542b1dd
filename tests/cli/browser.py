"""A real browser: the machine's own, or the one that comes as an npm package. Nothing is asked for beyond these."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path

_PACKAGE = "@sparticuz/chromium@^153"
_WHERE = """
import chromium from "@sparticuz/chromium";
console.log(JSON.stringify([await chromium.executablePath(), chromium.args]));
"""


@functools.cache
def chromium(folder: Path) -> tuple[str, list[str]] | str:
    """The program and its arguments, or why there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found, ["--no-sandbox"]
    if not shutil.which("npm") or not shutil.which("node"):
        return "there is no chromium, and no npm to get one with"
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), _PACKAGE]
    (folder / "where.mjs").write_text(_WHERE)
    for command in (install, ["node", "where.mjs"]):
        try:
            ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return f"{command[0]} takes too long"
        if ended.returncode:
            return f"{command[0]} does not give a chromium: {ended.stderr[-300:]}"
    path, arguments = json.loads(ended.stdout)
    return path, [each for each in arguments if each != "--single-process"]
