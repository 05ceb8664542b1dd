"""Requests, grants and proposals as callers see them: one shape for all that waits for approvals; and reasons."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from typing import Any

from strongroom.core.limits import LIMITS
from strongroom.errors import UsageError
from strongroom.formats.entry import Private
from strongroom.policy.state import Grant, Proposal, Request, State


def describe_request(state: State, request: Request, now: int) -> dict[str, Any]:
    """A request, with the lease that it has become; what it `needs` is left to whoever asks policy."""
    lease = state.leases.get(request.id)
    found = request.state_at(now)
    if lease is not None and found == "approved" and not lease.holds(now):
        found = "revoked" if lease.ended else "used" if lease.used_up else "expired"
    told = None
    if lease is not None:
        told = {
            "id": lease.id,
            "holder": lease.holder,
            "expires_at": lease.expires_at,
            "uses": lease.uses,
            "used": lease.used,
            "ended": lease.ended,
        }
    return {
        "id": request.id,
        "digest": request.digest,
        "action": request.action,
        "ref": request.ref,
        "for": request.holder,
        "by": request.by,
        "duration": request.duration,
        "uses": request.uses,
        "state": found,
        "needs": [],
        "approved_by": list(dict.fromkeys(each.by for each in request.approvals)),
        "lease": told,
        "expires_at": lease.expires_at if lease is not None else request.expires_at,
    }


def describe_ended(state: State, index: int, at: int) -> dict[str, Any]:
    """The leases that held until the entry at `index`, of the time `at`, and ended with it: whoever freezes what leaked
    ends the searches for whose copy it was, too."""
    ended = [each for each in state.leases.values() if each.ended.endswith(f" in entry {index}")]
    held = [each for each in ended if replace(each, ended="").lasts(at)]
    return {"ended": [{"id": each.id, "action": each.action, "ref": each.ref, "holder": each.holder} for each in held]}


def describe_grant(grant: Grant, now: int) -> dict[str, Any]:
    """A change of a principal, or of an authority, that waits, or has waited, for a second person."""
    state = grant.state_at(now)
    state = "done" if state == "approved" else state
    about, record = "authority" in grant.record, grant.record
    return {
        "id": grant.id,
        "digest": grant.digest,
        "action": "authority" if about else "grant",
        "ref": "" if about else ", ".join(record["roles"]),
        "for": record["authority"] if about else record["principal"],
        "by": grant.by,
        "duration": 0,
        "uses": None,
        "state": state,
        "needs": [f"the approval of somebody else than {grant.by} who may grant"] if state == "pending" else [],
        "approved_by": [grant.approved_by] if grant.approved_by else [],
        "lease": None,
        "expires_at": grant.expires_at,
    }


def describe_proposal(proposal: Proposal) -> dict[str, Any]:
    """A policy that somebody proposes."""
    approvers = [each.by for each in proposal.approvals]
    waits = proposal.state == "pending" and not approvers
    return {
        "id": proposal.id,
        "digest": proposal.statement,
        "action": "policy",
        "ref": "",
        "for": "",
        "by": proposal.by,
        "duration": 0,
        "uses": None,
        "state": proposal.state,
        "approved_by": approvers,
        "needs": [f"the approval of somebody else than {proposal.by}"] if waits else [],
        "enact_after": proposal.enact_after,
        "lease": None,
        "expires_at": None,
    }


def check_reason(reason: Private, commitment: str) -> None:
    """UsageError for what can't be kept or shown, or says nothing, Tampered unless it is what was signed."""
    shown = all(each.isprintable() or each in "\n\t" for each in reason.value)
    if reason.name != "reason" or len(reason.value) > LIMITS.reason or not shown:
        raise UsageError(
            "reason.malformed",
            f"a reason is a text of at most {LIMITS.reason} characters that can be shown",
            hint="--reason",
        )
    # Fillers of Hangul are letters to Unicode, and nothing to who reads.
    said = unicodedata.normalize("NFKC", reason.value).replace("\u115f", "").replace("\u1160", "")
    if not any(each.isalnum() for each in said):
        raise UsageError("reason.empty", "a reason says something: others will read it", hint="--reason TEXT")
    reason.check(commitment)
