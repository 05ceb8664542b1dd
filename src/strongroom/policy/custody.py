"""The rules of custody: what a signed statement does to the state that the log has made, or why it is refused.

Every method is a decision: a function of the state, the time and a statement, that returns the entry to append. The
sequencer calls it right before the entry is appended, so what was checked is still true when the entry is there.
Steps of `release` are numbered as in spec/release.md, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from strongroom.core.clock import text
from strongroom.core.ids import Ref, parse_principal
from strongroom.errors import Conflict, Denied, NotFound, Pending, StrongroomError, UsageError
from strongroom.formats.entry import Entry
from strongroom.formats.principal import RANKS, TOGETHER, gains, resolved, weighty
from strongroom.formats.statement import Statement
from strongroom.policy import entrance, registration, waiting
from strongroom.policy.engine import Decision, Policies
from strongroom.policy.explain import explain
from strongroom.policy.facts import CEILINGS, resource, situation, subject
from strongroom.policy.query import ROOM, Query, Resource
from strongroom.policy.speaker import OWN_KEY, Speaker, authenticate
from strongroom.policy.state import Approval, Grant, Lease, Principal, Proposal, Request, State, Version

REQUEST_LIFE = 7 * 86_400  # seconds in which a request may be approved
WAITING = 86_400  # seconds between a proposal and its policy
_LONGEST = 100 * 366 * 86_400  # seconds that may be asked for; what is granted is policy's to say

# What a request still needs.
Missing = Callable[[], list[str]]


@dataclass(frozen=True)
class Facts:
    """What the custodian's sealed record says of a version."""

    revision: int
    manifest: str


class Custody:
    """The rules, over what `policies` finds by a digest."""

    def __init__(self, policies: Callable[[str], Policies]) -> None:
        self.policies = self._policies = policies

    def may(
        self,
        state: State,
        who: Speaker,
        action: str,
        ref: str = ROOM,
        *,
        now: int,
        break_glass: bool = False,
        lease: bool | None = None,
    ) -> Decision:
        """Denied, explained, unless policy lets `who` do this directly; in an emergency, if it is one. What is done
        under a lease as a rule: with the one that there is, or without."""
        stage = "direct" if lease is None else "release"
        here = situation(state, who, ref, now, stage=stage, break_glass=break_glass, lease=bool(lease))
        return self._ask(state, Query(subject(who), action, resource(state, ref), here))

    # -- requests ------------------------------------------------------------------------------------------------

    def request(self, state: State, statement: Statement, reason: str, now: int) -> Entry:
        """Somebody asks for a lease. Denied at once if no approval could ever make policy allow it."""
        who = authenticate(state, statement, now)
        body = statement.body
        waiting.unheard(state, statement)
        holder = state.principals.get(body["for"])
        # First: whether there is such a principal is told to those only who may ask for others.
        if not set(RANKS) & set(who.roles) and (holder is None or holder.person != who.person):
            raise Denied(
                "request.for_other",
                f"{who.path} may ask for itself, and not for {body['for']:.80}",
                hint=f"strongroom request {body['ref']:.200} --action {body['action']} --for {who.path} --reason TEXT",
            )
        if holder is None or not holder.active:
            raise NotFound("principal.unknown", f"{body['for']} is not a principal of this room", hint=_PRINCIPALS)
        if not 0 < body["duration"] <= _LONGEST or body["uses"] == 0:
            raise UsageError(
                "request.nothing",
                "a request is for some time, not for ever, and for at least one use",
                hint="--duration 8h",
            )
        self.veiled(state, Speaker(holder, OWN_KEY), body["action"], body["ref"], now, stage="grant")
        version = usable(state, body["ref"], body["action"])
        query = self._grant(state, holder, body["action"], version.ref, [], body["duration"], now)
        policies = self._policies(state.policy)
        if policies.decide(query).allowed:
            raise UsageError(
                "request.not_needed",
                f"{holder.path} needs nobody's approval to {body['action']} {version.ref}",
                hint=_without_lease(body["action"], version.ref),
            )
        explanation = explain(policies, query)
        if not explanation.needs:
            raise explanation.denied()
        return Entry(
            "request",
            now,
            who.path,
            version.ref,
            {
                "id": statement.id,
                "action": body["action"],
                "for": holder.path,
                "duration": body["duration"],
                "uses": body["uses"],
                "expires_at": now + REQUEST_LIFE,
                "statement": statement.envelope,
            },
            {"reason": reason},
        )

    def approve(self, state: State, statement: Statement, now: int) -> Entry:
        """One more person's yes; the last one that policy asks for grants the lease."""
        who = authenticate(state, statement, now)
        found = waiting.find(state, statement.body["request"])
        with waiting.told(state, who, found, found.id):
            if isinstance(found, Proposal):
                return self._agree(state, who, found, statement, now)
            if isinstance(found, Grant):
                return self._second(state, who, found, statement, now)
            return self._yes(state, who, found, statement, now)

    def _yes(self, state: State, who: Speaker, request: Request, statement: Statement, now: int) -> Entry:
        waiting.waits(state, request, now)
        asker, holder = state.principals[request.by], state.principals[request.holder]
        if who.person in (asker.person, holder.person):
            raise Denied(
                "approve.own",
                f"nobody approves their own request: {request.id} was asked for by {asker.path} for {holder.path}, "
                f"and {who.path} is the same person",
                hint=f"somebody else runs: strongroom approve {request.id}",
            )
        self._approver(state, who, request.ref, request.action, now=now, about=request.id)
        usable(state, request.ref, request.action)
        duration, uses = waiting.narrowed(request, statement.body["duration"], statement.body["uses"])
        approval = Approval(who.path, who.person, sorted(who.roles), now, 0, who.method)
        given = [*request.approvals, approval]
        query = self._grant(state, holder, request.action, request.ref, given, duration, now)
        lease = None
        allowed = self._policies(state.policy).decide(query).allowed
        # Once is enough, but for a request that has all its approvals, and that a rule kept from becoming a lease: when
        # the rule does not apply any more, somebody has to say so.
        if not allowed:
            waiting.once(request.id, request.approvals, who)
        if allowed:
            lease = {
                "id": request.id,
                "holder": holder.path,
                "action": request.action,
                "ref": request.ref,
                "expires_at": now + duration,
                "uses": uses,
            }
        body = {"id": request.id, "duration": duration, "uses": uses, "roles": sorted(who.roles), "lease": lease}
        return Entry("approve", now, who.path, request.ref, {**body, "statement": statement.envelope})

    def deny(self, state: State, statement: Statement, reason: str, now: int) -> Entry:
        """A no ends the request. Who asked for it may take it back."""
        who = authenticate(state, statement, now)
        found = waiting.find(state, statement.body["request"])
        ref, action = (found.ref, found.action) if isinstance(found, Request) else (ROOM, "administer")
        with waiting.told(state, who, found, found.id):
            waiting.waits(state, found, now)
            # Whoever could say yes may say no.
            if state.principals[found.by].person != who.person and isinstance(found, Grant):
                self.may(state, who, "grant", now=now)
            elif state.principals[found.by].person != who.person:
                self._approver(state, who, ref, action, now=now, act="deny", about=found.id)
        body = {"id": found.id, "statement": statement.envelope}
        return Entry("deny", now, who.path, "" if ref == ROOM else ref, body, {"reason": reason})

    def revoke(self, state: State, statement: Statement, reason: str, now: int) -> Entry:
        """End a lease or request, suspend a principal, freeze a version: in force for every entry after this one.

        Whoever may approve may revoke, alone: taking a right away must never wait for others.
        """
        who = authenticate(state, statement, now)
        target = statement.body["target"]
        with waiting.told(state, who, state.requests.get(target), target):
            ref = self._revocable(state, who, target, now)
        body = {"target": target, "statement": statement.envelope}
        return Entry("revoke", now, who.path, ref, body, {"reason": reason})

    def _revocable(self, state: State, who: Speaker, target: str, now: int) -> str:
        """What the entry is about, if `who` may revoke `target`, and it is not over."""
        mine, over, ref, look = False, "", target, "show"
        if target in state.requests:
            request, lease = state.requests[target], state.leases.get(target)
            ref, look = request.ref, "requests"
            mine = state.principals[request.holder].person == who.person
            current = request.state_at(now)
            over = current if current != "pending" and not (lease and lease.lasts(now)) else ""
        elif target in state.principals:
            look = "principal show"
            over = "" if state.principals[target].active else state.principals[target].state
        elif target in state.versions:
            over = "frozen" if state.versions[target].frozen else "shredded" if state.versions[target].shredded else ""
        # No action is asked for: rules about how approvals are given are not about taking away. And what there is, and
        # is not, is told to those only who might revoke it.
        if not mine:
            self._approver(state, who, ref if ref in state.versions else ROOM, "", now=now, act="revoke", about=target)
        if not {target} & {*state.requests, *state.principals, *state.versions}:
            numbered = ", ".join(each for each in state.versions if each.partition("@")[0] == target)
            raise NotFound(
                "revoke.unknown",
                f"{target!r:.80} is no lease, principal or version here",
                hint=f"a version is revoked by its number: {numbered}" if numbered else "strongroom requests",
            )
        if over:
            message = f"{target} is {'over' if over == 'approved' else over} already"
            raise Conflict("revoke.over", message, hint=f"strongroom {look} {target}", state=over)
        if target in state.principals:
            self._not_the_last(state, who, target, [])
        return ref

    def renew(self, state: State, statement: Statement, now: int) -> Entry:
        """A lease to load holds on, by one fresh yes; the approvals that granted it have to be enough still."""
        who = authenticate(state, statement, now)
        name = statement.body["lease"]
        request = state.requests.get(name)
        if request is None:
            raise waiting.unknown(name)
        with waiting.told(state, who, request, name):
            until = self._renewed(state, who, request, statement.body["duration"], now)
        body = {"lease": name, "expires_at": until, "statement": statement.envelope}
        return Entry("renew", now, who.path, request.ref, body)

    def _renewed(self, state: State, who: Speaker, request: Request, wanted: int, now: int) -> int:
        """Until when the lease holds then."""
        name, lease = request.id, state.leases.get(request.id)
        if lease is None or not lease.holds(now):
            message = f"{name} is no lease that holds: it was not granted yet, or has ended; then ask again"
            raise NotFound("renew.no_lease", message, hint=f"strongroom requests {name}")
        holder = state.principals[lease.holder]
        if lease.action != "load":
            raise Denied(
                "renew.copy",
                f"a lease to {lease.action} is not renewed",
                hint=f"strongroom request {lease.ref} --action {lease.action} --reason TEXT",
            )
        if who.person in (holder.person, state.principals[request.by].person):
            raise Denied(
                "approve.own", "nobody renews their own lease", hint=f"somebody else runs: strongroom renew {lease.id}"
            )
        self._approver(state, who, lease.ref, lease.action, now=now, act="renew", about=lease.id)
        duration, _ = waiting.narrowed(request, wanted, None)
        if now + duration < lease.expires_at:
            raise UsageError(
                "renew.shorter",
                f"the lease {lease.id} holds until {text(lease.expires_at)} already, which is later",
                hint=f"a longer --duration; to end it: strongroom revoke {lease.id} --reason TEXT",
            )
        query = self._grant(state, holder, lease.action, lease.ref, request.approvals, duration, now)
        policies = self._policies(state.policy)
        if not policies.decide(query).allowed:
            error = explain(policies, query).denied()
            again = f"strongroom request {lease.ref} --action load --for {lease.holder} --reason TEXT"
            if error.evidence["needs"]:  # more approvals can't be given to what is granted already
                error.hint = f"ask anew: {again}"
            raise error
        return now + duration

    # -- release -------------------------------------------------------------------------------------------------

    def release(
        self,
        state: State,
        statement: Statement,
        fresh: Callable[[], None],
        facts: Callable[[], Facts],
        now: int,
        *,
        reason: str | None = None,
    ) -> Entry:
        """A key bundle for one holder; spec/release.md, section 2. `fresh` raises unless the challenge is this room's,
        and young: its key is none of policy's business. `facts` raises what nobody but the speaker may learn."""
        # Steps 1 and 2.
        who = authenticate(state, statement, now)
        body = statement.body
        # Step 3.
        fresh()
        if body["challenge"] in state.recent:
            raise Conflict("challenge.used", "the challenge was used before", hint="ask for a new one")
        if body["reason"] != (reason or ""):  # the entry has to say what was signed
            raise UsageError("release.reason", "the release was signed with another reason than it comes with")
        form = {name: body[name] for name in ("form",) if name in body}
        if form and body["action"] != "copy":
            raise UsageError("release.form", "a form is one of a copy", hint="strongroom copy --help")
        # Step 4: nobody takes a bundle for somebody else, whose code word it would carry.
        if body["holder"] != who.path:
            raise Denied("release.holder", f"{who.path} can't take the keys of {body['holder']!r:.80}")
        # Step 5.
        lease = state.lease_for(who.path, body["action"], body["ref"], now)
        if lease is None:
            self.veiled(state, who, body["action"], body["ref"], now, stage="release")
        known = facts()
        version = usable(state, body["ref"])
        if (known.revision, known.manifest) != (version.revision, version.manifest):
            raise Conflict(
                "release.revision",
                f"the room's record of {version.ref} is not the one that the log has (revision {version.revision})",
                hint="strongroom fsck; if the database was set back, restore the newest copy of it",
            )
        # Step 6: the lease that was found; whether one is needed is policy's to say, in step 7.
        here = situation(
            state, who, version.ref, now, stage="release", lease=lease is not None, break_glass=body["break_glass"]
        )
        # Step 7.
        try:
            self._ask(state, Query(subject(who), body["action"], resource(state, version.ref), here))
        except Denied as error:
            if body["break_glass"]:
                message = f"{error.message}; nor does policy let {who.path} break the glass"
                raise Denied(error.code, message, hint=error.hint, **error.evidence) from None
            raise self.with_what_there_is(state, error, who.principal, body["action"], version.ref, now) from None
        return Entry(
            "release",
            now,
            who.path,
            version.ref,
            {
                "action": body["action"],
                "holder": who.path,
                "lease": lease.id if lease else None,
                "revision": version.revision,
                "manifest": version.manifest,
                "public_key": body["public_key"],
                "challenge": body["challenge"],
                "break_glass": body["break_glass"],
                "statement": statement.envelope,
                **form,
            },
            {"reason": reason} if reason else {},
        )

    def veiled(self, state: State, who: Speaker, action: str, ref: str, now: int, *, stage: str) -> None:
        """A guest is refused what it never could have, whether or not there is such a version: else it could try
        names. What it could have, but for a freeze, is to it as if it were not there, unless it has asked for it."""
        if not who.guest:
            return
        whatever = Resource(str(Ref.parse(ref)), *CEILINGS, frozen=False)
        here = situation(state, Speaker(who.principal, OWN_KEY), ref, now, stage=stage)
        found = explain(self._policies(state.policy), Query(subject(who), action, whatever, here))
        if not found.allowed and not found.needs:
            raise found.denied()
        version = state.versions.get(ref)
        own = any(each.ref == ref and each.holder == who.path for each in state.requests.values())
        if version is None or version.shredded or (version.frozen and action != "trace" and not own):
            raise NotFound("version.missing", f"there are no weights {ref} in this room", hint="strongroom ls")

    def with_what_there_is(
        self, state: State, error: Denied, who: Principal, action: str, ref: str, now: int
    ) -> StrongroomError:
        """A refusal to release, or to trace, that says more: which request waits, or which lease has ended."""

        def about(each: Request | Lease) -> bool:
            return (each.holder, each.action, each.ref) == (who.path, action, ref)

        waiting = [each for each in state.requests.values() if about(each) and each.state_at(now) == "pending"]
        if waiting and error.code == "denied.default":
            needs = "; ".join(self.missing(state, waiting[-1], now)())
            return Pending(
                "trace.pending" if action == "trace" else "release.pending",
                f"{who.path} may not {action} {ref} yet: the request {waiting[-1].id} waits for {needs}",
                hint=f"strongroom requests {waiting[-1].id}; who may approve: strongroom approve {waiting[-1].id}",
                request=waiting[-1].id,
            )
        over = [each for each in state.leases.values() if about(each) and not each.holds(now)]
        if over and error.code == "denied.default":
            last = max(over, key=lambda each: each.granted_at)
            why = last.ended or ("used up" if last.used_up else "its time is over")
            message = f"{error.message}; the lease {last.id} has ended: {why}"
            return Denied(error.code, message, hint=error.hint, **error.evidence, lease=last.id)
        return error

    # -- principals and policies ---------------------------------------------------------------------------------

    def principal(self, state: State, statement: Statement, now: int) -> Entry:
        """Register or change a principal. Nobody changes their own rights."""
        who = authenticate(state, statement, now)
        self.may(state, who, "grant", now=now)
        before = state.principals.get(statement.body["principal"])
        # Else a change that was made of an older record would bring back what was taken away meanwhile.
        if before is not None and before.entry != statement.body["before"]:
            raise Conflict(
                "principal.changed",
                f"{before.path} was changed since it was looked at",
                hint=f"strongroom principal show {before.path}; then give the command again",
            )
        body = resolved(before, statement.body)
        if before is not None and body == resolved(before, {**_AS_BEFORE, "principal": before.path}):
            what = before.state if statement.body["state"] is not None else "what it is to be"
            raise Conflict(
                "principal.unchanged",
                f"{before.path} is {what} already, since entry {before.entry}",
                hint=f"strongroom principal show {before.path}",
                entry=before.entry,
            )
        for path in (body["principal"], body["person"], *body["teams"]):
            parse_principal(path)
        registration.check(state, body)
        if before is None and statement.body["before"] is not None:
            raise NotFound("principal.missing", f"there is no {body['principal']} in this room", hint=_PRINCIPALS)
        if who.person in (body["person"], before.person if before else "") and gains(before, body):
            raise Denied(
                "grant.own",
                f"{who.path} can't give rights to {body['principal']}, which is the same person",
                hint="somebody else who may grant has to do it",
            )
        self._not_the_last(state, who, body["principal"], body["roles"] if body["state"] == "active" else [])
        if state.most_granters >= TOGETHER and weighty(before, body):
            waiting.unheard(state, statement)
            grant = {"id": statement.id, "principal": body["principal"], "expires_at": now + REQUEST_LIFE}
            return Entry("grant", now, who.path, body["principal"], {**grant, "statement": statement.envelope})
        return Entry("principal", now, who.path, body["principal"], {**body, "statement": statement.envelope})

    def _not_the_last(self, state: State, who: Speaker, path: str, roles: Sequence[str]) -> None:
        """A room must not be left without people who may grant: nobody could bring one back. Where two of them have to
        agree, nobody goes by their own hand as the last but one, either; to send away somebody else is a defence."""
        before = state.granters()
        after = state.granters(path, roles)
        own = path in state.principals and state.principals[path].person == who.person
        least = 2 if own and state.most_granters >= TOGETHER else 1
        if len(after) < min(least, len(before)):
            raise Denied(
                "grant.last",
                f"without {path} too few people here may grant ({len(after)}) to let anybody in again",
                hint="strongroom principal add user/NAME --role officer, first",
            )

    def authority(self, state: State, statement: Statement, now: int) -> Entry:
        """Whose word the room takes for who somebody is: see policy/entrance.py."""
        alone, until = state.most_granters < TOGETHER, now + REQUEST_LIFE
        return entrance.change(self, state, statement, now, expires_at=until, alone=alone)

    def propose(self, state: State, statement: Statement, reason: str, now: int) -> Entry:
        """A new policy; it needs a second person and a waiting time."""
        who = authenticate(state, statement, now)
        self.may(state, who, "administer", now=now)
        waiting.unheard(state, statement)
        self._policies(statement.body["digest"])  # it has to be valid, and at hand
        body = {"id": statement.id, "digest": statement.body["digest"], "enact_after": now + WAITING}
        return Entry("proposal", now, who.path, "", {**body, "statement": statement.envelope}, {"reason": reason})

    def _agree(self, state: State, who: Speaker, proposal: Proposal, statement: Statement, now: int) -> Entry:
        waiting.waits(state, proposal, now)
        somebody_else = f"somebody else runs: strongroom approve {proposal.id}"
        if state.principals[proposal.by].person == who.person:
            raise Denied("approve.own", "nobody approves their own policy", hint=somebody_else)
        self._approver(state, who, ROOM, "administer", now=now, about=proposal.id)
        waiting.once(proposal.id, proposal.approvals, who)
        body = {"id": proposal.id, "duration": 0, "uses": None, "roles": sorted(who.roles), "lease": None}
        return Entry("approve", now, who.path, "", {**body, "statement": statement.envelope})

    def _second(self, state: State, who: Speaker, grant: Grant, statement: Statement, now: int) -> Entry:
        """Somebody else who may grant agrees to a change of a principal."""
        waiting.waits(state, grant, now)
        if "authority" in grant.record:
            if not self.allowed(state, Speaker(state.principals[grant.by], grant.method), "grant", now):
                raise Conflict("grant.lapsed", f"{grant.by} may not grant any more", hint="ask for it again")
            return entrance.second(self, state, who, grant, statement, now)
        target = state.principals.get(grant.record["principal"])
        if (target.entry if target else None) != grant.before:
            hint = (
                f"strongroom principal show {grant.record['principal']}; then change it again, if that is still wanted"
            )
            raise Conflict("grant.outdated", f"{grant.record['principal']} was changed since", hint=hint)
        if not self.allowed(state, Speaker(state.principals[grant.by], grant.method), "grant", now):
            raise Conflict("grant.lapsed", f"{grant.by} may not grant any more", hint="grant it again")
        registration.check(state, grant.record)
        persons = (state.principals[grant.by].person, grant.record["person"], target.person if target else "")
        if who.person in persons:
            hint = f"somebody else who may grant runs: strongroom approve {grant.id}"
            raise Denied("approve.own", "nobody approves their own grant", hint=hint)
        self.may(state, who, "grant", now=now)
        record = grant.record
        asker = Speaker(state.principals[grant.by], grant.method)
        self._not_the_last(state, asker, record["principal"], record["roles"] if record["state"] == "active" else [])
        body = {"id": grant.id, "duration": 0, "uses": None, "roles": sorted(who.roles), "lease": None}
        return Entry("approve", now, who.path, grant.record["principal"], {**body, "statement": statement.envelope})

    # -- what is missing -----------------------------------------------------------------------------------------

    def missing(self, state: State, request: Request, now: int) -> Missing:
        """What a pending request still needs, for people: found when it is called, without `state`, which others wait
        for."""
        holder = state.principals[request.holder]
        query = self._grant(state, holder, request.action, request.ref, request.approvals, request.duration, now)
        policies, identifier = self._policies(state.policy), request.id

        def found() -> list[str]:
            if policies.decide(query).allowed:
                return [f"one of those who approved to say it again: strongroom approve {identifier}"]
            explanation = explain(policies, query)
            return list(explanation.needs) or [f"{explanation.message}; {explanation.hint}"]

        return found

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, state: State, query: Query) -> Decision:
        policies = self._policies(state.policy)
        decision = policies.decide(query)
        if not decision.allowed:
            raise explain(policies, query).denied()
        return decision

    def allowed(self, state: State, who: Speaker, action: str, now: int) -> bool:
        here = situation(state, who, ROOM, now, stage="direct")
        query = Query(subject(who), action, resource(state, ROOM), here)
        return who.principal.active and self._policies(state.policy).decide(query).allowed

    def counts(self, state: State, approval: Approval, ref: str, asked: str, now: int) -> bool:
        """Whether who gave this approval could give it now, by the policy in force: as it is, and also without the
        roles that it did not have then; and with the kind of key that it was given with."""
        by = state.principals[approval.by]
        here = situation(state, Speaker(by, approval.method), ref, now, stage="direct", asked=asked)
        policies = self._policies(state.policy)
        return by.active and all(
            policies.decide(Query(subject(each), "approve", resource(state, ref), here)).allowed
            for each in (by, replace(by, roles=sorted(set(approval.roles) & set(by.roles))))
        )

    def _approver(
        self, state: State, who: Speaker, ref: str, asked: str, *, now: int, about: str, act: str = "approve"
    ) -> None:
        """Denied unless `who` may approve `asked`, which is what it takes to `act` on the request `about`, too."""
        here = situation(state, who, ref, now, stage="direct", asked=asked)
        query = Query(subject(who), "approve", resource(state, ref), here)
        policies = self._policies(state.policy)
        if not policies.decide(query).allowed:
            raise explain(policies, query, act=act, about=about).denied()

    def _grant(
        self,
        state: State,
        holder: Principal,
        action: str,
        ref: str,
        approvals: list[Approval],
        duration: int,
        now: int,
    ) -> Query:
        """The question whether these approvals are enough. What counts is who could give them still."""
        counted: dict[str, set[str]] = {}
        for approval in approvals:
            by = state.principals[approval.by]
            if by.person != holder.person and self.counts(state, approval, ref, action, now):
                counted.setdefault(by.person, set()).update(set(approval.roles) & set(by.roles))
        # Each under one role, the highest, so that sums of roles count people.
        ranks = [next((rank for rank in RANKS if rank in roles), "") for roles in counted.values()]
        here = situation(
            state,
            Speaker(holder, OWN_KEY),  # who is not speaking now; what it shows when it is comes in stage "release"
            ref,
            now,
            stage="grant",
            duration=duration,
            approvals=len(ranks),
            operators=ranks.count("operator"),
            officers=ranks.count("officer"),
            executives=ranks.count("executive"),
        )
        return Query(subject(holder), action, resource(state, ref), here)


def usable(state: State, ref: str, action: str = "") -> Version:
    """The version that is in the log under the full reference `ref`, and can be used; NotFound, Denied. One that is
    frozen can be traced: it may be frozen because it leaked."""
    parsed = Ref.parse(ref)
    version = state.versions.get(str(parsed))
    if parsed.number is None or version is None or version.shredded:
        raise NotFound("version.missing", f"there are no weights {ref} in this room", hint="strongroom ls")
    if version.frozen and action != "trace":
        raise Denied(
            "version.frozen",
            f"{ref} was revoked: nobody is given its keys",
            hint=f"an officer runs, if it is to be used again: strongroom thaw {ref} --reason TEXT",
        )
    return version


def _without_lease(action: str, ref: str) -> str:
    """What to do where no lease is needed."""
    hints = {
        "copy": f"strongroom copy {ref} --to PRINCIPAL --out DIR",
        "trace": f"strongroom trace FILE --weights {ref}",
    }
    return hints.get(action, f"strongroom run {ref} -- COMMAND")


_PRINCIPALS = "strongroom principal ls"
_AS_BEFORE = dict.fromkeys(("key", "person", "roles", "teams", "state", "subject"))
