"""Strongroom keeps AI model weights in custody.

Your weights stay in one locked room; nobody takes them out without approval; every copy that leaves names its holder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strongroom.load.source import register_opener

if TYPE_CHECKING:
    from strongroom.client import Room, open, safe_open  # noqa: A004 - the public name
    from strongroom.storage.reader import ImageReader

__version__ = "0.1.0"
__all__ = ["Room", "errors", "open", "safe_open"]


def __getattr__(name: str) -> Any:
    # Lazy: `import strongroom` costs nothing until a room is opened.
    if name in ("Room", "open", "safe_open"):
        from strongroom import client

        return getattr(client, name)
    if name == "errors":
        import strongroom.errors

        return strongroom.errors
    raise AttributeError(f"module 'strongroom' has no attribute {name!r}")


def _open_reader(ref: str) -> ImageReader:
    """How the loaders, which do not know rooms, come from a reference to a reader."""
    from strongroom import client

    return client.read_once(ref)


register_opener(_open_reader)
