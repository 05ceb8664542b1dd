"""The custodian: who may, who approved, and what is recorded before a key leaves (spec/ledger.md, spec/release.md).

It takes signed statements and nothing else at their word: an embedded room and a server hand them in alike.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.engine import Connection

from strongroom.core.clock import text
from strongroom.crypto.release import check_challenge, check_receiver, make_challenge, seal_bundle
from strongroom.errors import Conflict, Denied, NotFound, StrongroomError, UsageError
from strongroom.formats.authority import Authority
from strongroom.formats.entry import UNKNOWN, Entry, Private
from strongroom.formats.merkle import leaf_hash
from strongroom.formats.principal import RANKS
from strongroom.formats.statement import Statement
from strongroom.ledger.log import Decision, Draft, Ledger, Receipt
from strongroom.policy import acts, entrance, waiting
from strongroom.policy.custody import Custody, Facts, Missing, usable
from strongroom.policy.engine import Policies
from strongroom.policy.explain import either
from strongroom.policy.facts import ceilings, resource, situation, subject
from strongroom.policy.query import ROOM
from strongroom.policy.reach import Access, reach
from strongroom.policy.review import Review, review
from strongroom.policy.speaker import Speaker, assumed, authenticate, check_clock, speaking
from strongroom.policy.state import Principal, State
from strongroom.vault.apikeys import ApiKeys
from strongroom.vault.documents import Documents
from strongroom.vault.founding import Founding
from strongroom.vault.kept import Kept
from strongroom.vault.logins import Logins
from strongroom.vault.logins import check as check_authority
from strongroom.vault.opened import check_there
from strongroom.vault.refusals import Refusals
from strongroom.vault.release import Answer, Bundles
from strongroom.vault.requests import check_reason, describe_ended, describe_grant, describe_proposal, describe_request
from strongroom.vault.upkeep import Recorded, Upkeep

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

T = TypeVar("T")
_VERSIONS = 32  # whose secrets and manifests are kept opened
_OUTDATED = ("release.revision", "version.missing")
_GLANCE = 1.0  # seconds that the state may be old where the sequencer decides afterwards


class Custodian:
    """The custody of one room."""

    def __init__(self, vault: Vault, ledger: Ledger[State]) -> None:
        self._vault, self.ledger = vault, ledger
        self._documents = Documents(vault.db)
        self._opened: Kept[str, Bundles] = Kept(_VERSIONS)
        self._refusals = Refusals(ledger)
        self.logins = Logins()
        self.rules = Custody(self._documents.policies)
        self.apikeys = ApiKeys(self, self._append, self._now)
        self._upkeep = Upkeep(self.rules, self._once, vault.db)
        self.founding = Founding(vault.id, ledger, self._documents, self._now)

    # -- principals and policies ---------------------------------------------------------------------------------

    def known(self, path: str) -> Principal:
        """A principal in any state; NotFound ``principal.missing``."""
        with self.ledger.view() as state:
            return self._known(state, path)

    def _known(self, state: State, path: str) -> Principal:
        found = state.principals.get(path)
        if found is None:
            raise NotFound(
                "principal.missing", f"there is no {path!r:.80} in this room", hint="strongroom principal ls"
            )
        return found

    def show_principal(self, path: str) -> dict[str, Any]:
        """One principal, and the leases that it holds now."""
        now = self._now()
        who = self.known(path)
        with self.ledger.view() as state:
            leases = [
                {"id": lease.id, "action": lease.action, "ref": lease.ref, "expires_at": lease.expires_at}
                for lease in state.leases.values()
                if lease.holder == path and lease.holds(now)
            ]
            passkeys = [
                {"key": each.key, "credential": each.credential, "entry": each.entry}
                for each in state.passkeys.values()
                if each.principal == path
            ]
        more = {"leases": leases, "passkeys": passkeys, "apikeys": self.apikeys.of(path)}
        return {**vars(who), "since": text(who.since), **more}

    def change_principal(self, envelope: str) -> dict[str, Any]:
        """Register somebody, or change roles, key or state: a statement of the kind ``principal``."""
        statement = self.statement(envelope, "principal")
        receipt = self._append(statement, lambda state, now: Draft(self.rules.principal(state, statement, now)))
        body = receipt.entry.body
        if receipt.entry.type == "grant":
            with self.ledger.view() as state:
                body = state.grants[statement.id].record
        told = {name: body[name] for name in ("principal", "person", "roles", "teams", "state")}
        if receipt.entry.type == "grant":
            told |= {"state": "pending", "id": statement.id}
        return {**told, **self._ended(receipt), "entry": receipt.index}

    def _ended(self, done: Recorded) -> dict[str, Any]:
        with self.ledger.view() as state:
            return describe_ended(state, done.index, done.entry.at)

    def change_authority(self, envelope: str) -> dict[str, Any]:
        """Whose word is taken for who somebody is: a statement of the kind ``authority``."""
        statement = self.statement(envelope, "authority")
        with self._heard(statement, "authority"):
            if text := statement.body["text"]:
                check_authority(Authority.decode(text))
            receipt = self._append(statement, lambda state, now: Draft(self.rules.authority(state, statement, now)))
        pending = receipt.entry.body["expires_at"] is not None
        done = "pending" if pending else "active" if statement.body["text"] else "removed"
        told = {"authority": statement.body["authority"], "state": done, "entry": receipt.index}
        return {**told, "id": statement.id} if pending else told

    def change_passkey(self, envelope: str) -> dict[str, Any]:
        """A principal adds a passkey, or takes one away: a statement of the kind ``passkey``."""
        statement = self.statement(envelope, "passkey")
        receipt = self._append(statement, lambda state, now: Draft(entrance.passkey(state, statement, now)))
        return {"principal": statement.by, "state": statement.body["state"], "entry": receipt.index}

    def authorities(self) -> list[dict[str, Any]]:
        """Whose word is taken, by name."""
        with self.ledger.view() as state:
            found = [Authority.decode(text) for _, text in sorted(state.authorities.items())]
        return [{**vars(each), "algorithms": list(each.algorithms)} for each in found]

    def login(self, envelope: str, proof: Mapping[str, Any]) -> dict[str, Any]:
        """A key speaks for a principal, by the word of an authority (spec/ledger.md, section 9)."""
        statement = self.statement(envelope, "login")
        found, authority = None, None
        with self._refusals.recorded(UNKNOWN, "login"):
            # Before anything is looked up, or asked of anybody: steps 1 to 3.
            with self.ledger.view() as state:
                if statement.digest not in state.recent:  # else it is answered as the first time
                    entrance.check_statement(state, statement, self._now())
                    authority = entrance.find(state, statement.body["method"], statement.body["authority"])
            if authority is not None:  # not in the sequencer: it asks the issuer
                found = self.logins.verify(authority, statement, proof, self._now())
            done = self._once(statement, lambda _, state, now: Draft(entrance.login(state, statement, found, now)))
        return {"principal": statement.by, "expires_at": done.entry.body["expires_at"], "entry": done.index}

    def propose(self, envelope: str, text: str, reason: Private) -> dict[str, Any]:
        """A new policy, as a proposal."""
        statement = self.statement(envelope, "propose")
        with self._heard(statement, "administer"):
            # Before the text is looked at: parsing takes seconds of whatever is sent.
            try:
                self.authorise(self.identify(statement), "administer", recorded=False)
            except Conflict as error:
                _only_replayed(error)  # which is answered below
            policies = Policies.parse(text)
            if policies.digest != statement.body["digest"]:
                raise UsageError("policy.other_text", "the statement is about another policy text")
            check_reason(reason, statement.body["reason"])

            def decide(tx: Connection, state: State, now: int) -> Draft:
                authenticate(state, statement, now)
                self._documents.keep(tx, policies)
                return Draft(self.rules.propose(state, statement, reason.commitment, now), [reason])

            receipt = self._once(statement, decide, writes=True)
        return {"id": statement.id, "enact_after": receipt.entry.body["enact_after"], "entry": receipt.index}

    # -- requests ------------------------------------------------------------------------------------------------

    def request(self, envelope: str, reason: Private) -> dict[str, Any]:
        """Ask for a lease."""
        statement = self.statement(envelope, "request")
        receipt = self._append(
            statement,
            lambda state, now: Draft(self.rules.request(state, statement, reason.commitment, now), [reason]),
            reason,
        )
        return self.show_request(statement.id) | {"entry": receipt.index}

    def approve(self, envelope: str) -> dict[str, Any]:
        """One more approval of a request or a proposal."""
        statement = self.statement(envelope, "approve")
        receipt = self._append(statement, lambda state, now: Draft(self.rules.approve(state, statement, now)))
        return self.show_request(receipt.entry.body["id"]) | {"entry": receipt.index}

    def deny(self, envelope: str, reason: Private) -> dict[str, Any]:
        """A no."""
        statement = self.statement(envelope, "deny")
        receipt = self._append(
            statement,
            lambda state, now: Draft(self.rules.deny(state, statement, reason.commitment, now), [reason]),
            reason,
        )
        return self.show_request(receipt.entry.body["id"]) | {"entry": receipt.index}

    def revoke(self, envelope: str, reason: Private) -> dict[str, Any]:
        """End a lease or request, suspend a principal, freeze a version."""
        statement = self.statement(envelope, "revoke")
        receipt = self._append(
            statement,
            lambda state, now: Draft(self.rules.revoke(state, statement, reason.commitment, now), [reason]),
            reason,
        )
        done = {"target": statement.body["target"], "ref": receipt.entry.ref, "state": "revoked"}
        return {**done, **self._ended(receipt), "entry": receipt.index}

    def renew(self, envelope: str) -> dict[str, Any]:
        """Extend a lease."""
        statement = self.statement(envelope, "renew")
        receipt = self._append(statement, lambda state, now: Draft(self.rules.renew(state, statement, now)))
        return self.show_request(statement.body["lease"]) | {"entry": receipt.index}

    def requests(self) -> list[dict[str, Any]]:
        """All requests, grants and proposals, oldest first."""
        now, found = self._now(), []
        with self.ledger.view() as state:
            for told in self._described(state, now):
                _, index = state.recent[told[0]["digest"]]
                found.append((index, told))
        return [self._told(*told) for _, told in sorted(found, key=lambda item: item[0])]

    def show_request(self, identifier: str) -> dict[str, Any]:
        """One request, grant or proposal, with the signed statement that asks for it, and its reason if that was not
        deleted; NotFound ``request.unknown``."""
        now = self._now()
        with self.ledger.view() as state:
            for told in self._described(state, now, identifier):
                _, index = state.recent[told[0]["digest"]]
                break
            else:
                raise waiting.unknown(identifier)
        entry = self._entry(index)
        note = self.ledger.notes(index, entry).get("reason")
        reason = {"reason": note.value if note else None, "salt": note.salt.hex() if note else ""}
        return {**self._told(*told), "statement": entry.body["statement"], **reason}

    def _described(
        self, state: State, now: int, identifier: str | None = None
    ) -> Iterator[tuple[dict[str, Any], Missing | None]]:
        """All that waits or has waited, or the one with that identifier; of a request, what has to be asked about it
        where nobody waits for the answer."""

        def chosen(found: dict[str, T]) -> list[T]:
            return list(found.values()) if identifier is None else [found[identifier]] if identifier in found else []

        for request in chosen(state.requests):
            waits = request.state_at(now) == "pending"
            yield describe_request(state, request, now), self.rules.missing(state, request, now) if waits else None
        for grant in chosen(state.grants):
            yield describe_grant(grant, now), None
        for proposal in chosen(state.proposals):
            yield describe_proposal(proposal), None

    def _told(self, described: dict[str, Any], missing: Missing | None) -> dict[str, Any]:
        return {**described, "needs": missing()} if missing is not None else described

    # -- who can what --------------------------------------------------------------------------------------------

    def may(self, by: str | Speaker, *actions: str) -> bool:
        """Whether policy lets `by` do one of `actions` in the room; nothing is recorded."""
        with self.ledger.view() as state:
            who = speaking(state, by)
            return any(self.rules.allowed(state, who, action, self._now()) for action in actions)

    def may_know_why(self, found: Mapping[str, Any], who: Speaker) -> bool:
        """Whether `who` is told the reason of a request: who asked, whom it is for, who could approve, who audits."""
        if who.path in (found["by"], found["for"]) or set(RANKS) & set(who.roles):
            return True
        return self.may(who, "audit", "administer")

    def who(self, ref: str) -> list[dict[str, Any]]:
        """Every principal's access to one version, by the policy in force, with the counts and leases of now."""
        now = self._now()
        with self.ledger.view() as state:
            usable(state, ref)
            everybody = [each for each in state.principals.values() if each.state != "removed"]
            asked = [self._access(state, each, ref, now) for each in everybody]
        return [item.as_json() for answer in asked for item in answer()]

    def reach(self, path: str) -> list[dict[str, Any]]:
        """One principal's access to the room and to every version that is not shredded."""
        now = self._now()
        with self.ledger.view() as state:
            principal = self._known(state, path)
            refs = [ROOM, *(each.ref for each in state.versions.values() if not each.shredded)]
            asked = [self._access(state, principal, ref, now) for ref in refs]
        return [item.as_json() for answer in asked for item in answer()]

    def _access(self, state: State, principal: Principal, ref: str, now: int) -> Callable[[], list[Access]]:
        """What `principal` can reach of `ref`: found when it is called, without `state`, which others wait for."""
        if principal.path.startswith("team/"):
            return list  # a team acts through its members
        leases = frozenset(
            (each.holder, each.action, each.ref)
            for each in state.leases.values()
            if each.holder == principal.path and each.holds(now)
        )
        return partial(
            reach,
            self._documents.policies(state.policy),
            subject(principal),
            [resource(state, ref)],
            situation=situation(state, assumed(principal), ref, now),
            leases=leases,
        )

    def review(self) -> Review:
        """The review of the whole log, as of now."""
        now = self._now()
        with self.ledger.view() as state:
            # As it is now: reading the log takes long, and nothing is appended while it is held.
            kept = copy.deepcopy(replace(state, recent={}))
            size = self.ledger.viewed  # and no more: others append meanwhile, and nobody has reviewed that
        pieces = (self.ledger.proven(at, min(at + 1024, size)) for at in range(0, size, 1024))
        return review(kept, (Entry.decode(data) for piece in pieces for data in piece), now)

    def policy(self, digest: str | None = None) -> dict[str, Any]:
        """The policy in force, or one that is proposed, by its digest; and the proposals that are open. NotFound
        ``policy.unknown``."""
        with self.ledger.view() as state:
            if digest not in (None, state.policy, *(each.digest for each in state.proposals.values())):
                raise NotFound("policy.unknown", "nobody has proposed such a policy", hint="strongroom policy show")
            found = self._documents.policies(digest or state.policy)
            proposals = [
                {"id": each.id, "digest": each.digest, "by": each.by, "enact_after": each.enact_after}
                for each in state.proposals.values()
                if each.state == "pending"
            ]
            rules = [vars(rule) for rule in found.rules.values()]
            return {
                "digest": found.digest,
                "since": text(state.policy_since),
                "text": found.text,
                "rules": rules,
                "proposals": proposals,
            }

    # -- release -------------------------------------------------------------------------------------------------

    def challenge(self) -> bytes:
        """A fresh challenge of 32 bytes, good for 300 seconds."""
        state = self.ledger.glance(_GLANCE)
        if state is not None:
            era = state.era
        else:
            with self.ledger.view() as state:
                era = state.era
        return make_challenge(self._vault.keys.challenge_key, self._vault.id, era, self._now())

    def release(self, envelope: str, reason: Private | None = None) -> Answer:
        """Record a release, and only then seal the key bundle to the key that asked for it."""
        statement = self.statement(envelope, "release")
        body = statement.body
        # Before anything is looked up: how long that takes would tell a stranger what there is.
        with self._refusals.recorded(statement.by, body["action"], body["ref"]):
            self._recognise(statement)
            if reason is not None:
                check_reason(reason, body["reason"])
            elif body["break_glass"]:
                raise UsageError("release.no_reason", "breaking the glass takes a reason", hint="--reason TEXT")
            # Before the entry: what can fail must not be recorded as done.
            check_receiver(bytes.fromhex(body["public_key"]))
            receipt, bundles = self._released(statement, reason)
        copied = body["action"] == "copy"  # no keys to ciphertext: who had them could leave out the stamp
        bundle = self._vault.copies.bundle(receipt.data, receipt.index) if copied else bundles.of(body["holder"])
        leaf = leaf_hash(receipt.data)
        sealed = seal_bundle(bundle.encode(), bytes.fromhex(body["public_key"]), receipt.index, leaf)
        return Answer(receipt.data, receipt.index, tuple(receipt.proof()), receipt.note, sealed, self._vault.blobs.url)

    def forget(self) -> None:
        """Drop the secrets of versions that are kept opened: they must not outlive a shred in this process."""
        self._opened.forget()
        self._vault.copies.forget()

    @contextlib.contextmanager
    def _heard(self, statement: Statement, action: str, ref: str = "") -> Iterator[None]:
        """What is refused in this block is recorded as what the signer of `statement` was refused. Who that is is
        found out first, whatever is wrong besides: a stranger is told nothing, and fills nobody's record."""
        with self._refusals.recorded(statement.by, action, ref):
            try:
                self._recognise(statement, any_clock=True)  # which the decision is refused for, if it has to be
            except Conflict as error:
                _only_replayed(error)  # which is answered as it was
            yield

    def refusing(self, by: Speaker, action: str) -> contextlib.AbstractContextManager[None]:
        """What is refused in this block is recorded as what `by`, who has spoken, was refused."""
        return self._refusals.recorded(by.path, action)

    def _recognise(self, statement: Statement, *, any_clock: bool = False) -> None:
        """As `identify`, where the sequencer decides afterwards: somebody whom another custodian has suspended within
        the last second may pass here."""
        state = self.ledger.glance(_GLANCE)
        try:
            if state is not None:
                authenticate(state, statement, self._now(), any_clock=any_clock)
                return
        except StrongroomError:
            pass  # it may be so no more
        self.identify(statement, any_clock=any_clock)

    def _released(self, statement: Statement, reason: Private | None, left: int = 2) -> tuple[Receipt, Bundles]:
        """As `_release`; what was opened may be another revision than the log's by then, or have been shredded."""
        ref, keep = statement.body["ref"], self._opened.opening()
        try:
            receipt, bundles = self._release(statement, reason, self._opened.get(ref))
            keep(ref, bundles)
            return receipt, bundles
        except (Conflict, NotFound) as error:
            before = self._opened.get(ref)
            if not left or error.code not in _OUTDATED or (before is None and error.code != "release.revision"):
                raise
            self.forget()  # it may be shredded, which the log need not say: all that is kept of it goes
            return self._released(statement, reason, left - 1)

    def _release(self, statement: Statement, reason: Private | None, opened: Bundles | None) -> tuple[Receipt, Bundles]:
        """The entry of a release, decided with the facts of the version as it is `opened`, or found now."""
        body = statement.body
        found = opened or self._looked_up(body["ref"])
        key, unfit = self._vault.keys.challenge_key, None
        commitment = reason.commitment if reason is not None else None

        def facts() -> Facts:
            if isinstance(found, StrongroomError):
                raise found
            return Facts(found.record.revision, found.record.manifest_digest.hex())

        def judged(state: State, now: int) -> Entry:
            fresh = partial(check_challenge, bytes.fromhex(body["challenge"]), key, self._vault.id, state.era, now)
            return self.rules.release(state, statement, fresh, facts, now, reason=commitment)

        if "form" in body:
            with self.ledger.view() as state:  # who may not have it costs no look into the weights
                judged(state, self._now())
            unfit = self._vault.copies.unfit(found, body["form"])

        def decide(tx: Connection, state: State, now: int) -> Draft:
            entry = judged(state, now)
            if isinstance(found, Bundles):
                check_there(tx, found.record)
            if unfit is not None:  # before the entry: what can't be done is not recorded as done
                raise unfit
            return Draft(entry, [reason] if reason is not None else [])

        receipt = self.decide(decide)
        if isinstance(found, StrongroomError):
            raise found  # the decision has seen to that
        return receipt, found

    def _looked_up(self, ref: str) -> Bundles | StrongroomError:
        """The secrets and the manifest of a version; or why not, which is for those that are authenticated only."""
        try:
            return self._vault.bundles(ref)
        except StrongroomError as error:
            return error

    def lease_end(self, entry: bytes) -> int:
        """When the lease ends that a release entry rests on; a day from then for one that rests on none."""
        found = Entry.decode(entry)
        with self.ledger.view() as state:
            lease = state.leases.get(found.body["lease"] or "")
            return lease.expires_at if lease is not None else found.at + 86_400

    def identify(self, statement: Statement, *, any_clock: bool = False) -> Speaker:
        """The active principal that made `statement`, for what is read and not recorded; AuthRequired."""
        with self.ledger.view() as state:
            return authenticate(state, statement, self._now(), any_clock=any_clock)

    # -- everything else that is recorded ------------------------------------------------------------------------

    def authorise(self, by: str | Speaker, *actions: str, ref: str = ROOM, recorded: bool = True) -> None:
        """Denied, explained and recorded, unless policy lets `by` do one of `actions` directly."""
        now = self._now()
        with self.ledger.view() as state:
            who = speaking(state, by)
            refusals = []
            for action in actions:
                try:
                    self.rules.may(state, who, action, ref, now=now)
                    return
                except Denied as error:
                    refusals.append(error)
        refused = either(refusals)
        if recorded:
            self._refusals.record(who.path, actions[0], ref, refused)
        raise refused

    def tracing(self, by: str, ref: str | None) -> str | None:
        """The lease under which `by` traces the version `ref`, or None where policy asks for none; of every version,
        which names nobody, if `ref` is None. Denied, and recorded."""
        now = self._now()
        with self._refusals.recorded(by, "trace", ref or ROOM), self.ledger.view() as state:
            lease = state.lease_for(by, "trace", ref, now) if ref is not None else None
            acts.may_trace(self.rules, state, speaking(state, by), ref or "", now, lease)
            return lease.id if lease is not None else None

    def act(self, statement: Statement, action: str, decide: Decision[State]) -> Receipt:
        """Append what `decide` makes of `statement`, and what it writes; what is refused is recorded."""
        with self._refusals.recorded(statement.by, action):
            return self.decide(decide, writes=True)

    def acted(self, envelope: str, reason: Private | None = None) -> dict[str, Any]:
        """Do what a statement says of a kind that `upkeep` knows: ceiling, clock, copy, enact, inference and so on."""
        statement = Statement.decode(envelope)
        action = {"copy": "copy", "inference": "relay"}.get(statement.kind, "administer")
        with self._heard(statement, action, str(statement.body.get("ref", ""))):
            done = self._upkeep.act(statement, reason, self.ledger.checkpoint()[0].size, self._entry)
        body = {name: value for name, value in done.entry.body.items() if name != "statement"}
        return {"type": done.entry.type, "ref": done.entry.ref, "at": done.entry.at, "body": body, "entry": done.index}

    def ceilings(self, ref: str) -> dict[str, int]:
        """How many may hold a version, or every version of a name, copy it, and have copies of it; NotFound
        ``version.missing``."""
        with self.ledger.view() as state:
            if not any(ref in (each, each.partition("@")[0]) for each in state.versions):
                raise NotFound("version.missing", f"there are no weights {ref:.200} in this room", hint="strongroom ls")
            return dict(zip(("holders", "copies", "copiers"), ceilings(state, ref), strict=True))

    def check_clock(self) -> None:
        """Sealed ``clock.backwards`` while nothing may be decided."""
        with self.ledger.view() as state:
            check_clock(state, self._now())

    # -- inside --------------------------------------------------------------------------------------------------

    def _entry(self, index: int) -> Entry:
        return Entry.decode(self.ledger.proven(index, index + 1)[0])

    def _append(self, statement: Statement, decide: Any, reason: Private | None = None) -> Recorded:
        action = str(statement.body.get("action", statement.kind))
        ref = str(statement.body.get("ref", ""))
        with self._heard(statement, action, ref):
            if reason is not None:
                check_reason(reason, statement.body["reason"])
            return self._once(statement, lambda _, state, now: decide(state, now))

    def _once(self, statement: Statement, decide: Decision[State], *, writes: bool = False) -> Recorded:
        """As `_decide`; a statement that is recorded already is answered with its entry: whoever lost the answer with
        the connection says the same again. It has been authenticated, and is fresh, when that is found."""
        try:
            receipt = self.decide(decide, writes=writes)
        except Conflict as error:
            return self.before(statement, error)
        return Recorded(receipt.index, receipt.entry)

    def before(self, statement: Statement, error: Conflict) -> Recorded:
        """The entry of a statement that `error`, or else it is raised again, says to be in the log already."""
        _only_replayed(error)
        with self.ledger.view() as state:
            _, index = state.recent[statement.digest]
        return Recorded(index, self._entry(index))

    def decide(self, decide: Decision[State], *, writes: bool = False) -> Receipt:
        """Append what `decide` returns; policies that it asks for are read in the sequencer's own transaction."""

        def within(tx: Connection, state: State, now: int) -> Draft:
            with self._documents.within(tx):
                return decide(tx, state, now)

        return self.ledger.append(within, writes=writes)

    def statement(self, envelope: str, kind: str) -> Statement:
        """The statement in `envelope`, which has to be of that kind; UsageError ``statement.kind``."""
        statement = Statement.decode(envelope)
        if statement.kind != kind:
            raise UsageError("statement.kind", f"this takes a statement of the kind {kind}, not {statement.kind}")
        return statement

    def _now(self) -> int:
        return self._vault.clock()


def _only_replayed(error: Conflict) -> None:
    """Raises `error` again unless it says that the statement is in the log already."""
    if error.code != "statement.replayed":
        raise error
