"""Review: who has what, who used it when, what was never used, who approved it; and what of it to look at.

A function of the log: the same entries give the same review, whoever makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from strongroom.formats.entry import CUSTODIAN, UNKNOWN, Entry
from strongroom.policy import apikeys
from strongroom.policy.state import Lease, State

SEVERITIES = ("info", "low", "medium", "high")
_DAY = 86_400
_UNUSED = _DAY  # a lease that nobody has used after a day was asked for too early, or not needed
_IDLE = 90 * _DAY
_REFUSALS = 10  # of one principal, since the last review


@dataclass(frozen=True)
class Finding:
    """Something to look at. `removes`: what `revoke` would take away, or empty where a person has to decide."""

    severity: str
    kind: str
    about: str
    message: str
    removes: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass
class Activity:
    """What one principal has done, counted over the whole log; times in seconds, 0 for never."""

    principal: str
    releases: int = 0
    copies: int = 0
    requests: int = 0
    approvals: int = 0
    refused: int = 0
    last: int = 0


@dataclass(frozen=True)
class Holding:
    """A lease that holds now."""

    lease: str
    holder: str
    action: str
    ref: str
    expires_at: int
    used: int
    last_used: int
    approved_by: tuple[str, ...]


@dataclass(frozen=True)
class Review:
    """Of the first `size` entries of a log. `findings` are ranked, the worst first; `emergencies`: the entries of
    releases past a lease, and of policies before their time, that nobody else has reviewed."""

    findings: list[Finding] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    activity: list[Activity] = field(default_factory=list)
    emergencies: list[int] = field(default_factory=list)
    size: int = 0

    @property
    def worst(self) -> str:
        """The severity of the first finding, or empty."""
        return self.findings[0].severity if self.findings else ""

    def as_json(self) -> dict[str, Any]:
        return {
            "findings": [each.as_json() for each in self.findings],
            "holdings": [{**asdict(each), "approved_by": list(each.approved_by)} for each in self.holdings],
            "activity": [asdict(each) for each in self.activity],
            "emergencies": self.emergencies,
            "size": self.size,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Review:
        """The reverse, of an answer that has these members; more are left out."""
        findings = [Finding(**_of(Finding, item)) for item in value["findings"]]
        holdings = [
            Holding(**_of(Holding, item) | {"approved_by": tuple(item["approved_by"])}) for item in value["holdings"]
        ]
        activity = [Activity(**_of(Activity, item)) for item in value["activity"]]
        return cls(findings, holdings, activity, list(value["emergencies"]), value["size"])


def _of(kind: type, item: Mapping[str, Any]) -> dict[str, Any]:
    return {each.name: item[each.name] for each in fields(kind)}


def review(state: State, entries: Iterable[Entry], now: int) -> Review:
    """The review of a room whose log is `entries`, from the first, and whose state they make is `state`."""
    history = _History(state)
    size = 0
    for index, entry in enumerate(entries):
        history.add(index, entry)
        size = index + 1
    holdings = [_holding(state, history, lease) for lease in state.leases.values() if lease.holds(now)]
    findings = [*_of_leases(state, holdings, now), *_of_people(state, history, now), *_of_releases(state, history)]
    findings.sort(key=lambda each: (-SEVERITIES.index(each.severity), each.kind, each.about))
    known = [history.of(path) for path in state.principals]
    others = [item for path, item in history.activity.items() if path not in state.principals]
    activity = sorted(known + others, key=lambda each: (-(each.releases + each.copies + each.refused), each.principal))
    emergencies = [index for index, _ in history.emergencies]
    return Review(findings, sorted(holdings, key=lambda each: each.expires_at), activity, emergencies, size)


class _History:
    """What only the entries say: counts, and what has happened since somebody reviewed last."""

    def __init__(self, state: State) -> None:
        self.activity: dict[str, Activity] = {}
        self._open = state.emergencies
        self.emergencies: list[tuple[int, Entry]] = []  # that nobody else has reviewed
        self.refused: dict[str, int] = {}  # since the last review
        self.used: dict[str, int] = {}  # lease: when last

    def of(self, path: str) -> Activity:
        return self.activity.setdefault(path, Activity(path))

    def add(self, index: int, entry: Entry) -> None:
        if entry.type == "review":
            self.refused.clear()
        if str(index) in self._open:
            self.emergencies.append((index, entry))
        if entry.by == CUSTODIAN:
            return
        who = self.of(entry.by)
        match entry.type:
            case "release":
                who.releases += 1
                if entry.body["lease"] is not None:
                    self.used[entry.body["lease"]] = entry.at
            case "trace":
                if entry.body["lease"] is not None:
                    self.used[entry.body["lease"]] = entry.at
            case "copy":
                who.copies += 1
            case "request":
                who.requests += 1
            case "approve":
                who.approvals += 1
            case "refused":
                who.refused += 1
                self.refused[entry.by] = self.refused.get(entry.by, 0) + 1
        if entry.type != "refused":
            who.last = max(who.last, entry.at)


def _holding(state: State, history: _History, lease: Lease) -> Holding:
    request = state.requests.get(lease.id)
    approved = tuple(each.by for each in request.approvals) if request else ()
    last = history.used.get(lease.id, 0)
    return Holding(lease.id, lease.holder, lease.action, lease.ref, lease.expires_at, lease.used, last, approved)


def _of_leases(state: State, holdings: list[Holding], now: int) -> Iterable[Finding]:
    for each in holdings:
        age = now - state.leases[each.lease].granted_at
        what = f"{each.holder} may {each.action} {each.ref}"
        if not each.used and age >= _UNUSED:
            severity = "medium" if each.action == "copy" else "low"
            message = f"{what}, and has not in {age // _DAY} days"
            yield Finding(severity, "unused-lease", each.lease, message, each.lease)
        gone = [path for path in each.approved_by if not state.principals[path].active]
        if gone:
            message = f"{what} by the approval of {', '.join(gone)}, who may not act any more"
            yield Finding("medium", "approver-gone", each.lease, message, each.lease)


def _of_people(state: State, history: _History, now: int) -> Iterable[Finding]:
    inferring = any(int(day) * _DAY > now - _IDLE for day in state.usage)
    for each in state.principals.values():
        last = max(history.of(each.path).last, each.since)
        if each.active and each.roles and now - last >= _IDLE:
            message = f"{each.path} ({', '.join(each.roles)}) has done nothing for {(now - last) // _DAY} days"
            # What is done at the gateway is in its records, and by nobody in the log.
            calls = inferring and (each.subject or apikeys.of(state, each.path, now))
            message += ", unless it calls the gateway, whose records say so" if calls else ""
            yield Finding("medium", "idle", each.path, message, "" if calls else each.path)
        both = {"officer", "executive"} & set(each.roles) and {"researcher", "partner"} & set(each.roles)
        if each.active and both and state.custody != "solo":  # there it is so by design
            message = f"{each.path} approves and holds weights: {', '.join(each.roles)}"
            yield Finding("medium", "duties", each.path, message)
    for path, count in history.refused.items():
        if count >= _REFUSALS and path != UNKNOWN:
            yield Finding("high", "refusals", path, f"{path} was refused {count} times since the last review")
    if count := history.refused.get(UNKNOWN, 0):
        message = f"somebody who could not say who they are was refused {count} times since the last review"
        yield Finding("high" if count >= _REFUSALS else "low", "unknown", "", message)
    approvers = {each.person for each in state.principals.values() if each.active and "officer" in each.roles}
    if len(approvers) == 1:
        yield Finding("info", "one-officer", "", f"{next(iter(approvers))} is the only officer")


def _of_releases(state: State, history: _History) -> Iterable[Finding]:
    for index, entry in history.emergencies:
        if entry.type == "reinstate":
            message = (
                f"recovery shares have made {entry.ref} an active {entry.body['role']}, in entry {index}: "
                f"strongroom log show {index}; somebody else has to review it"
            )
            yield Finding("high", "reinstated", entry.ref, message)
            continue
        message = (
            f"{entry.by} broke the glass for {entry.ref or 'a policy, before its time'}, in entry {index}: "
            f"strongroom log show {index}; "
            "somebody else has to review it"
        )
        yield Finding("high", "break-glass", entry.by, message)
    for use in state.uses.values():
        version = state.versions.get(use.ref)
        if use.copies and version is not None and not version.shredded:
            message = f"{use.holder} has a plaintext copy of {use.ref}" + (f", {use.copies} times" * (use.copies > 1))
            yield Finding("info", "copy", f"{use.holder} {use.ref}", message)
