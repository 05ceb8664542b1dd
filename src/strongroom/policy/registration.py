"""Records of principals: which may be in the log, and which take a second person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strongroom.crypto import signatures
from strongroom.errors import UsageError
from strongroom.policy.query import Subject
from strongroom.policy.state import State

_PRINCIPALS = "strongroom principal ls"


def check(state: State, body: Mapping[str, Any]) -> None:
    """UsageError for a principal that no question could be asked about later, or who could pass for two people."""
    path, person = body["principal"], body["person"]
    if not path.startswith("team/"):
        Subject(path, tuple(body["roles"]), tuple(body["teams"]), person, suspended=False)
    first = state.principals.get(person)
    chained = person != path and (first is None or first.person != person)
    others = [each for each in state.principals.values() if each.path != path]
    if chained or (person != path and any(each.person == path for each in others)):
        raise UsageError(
            "principal.person",
            f"the person behind {path} is named by the principal that they had first, and {person} is not one",
            hint=_PRINCIPALS,
        )
    if body["key"] and any(each.key == body["key"] and each.person != person for each in others):
        raise UsageError("principal.key", f"the key of {path} is that of another person", hint=_PRINCIPALS)
    if body["key"] and signatures.key_id(bytes.fromhex(body["key"])) in state.sessions:
        raise UsageError("principal.key", "this key was introduced by a login", hint="strongroom identity new")
    bound = body.get("subject", "")
    if bound and any(each.subject == bound and each.person != person for each in others):
        raise UsageError("principal.subject", f"{path} is bound to a name of another person", hint=_PRINCIPALS)
