"""What an approver approves: the request as its asker signed it, which is not always what a server says of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from strongroom.errors import StrongroomError, Tampered, UsageError
from strongroom.formats.statement import Statement

if TYPE_CHECKING:
    from strongroom.load.room import AnyRoom

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
            expected = ("grant", ", ".join(body["roles"]), body["principal"])
        case "authority":
            expected = ("authority", "", body["authority"])
        case _:
            expected = ("policy", "", "")
    if (found["action"], found["ref"], found["for"]) != expected:
        raise _other(identifier, "its statement is about something else")
    # Approvers shorten what was asked for; nobody lengthens it.
    if said.kind == "request" and found["duration"] > body["duration"]:
        raise _other(identifier, "it was asked for a shorter time")
    return found


def _other(identifier: str, why: str) -> Tampered:
    return Tampered(
        "request.other",
        f"what the custodian shows of the request {identifier} is not what was signed: {why}",
        hint="approve nothing; show this to whoever audits the log",
    )
