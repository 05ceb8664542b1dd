"""A question to the policy: who, what, on which weights, in which situation; and its form for Cedar.

Names are refused here unless they are in the path grammar, and reach Cedar as JSON strings only: no name can become
policy text. Wherever a forgotten argument could open a door, it has no default.
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import Any

from strongroom.core.ids import Ref, parse_principal
from strongroom.errors import UsageError

# What a request for inference may have besides (spec/gateway.md, section 2), each asked after `infer`. They help to
# steal a model, so a rule permits one only by its name: one for every action, maybe older than these, permits none.
FEATURES = ("infer_logprobs", "infer_embeddings", "infer_steering", "infer_many")
NAMED = (*FEATURES, "relay")  # what no rule for every action permits
ACTIONS = (
    "put",
    "load",
    "copy",
    "infer",
    *FEATURES,
    "adapt",
    "trace",
    "approve",
    "grant",
    "audit",
    "administer",
    "relay",
)
ON_WEIGHTS = ("load", "copy", "infer", *FEATURES, "adapt")  # never about the room as a whole
RELEASES = ("load", "copy")  # decided twice: in stage "grant" and in stage "release"
LEASED = (*RELEASES, "trace")  # what a lease may be for
STAGES = ("grant", "release", "direct")
AUTHENTICATIONS = (
    "key",
    "passkey",
    "oidc",
    "x509",
    "apikey",
)  # what the one who speaks has shown; policy/speaker.py finds it
ROLES = ("researcher", "operator", "officer", "executive", "auditor", "partner", "gateway")
ALONE = ("gateway",)  # goes with no other role: what has it is the one program that strangers reach
ROOM = "room"  # as a `ref`: the room as a whole. Of weights that have this very name, only versions can be named.

_ROLE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_LONG_MAX = 2**63 - 1  # Cedar's Long
_TEXT_MAX = 256
_NO_ADDRESS = "::"  # the unspecified address, which is in no range but ::/0
_COUNTS = (
    "approvals",
    "operators",
    "officers",
    "executives",
    "duration",
    "now",
    "egress_used",
    "egress_budget",
    "holders",
    "copies",
    "copiers",
)


@dataclass(frozen=True)
class Subject:
    """Who acts: ``user/NAME`` or ``workload/NAME``. `person` is the same for all identities of one human.

    UsageError ``principal.malformed``, ``policy.subject``.
    """

    path: str
    roles: tuple[str, ...]
    teams: tuple[str, ...]
    person: str
    suspended: bool

    def __post_init__(self) -> None:
        if parse_principal(_text(self.path, "a principal")).startswith("team/"):
            raise UsageError("policy.subject", f"{self.path} is a team: its members act, each as itself")
        for role in self.roles:
            if not _ROLE.fullmatch(_text(role, "a role")):
                raise UsageError("policy.subject", f"{role!r:.80} is not the name of a role, such as {ROLES[0]}")
        for team in self.teams:
            if not parse_principal(_text(team, "a team")).startswith("team/"):
                raise UsageError("policy.subject", f"{team} is not a team; expected team/NAME")
        # Two principals of nobody in particular would count as one person, or as two: neither is known.
        if not _text(self.person, "the person behind a principal"):
            raise UsageError("policy.subject", f"{self.path} has no person behind it")
        _flag(self.suspended, "suspended")

    @property
    def uid(self) -> dict[str, str]:
        return _uid("User" if self.path.startswith("user/") else "Workload", self.path)


@dataclass(frozen=True)
class Resource:
    """The weights (``NAME`` or ``NAME@N``), with their ceilings; or the room as a whole, `Resource.room()`.

    UsageError ``ref.malformed``, ``policy.resource``.
    """

    ref: str
    max_holders: int
    max_copies: int
    max_copiers: int
    frozen: bool

    def __post_init__(self) -> None:
        Ref.parse(_text(self.ref, "a reference"))
        for name in ("max_holders", "max_copies", "max_copiers"):
            _count(getattr(self, name), name)
        _flag(self.frozen, "frozen")

    @classmethod
    def room(cls) -> Resource:
        return cls(ROOM, 0, 0, 0, frozen=False)

    @property
    def is_room(self) -> bool:
        return self.ref == ROOM

    @property
    def uid(self) -> dict[str, str]:
        return _uid("Room" if self.is_room else "Weights", self.ref)

    @property
    def parents(self) -> list[dict[str, str]]:
        """What the weights are in: of acme/tiny@3 these are acme/tiny, acme and the room."""
        if self.is_room:
            return []
        ref = Ref.parse(self.ref)
        parts = ref.name.split("/")
        above = ["/".join(parts[:count]) for count in range(1, len(parts) + (ref.number is not None))]
        return [_uid("Weights", name) for name in above] + [_uid("Room", ROOM)]


@dataclass(frozen=True)
class Situation:
    """The context of a question; schema.cedarschema says what each is. The defaults are those of a principal that has
    no lease and no approvals, speaks under its own key, and comes from an unknown place. UsageError
    ``policy.situation``.

    `approvals` counts distinct people other than the one who asks; each of them is counted under one role as well, the
    highest of executive, officer, operator. `holders`, `copies` and `copiers` leave this principal out.
    """

    stage: str = "direct"
    approvals: int = 0
    operators: int = 0
    officers: int = 0
    executives: int = 0
    lease: bool = False
    duration: int = 0
    now: int = 0
    address: str | None = None
    attested: bool = False
    evidence: str = ""
    measurement: str = ""
    egress_used: int = 0
    egress_budget: int = 0
    holders: int = 0
    copies: int = 0
    copiers: int = 0
    break_glass: bool = False
    same_person: bool = False
    asked: str = ""
    authentication: str = "key"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise _situation(f"{self.stage!r:.80} is not a stage; expected one of {', '.join(STAGES)}")
        if self.asked and self.asked not in ACTIONS:
            raise _situation(f"{self.asked!r:.80} is not an action; expected one of {', '.join(ACTIONS)}")
        if self.authentication not in AUTHENTICATIONS:
            known = ", ".join(AUTHENTICATIONS)
            raise _situation(f"{self.authentication!r:.80} is not a way to authenticate; expected one of {known}")
        for name in _COUNTS:
            _count(getattr(self, name), name)
        for name in ("lease", "attested", "break_glass", "same_person"):
            _flag(getattr(self, name), name)
        for name in ("evidence", "measurement"):
            _text(getattr(self, name), name)
        if self.address is not None:
            _address(self.address)

    @property
    def hour(self) -> int:
        return self.now // 3600 % 24

    @property
    def weekday(self) -> int:
        """1 is Monday, as in ISO 8601. The first day of 1970 was a Thursday."""
        return (self.now // 86_400 + 3) % 7 + 1

    def context(self) -> dict[str, Any]:
        """The record that Cedar sees."""
        address = _NO_ADDRESS if self.address is None else _address(self.address)
        return {
            "stage": self.stage,
            "approvals": {
                "total": self.approvals,
                "operators": self.operators,
                "officers": self.officers,
                "executives": self.executives,
            },
            "lease": self.lease,
            "duration": self.duration,
            "now": self.now,
            "hour": self.hour,
            "weekday": self.weekday,
            "network": {
                "known": self.address is not None,
                "address": {"__extn": {"fn": "ip", "arg": address}},
            },
            "attestation": {"verified": self.attested, "kind": self.evidence, "measurement": self.measurement},
            "egress": {"used": self.egress_used, "budget": self.egress_budget},
            "holders": self.holders,
            "copies": self.copies,
            "copiers": self.copiers,
            "break_glass": self.break_glass,
            "same_person": self.same_person,
            "asked": self.asked,
            "authentication": self.authentication,
        }


@dataclass(frozen=True)
class Query:
    """May `subject` do `action` to `resource`? UsageError ``policy.action``."""

    subject: Subject
    action: str
    resource: Resource
    situation: Situation

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UsageError(
                "policy.action", f"{self.action!r:.80} is not an action; expected one of {', '.join(ACTIONS)}"
            )
        if self.resource.is_room and self.action in ON_WEIGHTS:
            raise UsageError("policy.action", f"{self.action} is about weights, and not about the room")

    def request(self) -> dict[str, Any]:
        """The request that Cedar takes, names as JSON strings."""
        return {
            "principal": self.subject.uid,
            "action": _uid("Action", self.action),
            "resource": self.resource.uid,
            "context": self.situation.context(),
        }

    def entities(self) -> str:
        """The principal and the resource with what they are in, as a JSON document."""
        resource = self.resource
        ceilings = {} if resource.is_room else _ceilings(resource)
        subject = self.subject
        groups = [_uid("Role", role) for role in subject.roles] + [_uid("Team", team) for team in subject.teams]
        return json.dumps(
            [
                {
                    "uid": subject.uid,
                    "attrs": {"person": subject.person, "suspended": subject.suspended},
                    "parents": groups,
                },
                {"uid": resource.uid, "attrs": ceilings, "parents": resource.parents},
            ]
        )


def _ceilings(resource: Resource) -> dict[str, int | bool]:
    return {
        "max_holders": resource.max_holders,
        "max_copies": resource.max_copies,
        "max_copiers": resource.max_copiers,
        "frozen": resource.frozen,
    }


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": f"Strongroom::{kind}", "id": name}


def _situation(message: str) -> UsageError:
    return UsageError("policy.situation", message)


def _text(value: object, what: str) -> str:
    """Printable ASCII: nothing that a terminal, a log or Cedar could read as more than a name."""
    if not isinstance(value, str) or len(value) > _TEXT_MAX or not (value.isascii() and value.isprintable()):
        raise _situation(f"{what} is at most {_TEXT_MAX} printable ASCII characters; this is {value!r:.80}")
    return value


def _count(value: object, what: str) -> None:
    # bool is an int in Python, and true is not 1 for Cedar.
    if type(value) is not int or not 0 <= value <= _LONG_MAX:
        raise _situation(f"{what} is a whole number from 0 to 2^63 - 1; this is {value!r:.80}")


def _flag(value: object, what: str) -> None:
    if not isinstance(value, bool):
        raise _situation(f"{what} is true or false; this is {value!r:.80}")


def _address(value: str) -> str:
    """The address as Cedar takes it. ::ffff:10.0.0.1 becomes 10.0.0.1, which a rule about 10.0.0.0/8 has to see."""
    try:
        address = ipaddress.ip_address(_text(value, "an address"))
    except ValueError:
        raise _situation(f"{value!r:.80} is not an IP address") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise _situation(f"{value!r:.80} has a zone, which means something on one machine only")
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
    return str(address)
