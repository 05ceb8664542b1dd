"""What is asked for, as those see it who answer: whether they are told of it, whether it still waits, and what is said
to whoever comes too late, twice, or for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from strongroom.core.clock import duration as said
from strongroom.errors import Conflict, NotFound, StrongroomError, UsageError
from strongroom.formats.statement import Statement
from strongroom.policy.speaker import Speaker
from strongroom.policy.state import Approval, Grant, Proposal, Request, State

T = TypeVar("T")
Asked = Request | Grant | Proposal


def unknown(identifier: str) -> NotFound:
    """The one answer about what is not there, and about what is somebody else's business: in the same words, or they
    would tell which of the two it is."""
    return NotFound("request.unknown", f"there is no request {identifier!r:.40}", hint="strongroom requests")


def find(state: State, digest: str) -> Asked:
    """What waits, or has waited, under the whole hash of what was signed; NotFound ``request.unknown``."""
    found = (
        _of(state.proposals, digest, lambda each: each.statement)
        or _of(state.grants, digest, lambda each: each.digest)
        or _of(state.requests, digest, lambda each: each.digest)
    )
    if found is None:
        raise unknown(digest[:16])
    return found


@contextlib.contextmanager
def told(state: State, who: Speaker, found: Asked | None, identifier: str) -> Iterator[None]:
    """A guest is told of what it asked for, of what is for it, and of itself. Whatever else it is refused in this block
    it is refused as if there were nothing of the name `identifier`."""
    concerned = {identifier, found.by if found else ""}
    if isinstance(found, Request):
        concerned.add(found.holder)
    elif isinstance(found, Grant):
        concerned.add(found.record.get("principal", ""))
    persons = {state.principals[each].person for each in concerned if each in state.principals}
    try:
        yield
    except StrongroomError:
        if who.guest and who.person not in persons:
            raise unknown(identifier) from None
        raise


def waits(state: State, found: Asked, now: int) -> None:
    """Conflict ``request.over`` for what was decided already, or has expired."""
    current = found.state if isinstance(found, Proposal) else found.state_at(now)
    if current == "pending":
        return
    lease = state.leases.get(found.id)
    if isinstance(found, Proposal):
        hint = "strongroom policy show"
    elif lease is not None and lease.holds(now):
        hint = f"strongroom revoke {found.id} --reason TEXT, to end the lease that it is now"
    else:
        hint = f"strongroom requests {found.id}"
    raise Conflict("request.over", f"{found.id} is {current}", hint=hint, state=current)


def unheard(state: State, statement: Statement) -> None:
    """Half an hour of hashing finds two statements with one identifier; an approval of one must not be taken for an
    approval of the other."""
    if statement.id in state.requests or statement.id in state.proposals or statement.id in state.grants:
        raise Conflict("request.exists", f"there is a {statement.id} already", hint="sign a new one")


def once(identifier: str, approvals: list[Approval], who: Speaker) -> None:
    """Conflict ``approve.duplicate``: a person counts once."""
    if any(each.person == who.person for each in approvals):
        raise Conflict(
            "approve.duplicate",
            f"{who.path}, or the same person, has approved {identifier} already",
            hint=f"somebody else runs: strongroom approve {identifier}",
        )


def narrowed(request: Request, duration: int, uses: int | None) -> tuple[int, int | None]:
    """What is left of a request when an approver allows `duration` (0: as asked) and `uses`; never more than before."""
    if duration > request.duration:
        raise UsageError(
            "approve.longer",
            f"{request.id} is for {said(request.duration)}, which may be shortened, and not made {said(duration)}",
            hint=f"--duration {said(request.duration)}, or less",
        )
    counts = [count for count in (request.uses, uses) if count is not None]
    if 0 in counts:
        hint = f"to refuse: strongroom deny {request.id} --reason TEXT"
        raise UsageError("approve.nothing", "a lease is for at least one use", hint=hint)
    return duration or request.duration, min(counts, default=None)


def _of(found: dict[str, T], digest: str, whole: Callable[[T], str]) -> T | None:
    item = found.get(digest[:16])
    return item if item is not None and whole(item) == digest else None
