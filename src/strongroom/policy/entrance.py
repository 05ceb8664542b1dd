"""Whose word is taken for who somebody is, and whom it has let in: the rules for authorities and logins.

As in policy/custody.py each is a decision: a function of the state, the time and a statement. Steps of `login` are
numbered as in spec/ledger.md, section 9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strongroom.crypto import signatures
from strongroom.crypto.passkey import check_key
from strongroom.errors import AuthRequired, Conflict, Denied, NotFound, UsageError
from strongroom.formats.authority import LONGEST, Authority
from strongroom.formats.entry import Entry
from strongroom.formats.statement import Statement
from strongroom.policy.speaker import OWN_KEY, Key, Speaker, authenticate, check_age, check_clock, nobody

if TYPE_CHECKING:
    from strongroom.policy.custody import Custody
    from strongroom.policy.state import Grant, State


_CREDENTIAL = re.compile(r"[A-Za-z0-9_-]{1,1366}", re.ASCII)  # base64url of at most 1,023 bytes


@dataclass(frozen=True)
class Verified:
    """What the custodian found in a proof. `authority`: the text under which it was judged; `subject`: whom it names,
    as in a principal's record; `until`: when it ends by itself, in seconds; `digest`: SHA-256 of the proof."""

    authority: str
    subject: str
    until: int
    digest: str


def find(state: State, method: str, name: str) -> Authority:
    """The authority that a login names; AuthRequired ``login.refused``."""
    text = state.authorities.get(name)
    found = Authority.decode(text) if text is not None else None
    if found is None or found.kind != method:
        raise refused(f"this room takes nobody's word that comes from {name!r:.200}", "strongroom authority add --help")
    return found


def check_statement(state: State, statement: Statement, now: int) -> None:
    """Steps 1 and 2: whoever has the new key made this statement, for this room, now, and not before. Errors as
    `speaker.authenticate`."""
    try:
        Key(statement.body["public_key"], statement.body["method"]).verify(statement)
    except Exception:  # noqa: BLE001 - whatever it is: nobody has said this
        raise nobody(statement.by) from None
    if statement.room != state.room:
        raise nobody(statement.by)
    check_clock(state, now)
    check_age(state, statement, now)


def login(state: State, statement: Statement, found: Verified | None, now: int) -> Entry:
    """A key speaks for a principal from now on, for some hours. `found` may be missing of a statement that is recorded
    already, which is said: Conflict ``statement.replayed``."""
    body = statement.body
    check_statement(state, statement, now)
    if found is None:
        raise nobody(statement.by)
    # Step 3, once more: it may have been taken away, or changed, while its answer was on the way.
    authority = find(state, body["method"], body["authority"])
    if authority.encode() != found.authority:
        raise refused("the authority was changed meanwhile")
    # Step 5: one proof introduces one key, once.
    if found.digest in state.recent:
        raise Conflict("login.replayed", "this token or certificate has been used for a login", hint="get a new one")
    # Step 6: the principal is the one that the log binds to this subject. One answer for all that is wrong here.
    who = state.principals.get(statement.by)
    if who is None or not who.active or who.path.startswith("team/") or not who.subject or who.subject != found.subject:
        raise nobody(statement.by)
    # A key that is somebody's own already would speak for two, by whichever is found first.
    key = body["public_key"]
    mine = signatures.key_id(bytes.fromhex(key))
    if mine in state.sessions or any(each.key == key for each in state.principals.values()):
        raise Conflict("login.key", "this key speaks for somebody already", hint="strongroom login makes a new one")
    if not body["duration"]:
        raise UsageError("login.nothing", "a login is for some time", hint="--duration 8h")
    until = min(now + min(body["duration"], authority.longest, LONGEST), found.until)
    if until <= now:
        raise refused("what was shown ends now")
    return Entry(
        "session",
        now,
        who.path,
        "",
        {
            "method": body["method"],
            "authority": body["authority"],
            "public_key": key,
            "expires_at": until,
            "proof": found.digest,
            "statement": statement.envelope,
        },
    )


def change(rules: Custody, state: State, statement: Statement, now: int, *, expires_at: int, alone: bool) -> Entry:
    """Take an authority's word, under these terms, or (an empty text) no more. Weighty: whoever runs one speaks for
    all who are bound to it. `alone`: the room is being set up still, by people who are too few for two to agree."""
    who = authenticate(state, statement, now)
    rules.may(state, who, "grant", now=now)
    body = statement.body
    name = body["authority"]
    if not body["text"]:
        if name not in state.authorities:
            raise NotFound("authority.unknown", f"the room has no authority {name!r:.200}", hint=_LS)
    elif Authority.decode(body["text"]).name != name:
        raise UsageError("authority.malformed", "the authority is not the one that is named", hint=_LS)
    elif state.authorities.get(name) == body["text"]:
        raise Conflict("authority.exists", f"{name} is an authority of the room, under these terms", hint=_LS)
    if statement.id in state.requests or statement.id in state.proposals or statement.id in state.grants:
        raise Conflict("request.exists", f"there is a {statement.id} already", hint="sign a new one")
    # Taking trust away never waits for others.
    until = None if alone or not body["text"] else expires_at
    said = {"id": statement.id, "authority": name, "expires_at": until, "statement": statement.envelope}
    return Entry("authority", now, who.path, "", said)


def second(rules: Custody, state: State, who: Speaker, grant: Grant, statement: Statement, now: int) -> Entry:
    """Somebody else who may grant agrees to an authority that is asked for."""
    if state.principals[grant.by].person == who.person:
        raise Denied(
            "approve.own",
            "nobody approves their own authority",
            hint=f"somebody else who may grant runs: strongroom approve {grant.id}",
        )
    rules.may(state, who, "grant", now=now)
    body = {"id": grant.id, "duration": 0, "uses": None, "roles": sorted(who.roles), "lease": None}
    return Entry("approve", now, who.path, "", {**body, "statement": statement.envelope})


def refused(why: str, hint: str = "strongroom login --help") -> AuthRequired:
    """What is wrong with a proof: told to whoever shows it, since it says nothing about anybody here."""
    return AuthRequired("login.refused", f"this login is refused: {why}", hint=hint)


_LS = "strongroom authority ls"


def passkey(state: State, statement: Statement, now: int) -> Entry:
    """A principal adds a passkey with its own key, or takes one of its own away (spec/ledger.md, section 10)."""
    who, body = authenticate(state, statement, now), statement.body
    mine = state.passkeys.get(signatures.key_id(bytes.fromhex(body["key"])))
    if body["state"] == "removed":
        if mine is None or mine.principal != who.path:
            raise NotFound("passkey.missing", f"{who.path} has no such passkey", hint="strongroom passkey ls")
    elif who.method != OWN_KEY:
        # On an authority's word, or a passkey's, whoever has that could add a key that outlives it.
        raise Denied(
            "passkey.own_key",
            f"a passkey is added with the principal's own key, and {who.path} speaks by {who.method}",
            hint="strongroom login --end, on a machine that has the principal's own key",
        )
    elif mine is not None:
        raise Conflict("passkey.exists", "this passkey is there already", hint="strongroom passkey ls")
    else:
        check_key(bytes.fromhex(body["key"]))
        if not _CREDENTIAL.fullmatch(body["credential"]):
            raise UsageError(
                "passkey.credential", "the credential's identifier is not one", hint="strongroom passkey add"
            )
    return Entry("passkey", now, who.path, "", {**body, "statement": statement.envelope})
