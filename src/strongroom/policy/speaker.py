"""Who is speaking: the principal that a signed statement is by, and how it is known that it is.

`key_of` is the one place where the key that a statement has to be signed with is found. A further kind of key is a
further thing that it looks at, and a further word in `query.AUTHENTICATIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strongroom.crypto import passkey, signatures
from strongroom.errors import AuthRequired, Conflict, Sealed
from strongroom.formats.statement import Statement

if TYPE_CHECKING:
    from strongroom.policy.state import Principal, State

TOLERANCE = 300  # seconds that a clock may be off
OWN_KEY = "key"  # the Ed25519 key in the principal's record
PASSKEY = "passkey"  # one that the principal has added with its own key


@dataclass(frozen=True)
class Key:
    """A key that speaks for a principal: Ed25519 in hexadecimal, and how it came to be one (one of
    `query.AUTHENTICATIONS`)."""

    public_key: str
    method: str

    def verify(self, statement: Statement) -> None:
        """Tampered unless `statement` is signed with this key."""
        statement.verify(self.public_key, passkey.verify)


@dataclass(frozen=True)
class Speaker:
    """A principal that has spoken, and by which kind of key: what policy calls `context.authentication`."""

    principal: Principal
    method: str

    @property
    def path(self) -> str:
        return self.principal.path

    @property
    def person(self) -> str:
        return self.principal.person

    @property
    def roles(self) -> Sequence[str]:
        return self.principal.roles

    @property
    def guest(self) -> bool:
        """Whether this is a guest, with no role or those of a partner and a gateway only: who sees what concerns
        itself, and of all else not whether it is there (spec/http.md, section 6)."""
        return set(self.roles) <= {"partner", "gateway"}


def key_of(state: State, path: str, key_id: str, now: int) -> Key | None:
    """The key with the identifier `key_id` (SHA-256 in hexadecimal), if it speaks for the principal `path` now."""
    who = state.principals.get(path)
    if who is None or not who.active:
        return None
    if who.key and key_id == signatures.key_id(bytes.fromhex(who.key)):
        return Key(who.key, OWN_KEY)
    own = state.passkeys.get(key_id)
    if own is not None and own.principal == path:
        return Key(own.key, PASSKEY)
    session = state.sessions.get(key_id)
    if session is not None and session.principal == path and max(now, state.latest) < session.expires_at:
        return Key(session.public_key, session.method)
    return None


def assumed(who: Principal) -> Speaker:
    """`who`, as it would speak: with its own key if it has one, else by the word of an authority. For reviews, and for
    whoever opened an embedded room."""
    return Speaker(who, OWN_KEY if who.key else "oidc")


def authenticate(
    state: State, statement: Statement, now: int, *, since: int | None = None, any_clock: bool = False
) -> Speaker:
    """Who signed: steps 1 and 2 of spec/release.md, section 2. AuthRequired, and it does not say what was wrong with
    whom: nobody learns from it which principals there are. Conflict ``statement.replayed``, Sealed
    ``clock.backwards``, unless `any_clock` is as good as the right one.

    `since`: when the statement came, of a job that takes longer than a statement is young. Its key has to be good now.
    """
    key = key_of(state, statement.by, statement.key_id, now)
    if key is None or statement.room != state.room:
        raise nobody(statement.by)
    try:
        key.verify(statement)
    except Exception:  # noqa: BLE001 - whatever it is: this is not that principal
        raise nobody(statement.by) from None
    if not any_clock:
        check_clock(state, now)
    check_age(state, statement, now if since is None else since)
    return Speaker(state.principals[statement.by], key.method)


def suspended(state: State, statement: Statement, now: int) -> bool:
    """Whether a principal that is suspended has just signed this, with its own key: nobody else may learn that from
    what is refused."""
    who = state.principals.get(statement.by)
    if who is None or who.state != "suspended" or not who.key or statement.room != state.room:
        return False
    if statement.key_id != signatures.key_id(bytes.fromhex(who.key)):
        return False
    try:
        Key(who.key, OWN_KEY).verify(statement)
        check_age(state, statement, now)
    except Exception:  # noqa: BLE001 - whatever it is: this is not that principal
        return False
    return True


def check_age(state: State, statement: Statement, now: int) -> None:
    """AuthRequired ``statement.stale`` unless it was just signed, Conflict ``statement.replayed`` if it was said
    before."""
    if abs(now - statement.at) > TOLERANCE:
        raise AuthRequired(
            "statement.stale",
            f"the statement was signed {abs(now - statement.at)} seconds off the custodian's clock; "
            f"at most {TOLERANCE} are accepted",
            hint="set this machine's clock, and run the command again",
        )
    if statement.digest in state.recent:
        raise Conflict("statement.replayed", "this very statement is in the log already", hint="sign a new one")
    used = state.passkeys.get(statement.key_id)
    # An authenticator that counts, and has counted back, is one of two with the same key (step 22).
    if used is not None and (used.count or statement.count) and statement.count <= used.count:
        raise AuthRequired(
            "passkey.cloned",
            f"the passkey has told a higher count before ({used.count}): there may be a copy of it",
            hint="strongroom passkey rm; then add another one",
        )


def check_clock(state: State, now: int) -> None:
    """Sealed ``clock.backwards`` while the clock is behind what the log has seen: a clock that is set back must not
    bring a lease to life that has ended."""
    if now < state.latest - TOLERANCE:
        raise Sealed(
            "clock.backwards",
            f"this machine's clock is {state.latest - now} seconds behind the newest entry of the log",
            hint="set the clock; if it was ahead before: strongroom log clock --reason TEXT, which ends all leases",
        )


def nobody(path: str) -> AuthRequired:
    """The one answer to whoever is not known, whatever the reason."""
    return AuthRequired(
        "auth.refused",
        f"the statement is not one that {path!r:.80} of this room has signed, or nobody of that name may act here",
        hint="--as PRINCIPAL, with that principal's own key; or ask somebody who may grant to register, or to restore, "
        "the key that `strongroom identity ls` shows",
    )


def active(state: State, path: str) -> Principal:
    """The principal at `path`; AuthRequired ``principal.unknown`` unless it may act."""
    found = state.principals.get(path)
    if found is None or not found.active:
        raise AuthRequired(
            "principal.unknown", f"{path!r:.80} is not active in this room", hint="strongroom principal ls"
        )
    return found


def speaking(state: State, by: str | Speaker) -> Speaker:
    """Who has spoken, as it is now. By name: whoever opened an embedded room, and is the principal whose key lies
    there; what comes over the network names a `Speaker`."""
    if isinstance(by, Speaker):
        return Speaker(active(state, by.path), by.method)
    return assumed(active(state, by))
