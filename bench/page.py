"""A page that several benches write: each its own part, and the rest stays as it is."""

from __future__ import annotations

import re
from pathlib import Path

TRACING = Path("docs/reference/tracing.md")


def write(page: Path, part: str, text: str) -> None:
    """Put `text` between the comments that begin and end `part` of `page`; at its end, if it has no such part yet."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    whole = page.read_text(encoding="utf-8")
    fresh = f"{begin}\n\n{text.strip()}\n\n{end}"
    found, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: fresh, whole, count=1, flags=re.DOTALL)
    page.write_text(found if count else f"{whole.rstrip()}\n\n{fresh}\n", encoding="utf-8")
