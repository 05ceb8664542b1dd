"""What people do to a room and to what is in it, besides asking and approving: each act is a signed statement of its
own kind, and an entry that quotes it.

As in policy/custody.py each is a decision: a function of the state, the time and a statement. All but `copy` take the
right to `administer`, `put` and `trace` the one to do that, `inference` the one to `relay`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from strongroom.core.clock import about, text
from strongroom.core.ids import Ref
from strongroom.errors import Conflict, Denied, NotFound, Pending, UsageError
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.formats.stream import owned
from strongroom.policy import usage
from strongroom.policy.query import ROOM
from strongroom.policy.speaker import TOLERANCE, Speaker, authenticate

if TYPE_CHECKING:
    from strongroom.policy.custody import Custody
    from strongroom.policy.state import Lease, State


def enact(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """A proposal that waited long enough, and that somebody else has agreed to, becomes the policy. With a reason it
    does so before its time: an emergency, which stays open until somebody else has reviewed it."""
    who = _administrator(rules, state, statement, now)
    emergency = bool(statement.body["reason"])
    if emergency:
        rules.may(state, who, "administer", now=now, break_glass=True)
    name = statement.body["proposal"]
    proposal = state.proposals.get(name)
    if proposal is None or proposal.state != "pending":
        raise NotFound("policy.no_proposal", f"no proposal {name!r:.40} is open", hint="strongroom policy show")
    agreed = {
        state.principals[each.by].person
        for each in proposal.approvals
        if rules.counts(state, each, ROOM, "administer", now)
    }
    proposer = state.principals[proposal.by]
    if rules.allowed(state, Speaker(proposer, proposal.method), "administer", now):
        agreed.add(proposer.person)
    if len(agreed) < 2:
        raise Pending(
            "policy.needs_second",
            f"the policy {proposal.id} needs the approval of somebody else than {proposal.by}",
            hint=f"somebody else runs: strongroom approve {proposal.id}",
        )
    if now < proposal.enact_after and not emergency:
        raise Pending(
            "policy.waiting",
            f"the policy {proposal.id} may be enacted from {text(proposal.enact_after)}, "
            f"in {about(proposal.enact_after - now)}",
            hint=f"then: strongroom policy enact {proposal.id}; before, in an emergency: --break-glass REASON",
            enact_after=proposal.enact_after,
        )
    body = {"digest": proposal.digest, "proposal": proposal.id, "break_glass": emergency}
    return _entry("policy", who, "", statement, now, body)


def ceiling(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """How many may hold, copy and have copies of a version, or of every version of a name."""
    who = _administrator(rules, state, statement, now)
    ref = statement.body["ref"]
    if not any(ref in (each, each.partition("@")[0]) for each in state.versions):
        raise NotFound("version.missing", f"there are no weights {ref} in this room", hint="strongroom ls")
    body = {name: statement.body[name] for name in ("holders", "copies", "copiers")}
    return _entry("ceiling", who, ref, statement, now, body)


def thaw(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """A version that was revoked may be asked for again. Its leases have ended: each takes new approvals."""
    who = _administrator(rules, state, statement, now)
    ref = statement.body["ref"]
    version = state.versions.get(ref)
    if version is None or not version.frozen:
        raise NotFound("thaw.nothing", f"{ref} is not a frozen version of this room", hint="strongroom ls")
    return _entry("thaw", who, ref, statement, now, {})


def clock(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """After the clock had been ahead: the room's time is taken back to now. Ends every lease, and every login."""
    who = _administrator(rules, state, statement, now, any_clock=True)
    if now >= state.latest - TOLERANCE:
        raise UsageError("clock.right", "the clock is not behind the log: nothing has to be mended")
    return _entry("clock", who, "", statement, now, {"before": state.latest})


def redact(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """What was kept beside an entry goes; who may look, and that there is something, is the caller's to see to."""
    who = _administrator(rules, state, statement, now)
    if str(statement.body["entry"]) in state.emergencies:
        raise Denied(
            "redact.open",
            f"entry {statement.body['entry']} is an emergency that nobody else has reviewed: its reason "
            "stays until then",
            hint="somebody else runs: strongroom review --apply",
        )
    return _entry("redact", who, "", statement, now, {"entry": statement.body["entry"]})


def review(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """Somebody has looked at the log as it was with its first `size` entries."""
    who = _administrator(rules, state, statement, now)
    return _entry("review", who, "", statement, now, statement.body)


def copy(_: Custody, state: State, statement: Statement, now: int) -> Entry:
    """The holder of a release says that the plaintext copy is written."""
    who = authenticate(state, statement, now)
    body = dict(statement.body)
    if body["holder"] != who.path:
        raise UsageError("copy.holder", f"{who.path} has no copy of {body['holder']:.80}'s")
    return _entry("copy", who, body.pop("ref"), statement, now, body)


def trace(
    rules: Custody,
    state: State,
    statement: Statement,
    now: int,
    verdict: str,
    accused: Sequence[str],
    *,
    detail: str | None = None,
    since: int | None = None,
) -> Entry:
    """Somebody has a suspect file searched for the marks of a version, or of every one; what was found is recorded
    before it is told. With an empty `verdict` nothing was yet, and it is asked whether it may be. `accused`:
    principals; `detail`: a commitment; the statement came at `since`, when it was young."""
    who = authenticate(state, statement, now, since=since)
    body = statement.body
    ref, lease = body["ref"] or "", None
    if body["lease"] is not None:
        lease = _lease_to_trace(state, who, body["lease"], ref, now if since is None else since, bool(verdict))
    if ref and lease is None:
        rules.veiled(state, who, "trace", ref, now, stage="release")
    if ref and ref not in state.versions:
        raise NotFound("version.missing", f"there are no weights {ref:.200} in this room", hint="strongroom ls")
    may_trace(rules, state, who, ref, now, lease)
    found = {"suspect": body["suspect"], "lease": body["lease"], "verdict": verdict, "accused": sorted(set(accused))}
    return _entry("trace", who, ref, statement, now, found, {"detail": detail} if detail else {})


def may_trace(rules: Custody, state: State, who: Speaker, ref: str, now: int, lease: Lease | None) -> None:
    """Denied, explained, unless `who` may trace the version `ref` under `lease`, or every version if `ref` is empty;
    Pending ``trace.pending`` while a request for it waits."""
    try:
        rules.may(state, who, "trace", ref or ROOM, now=now, lease=lease is not None if ref else None)
    except Denied as error:
        if not ref:
            raise
        # Who has asked already must not be told to ask: there would be two requests.
        raise rules.with_what_there_is(state, error, who.principal, "trace", ref, now) from None


def _lease_to_trace(state: State, who: Speaker, name: str, ref: str, since: int, found: bool) -> Lease:  # noqa: FBT001
    """The lease that a search which began at `since`, and has `found` something or not yet, is under. It has to hold
    then: a search takes hours, and its time may be over by the end. Not so of what was taken away or used up meanwhile,
    which is in force at once."""
    lease = state.leases.get(name)
    if lease is None or (lease.holder, lease.action, lease.ref) != (who.path, "trace", ref):
        raise Denied(
            "trace.lease",
            f"{who.path} has no lease {name} to trace {ref or 'every version'}",
            hint="strongroom requests",
        )
    if not lease.holds(since):
        why = lease.ended or ("other searches have used it up" if lease.used_up else "its time is over")
        raise Denied(
            "trace.lease",
            f"the lease {name} to trace {ref} has ended {'meanwhile' if found else 'already'}: {why}"
            + ("; what was found is not told" if found else ""),
            hint=f"strongroom requests {name}",
        )
    return lease


def inference(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """A gateway away from the room says what it has answered."""
    who = authenticate(state, statement, now)
    rules.may(state, who, "relay", now=now)
    body = dict(statement.body)
    ref, account = body.pop("ref"), body.pop("account")
    if not owned(body["gateway"], state.room, who.path):
        raise Denied(
            "inference.stream",
            f"the stream {body['gateway']} is not one of {who.path}",
            hint="strongroom principal ls; each gateway names its streams after its own principal",
        )
    if ref and ref not in state.versions:
        raise UsageError("inference.malformed", f"there never were weights {ref!r:.80} in this room")
    usage.check(state, body, account)
    return _entry("inference", who, ref, statement, now, body)


def keystore(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """Another key-encryption key, or key store."""
    who = _administrator(rules, state, statement, now)
    return _entry("keystore", who, "", statement, now, statement.body)


def put(
    rules: Custody,
    state: State,
    statement: Statement,
    now: int,
    ref: str,
    body: Mapping[str, Any],
    *,
    files: str,
    since: int | None = None,
) -> Entry:
    """Weights are in the room, as `ref`; `files` is the commitment to the digests of what was put. Whoever began it may
    do so at this moment still; the statement came at `since`, when it was young."""
    who = authenticate(state, statement, now, since=since)
    rules.may(state, who, "put", now=now)
    if statement.body["name"] != Ref.parse(ref).name or statement.body["files"] != files:
        raise UsageError("put.other", "the statement is about other weights than those that are put")
    return _entry("put", who, ref, statement, now, body, {"files": files})


def rotate(rules: Custody, state: State, statement: Statement, now: int, body: Mapping[str, Any]) -> Entry:
    """A version has another revision, under new keys."""
    who = _administrator(rules, state, statement, now)
    return _entry("rotate", who, statement.body["ref"], statement, now, body)


def shred(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """A version's keys are destroyed: a clock that is wrong must not keep them alive."""
    who = _administrator(rules, state, statement, now, any_clock=True)
    ref = statement.body["ref"]
    if ref not in state.versions or state.versions[ref].shredded:
        raise Conflict("shred.unrecorded", f"the log has no version {ref} to shred")
    return _entry("shred", who, ref, statement, now, {})


def _administrator(rules: Custody, state: State, statement: Statement, now: int, *, any_clock: bool = False) -> Speaker:
    who = authenticate(state, statement, now, any_clock=any_clock)
    rules.may(state, who, "administer", now=now)
    return who


def _entry(
    kind: str,
    who: Speaker,
    ref: str,
    statement: Statement,
    now: int,
    body: Mapping[str, Any],
    private: Mapping[str, str] | None = None,
) -> Entry:
    """The entry that quotes `statement`; a reason in it is a commitment."""
    if private is None:
        private = {"reason": statement.body["reason"]} if statement.body.get("reason") else {}
    return Entry(kind, now, who.path, ref, {**body, "statement": statement.envelope}, private)
