"""Writes every test vector, byte for byte the same each time, with the encoder of tests/conformance.

python vectors/generate.py [FOLDER]     FOLDER is this one unless given; only folders of vectors and the table in
                                        README.md are replaced
"""  # noqa: INP001

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from conformance import cases  # noqa: E402

HEADING = "## The vectors"


def expected(vector: cases.Vector) -> dict[str, Any]:
    """What readers must find. It comes from the writer's input, never from what a reader says."""

    def outcome(refusal: str | None, files: dict[str, bytes]) -> dict[str, Any]:
        if refusal is not None:
            return {"refused": refusal}
        return {"files": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}}

    return {
        "shows": vector.shows,
        "holder": outcome(vector.holder, vector.written.held),
        "custodian": outcome(vector.custodian, vector.written.originals),
    }


def generate(target: Path) -> None:
    """Replaces the vectors in `target`."""
    for old in target.iterdir():
        if (old / "expected.json").is_file():
            shutil.rmtree(old)
    rows = []
    for vector in cases.vectors():
        folder = target / vector.name
        for name, data in vector.written.store.items():
            (folder / "store" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "store" / name).write_bytes(data)
        (folder / "bundle").write_bytes(vector.written.bundle)
        for name, value in (("secrets", vector.written.secrets), ("expected", expected(vector))):
            text = json.dumps(value, ensure_ascii=False, indent=1)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        refusals = [f"`{refusal}`" if refusal else "reads" for refusal in (vector.holder, vector.custodian)]
        rows.append(f"| {vector.name} | {vector.shows} | {' | '.join(refusals)} |")
    page = (HERE / "README.md").read_text(encoding="utf-8")
    head = page[: page.index(HEADING)] + HEADING
    table = ["", "", "| folder | shows | holder | custodian |", "|---|---|---|---|", *rows, ""]
    (target / "README.md").write_text(head + "\n".join(table), encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
