"""What no principal of a room has said: how it begins, and what its recovery shares do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy.engine import Connection

from strongroom.core.ids import parse_principal
from strongroom.crypto.identity import Identities
from strongroom.crypto.recovery import signer_of
from strongroom.crypto.shamir import Share
from strongroom.crypto.signatures import Signer
from strongroom.errors import Conflict, UsageError
from strongroom.formats.entry import CUSTODIAN, DIGEST, Entry, Private
from strongroom.formats.principal import reinstated
from strongroom.formats.statement import Statement
from strongroom.ledger.log import Draft, Ledger
from strongroom.policy import registration
from strongroom.policy.engine import Policies
from strongroom.policy.speaker import check_clock
from strongroom.policy.state import State
from strongroom.vault.documents import Documents
from strongroom.vault.requests import check_reason

FIRST_ROLES = {"team": ("operator", "officer"), "solo": ("operator", "officer", "researcher")}


class Founding:
    """The founding of one room, and of what is left of it."""

    def __init__(self, room: bytes, ledger: Ledger[State], documents: Documents, clock: Callable[[], int]) -> None:
        self._room, self._ledger, self._documents, self._clock = room, ledger, documents, clock

    def begin(
        self, owner: str, key: bytes, custody: str, signer: bytes, *, recovery: bytes = b"", begun: bool = False
    ) -> None:
        """The first two entries of a new room: the room itself under a shipped policy, unless that has `begun`, and its
        owner. `recovery`: the public key of what its recovery shares sign, if it has any."""
        policies = Policies.shipped(custody)

        def genesis(tx: Connection, state: State, now: int) -> Draft:
            if state.room:
                raise Conflict("room.exists", "the log of this room has begun already")
            digest = self._documents.keep(tx, policies)
            body = {"room": self._room.hex(), "signer": signer.hex(), "policy": digest, "custody": custody}
            body |= {"recovery": recovery.hex()} if recovery else {}
            return Draft(Entry("genesis", now, CUSTODIAN, "", body))

        def first(_: Connection, state: State, now: int) -> Draft:
            if state.principals:
                raise Conflict("room.exists", "the room has an owner already")
            body = {
                "principal": owner,
                "key": key.hex(),
                "person": owner,
                "roles": sorted(FIRST_ROLES[custody]),
                "teams": [],
                "state": "active",
                "statement": "",
            }
            return Draft(Entry("principal", now, CUSTODIAN, owner, body))

        if not begun:
            self._ledger.append(genesis, writes=True)
        self._ledger.append(first)

    def recovered(self, epoch: int) -> int:
        """Record that shares have opened the room: what they prove is not who brought them; the entry."""
        body = {"operation": "recover", "epoch": epoch, "statement": ""}
        return self._ledger.append(lambda _, __, now: Draft(Entry("keystore", now, CUSTODIAN, "", body))).index

    def reinstate(
        self,
        shares: Sequence[str],
        path: str,
        role: str,
        public_key: str | None,
        reason: str,
        identities: Identities,
    ) -> dict[str, Any]:
        """`path` is an officer or executive from now on, active, by the word of recovery shares; with this
        `public_key` (hexadecimal), or the one it had, or one that is made among `identities`. UsageError
        ``recovery.*``, ``share.*``, Conflict ``reinstate.not_needed``, Sealed ``clock.backwards``."""
        signer, note = signer_of([Share.parse(share) for share in shares]), Private.fresh("reason", reason)
        check_reason(note, note.commitment)
        if parse_principal(path).startswith("team/"):
            raise UsageError("reinstate.team", "a team lets nobody in: its members act", hint="user/NAME")
        if public_key is not None and not DIGEST(public_key):
            raise UsageError(
                "principal.public_key",
                f"{public_key!r:.80} is not a public key: 64 hexadecimal digits, in lower case",
                hint="strongroom identity show PRINCIPAL, on its machine",
            )
        with self._ledger.view() as state:
            known = state.principals.get(path)
        made = None
        if public_key is None and (known is None or not known.key):
            made = identities.create(path)
        try:
            key = made.public_key.hex() if made is not None else public_key or ""
            return self._reinstate(signer, path, {"key": key, "role": role}, note)
        except BaseException:
            if made is not None:
                identities.remove(path)
            raise

    def _reinstate(self, shares: Signer, path: str, given: Mapping[str, str], note: Private) -> dict[str, Any]:
        body = {"principal": path, **given}
        signed, room = {**body, "reason": note.commitment}, self._room.hex()
        said = Statement.sign("reinstate", signed, room=room, by=CUSTODIAN, at=self._clock(), signer=shares)

        def decide(_: Connection, state: State, now: int) -> Draft:
            check_clock(state, now)
            if not state.recovery:
                raise UsageError(
                    "recovery.none",
                    "the log of this room names no recovery shares: it has none, or has had them since before there "
                    "was a log",
                    hint="put the weights into a new room: strongroom --room NEW-FOLDER init --recovery 2of3",
                )
            if shares.public_key.hex() != state.recovery:
                raise UsageError(
                    "recovery.other_key",
                    "these shares are not those of this room",
                    hint="use the shares that were made with this room",
                )
            before = state.principals.get(path)
            record = reinstated(before, body)
            registration.check(state, record)
            if before is not None and before.active and record["roles"] == before.roles and record["key"] == before.key:
                raise Conflict(
                    "reinstate.not_needed",
                    f"{path} is active, and {given['role']}, already",
                    hint=f"strongroom principal show {path}",
                )
            entry = {**body, "statement": said.envelope}
            return Draft(Entry("reinstate", now, CUSTODIAN, path, entry, {"reason": note.commitment}), [note])

        index = self._ledger.append(decide).index
        return {"principal": path, "role": given["role"], "state": "active", "entry": index}
