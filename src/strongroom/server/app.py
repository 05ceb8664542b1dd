"""The custodian over HTTP (spec/http.md): a thin skin over `Custodian`, which decides everything.

Stateless: any number of these may run over one database and one store.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from strongroom.core.limits import LIMITS, MIB
from strongroom.crypto.reading import PASS_LIFE, check_pass, make_pass
from strongroom.crypto.release import CHALLENGE_LIFE
from strongroom.errors import (
    AuthRequired,
    BackendError,
    Denied,
    LimitExceeded,
    NotFound,
    Sealed,
    StrongroomError,
    UsageError,
)
from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement
from strongroom.formats.tiles import WIDTH, Tile
from strongroom.ledger.published import tile_bytes
from strongroom.policy.speaker import Speaker
from strongroom.server.guard import Guard
from strongroom.server.uploads import Uploads
from strongroom.vault.custodian import Answer
from strongroom.vault.vault import Vault

_MOST = 2 * MIB
_BODY_TIME = 30.0  # seconds that a body may take to come
_RANGE_MOST = 64 * MIB
_PIECE = MIB  # of an object, in memory at a time
_SCHEME = "Strongroom "
_LOG = logging.getLogger("strongroom.server")

_UNABLE = "the custodian can't do this now: its store, database or key store does not answer, or its clock is wrong"

Handler = Callable[[Request, bytes], Any]


class CustodianApp:
    """The ASGI application of one room; `asgi` is what a server runs."""

    def __init__(self, vault: Vault, url: str) -> None:
        self._url = url
        self._vault, self._custodian = vault, vault.custodian
        self._uploads = Uploads(vault, self._caller)
        routes = [
            self._route("POST", "/v1/challenges", self._challenge),
            self._route("POST", "/v1/releases", self._release),
            self._route("GET", "/v1/requests", self._requests),
            self._route("POST", "/v1/requests", partial(self._say, "request")),
            self._route("GET", "/v1/requests/{id}", self._request),
            self._route("POST", "/v1/requests/{id}/approve", partial(self._say, "approve")),
            self._route("POST", "/v1/requests/{id}/deny", partial(self._say, "deny")),
            self._route("POST", "/v1/leases/{id}/renew", partial(self._say, "renew")),
            self._route("POST", "/v1/revocations", partial(self._say, "revoke")),
            self._route("GET", "/v1/principals", self._principals),
            self._route("POST", "/v1/principals", partial(self._say, "principal")),
            self._route("GET", "/v1/principals/{path:path}", self._principal),
            self._route("POST", "/v1/logins", self._login),
            self._route("GET", "/v1/authorities", self._authorities),
            self._route("POST", "/v1/authorities", partial(self._say, "authority")),
            self._route("GET", "/v1/policies", self._policy),
            self._route("POST", "/v1/policies", partial(self._say, "propose")),
            self._route("POST", "/v1/policies/{id}/enact", self._enact),
            self._route("GET", "/v1/weights", self._weights),
            Route("/v1/weights", self._put, methods=["POST"], name="POST /v1/weights"),
            self._route("POST", "/v1/uploads", self._uploads.check),
            self._route("GET", "/v1/reach", self._reach),
            self._route("GET", "/v1/objects/{pass}/{name:path}", self._object),
            self._route("GET", "/v1/log/checkpoint", self._checkpoint),
            self._route("GET", "/v1/log/consistency", self._consistency),
            self._route("GET", "/v1/log/tile/{path:path}", self._tile),
            self._route("GET", "/healthz", lambda *_: {"ok": True}),
            self._route("GET", "/readyz", self._ready),
        ]
        self.asgi = Guard(Starlette(routes=routes, exception_handlers={404: _missing, 405: _missing, 500: _fault}))

    def _route(self, method: str, path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                body = await _body(request)
                # In a thread: it waits for the database, and many who wait together share one batch of the log.
                answer = await run_in_threadpool(handler, request, body)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except StrongroomError as error:
                return problem(error)
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        return Route(path, endpoint, methods=[method], name=f"{method} {path}")

    # -- statements ----------------------------------------------------------------------------------------------

    def _challenge(self, _: Request, __: bytes) -> dict[str, Any]:
        nonce = self._custodian.challenge()
        return {"nonce": nonce.hex(), "expires_at": self._vault.clock() + CHALLENGE_LIFE}

    def _release(self, _: Request, body: bytes) -> dict[str, Any]:
        value = _object(body, {"statement", "reason"})
        answer = self._custodian.release(_text(value, "statement"), _private(value.get("reason")))
        return {
            "entry": _base64(answer.entry),
            "index": answer.index,
            "proof": [_base64(each) for each in answer.proof],
            "checkpoint": _base64(answer.checkpoint),
            "sealed": _base64(answer.sealed),
            "store": self._store(answer),
        }

    def _store(self, answer: Answer) -> str:
        """Where the ciphertext is read: from the object store itself, or through here while the lease is good."""
        if "://" in answer.store and not answer.store.startswith("file:"):
            return answer.store
        until = min(self._vault.clock() + PASS_LIFE, self._custodian.lease_end(answer.entry))
        return f"{self._url}/v1/objects/{make_pass(self._vault.keys.reading_key, self._vault.id, until)}"

    def _say(self, kind: str, request: Request, body: bytes) -> dict[str, Any]:
        value = _object(body, {"statement", "reason", "text"})
        envelope = _text(value, "statement")
        named = request.path_params.get("id")
        if named is not None:
            said = Statement.decode(envelope).body
            if str(said.get("request", said.get("lease", "")))[:16] != named:
                raise UsageError("statement.elsewhere", "the statement is about something else than the address is")
        reason = _private(value.get("reason"))
        match kind:
            case "request":
                return self._custodian.request(envelope, _needed(reason))
            case "approve":
                return self._custodian.approve(envelope)
            case "deny":
                return self._custodian.deny(envelope, _needed(reason))
            case "renew":
                return self._custodian.renew(envelope)
            case "revoke":
                return self._custodian.revoke(envelope, _needed(reason))
            case "propose":
                return self._custodian.propose(envelope, _text(value, "text"), _needed(reason))
            case "authority":
                return self._custodian.change_authority(envelope)
            case _:
                return self._custodian.change_principal(envelope)

    def _login(self, _: Request, body: bytes) -> dict[str, Any]:
        value = _object(body, {"statement", "proof"})
        proof = value.get("proof")
        if not isinstance(proof, dict):
            raise UsageError("server.body", "the body has no proof")
        return self._custodian.login(_text(value, "statement"), proof)

    # -- calls ---------------------------------------------------------------------------------------------------

    def _caller(self, request: Request, body: bytes, *actions: str) -> Speaker:
        """The principal whose `call` this request is; with `actions`, one who may do one of them."""
        header = request.headers.get("authorization", "")
        # As sent, byte for byte: what is decoded first, or made of the header Host, is another text than was signed.
        path, query = request.scope["raw_path"], request.scope["query_string"]
        target = (path + (b"?" + query if query else b"")).decode("latin-1")
        if not header.startswith(_SCHEME):
            raise _unknown()
        try:
            padded = header.removeprefix(_SCHEME).encode("ascii")
            envelope = base64.b64decode(padded + b"=" * (-len(padded) % 4), altchars=b"-_", validate=True)
            statement = Statement.decode(envelope.decode("utf-8"))
        except (binascii.Error, UnicodeError, StrongroomError):
            raise _unknown() from None
        expected = {"method": request.method, "path": target, "body": hashlib.sha256(body).hexdigest()}
        if statement.kind != "call" or dict(statement.body) != expected:
            raise _unknown()
        who = self._custodian.identify(statement)
        if actions:
            self._custodian.authorise(who, *actions)
        return who

    def _guest(self, request: Request, body: bytes) -> str:
        """The caller if it is a guest, who sees what concerns itself only (spec/http.md, section 6); else nothing."""
        who = self._caller(request, body)
        return who.path if set(who.roles) <= {"partner"} else ""

    def _requests(self, request: Request, body: bytes) -> dict[str, Any]:
        guest = self._guest(request, body)
        return {"requests": [each for each in self._custodian.requests() if _concerns(each, guest)]}

    def _request(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, identifier = self._guest(request, body), request.path_params["id"]
        found = self._custodian.show_request(identifier)
        if not _concerns(found, guest):
            raise NotFound("request.unknown", f"there is no request {identifier!r:.40}", hint="strongroom requests")
        return found

    def _principals(self, request: Request, body: bytes) -> dict[str, Any]:
        guest = self._guest(request, body)
        return {"principals": [each for each in self._vault.principal_ls() if guest in ("", each["path"])]}

    def _principal(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, path = self._guest(request, body), request.path_params["path"]
        if guest not in ("", path):
            raise NotFound("principal.missing", f"there is no {path!r:.80} in this room")
        return self._custodian.show_principal(path)

    def _authorities(self, request: Request, body: bytes) -> dict[str, Any]:
        if guest := self._guest(request, body):
            raise Denied("read.guest", f"{guest} is a guest of this room, and does not see whom it trusts")
        return {"authorities": self._custodian.authorities()}

    def _policy(self, request: Request, body: bytes) -> dict[str, Any]:
        if guest := self._guest(request, body):
            raise Denied("read.guest", f"{guest} is a guest of this room, and does not see its policy")
        return self._custodian.policy()

    def _enact(self, request: Request, body: bytes) -> dict[str, Any]:
        return self._custodian.enact(request.path_params["id"], self._caller(request, body))

    def _weights(self, request: Request, body: bytes) -> dict[str, Any]:
        guest = self._guest(request, body)
        found = self._vault.ls(request.query_params.get("name"))
        if guest:
            mine = {each["ref"] for each in self._custodian.reach(guest) if each["state"] != "never"}
            return {"versions": [{**info.as_json(), "created_by": ""} for info in found if info.ref in mine]}
        return {"versions": [info.as_json() for info in found]}

    async def _put(self, request: Request) -> Response:
        # Unlike every other: the body is gigabytes, and goes to where it is encrypted as it comes.
        try:
            return JSONResponse((await self._uploads.receive(request)).as_json())
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except StrongroomError as error:
            return problem(error)

    def _reach(self, request: Request, body: bytes) -> dict[str, Any]:
        guest, query = self._guest(request, body), request.query_params
        if guest:
            mine = self._custodian.reach(guest)
            return {"access": [each for each in mine if query.get("ref", each["ref"]) == each["ref"]]}
        if "ref" in query:
            return {"access": self._custodian.who(query["ref"])}
        return {"access": self._custodian.reach(query.get("principal", ""))}

    def _object(self, request: Request, _: bytes) -> Response:
        check_pass(request.path_params["pass"], self._vault.keys.reading_key, self._vault.id, self._vault.clock())
        name = request.path_params["name"]
        size = self._vault.blobs.size(name)
        begin, end = _range(request.headers.get("range", ""), size)
        headers = {"Content-Length": str(end - begin)}
        if end > begin:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"

        def pieces() -> Iterator[bytes]:
            # One piece at a time, and the next when the last is on its way: a reader that is slow costs no memory.
            for at in range(begin, end, _PIECE):
                buffer = bytearray(min(_PIECE, end - at))
                self._vault.blobs.read_into(name, at, memoryview(buffer))
                yield bytes(buffer)

        status = 206 if end > begin and "range" in request.headers else 200
        return StreamingResponse(pieces(), status, headers, "application/octet-stream")

    def _checkpoint(self, request: Request, body: bytes) -> Response:
        self._caller(request, body)
        return Response(self._custodian.ledger.checkpoint()[1], media_type="text/plain; charset=utf-8")

    def _consistency(self, request: Request, body: bytes) -> dict[str, Any]:
        self._caller(request, body)
        old, new = (_number(request.query_params.get(name, "")) for name in ("old", "new"))
        if new > self._custodian.ledger.checkpoint()[0].size:
            raise NotFound("log.no_entry", f"the log does not have {new} entries yet")
        return {"proof": [_base64(each) for each in self._custodian.ledger.consistency(old, new)]}

    def _tile(self, request: Request, body: bytes) -> Response:
        self._caller(request, body, "audit", "administer")
        tile = Tile.parse(f"tile/{request.path_params['path']}")
        if (tile.index * WIDTH + tile.width) << 8 * (tile.level or 0) > self._custodian.ledger.checkpoint()[0].size:
            raise NotFound("log.no_tile", "the log does not have this tile yet")
        return Response(tile_bytes(tile, self._custodian.ledger), media_type="application/octet-stream")

    def _ready(self, _: Request, __: bytes) -> dict[str, Any]:
        try:
            self._custodian.challenge()  # the room is unsealed
            self._custodian.ledger.checkpoint()
        except StrongroomError as error:
            _LOG.warning("not ready: %s: %r", error.code, error.message)
            raise BackendError("server.not_ready", "sealed, or its log can't be read") from None
        return {"ok": True}


# -- requests and answers ----------------------------------------------------------------------------------------------


def problem(error: StrongroomError) -> Response:
    """An error of ours, as RFC 9457 has it. Where this host keeps keys and database, and what is wrong with them, is
    in its own log, and not in the answer."""
    if isinstance(error, BackendError | Sealed) and error.code != "server.not_ready":
        _LOG.warning("%s: %r", error.code, error.message)
        error = type(error)(error.code, _UNABLE, hint="try again; whoever runs the custodian: strongroom doctor")
    value = {
        "type": "about:blank",
        "title": type(error).__name__,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "evidence": error.evidence,
    }
    return JSONResponse(value, error.http_status, media_type="application/problem+json")


async def _missing(_: Request, __: Exception) -> Response:
    return problem(NotFound("server.no_route", "there is nothing at this address"))


async def _fault(_: Request, __: Exception) -> Response:
    value = {"type": "about:blank", "title": "Fault", "status": 500, "code": "server.fault", "detail": "", "hint": ""}
    return JSONResponse({**value, "evidence": {}}, 500, media_type="application/problem+json")


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_TIME):
            async for part in request.stream():
                size += len(part)
                if size > _MOST:
                    raise LimitExceeded("server.too_large", f"a request has at most {_MOST} bytes")
                parts.append(part)
    except TimeoutError:
        raise LimitExceeded("server.too_slow", f"a request has to come within {_BODY_TIME:.0f} seconds") from None
    return b"".join(parts)


def _concerns(request: dict[str, Any], guest: str) -> bool:
    """Whether a guest sees this request; whoever is none (an empty text) sees them all."""
    return guest in ("", request["by"], request.get("for"))


def _object(body: bytes, known: set[str]) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not value.keys() <= known:
        raise UsageError("server.body", f"the body is a JSON object of {', '.join(sorted(known))}")
    return value


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise UsageError("server.body", f"the body has no {name}")
    return found


def _private(value: object) -> Private | None:
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"value", "salt"} and isinstance(value["value"], str):
        salt = value["salt"]
        try:
            if isinstance(salt, str) and len(value["value"]) <= LIMITS.reason:
                return Private("reason", value["value"], base64.b64decode(salt, validate=True))
        except (binascii.Error, ValueError):
            pass
    raise UsageError("server.body", f"a reason is a value of at most {LIMITS.reason} characters and a salt")


def _needed(reason: Private | None) -> Private:
    if reason is None:
        raise UsageError("server.body", "the body has no reason")
    return reason


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UsageError("server.number", f"{text!r:.40} is not a number")
    return int(text)


def _range(header: str, size: int) -> tuple[int, int]:
    """Begin and end of what a request asks for: all of it, or one range that the object has."""
    begin, end = 0, size
    if header:
        unit, _, spec = header.partition("=")
        first, _, last = spec.partition("-")
        if unit != "bytes" or not last:
            raise UsageError("server.range", "a range is bytes=FIRST-LAST")
        begin, end = _number(first), _number(last) + 1
    if not 0 <= begin <= end <= size or end - begin > _RANGE_MOST:
        raise UsageError(
            "server.range", f"a range lies within the object's {size} bytes, and has at most {_RANGE_MOST}"
        )
    return begin, end


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unknown() -> AuthRequired:
    return AuthRequired("auth.refused", "the request is not one that a principal of this room has signed")
