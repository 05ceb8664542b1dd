"""What the tokens of each version spell, read once: by it an answer over the private channel is known to be no more
than its tokens (spec/gateway.md, section 5)."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from strongroom.errors import StrongroomError, UsageError

_KEPT = 16  # versions: a vocabulary of 150,000 takes about 10 MB
_log = logging.getLogger("strongroom.gateway")


class Spelling(Protocol):
    """As vault/spelling.py has it."""

    def spells(self, tokens: Sequence[int], text: str) -> bool: ...


class Spellings:
    """Those of the versions that were asked for. `read` is called in a thread, and takes a second."""

    def __init__(self, read: Callable[[str], Spelling]) -> None:
        self._read = read
        self._known: OrderedDict[str, Spelling | None] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Spelling | None]] = {}

    async def of(self, ref: str) -> Spelling | None:
        """None where it can't be known: then each byte of a text is charged for a part of what it could carry
        (spec/gateway.md, section 5)."""
        if ref in self._known:
            return self._known[ref]
        task = self._asked.get(ref)
        if task is None:
            task = self._asked[ref] = asyncio.get_running_loop().create_task(self._learn(ref))
        return await asyncio.shield(task)  # whoever leaves while it is read leaves others waiting

    async def _learn(self, ref: str) -> Spelling | None:
        found: Spelling | None = None
        try:
            found = await asyncio.to_thread(self._read, ref)
        except UsageError as error:  # it will not be known later, either
            _log.warning("%s: %s; its answers are charged by their bytes where these are more", ref, error.message)
        except (StrongroomError, OSError) as error:
            _log.warning("%s: it is not known yet what its tokens spell: %s", ref, error)
            return None
        finally:
            self._asked.pop(ref, None)
        self._known[ref] = found
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return found


def spelled(spelling: Spelling, sampled: Mapping[int, Sequence[int]], texts: Mapping[int, Sequence[str]]) -> bool:
    """Whether the text of each choice is the beginning of what its own tokens spell."""
    return all(spelling.spells(sampled.get(index, ()), "".join(parts)) for index, parts in texts.items())
