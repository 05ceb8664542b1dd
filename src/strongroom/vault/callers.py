"""Who calls at the gateway, and what each may have: all that a gateway sees of a room (spec/gateway.md, sections 1, 2
and 6). Thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from strongroom.core.ids import Ref
from strongroom.crypto import svid
from strongroom.errors import AuthRequired, Denied, IntegrityError, NotFound, Tampered, UsageError
from strongroom.formats.authority import OIDC, X509, Authority, trust_domain
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.ledger.log import Draft
from strongroom.policy import apikeys, usage
from strongroom.policy.apikeys import APIKEY
from strongroom.policy.custody import usable
from strongroom.policy.explain import explain
from strongroom.policy.facts import resource, situation, subject
from strongroom.policy.query import FEATURES, Query
from strongroom.policy.speaker import Speaker, active
from strongroom.vault.logins import Logins, issuer_of
from strongroom.vault.opened import opened
from strongroom.vault.originals import Originals
from strongroom.vault.spelling import Spelling, spelling_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Row

    from strongroom.policy.state import State
    from strongroom.vault.record import VersionRecord
    from strongroom.vault.vault import Vault

_ACTIONS = ("infer", *FEATURES)


@dataclass(frozen=True)
class Caller:
    """A principal that calls. `key`: the first 16 digits of the API key's digest, empty for a token; `method`: what it
    has shown, one of `query.AUTHENTICATIONS`."""

    principal: str
    roles: tuple[str, ...]
    teams: tuple[str, ...]
    person: str
    key: str
    method: str = APIKEY


@dataclass(frozen=True)
class ModelInfo:
    """A version. `created`: seconds; `parameters`: elements of its tensors; `vocabulary` and `hidden`: tokens, and the
    size of a hidden state, 0 where neither config.json nor its tensors say; `bytes`: of its files."""

    ref: str
    created: int
    parameters: int
    vocabulary: int
    hidden: int
    bytes: int


class Callers:
    """The callers of one room. Everything here may raise what a log or a database that fails raises: Sealed,
    BackendError, IntegrityError."""

    def __init__(self, vault: Vault, logins: Logins | None = None) -> None:
        self._vault, self._custodian = vault, vault.custodian
        self._ledger = vault.custodian.ledger
        self._logins = logins or vault.custodian.logins
        self._models: dict[str, ModelInfo] = {}  # by the version's identifier: what it has in it does not change
        self._lock = threading.Lock()

    def version(self) -> str:
        """Another text whenever a decision may be another one: of the log's entries all count but those about inference
        and refusals; and the lists of revoked certificates do. What ends by time alone, a key or a token, changes
        nothing here."""
        with self._ledger.view() as state:
            return f"{state.decided}.{self._logins.revoked.digest}"

    # -- who calls -----------------------------------------------------------------------------------------------

    def by_key(self, digest: str) -> tuple[Caller, int] | None:
        """Who shows the API key with this SHA-256 (64 hexadecimal digits), and until when it is good, in seconds; None
        if it is not good now."""
        now = self._vault.clock()
        with self._ledger.view() as state:
            key = state.apikeys.get(digest)
            if key is None or not apikeys.good(state, key, now):
                return None
            return _caller(Speaker(state.principals[key.principal], key.method), key.id), key.expires_at

    def by_token(self, token: str) -> tuple[Caller, int]:
        """Who shows this ID token, and until when it is good, in seconds; AuthRequired, in the same words for everybody
        who is not known."""
        now, name = self._vault.clock(), issuer_of(token)
        with self._ledger.view() as state:
            text, today = state.authorities.get(name), max(now, state.latest)
        authority = Authority.decode(text) if text is not None else None
        if authority is None or authority.kind != OIDC:
            raise _nobody()
        # Without the state, which others wait for: it may ask the issuer for its keys.
        named, until = self._logins.bearer(authority, token, self._vault.id, today)
        return self._bound(name, str(text), named, OIDC), until

    def by_certificate(self, chain: str, at: int) -> tuple[Caller, int]:
        """Who has shown this PEM chain in a TLS handshake that ended at `at` (seconds), and until when that is good, in
        seconds; AuthRequired, in the same words for everybody who is not known."""
        try:
            name = trust_domain(svid.uri_of(chain))
        except UsageError:
            raise _nobody() from None
        now = self._vault.clock()
        with self._ledger.view() as state:
            text, today = state.authorities.get(name), max(now, state.latest)
        authority = Authority.decode(text) if text is not None else None
        if authority is None or authority.kind != X509:
            raise _nobody()
        named, until = self._logins.certificate(authority, chain, at, today)
        return self._bound(name, str(text), named, X509), until

    def _bound(self, name: str, text: str, subject: str, method: str) -> Caller:
        """The principal that is bound to `subject`, which was found under the terms `text` of the authority `name`."""
        with self._ledger.view() as state:
            found = [each for each in state.principals.values() if each.subject == subject and each.active]
            # It was judged by the terms that were in force then.
            if state.authorities.get(name) != text or len(found) != 1 or found[0].path.startswith("team/"):
                raise _nobody()
            return _caller(Speaker(found[0], method), "")

    def bundles(self) -> list[str]:
        """The certificates (PEM) of the trust domains whose word the room takes."""
        with self._ledger.view() as state:
            texts = list(state.authorities.values())
        return [each.bundle for text in texts if (each := Authority.decode(text)).kind == X509]

    # -- what they may have --------------------------------------------------------------------------------------

    def models(self, caller: Caller) -> list[ModelInfo]:
        """The versions that `caller` may infer on, by name and number; without those that are frozen, and those whose
        bytes fail their checks, of which `strongroom verify` says more."""
        now = self._vault.clock()
        with self._ledger.view() as state:
            speaker = Speaker(active(state, caller.principal), caller.method)
            there = [each for each in state.versions.values() if not each.shredded and not each.frozen]
            policies = self._custodian.rules.policies(state.policy)
            asked = [(each.ref, _query(state, speaker, "infer", each.ref, now)) for each in there]
        found = []
        for ref, query in asked:
            if policies.decide(query).allowed:
                try:
                    found.append(self.model(ref))
                except (IntegrityError, NotFound):  # or it was shredded meanwhile
                    continue
        return sorted(found, key=lambda each: Ref.parse(each.ref))

    def model(self, ref: str) -> ModelInfo:
        """What a version is, whoever asks; NotFound ``version.missing``."""
        name = self.named(ref)
        with self._lock:
            known = self._models.get(name)
        if known is None:
            known = self._read(ref, name)
            with self._lock:
                self._models[name] = known
        return known

    def resolve(self, model: str) -> str:
        """The version that a name stands for: NAME@N itself, of NAME the newest that is not shredded. NotFound."""
        try:
            wanted = Ref.parse(model)
        except UsageError:
            raise _missing(model) from None
        with self._ledger.view() as state:
            refs = [Ref.parse(each.ref) for each in state.versions.values() if not each.shredded]
        found = [each for each in refs if each.name == wanted.name and wanted.number in (None, each.number)]
        if not found:
            raise _missing(model)
        return str(max(found, key=lambda each: each.number or 0))

    def decide(self, caller: Caller, action: str, ref: str) -> None:
        """Denied, explained, unless policy lets `caller` do `action`, which is `infer` or a feature of it, to the
        version `ref` now. NotFound for one that is not there."""
        if action not in _ACTIONS:
            raise UsageError("policy.action", f"{action!r:.80} is not inference; expected one of {', '.join(_ACTIONS)}")
        now = self._vault.clock()
        with self._ledger.view() as state:
            # As the principal is now, and not as it was when it was recognised.
            speaker = Speaker(active(state, caller.principal), caller.method)
            frozen = None
            try:
                usable(state, ref)
            except Denied as error:
                frozen = error
            query = _query(state, speaker, "infer", ref, now)
            policies = self._custodian.rules.policies(state.policy)
        # Whether it is frozen is told to those only who could use it otherwise. A feature is part of inference: what
        # forbids that, and may not name the feature, forbids it.
        query = replace(query, resource=replace(query.resource, frozen=False))
        for each in dict.fromkeys(("infer", action)):
            asked = replace(query, action=each)
            if not policies.decide(asked).allowed:
                raise explain(policies, asked).denied()
        if frozen is not None:
            raise frozen

    def record(self, ref: str, body: Mapping[str, Any]) -> int:
        """Append what a gateway has counted as an `inference` entry, about `ref` or about none (an empty text); its
        index. UsageError ``inference.malformed``, Conflict ``inference.behind``."""

        def append(_: Connection, state: State, now: int) -> Draft:
            entry = Entry("inference", now, CUSTODIAN, ref, dict(body))
            try:
                entry.encode()
            except (ValueError, TypeError) as error:
                raise UsageError("inference.malformed", f"that is no account of inference: {error}") from None
            if ref and ref not in state.versions:
                raise UsageError("inference.malformed", f"there never were weights {ref!r:.80} in this room")
            usage.check(state, body)
            return Draft(entry)

        return self._custodian.decide(append).index

    def spelling(self, ref: str) -> Spelling:
        """What the tokens of a version spell: read anew each time, which takes a second. NotFound ``version.missing``,
        UsageError ``spelling.unknown``."""
        return spelling_of(self._opened(ref, self.named(ref))[1])

    def named(self, ref: str) -> str:
        """The identifier that the log has of a version that is there; NotFound ``version.missing``."""
        with self._ledger.view() as state:
            version = state.versions.get(ref)
            if version is None or version.shredded:
                raise _missing(ref)
            return version.version

    # -- inside --------------------------------------------------------------------------------------------------

    def _opened(self, ref: str, version: str) -> tuple[Row[Any], Originals]:
        def use(row: Row[Any], record: VersionRecord) -> tuple[Row[Any], Originals]:
            if record.version.hex() != version:
                raise Tampered("record.swapped", f"the database says that {ref} is another version than the log has")
            return row, Originals(self._vault.image(record), record)

        return opened(self._vault, ref, use)

    def _read(self, ref: str, version: str) -> ModelInfo:
        row, originals = self._opened(ref, version)
        vocabulary, hidden = originals.logits()
        try:
            created = int(datetime.strptime(row.created_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())
        except ValueError:
            raise Tampered("record.malformed", f"the database does not say when {ref} was put") from None
        parameters = sum(each.info.elements for each in originals.tensors())
        size = sum(each.bytes for each in originals.layout.files)
        return ModelInfo(ref, created, parameters, vocabulary, hidden, size)


def _caller(who: Speaker, key: str) -> Caller:
    return Caller(who.path, tuple(who.roles), tuple(who.principal.teams), who.person, key, who.method)


def _query(state: State, who: Speaker, action: str, ref: str, now: int) -> Query:
    return Query(subject(who), action, resource(state, ref), situation(state, who, ref, now, stage="direct"))


def _missing(ref: str) -> NotFound:
    return NotFound("version.missing", f"there are no weights {ref!r:.200} in this room", hint="strongroom ls")


def _nobody() -> AuthRequired:
    return AuthRequired(
        "token.refused",
        "the token is of nobody who may act here, or of nobody whose word this room takes",
        hint="strongroom authority ls; or an API key: strongroom apikey new",
    )
