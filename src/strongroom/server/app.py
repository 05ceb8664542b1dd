"""The custodian over HTTP (spec/http.md): a thin skin over `Custodian`, which decides everything.

Stateless: any number of these may run over one database and one store. Its routes are those of operations.py, each with
the handler of its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from strongroom.crypto.reading import PASS_LIFE, make_pass
from strongroom.crypto.release import CHALLENGE_LIFE
from strongroom.errors import StrongroomError, UsageError
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.gateway.settings import Budgets
from strongroom.server import openapi
from strongroom.server.bodies import base64_of, members, needed, read_body, reason_of, text_of
from strongroom.server.calls import Calls
from strongroom.server.guard import Guard
from strongroom.server.memory import Memory
from strongroom.server.metrics import CONTENT_TYPE, Metrics
from strongroom.server.operations import OPERATIONS, Operation
from strongroom.server.problem import fault, missing, problem
from strongroom.server.readiness import Readiness
from strongroom.server.reading import Reading
from strongroom.server.relays import Relays
from strongroom.server.traces import Traces
from strongroom.server.uploads import Uploads
from strongroom.vault.release import Answer
from strongroom.vault.vault import Vault

Handler = Callable[[Request, bytes], Any]
_ACTS = ("ceiling", "clock", "copy", "redact", "review", "thaw")  # the others are done where the room is

_ASKED_BY_RELAYS = ("callers", "decisions", "models", "spellings", "draws", "settlements", "tallies")


class CustodianApp:
    """The ASGI application of one room; `asgi` is what a server runs. `direct`: clients read an object store by
    themselves, with credentials of their own. `trace_memory`: bytes that found files may take; see `Memory`;
    `trace_seconds`: see `Traces`. `budgets`: those by which is told what has left, and of which gateways elsewhere
    draw."""

    def __init__(
        self,
        vault: Vault,
        url: str,
        *,
        direct: bool = False,
        trace_memory: int | None = None,
        trace_seconds: float | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        self._url, self._direct, self._budgets = url, direct, budgets or Budgets()
        self._vault, self._custodian = vault, vault.custodian
        self._calls = Calls(self._custodian)
        self._uploads = Uploads(vault, self._calls.caller)
        self._traces = Traces(vault, self._calls.caller, Memory(trace_memory), seconds=trace_seconds)
        self._relays = Relays(vault, self._calls, self._budgets)
        self._document = openapi.encoded()
        self.metrics, self._readiness = Metrics(vault), Readiness(vault)
        handlers = self._handlers()
        routes = [self._route(each, handlers.pop(each.name)) for each in OPERATIONS]
        if handlers:
            raise LookupError(f"no operation is called {', '.join(handlers)}")
        starlette = Starlette(routes=routes, exception_handlers={404: self._missing, 405: self._missing, 500: fault})
        self.asgi = Guard(starlette, refused=partial(self.metrics.refused, "server.busy"))

    def _handlers(self) -> dict[str, Handler]:
        reading = Reading(self._vault, self._calls, self._budgets)
        said = ("request", "approve", "deny", "renew", "revoke", "propose")
        also = ("principal", "authority", "passkey", "apikey")
        read = ("requests", "show_request", "leases", "principals", "show_principal", "policy", "weights", "show")
        more = ("authorities", "reach", "review", "status", "checkpoint", "consistency", "tile", "object", "ceilings")
        return {
            "challenge": self._challenge,
            "release": self._release,
            **{kind: partial(self._say, kind) for kind in (*said, *also)},
            **{name: getattr(reading, name) for name in (*read, *more, "apikeys", "budgets")},
            "login": self._login,
            "enact": partial(self._act, ("enact",)),
            "act": partial(self._act, _ACTS),
            "put": self._uploads.receive,
            "check_put": self._uploads.check,
            "trace": self._traces.receive,
            "check_trace": self._traces.check,
            "show_trace": self._traces.show,
            "stop_trace": self._traces.stop,
            "inference": self._relays.account,
            "gateway_version": self._relays.version,
            **{f"gateway_{name}": getattr(self._relays, name) for name in _ASKED_BY_RELAYS},
            "openapi": lambda *_: Response(self._document, media_type="application/json"),
            "metrics": self._metrics,
            "alive": lambda *_: {"ok": True},
            "ready": self._ready,
        }

    def _route(self, operation: Operation, handler: Handler) -> Route:
        path = operation.path.replace(":path}", "}")

        async def endpoint(request: Request) -> Response:
            try:
                with self.metrics.timed(path, operation.method):
                    answer = await self._answer(operation, handler, request)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except StrongroomError as error:
                self.metrics.refused(error.code)
                answer = problem(error)
            except BaseException:
                self.metrics.answered(path, operation.method, 500)
                raise
            self.metrics.answered(path, operation.method, answer.status_code)
            return answer

        return Route(operation.path, endpoint, methods=[operation.method], name=operation.name)

    async def _answer(self, operation: Operation, handler: Handler, request: Request) -> Response:
        if operation.name == "put":
            # Unlike every other: the body is gigabytes, and goes to where it is encrypted as it comes.
            return JSONResponse((await self._uploads.receive(request)).as_json())
        if operation.name == "trace":
            return JSONResponse(await self._traces.receive(request), operation.status)
        body = await read_body(request)
        if operation.name == "gateway_version":  # it waits, and would keep a thread from others
            return JSONResponse(await self._relays.version(request, body))
        # In a thread: it waits for the database, and many who wait together share one batch of the log.
        answer = await run_in_threadpool(handler, request, body)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    async def _missing(self, request: Request, error: Exception) -> Response:
        self.metrics.answered("none", "any", 404)
        return await missing(request, error)

    # -- statements ----------------------------------------------------------------------------------------------

    def _challenge(self, _: Request, __: bytes) -> dict[str, Any]:
        nonce = self._custodian.challenge()
        return {"nonce": nonce.hex(), "expires_at": self._vault.clock() + CHALLENGE_LIFE}

    def _release(self, _: Request, body: bytes) -> dict[str, Any]:
        value = members(body, {"statement", "reason"})
        answer = self._custodian.release(text_of(value, "statement"), reason_of(value.get("reason")))
        return {
            "entry": base64_of(answer.entry),
            "index": answer.index,
            "proof": [base64_of(each) for each in answer.proof],
            "checkpoint": base64_of(answer.checkpoint),
            "sealed": base64_of(answer.sealed),
            "store": self._store(answer),
        }

    def _store(self, answer: Answer) -> str:
        """Where the ciphertext is read: through here while the lease is good, or in the object store itself."""
        copies = Entry.decode(answer.entry).body["action"] == "copy"  # which nobody but the custodian can write
        if self._direct and not copies and "://" in answer.store and not answer.store.startswith("file:"):
            return answer.store
        until = min(self._vault.clock() + PASS_LIFE, self._custodian.lease_end(answer.entry))
        return f"{self._url}/v1/objects/{make_pass(self._vault.keys.reading_key, self._vault.id, until)}"

    def _say(self, kind: str, request: Request, body: bytes) -> dict[str, Any]:
        value = members(body, {"statement", "reason", "text"})
        envelope = text_of(value, "statement")
        named = request.path_params.get("id")
        if named is not None:
            said = Statement.decode(envelope).body
            if str(said.get("request", said.get("lease", "")))[:16] != named:
                raise UsageError("statement.elsewhere", "the statement is about something else than the address is")
        reason = reason_of(value.get("reason"))
        custodian = self._custodian
        match kind:
            case "request":
                return custodian.request(envelope, needed(reason))
            case "deny":
                return custodian.deny(envelope, needed(reason))
            case "revoke":
                return custodian.revoke(envelope, needed(reason))
            case "propose":
                return custodian.propose(envelope, text_of(value, "text"), needed(reason))
        return {
            "approve": custodian.approve,
            "renew": custodian.renew,
            "principal": custodian.change_principal,
            "authority": custodian.change_authority,
            "passkey": custodian.change_passkey,
            "apikey": custodian.apikeys.change,
        }[kind](envelope)

    def _act(self, kinds: tuple[str, ...], request: Request, body: bytes) -> dict[str, Any]:
        value = members(body, {"statement", "reason"})
        envelope = text_of(value, "statement")
        said = Statement.decode(envelope)
        if said.kind not in kinds or said.body.get("proposal") != request.path_params.get("id"):
            raise UsageError("statement.elsewhere", "the statement is not one that this address takes")
        return self._custodian.acted(envelope, reason_of(value.get("reason")))

    def _login(self, _: Request, body: bytes) -> dict[str, Any]:
        value = members(body, {"statement", "proof"})
        proof = value.get("proof")
        if not isinstance(proof, dict):
            raise UsageError("server.body", "the body has no proof")
        return self._custodian.login(text_of(value, "statement"), proof)

    # -- calls ---------------------------------------------------------------------------------------------------

    def _metrics(self, request: Request, body: bytes) -> Response:
        self._calls.caller(request, body, "audit", "administer")
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)

    def _ready(self, _: Request, __: bytes) -> dict[str, Any]:
        self._readiness.check()
        return {"ok": True}
