"""API keys, on the side of whoever uses them: made here, and shown once. Only the SHA-256 of one leaves
(spec/ledger.md, section 12)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from strongroom.errors import NotFound, UsageError
from strongroom.formats.apikey import digest_of, make

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom, Say

DURATION = 90 * 86_400  # seconds, unless something else is asked for
_BEGINNING = re.compile(r"[0-9a-f]{4,64}", re.ASCII)


class ApiKeys:
    """The API keys of `who` in a room; `say` signs a statement of a kind, as `who`."""

    def __init__(self, room: AnyRoom, who: str, say: Say) -> None:
        self._room, self._who, self._say = room, who, say

    def new(self, name: str = "default", duration: int = DURATION) -> dict[str, Any]:
        """Make one, good for `duration` seconds: `key`, which is kept nowhere, `id`, `principal`, `name`, `expires_at`,
        `entry`, `infers` (whether policy lets it infer on any version). Errors as policy/apikeys.py has them."""
        key = make()
        expires_at = self._room.clock() + duration
        body = {"key": digest_of(key), "principal": self._who, "name": name, "expires_at": expires_at}
        done = self._room.custodian.apikeys.change(self._say("apikey", {**body, "state": "active"}))
        return {
            "key": key,
            **{each: done[each] for each in ("id", "principal", "name", "expires_at", "entry", "infers")},
        }

    def ls(self, principal: str | None = None) -> list[dict[str, Any]]:
        """Those that are good now, without the keys themselves: of `principal`, or all that `who` may see."""
        return self._room.custodian.apikeys.ls(self._who, principal)

    def end(self, identifier: str) -> dict[str, Any]:
        """End one, at once, by its identifier or the beginning of it; UsageError ``apikey.malformed``, NotFound
        ``apikey.missing``."""
        if not _BEGINNING.fullmatch(identifier):
            raise UsageError(
                "apikey.malformed",
                f"{identifier!r:.40} is not the identifier of an API key: 16 hexadecimal digits, and never the key",
                hint="strongroom apikey ls",
            )
        found = [each for each in self.ls() if each["key"].startswith(identifier)]
        if len(found) != 1:
            raise NotFound(
                "apikey.missing",
                f"{len(found) or 'no'} API keys that {self._who} may see begin with {identifier}",
                hint="strongroom apikey ls",
            )
        body = {each: found[0][each] for each in ("key", "principal", "name", "expires_at")}
        return self._room.custodian.apikeys.change(self._say("apikey", {**body, "state": "ended"}))
