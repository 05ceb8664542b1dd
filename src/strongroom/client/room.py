"""The room as a Python program sees it: `strongroom.open(...)`, the same methods for an embedded and a served room,
as far as that offers them over a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from strongroom.client.budget import budget
from strongroom.client.roomlog import RoomLog, verify_log
from strongroom.core.canonical import MAX_INTEGER
from strongroom.core.ids import Ref
from strongroom.core.progress import Progress, silent
from strongroom.core.settings import Settings, room_folder
from strongroom.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from strongroom.client.anyroom import AnyRoom
    from strongroom.client.apikeys import ApiKeys
    from strongroom.client.login import Login
    from strongroom.client.passkey import Passkeys
    from strongroom.client.registry import Registry
    from strongroom.crypto.keystores import PassphraseSource
    from strongroom.formats.authority import Authority
    from strongroom.formats.bundle import KeyBundle
    from strongroom.formats.card import Card
    from strongroom.formats.entry import Private
    from strongroom.formats.statement import Signing
    from strongroom.load.safe_open import SafeOpen
    from strongroom.load.weights import Weights
    from strongroom.storage.blobs import Blobs
    from strongroom.storage.reader import ImageReader
    from strongroom.vault.fsck import FsckReport
    from strongroom.vault.status import Check
    from strongroom.vault.vault import PutResult, Vault
    from strongroom.vault.verify import VerifyReport
    from strongroom.vault.versions import VersionInfo

    _Texts = Sequence[str] | None

__all__ = ["Progress", "Room", "RoomLog", "open", "read_once", "room_folder", "safe_open", "verify_log"]


_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)


class Room:
    """A room, as one principal. Make one with `Room.init`, open one with `strongroom.open`."""

    def __init__(
        self, room: str | Path | Card, principal: str | None = None, *, passphrase: PassphraseSource | None = None
    ) -> None:
        self._as = principal
        self._who: str | None = None
        self._vault: AnyRoom
        self._embedded: Vault | None = None  # for what is done where the room is
        if isinstance(room, Path) or (isinstance(room, str) and not room.startswith("https://")):
            from strongroom.vault.vault import Vault

            self._vault = self._embedded = Vault(room_folder(room), passphrase=passphrase)
            self._where: Path | Card = self._embedded.folder
        else:
            from strongroom.client.served import ServedRoom
            from strongroom.storage.session import card_of

            self._where = card_of(room) if isinstance(room, str) else room
            self._vault = ServedRoom(self._where, principal)

    def _here(self, command: str) -> Vault:
        """The room itself; UsageError ``room.not_here`` for a served one, which is changed so on its own host only."""
        if self._embedded is None:
            raise UsageError(
                "room.not_here",
                f"strongroom {command} works on the room's own host: a served room does not offer it",
                hint=f"there: strongroom --room FOLDER {command}",
            )
        return self._embedded

    @classmethod
    def init(
        cls,
        folder: str | Path,
        *,
        store: str = "store",
        db: str = "sqlite:room.db",
        keystore: str = "file:keys/room.key",
        recovery: tuple[int, int] | None = None,
        owner: str = "user/owner",
        custody: str = "team",
        passphrase: PassphraseSource | None = None,
    ) -> tuple[Room, list[str]]:
        """Make a room; returns it and its recovery shares (`recovery` = (needed, made)), which are kept nowhere
        else. `custody`: the policy that it starts with, ``team`` (several people approve) or ``solo``."""
        from strongroom.vault.vault import Vault

        vault, shares = Vault.init(
            room_folder(folder),
            store=store,
            db=db,
            keystore=keystore,
            recovery=recovery,
            owner=owner,
            custody=custody,
            passphrase=passphrase,
        )
        vault.close()
        return cls(folder, owner, passphrase=passphrase), [str(share) for share in shares]

    def close(self) -> None:
        self._vault.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def principal(self) -> str:
        """Who this room is opened as."""
        if self._who is None:
            self._who = self._vault.principal(self._as)
        return self._who

    # -- weights -------------------------------------------------------------------------------------------------

    def put(
        self,
        path: str | Path,
        name: str,
        *,
        share: str = "auto",
        positions: int = 16384,
        suite: str = "blake3",
        convert: bool = False,
        follow_links: bool = False,
        progress: Progress = silent,
    ) -> PutResult:
        """Store a model directory, a safetensors file or a GGUF file as the next version of `name`."""
        import contextlib

        from strongroom.formats.suites import Suite
        from strongroom.vault.convert import converted
        from strongroom.vault.source import ModelSource

        if suite.upper() not in Suite.__members__:
            raise UsageError("put.suite", f"there is no suite {suite!r}", hint="--suite blake3 or --suite sha256")
        self._vault.custodian.authorise(self.principal, "put")
        with contextlib.ExitStack() as stack:
            if convert:
                source = stack.enter_context(converted(Path(path), follow_links=follow_links))
            else:
                source = ModelSource.scan(Path(path), follow_links=follow_links)
            return self._vault.put(
                source,
                name,
                by=self.principal,
                share=share,
                positions=positions,
                suite=Suite[suite.upper()],
                progress=progress,
            )

    def ls(self, name: str | None = None) -> list[VersionInfo]:
        """Versions, oldest first. Needs no key."""
        return self._vault.ls(name)

    def show(self, ref: str) -> dict[str, Any]:
        """Everything about one version, files and geometry included."""
        return self._vault.show(ref)

    def verify(self, ref: str, *, deep: bool = False, progress: Progress = silent) -> VerifyReport:
        """Check every byte in the store; `deep` also decrypts both variants and compares with what was put."""
        return self._here("verify").verify(ref, deep=deep, progress=progress)

    def rotate(self, ref: str, *, progress: Progress = silent) -> dict[str, Any]:
        """Re-encrypt one version under new keys; marks and code words stay."""
        vault = self._here("rotate")
        vault.custodian.authorise(self.principal, "administer", ref=ref)
        return vault.rotate(ref, by=self.principal, progress=progress)

    def shred(self, ref: str, *, confirm: str) -> dict[str, Any]:
        """Destroy one version's keys and ciphertext; `confirm` repeats its full name."""
        vault = self._here("shred")
        try:
            by = self.principal
        except IntegrityError:
            # A log that is damaged must not keep the keys alive; whoever has them, and this folder, needs no log.
            if self._as is None:
                raise
            by = self._as
        return vault.shred(ref, confirm=confirm, by=by)

    # -- reading -------------------------------------------------------------------------------------------------

    def reader(self, ref: str, *, break_glass: str | None = None) -> ImageReader:
        """A reader of one version, with this principal's key bundle: a release, which is recorded first, and which
        needs what policy asks for, a lease as a rule. `break_glass`: the reason for going past the lease in an
        emergency."""
        from strongroom.client.reading import reader

        return reader(self._vault, self._say, self.principal, ref, break_glass)

    def load(self, ref: str, *, break_glass: str | None = None) -> Weights:
        """One version as a lazy mapping from tensor names to arrays; see `Weights` for whole-model reads."""
        from strongroom.load.weights import Weights

        return Weights(self.reader(ref, break_glass=break_glass))

    def grant(self, ref: str, *, break_glass: str | None = None) -> tuple[str, bytes]:
        """The store's URL and this principal's encoded key bundle: what ``strongroom run`` hands to its child.
        Secret."""
        from strongroom.client.reading import keys

        found, bundle = keys(self._vault, self._say, self.principal, ref, break_glass)
        return found.store, bundle.encode()

    def copy(
        self, ref: str, to: str, out: str | Path, *, quantise: str | None = None, progress: Progress = silent
    ) -> dict[str, Any]:
        """Write the holder's marked plaintext copy of one version into the new folder `out`; needs its approved
        request.

        `to` is who the copy is for: this principal itself, whose code word it carries; `carries_marks` is false of a
        version in which nothing can be marked. `quantise`: of floats, ``int4``, ``int8``, ``q4_0`` or ``q8_0`` of them.
        """
        from strongroom.client.copy import check_copy, take_copy
        from strongroom.client.receive import receive

        folder = check_copy(ref, to, self.principal, Path(out), quantise)
        found = receive(self._vault, self._say, self.principal, ref, "copy", form=quantise)
        told, signed = take_copy(self._vault, found, folder, quantise, progress)
        return {**told, "entry": self._act("copy", signed)["entry"]}

    def trace(
        self,
        path: str | Path | None = None,
        *,
        weights: str | None = None,
        text: str | Path | None = None,
        progress: Progress = silent,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """Whose copy what was found at `path` is, as ``strongroom trace --json`` tells it, or whose wrote a `text`; by
        `weights`, which takes an approved request, or all. `seconds`: for an embedded room, how long to align."""
        found = text if path is None else path
        if found is None or (path is not None and text is not None):
            raise UsageError("trace.what", "either a path or text is traced", hint="room.trace(text=FILE, weights=REF)")
        more: dict[str, Any] = {"weights": weights, "text": path is None, "seconds": seconds}
        return self._vault.trace(Path(found), by=self.principal, progress=progress, **more)

    @property
    def log(self) -> RoomLog:
        """The log of this room."""
        return RoomLog(self._vault, self._act, self._here)

    def set_ceiling(self, ref: str, **changes: int) -> dict[str, Any]:
        """Change `holders`, `copies` or `copiers` of a version, or of every version of a name; none: only say them."""
        if not all(0 <= value <= MAX_INTEGER for value in changes.values()):
            raise UsageError("ceiling.negative", f"a ceiling is a number from 0 to {MAX_INTEGER}")
        body = {"ref": str(Ref.parse(ref)), **self._vault.custodian.ceilings(ref), **changes}
        return {**body, "entry": self._act("ceiling", body)["entry"]} if changes else body

    def thaw(self, ref: str, *, reason: str) -> dict[str, Any]:
        """Let a version that was revoked be asked for again."""
        return {"ref": ref, "entry": self._act("thaw", {"ref": ref}, reason)["entry"]}

    def set_clock(self, reason: str) -> dict[str, Any]:
        """After the custodian's clock was ahead: take the room's time back to now. Ends every lease and login."""
        done = self._act("clock", {}, reason)
        return {"before": done["body"]["before"], "now": done["at"], "entry": done["entry"]}

    # -- custody -------------------------------------------------------------------------------------------------

    def request(
        self,
        ref: str,
        *,
        action: str = "load",
        reason: str,
        holder: str | None = None,
        duration: int = 8 * 3600,
        uses: int | None = None,
    ) -> dict[str, Any]:
        """Ask for a lease of `duration` seconds, for `holder` (default: this principal); to trace, for one use unless
        `uses` says more."""
        row = self._vault.find(ref)
        note = self._private("reason", reason)
        body = {
            "action": action,
            "ref": f"{row.name}@{row.number}",
            "for": holder or self.principal,
            "duration": duration,
            "uses": 1 if action == "trace" and uses is None else uses,
            "reason": note.commitment,
        }
        return self._vault.custodian.request(self._say("request", body), note)

    def requests(self) -> list[dict[str, Any]]:
        """All requests, grants and proposals, oldest first."""
        return self._vault.custodian.requests()

    def show_request(self, identifier: str) -> dict[str, Any]:
        """One of them, with its reason, checked against what was signed."""
        from strongroom.client.asked import look

        return look(self._vault, identifier)

    def approve(
        self, identifier: str, *, duration: int = 0, uses: int | None = None, show: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Approve a request or a proposed policy; an approver may shorten, and count the uses. With `show`, by a
        passkey: it is called with the address of the page that asks for it."""
        # What was shown is what is allowed, and no more, whatever else was asked for.
        asked = self.show_request(identifier)
        duration, uses = duration or asked["duration"], asked["uses"] if uses is None else uses
        body = {"request": asked["digest"], "duration": duration, "uses": uses}
        signer = self.passkeys.signer("approve", asked, show) if show else None
        return self._vault.custodian.approve(self._say("approve", body, signer))

    def deny(self, identifier: str, *, reason: str, show: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Refuse a request or a proposed policy, or take back one's own; `show` as of `approve`."""
        note = self._private("reason", reason)
        asked = self.show_request(identifier)
        body = {"request": asked["digest"], "reason": note.commitment}
        signer = self.passkeys.signer("deny", asked, show) if show else None
        return self._vault.custodian.deny(self._say("deny", body, signer), note)

    @property
    def passkeys(self) -> Passkeys:
        """The passkeys of this principal."""
        from strongroom.client.passkey import Passkeys

        return Passkeys(self._vault, self.principal, self._say)

    @property
    def apikeys(self) -> ApiKeys:
        """The API keys with which this principal calls the room's gateway."""
        from strongroom.client.apikeys import ApiKeys

        return ApiKeys(self._vault, self.principal, self._say)

    def revoke(self, target: str, *, reason: str) -> dict[str, Any]:
        """End a lease, suspend a principal, or freeze a version; in force at once."""
        note = self._private("reason", reason)
        return self._vault.custodian.revoke(self._say("revoke", {"target": target, "reason": note.commitment}), note)

    def who(self, ref: str) -> list[dict[str, Any]]:
        """For every principal and action, whether it can reach the version: now, with approvals, never; and by what."""
        row = self._vault.find(ref)
        return self._vault.custodian.who(f"{row.name}@{row.number}")

    def reach(self, principal: str) -> list[dict[str, Any]]:
        """The same of one principal, for the room and every version in it."""
        return self._vault.custodian.reach(principal)

    def budget(self, ref: str, settings: Path | None = None) -> dict[str, Any]:
        """What has left of a version as answers, and what may: see `client.budget.budget`."""
        return budget(self._vault, self.principal, ref, settings)

    def policy(self, proposal: str | None = None) -> dict[str, Any]:
        """The policy in force, or a proposed one: `text`, `digest`, `rules`; and the `proposals` that are open. Of a
        proposal the text is the one whose digest was signed; Tampered ``request.other``."""
        from strongroom.client.asked import proposed

        return self._vault.custodian.policy() if proposal is None else proposed(self._vault, proposal)

    def propose(self, text: str, *, reason: str) -> dict[str, Any]:
        """Propose another policy: it takes a second person, and a day, before it can be enacted."""
        from strongroom.policy.engine import Policies

        note = self._private("reason", reason)
        body = {"digest": Policies.parse(text).digest, "reason": note.commitment}
        return self._vault.custodian.propose(self._say("propose", body), text, note)

    def enact(self, proposal: str, *, break_glass: str | None = None) -> dict[str, Any]:
        """Make a proposal the policy in force; Pending until it may be. `break_glass`: the reason for not waiting, in
        an emergency; two people it takes all the same."""
        if not _ID.fullmatch(proposal):
            raise UsageError(
                "policy.malformed",
                f"{proposal!r:.40} is not the 16 digits of a proposal",
                hint="strongroom policy show",
            )
        done = self._act("enact", {"proposal": proposal, "reason": ""}, break_glass)
        return {"policy": done["body"]["digest"], "proposal": proposal, "entry": done["entry"]}

    def renew(self, lease: str, *, duration: int = 0, show: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Extend somebody else's lease to load, from now, by what it was granted for or less; `show` as of
        `approve`."""
        if not _ID.fullmatch(lease):
            raise UsageError(
                "renew.malformed", f"{lease!r:.40} is not the 16 digits of a lease", hint="strongroom requests"
            )
        signer = self.passkeys.signer("renew", self.show_request(lease), show) if show else None
        return self._vault.custodian.renew(self._say("renew", {"lease": lease, "duration": duration}, signer))

    def review(self, *, apply: bool = False) -> dict[str, Any]:
        """Who has what, who used it when, and what to look at, ranked. With `apply` what the findings call unused or
        left over is revoked, by statements of this principal, and the review is recorded; `left`: the entries of
        emergencies that somebody else has to review."""
        from strongroom.client.reviewing import review

        return review(self._vault.custodian, self.principal, self.revoke, self._act, apply=apply)

    def _private(self, name: str, value: str) -> Private:
        from strongroom.formats.entry import Private

        return Private.fresh(name, value)

    def _say(self, kind: str, body: dict[str, Any], signer: Signing | None = None) -> str:
        """A statement by this principal, signed by `signer`, else with the key that this machine has of it."""
        from dataclasses import replace

        voice = self._vault.voice(self.principal)
        return (replace(voice, signer=signer) if signer else voice).say(kind, body).envelope

    def _act(self, kind: str, body: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """Say and do one thing; what the custodian has recorded of it."""
        note = None if reason is None else self._private("reason", reason)
        if note is not None:
            body = {**body, "reason": note.commitment}
        return self._vault.custodian.acted(self._say(kind, body), note)

    # -- the room itself -----------------------------------------------------------------------------------------

    @property
    def _registry(self) -> Registry:
        from strongroom.client.registry import Registry

        return Registry(self._vault, self._say, makes_keys=self._embedded is not None)

    def principal_add(
        self,
        path: str,
        *,
        roles: Sequence[str] = (),
        teams: Sequence[str] = (),
        person: str | None = None,
        public_key: str | None = None,
        oidc: str | None = None,
        spiffe: str | None = None,
    ) -> dict[str, Any]:
        """Register a principal. Without `public_key` (64 hexadecimal digits) its key is made in the folder of an
        embedded room (`key_file`), and in a served one it is a UsageError; one that is bound to a name which an
        authority gives it, `oidc` (ISSUER#SUBJECT) or `spiffe` (an id), needs none. `person`: the principal of the same
        human that was registered first, if this is a further one."""
        return self._registry.add(path, roles, teams, person, public_key, oidc, spiffe)

    def principal_change(
        self, path: str, *, roles: _Texts = None, teams: _Texts = None, state: str | None = None
    ) -> dict[str, Any]:
        """Give a principal other roles or teams, or another state: active, suspended, removed."""
        return self._registry.change(path, roles, teams, state)

    def principal_key(self, path: str, public_key: str) -> dict[str, Any]:
        """Give a principal another key, 64 hexadecimal digits. Its leases and logins end, and its passkeys."""
        return self._registry.key(path, public_key)

    def principal_bind(self, path: str, *, oidc: str | None = None, spiffe: str | None = None) -> dict[str, Any]:
        """Bind a principal to another name that an authority gives it, or, without one, to none."""
        return self._registry.bind(path, oidc, spiffe)

    def authority_add(self, authority: Authority) -> dict[str, Any]:
        """Take an authority's word for who somebody is; with a second person once there are three who may grant."""
        return self._vault.custodian.change_authority(
            self._say("authority", {"authority": authority.name, "text": authority.encode()})
        )

    def authority_rm(self, name: str) -> dict[str, Any]:
        """Take it no more: who came in by its word is out, at once."""
        return self._vault.custodian.change_authority(self._say("authority", {"authority": name, "text": ""}))

    def authority_ls(self) -> list[dict[str, Any]]:
        """Whose word is taken."""
        return self._vault.custodian.authorities()

    def login(self, duration: int = 8 * 3600) -> Login:
        """A login of this principal, to be finished with a token or a certificate; see `strongroom.client.login`."""
        from strongroom.client.login import Login

        return Login(self._vault, self._as or self._vault.principal(None), duration)

    def principal_show(self, path: str) -> dict[str, Any]:
        """One principal, and the leases that it holds."""
        return self._vault.custodian.show_principal(path)

    def principal_ls(self) -> list[dict[str, Any]]:
        return self._vault.principal_ls()

    def status(self) -> dict[str, Any]:
        return self._vault.status()

    def doctor(self) -> list[Check]:
        from strongroom.vault.status import doctor

        return doctor(self._here("doctor"))

    def fsck(self, *, repair: bool = False) -> FsckReport:
        from strongroom.vault.fsck import fsck

        return fsck(self._here("fsck"), repair=repair)

    def keystore_show(self) -> dict[str, Any]:
        """The key store, and whether the room can be unsealed with it."""
        found = self._here("keystore show").status()
        return {name: found[name] for name in ("keystore", "sealed", "sealed_because", "key_epoch")}

    def keystore_rotate(self, to: str | None = None) -> dict[str, int | str]:
        """A new room key under a new key-encryption key, or in another key store."""
        vault = self._here("keystore rotate")
        vault.custodian.authorise(self.principal, "administer")
        # Before anything is changed: what can't be recorded must not be done.
        vault.voice(self.principal)
        vault.custodian.check_clock()
        done = vault.keys.rotate(to)
        return {**done, "entry": self._act("keystore", {"operation": "rotate", "epoch": done["key_epoch"]})["entry"]}

    def recovery_drill(self, shares: Sequence[str]) -> None:
        """Prove that these shares open the room."""
        self._here("recovery drill").keys.drill(shares)

    def recover(self, shares: Sequence[str], keystore: str) -> dict[str, int | str]:
        """Open a room whose key store is lost, and give it another."""
        vault = self._here("recovery recover")
        done = vault.keys.recover(shares, keystore)
        return {**done, "entry": vault.custodian.founding.recovered(int(done["key_epoch"]))}

    def reinstate(
        self, shares: Sequence[str], path: str, role: str, *, reason: str, public_key: str | None = None
    ) -> dict[str, Any]:
        """Make somebody an officer or executive by the shares' word: see `Founding.reinstate`."""
        vault = self._here("recovery reinstate")
        return vault.custodian.founding.reinstate(shares, path, role, public_key, reason, vault.identities)


def open(room: str | Path | None = None, principal: str | None = None) -> Room:  # noqa: A001 - the public name
    """Open a room: a folder or its ``file:`` URL (default: ``STRONGROOM_ROOM``, else ``./room``), as `principal`
    (default: ``STRONGROOM_AS``, else the only local identity). UsageError inside ``strongroom run``."""
    settings = Settings.from_environment()
    if settings.grant is not None:
        raise _no_room_here("strongroom.safe_open(REF, …) and the loaders read what this process was given")
    return Room(room or settings.room, principal or settings.principal)


def safe_open(
    ref: str,
    framework: str,
    device: str | int = "cpu",
    *,
    file: str | None = None,
    room: str | Path | None = None,
) -> SafeOpen:
    """`safetensors.safe_open` for weights in the room: same methods, and a slice fetches only what it touches.

    `file` names one weights file of the version (default: the tensors of all). Inside ``strongroom run`` the grant of
    the parent is used, and naming a `room` there is a UsageError; elsewhere the room is opened.
    """
    from strongroom.load.safe_open import SafeOpen
    from strongroom.load.source import resolve

    if room is None:
        reader = resolve(ref)
    elif Settings.from_environment().grant is not None:
        # A child that is denied something must not get round that by naming the room.
        raise _no_room_here("leave out room=, or run it without strongroom run")
    else:
        reader = read_once(ref, room)
    return SafeOpen(reader, framework, device, file=file)


def _no_room_here(hint: str) -> UsageError:
    return UsageError(
        "grant.room",
        "this process runs under strongroom run and reads what it was given; it opens no room",
        hint=hint,
    )


def read_once(ref: str, room: str | Path | None = None) -> ImageReader:
    """A reader of `ref` that outlives the room it is from: it has its key bundle and the store, and no database."""
    from strongroom.client.reading import reader, released

    with open(room) as opened:
        where, who = opened._where, opened.principal  # noqa: SLF001

        def again(lease: str | None, bundle: KeyBundle) -> tuple[Blobs, KeyBundle] | None:
            with Room(where, who) as anew:
                return released(anew._vault, anew._say, lease, bundle)  # noqa: SLF001 - of this module

        return reader(opened._vault, opened._say, who, ref, again=again)  # noqa: SLF001
