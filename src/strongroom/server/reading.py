"""What is read of a room over HTTP, by whoever has signed the call for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.responses import Response, StreamingResponse

from strongroom.core.ids import Ref
from strongroom.core.limits import MIB
from strongroom.crypto.reading import check_pass
from strongroom.errors import Denied, NotFound
from strongroom.formats.tiles import WIDTH, Tile
from strongroom.gateway.settings import Budgets
from strongroom.ledger.published import tile_bytes
from strongroom.policy.query import ROOM
from strongroom.policy.waiting import unknown
from strongroom.server.bodies import base64_of, number_of, range_of
from strongroom.server.calls import Calls
from strongroom.vault.copies import Copies
from strongroom.vault.status import status
from strongroom.vault.vault import Vault
from strongroom.watch.room import report

if TYPE_CHECKING:
    from starlette.requests import Request

_PIECE = MIB  # of an object, in memory at a time
# What is told of a room; the rest is its host's own business.
_STATUS = ("room", "principals", "versions", "shredded", "bytes", "stored_bytes", "emergencies")


class Reading:
    """The handlers of the routes that read: each takes a request and its body."""

    def __init__(self, vault: Vault, calls: Calls, budgets: Budgets) -> None:
        self._budgets = budgets
        self._vault, self._custodian, self._calls = vault, vault.custodian, calls

    def requests(self, request: Request, body: bytes) -> dict[str, Any]:
        guest = self._calls.guest(request, body)
        return {"requests": [each for each in self._custodian.requests() if _concerns(each, guest)]}

    def show_request(self, request: Request, body: bytes) -> dict[str, Any]:
        who, identifier = self._calls.caller(request, body), request.path_params["id"]
        found = self._custodian.show_request(identifier)
        if not _concerns(found, who.path if who.guest else ""):
            raise unknown(identifier)
        return found if self._custodian.may_know_why(found, who) else {**found, "reason": None, "salt": ""}

    def leases(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, now = self._calls.guest(request, body), self._vault.clock()
        with self._custodian.ledger.view() as state:
            found = [each for each in state.leases.values() if each.holds(now) and guest in ("", each.holder)]
            names = ("id", "holder", "action", "ref", "expires_at", "used")
            return {"leases": [{name: getattr(each, name) for name in names} for each in found]}

    def principals(self, request: Request, body: bytes) -> dict[str, Any]:
        guest = self._calls.guest(request, body)
        return {"principals": [each for each in self._vault.principal_ls() if guest in ("", each["path"])]}

    def show_principal(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, path = self._calls.guest(request, body), request.path_params["path"]
        if guest not in ("", path):
            raise NotFound(
                "principal.missing", f"there is no {path!r:.80} in this room", hint=f"strongroom principal show {guest}"
            )
        return self._custodian.show_principal(path)

    def apikeys(self, request: Request, body: bytes) -> dict[str, Any]:
        who, path = self._calls.caller(request, body), request.query_params.get("principal")
        return {"apikeys": self._custodian.apikeys.ls(who, path)}

    def authorities(self, request: Request, body: bytes) -> dict[str, Any]:
        self._no_guest(request, body, "authorities")
        return {"authorities": self._custodian.authorities()}

    def policy(self, request: Request, body: bytes) -> dict[str, Any]:
        self._no_guest(request, body, "policy")
        return self._custodian.policy(request.query_params.get("digest"))

    def weights(self, request: Request, body: bytes) -> dict[str, Any]:
        guest = self._calls.guest(request, body)
        name = request.query_params.get("name")
        if guest:
            # Whether there is a name is told by what is in the list, and by nothing else.
            mine = self._usable(guest)
            found = [info for info in self._vault.ls() if info.ref in mine and name in (None, info.name)]
            return {"versions": [{**info.as_json(), "created_by": ""} for info in found]}
        return {"versions": [info.as_json() for info in self._vault.ls(name)]}

    def show(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, ref = self._calls.guest(request, body), request.path_params["ref"]
        if not guest:
            return self._vault.show(ref)
        # Told like a version that is not there, and before it is looked up.
        if Ref.parse(ref).number is None or ref not in self._usable(guest):
            raise NotFound("weights.missing", f"the room has no weights {ref!r:.200}", hint="strongroom ls")
        found = {**self._vault.show(ref), "created_by": ""}
        del found["ceiling"]  # how many there may be is not a guest's business
        return found

    def reach(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, query = self._calls.guest(request, body), request.query_params
        if guest:
            # In the same words for everybody, known or not.
            if query.get("principal", guest) != guest:
                raise Denied(
                    "read.guest",
                    f"{guest} is a guest of this room, and sees what it can reach itself, and nobody else",
                    hint=f"strongroom reach {guest}",
                )
            # Whether there is a version that it never can reach is not told, either.
            refs = {ROOM, *self._usable(guest)}
            mine = [each for each in self._custodian.reach(guest) if each["ref"] in refs]
            return {"access": [each for each in mine if query.get("ref", each["ref"]) == each["ref"]]}
        if "ref" in query:
            return {"access": self._custodian.who(query["ref"])}
        return {"access": self._custodian.reach(query.get("principal", ""))}

    def ceilings(self, request: Request, body: bytes) -> dict[str, int]:
        self._no_guest(request, body, "ceilings")
        return self._custodian.ceilings(request.query_params.get("ref", ""))

    def budgets(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body, "audit", "administer")
        return report(
            self._vault,
            request.query_params.get("ref", ""),
            self._budgets.rules,
            bits_per_parameter=self._budgets.bits_per_parameter,
            compression=self._budgets.compression,
        )

    def review(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body, "audit", "administer")
        return self._custodian.review().as_json()

    def status(self, request: Request, body: bytes) -> dict[str, Any]:
        self._no_guest(request, body, "status")
        found, now = status(self._vault), self._vault.clock()
        with self._custodian.ledger.view() as state:
            leases = sum(each.holds(now) for each in state.leases.values())
        size = self._custodian.ledger.checkpoint()[0].size
        return {name: found[name] for name in (*_STATUS, "sealed")} | {"log_size": size, "leases": leases}

    # -- the log -------------------------------------------------------------------------------------------------

    def checkpoint(self, request: Request, body: bytes) -> Response:
        self._calls.caller(request, body)
        note = self._vault.cosigned_note(self._custodian.ledger.checkpoint()[1])
        return Response(note, media_type="text/plain; charset=utf-8")

    def consistency(self, request: Request, body: bytes) -> dict[str, Any]:
        self._calls.caller(request, body)
        old, new = (number_of(request.query_params.get(name, "")) for name in ("old", "new"))
        if new > self._custodian.ledger.checkpoint()[0].size:
            raise NotFound("log.no_entry", f"the log does not have {new} entries yet")
        return {"proof": [base64_of(each) for each in self._custodian.ledger.consistency(old, new)]}

    def tile(self, request: Request, body: bytes) -> Response:
        self._calls.caller(request, body, "audit", "administer")
        tile = Tile.parse(f"tile/{request.path_params['path']}")
        if (tile.index * WIDTH + tile.width) << 8 * (tile.level or 0) > self._custodian.ledger.checkpoint()[0].size:
            raise NotFound("log.no_tile", "the log does not have this tile yet")
        return Response(tile_bytes(tile, self._custodian.ledger), media_type="application/octet-stream")

    # -- ciphertext ----------------------------------------------------------------------------------------------

    def object(self, request: Request, _: bytes) -> Response:
        check_pass(request.path_params["pass"], self._vault.keys.reading_key, self._vault.id, self._vault.clock())
        name = request.path_params["name"]
        if Copies.is_one(name):
            return Response(self._vault.copies.read(name), media_type="application/octet-stream")
        size = self._vault.blobs.size(name)
        begin, end = range_of(request.headers.get("range", ""), size)
        headers = {"Content-Length": str(end - begin)}
        if end > begin:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"

        def pieces() -> Iterator[bytes]:
            # One piece at a time, and the next when the last is on its way: a reader that is slow costs no memory, and
            # no thread: what waits for it is the connection, which listen.py ends.
            for at in range(begin, end, _PIECE):
                buffer = bytearray(min(_PIECE, end - at))
                self._vault.blobs.read_into(name, at, memoryview(buffer))
                yield bytes(buffer)

        status = 206 if end > begin and "range" in request.headers else 200
        return StreamingResponse(pieces(), status, headers, "application/octet-stream")

    # -- inside --------------------------------------------------------------------------------------------------

    def _usable(self, guest: str) -> set[str]:
        return {each["ref"] for each in self._custodian.reach(guest) if each["state"] != "never"}

    def _no_guest(self, request: Request, body: bytes, what: str) -> None:
        if guest := self._calls.guest(request, body):
            raise Denied(
                "read.guest",
                f"{guest} is a guest of this room, and does not see its {what}",
                hint=f"strongroom reach {guest}, for what it can do",
            )


def _concerns(request: dict[str, Any], guest: str) -> bool:
    """Whether a guest sees this request; whoever is none (an empty text) sees them all."""
    return guest in ("", request["by"], request.get("for"))
