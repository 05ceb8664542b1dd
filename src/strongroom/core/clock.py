"""Time in whole seconds: as text (RFC 3339, UTC), and as a number."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> str:
    """For example 2026-03-01T09:30:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix() -> int:
    """Seconds since 1970-01-01 UTC."""
    return int(time.time())


def duration(seconds: int) -> str:
    """As people type it, 8h or 90m: the largest unit that says it exactly."""
    for unit, count in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds and seconds % count == 0:
            return f"{seconds // count}{unit}"
    return f"{seconds}s"


def about(seconds: int) -> str:
    """How long that is, roughly and never less: 90s, 45m, 24h, 7d."""
    for unit, count in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * count:
            return f"{-(-seconds // count)}{unit}"
    return f"{seconds}s"


def text(seconds: int) -> str:
    """The same time as text; what no calendar has is said as the number that it is."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}"
