"""What an approver approves: the request as its asker signed it, which is not always what a server says of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from strongroom.errors import StrongroomError, Tampered, UsageError
from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom

_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)


def look(room: AnyRoom, identifier: str) -> dict[str, Any]:
    """One request, grant or proposal, as `strongroom.vault.requests` describes it, after a check that it is the one
    with this `identifier`, and that its statement says what is shown. Else a server could have somebody read one
    request and approve another. Tampered ``request.other``; UsageError ``request.malformed``."""
    if not _ID.fullmatch(identifier):
        raise UsageError(
            "request.malformed", f"{identifier!r:.40} is not the 16 digits of a request", hint="strongroom requests"
        )
    found = room.custodian.show_request(identifier)
    try:
        said = Statement.decode(found["statement"])
    except StrongroomError as error:
        raise _other(identifier, error.message) from None
    shown = {name: found[name] for name in ("id", "digest", "by")}
    signed = {"id": said.id, "digest": said.digest, "by": said.by}
    if said.id != identifier or shown != signed or said.room != room.id.hex():
        raise _other(identifier, "its statement is another's")
    body = said.body
    match said.kind:
        case "request":
            expected = (body["action"], body["ref"], body["for"])
        case "principal":
            roles = found["ref"] if body["roles"] is None else ", ".join(body["roles"])
            expected = ("grant", roles, body["principal"])
        case "authority":
            expected = ("authority", "", body["authority"])
        case "propose":
            expected = ("policy", "", "")
        case _:
            raise _other(identifier, "its statement asks for nothing")
    if (found["action"], found["ref"], found["for"]) != expected:
        raise _other(identifier, "its statement is about something else")
    if said.kind == "request" and not _no_longer(found, body):
        raise _other(identifier, "it was asked for a shorter time, or fewer uses")
    if found["reason"] is not None:
        try:
            Private("reason", found["reason"], bytes.fromhex(found["salt"])).check(body.get("reason", ""))
        except (StrongroomError, ValueError):
            raise _other(identifier, "its reason is another") from None
    return {**found, "details": _details(said)}


def proposed(room: AnyRoom, identifier: str) -> dict[str, Any]:
    """The policy that a proposal proposes. Errors of `look`; UsageError ``policy.malformed`` for what is none."""
    from strongroom.policy.engine import Policies

    found = look(room, identifier)
    digest = Statement.decode(found["statement"]).body.get("digest")
    if found["action"] != "policy":
        raise UsageError("policy.malformed", f"{identifier} is no proposal of a policy", hint="strongroom requests")
    policy = room.custodian.policy(digest)
    if Policies.parse(policy["text"]).digest != digest or policy["digest"] != digest:
        raise _other(identifier, "the text of the policy is another")
    return policy


def _no_longer(found: dict[str, Any], body: Mapping[str, Any]) -> bool:
    """Approvers shorten what was asked for, and count it; nobody lengthens it."""
    fewer = body["uses"] is None or (found["uses"] is not None and found["uses"] <= body["uses"])
    return bool(found["duration"] <= body["duration"]) and fewer


def _details(said: Statement) -> dict[str, str]:
    """What else was signed, for whoever has to agree: by its hash where it is long."""
    body = said.body
    match said.kind:
        case "principal":
            told = {
                "key": body["key"],  # as `identity new` shows it, so that it can be compared
                "person": body["person"],
                "roles": body["roles"] if body["roles"] is None else ", ".join(body["roles"]),
                "teams": body["teams"] if body["teams"] is None else ", ".join(body["teams"]),
                "state": body["state"],
                "bound to": body.get("subject", ""),
            }
            return {name: "as before" if value is None else value or "none" for name, value in told.items()}
        case "authority":
            return {"terms": hashlib.sha256(body["text"].encode()).hexdigest()}
        case "propose":
            return {"policy": body["digest"]}
    return {}


def _other(identifier: str, why: str) -> Tampered:
    return Tampered(
        "request.other",
        f"what the custodian shows of the request {identifier} is not what was signed: {why}",
        hint="approve nothing; show this to whoever audits the log",
    )
