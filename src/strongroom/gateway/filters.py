"""What may not be asked: words and patterns of the settings, and classifiers elsewhere, by URL. A detector plugs in as
one more `Filter`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

import orjson

from strongroom.errors import BackendError, UsageError
from strongroom.gateway.upstream import Upstream

_MOST = 1 << 16  # bytes of a classifier's answer


class Filter(Protocol):
    """UsageError ``content.refused`` for texts that are not answered; BackendError where it can't tell: they are not
    answered either. `looks`: whether it has anything to look for."""

    @property
    def looks(self) -> bool: ...
    async def check(self, texts: Sequence[str], caller: Any) -> None: ...


class Words:
    """Words, as whole words in any case, and regular expressions. UsageError ``settings.pattern``."""

    def __init__(self, words: Sequence[str], patterns: Sequence[str]) -> None:
        parts = [rf"\b{re.escape(_folded(word))}\b" for word in words]
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    "settings.pattern",
                    f"{pattern!r:.80} is no regular expression: {error}",
                    hint="patterns in [requests] of the settings are those of Python; a word as it is goes into words",
                ) from None
            parts.append(f"(?:{pattern})")
        self._found = re.compile("|".join(parts) or "(?!)", re.IGNORECASE)
        self.looks = bool(parts)

    async def check(self, texts: Sequence[str], caller: Any) -> None:  # noqa: ARG002 - the same for everybody
        for text in texts:
            if self._found.search(_folded(text)):
                # Which word it was would tell how to write it otherwise.
                raise UsageError("content.refused", "the gateway does not pass this content on")


class Classifier:
    """``POST {"texts": […]}`` to a URL, which answers ``{"refuse": true or false}``."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        host, _, path = rest.partition("/")
        self._upstream, self._path = Upstream(f"{scheme}://{host}"), f"/{path}"
        self.looks = True

    async def check(self, texts: Sequence[str], caller: Any) -> None:  # noqa: ARG002 - it is not told who asks
        reply = await self._upstream.post(self._path, orjson.dumps({"texts": list(texts)}))
        body = await reply.read()
        try:
            refuse = orjson.loads(body[:_MOST])["refuse"] if reply.status == 200 else None
        except (ValueError, TypeError, KeyError):
            refuse = None
        if not isinstance(refuse, bool):
            raise BackendError("filter.malformed", "the classifier of contents does not answer as it should")
        if refuse:
            raise UsageError("content.refused", "the gateway does not pass this content on")


def _folded(text: str) -> str:
    """Without the tricks that make one word look like another to a list: wide forms, invisible characters."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
