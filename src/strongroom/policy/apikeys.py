"""API keys: what somebody may show at the gateway in place of a statement (spec/ledger.md, section 12).

The log has the SHA-256 of a key only. What a key may do is not decided here: policy says that, each time it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strongroom.core.clock import text
from strongroom.errors import Conflict, Denied, LimitExceeded, NotFound, UsageError
from strongroom.formats.apikey import LONGEST, MOST, NAME
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.policy.speaker import OWN_KEY, PASSKEY, TOLERANCE, Speaker, authenticate

if TYPE_CHECKING:
    from strongroom.policy.custody import Custody
    from strongroom.policy.state import State

APIKEY = "apikey"  # what such a key shows, for policies: `context.authentication`
_LS = "strongroom apikey ls"


@dataclass
class ApiKey:
    """`digest`: SHA-256 of the key's text in hexadecimal. `method`: what whoever shows it has shown, one of
    `query.AUTHENTICATIONS`; `session`: of a key that was made under a login, the identifier of the login's."""

    digest: str
    principal: str
    name: str
    expires_at: int
    entry: int
    method: str = APIKEY
    session: str = ""
    ended: bool = False

    @property
    def id(self) -> str:
        """How people name it: the first 16 digits."""
        return self.digest[:16]


def good(state: State, key: ApiKey, now: int) -> bool:
    """Whether `key` speaks for its principal at the gateway."""
    who = state.principals.get(key.principal)
    return not key.ended and who is not None and who.active and max(now, state.latest) < key.expires_at


def of(state: State, path: str, now: int) -> list[ApiKey]:
    """The keys of a principal that are good now, oldest first."""
    return [each for each in state.apikeys.values() if each.principal == path and good(state, each, now)]


def apply(state: State, index: int, entry: Entry, said: Statement) -> None:
    """Take in the entry at `index`, which quotes `said`."""
    body = entry.body
    if body["state"] == "ended":
        state.apikeys[body["key"]].ended = True
        return
    session = state.sessions.get(said.key_id)
    method, under = (session.method, said.key_id) if session is not None else (APIKEY, "")
    state.apikeys[body["key"]] = ApiKey(
        body["key"], body["principal"], body["name"], body["expires_at"], index, method, under
    )


def change(rules: Custody, state: State, statement: Statement, now: int) -> Entry:
    """Somebody makes a key for themselves, or ends one."""
    who, body = authenticate(state, statement, now), statement.body
    if body["state"] == "ended":
        _check_end(rules, state, who, body, now)
    else:
        _check_new(state, who, statement, now)
    return Entry("apikey", now, who.path, body["principal"], {**body, "statement": statement.envelope})


def _check_new(state: State, who: Speaker, statement: Statement, now: int) -> None:
    body, today = statement.body, max(now, state.latest)
    # Whoever makes a key has it, and is whom it speaks for: nobody makes one for somebody else, whatever their rights.
    if body["principal"] != who.path or who.path.startswith("team/"):
        raise Denied(
            "apikey.other",
            f"{who.path} makes API keys for itself, and not for {body['principal']:.80}",
            hint="the principal runs by itself: strongroom apikey new",
        )
    # By the signer's clock: what it reckons as the longest time is not too long by the custodian's.
    longest, until, hint = statement.at + LONGEST, "at most 366 days ahead", "--expires 90d"
    if who.method == PASSKEY:
        raise Denied(
            "apikey.own_key",
            f"an API key is made with the principal's own key, or under a login, and {who.path} speaks by a passkey",
            hint="strongroom apikey new, on the machine that has the principal's own key",
        )
    if who.method != OWN_KEY:
        # Else whoever has somebody's token once would have a key that outlives it.
        session = state.sessions[statement.key_id]
        longest, until = min(longest, session.expires_at), f"not after the login, {text(session.expires_at)}"
        hint = f"--expires {max(session.expires_at - now - TOLERANCE, 60) // 60}m"
    if not NAME.fullmatch(body["name"]):
        raise UsageError(
            "apikey.name",
            f"{body['name']!r:.80} is not the name of an API key: 1 to 64 of a-z, 0-9, dot, dash and underscore",
            hint="--name evaluation-7",
        )
    if not today < body["expires_at"] <= longest:
        raise UsageError(
            "apikey.time",
            f"an API key ends in the future, and {until}; this one would at {text(body['expires_at'])}",
            hint=hint,
        )
    if body["key"] in state.apikeys:
        raise Conflict(
            "apikey.exists", "this API key is in the log already", hint="strongroom apikey new makes another"
        )
    if len(of(state, who.path, now)) >= MOST:
        raise LimitExceeded(
            "apikey.too_many",
            f"{who.path} has {MOST} API keys that are good, which is as many as it may",
            hint=f"{_LS}; then strongroom apikey end KEYID",
        )


def _check_end(rules: Custody, state: State, who: Speaker, body: Mapping[str, object], now: int) -> None:
    key = state.apikeys.get(str(body["key"]))
    # Taking away never waits for a better way to speak. And what others have is told only to those who may end it.
    if key is None or key.principal != who.path:
        rules.may(state, who, "grant", now=now)
    if key is None:
        raise NotFound("apikey.missing", "there is no such API key in this room", hint=_LS)
    if not good(state, key, now):
        raise Conflict("apikey.over", f"the API key {key.id} has ended already", hint=_LS)
    if (body["principal"], body["name"], body["expires_at"]) != (key.principal, key.name, key.expires_at):
        raise UsageError("apikey.differs", f"the API key {key.id} is another one than was said", hint=_LS)
