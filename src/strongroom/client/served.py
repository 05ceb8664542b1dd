"""A served room, with the surface that `strongroom.client.Room` uses of an embedded one (spec/http.md)."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from strongroom.client import answers
from strongroom.client.receive import Released
from strongroom.client.send import announce, body
from strongroom.core.clock import unix
from strongroom.core.ids import Ref
from strongroom.core.progress import Progress
from strongroom.core.settings import Settings
from strongroom.crypto.identity import Identities
from strongroom.crypto.session_key import SessionKeys, acting, signer_of
from strongroom.errors import BackendError, NotFound, Tampered, UsageError
from strongroom.formats.card import Card
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.entry import Entry, Kind, Private
from strongroom.formats.merkle import HASH, inclusion_proof, leaf_hash, node_hash
from strongroom.formats.statement import Statement, Voice
from strongroom.formats.suites import Suite
from strongroom.formats.tiles import WIDTH, Tile, decode_bundle, verify_leaves
from strongroom.ledger.key import LogKey
from strongroom.policy.review import Review
from strongroom.storage.blobs import Blobs, open_blobs
from strongroom.storage.served import ServedBlobs
from strongroom.storage.session import Session, authorization
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import PutResult
from strongroom.vault.versions import VersionInfo


@dataclass(frozen=True)
class Named:
    """A version by name and number."""

    name: str
    number: int


@dataclass(frozen=True)
class Known:
    """A principal, as far as changing it takes."""

    state: str
    entry: int


@dataclass(frozen=True)
class ServedAnswer(Released):
    """A release, and where its ciphertext is read."""

    store: str


class ServedRoom:
    """The room that `card` names, as `principal` (default: the only identity on this machine)."""

    def __init__(self, card: Card, principal: str | None) -> None:
        self.card, self.id, self.signer = card, card.room, card.signer
        self.log_key, self.witnesses = LogKey(card.room, card.log_key), card.witnesses
        self.identities = Identities(Settings.from_environment().identities_folder)
        self.sessions = SessionKeys(Settings.from_environment().state_folder, card.room)
        self.clock = unix
        self._principal = principal
        self._session = Session(card)
        self._lock = threading.Lock()
        self._copied: ServedBlobs | None = None  # where the copy that is being taken comes from
        self.custodian = ServedCustodian(self)

    def close(self) -> None:
        self._session.close()
        if self._copied is not None:
            self._copied.close()

    def principal(self, path: str | None) -> str:
        """Who to act as; the server says whether that is somebody."""
        return acting(self.identities, self.sessions, path, whom="you are", new="user/NAME")

    def principal_ls(self) -> list[dict[str, Any]]:
        return list(self.get("/v1/principals", answers.PRINCIPALS)["principals"])

    def ls(self, name: str | None = None) -> list[VersionInfo]:
        query = f"?{urlencode({'name': name})}" if name else ""
        found = self.get(f"/v1/weights{query}", answers.VERSIONS)["versions"]
        return [VersionInfo.from_json(item) for item in found]

    def show(self, ref: str) -> dict[str, Any]:
        named = self.find(ref)
        return self.get(f"/v1/weights/{quote(f'{named.name}@{named.number}', safe='/@')}", answers.SHOWN)

    def status(self) -> dict[str, Any]:
        """What the custodian tells of the room: its keys and its files are its host's own business."""
        return self.get("/v1/status", answers.STATUS) | {"url": self.card.url}

    def put(
        self,
        source: ModelSource,
        name: str,
        *,
        by: str,
        share: str = "auto",
        positions: int = 16384,
        suite: Suite = Suite.BLAKE3,
        progress: Progress,
    ) -> PutResult:
        """Send a model, which the custodian encrypts as it comes; `Vault.put`. The files are read twice: to say what
        will come, and to send it."""
        upload = announce(source, name, share, positions, suite.name.lower(), self.voice(by))
        head = upload.encode()
        # What would be refused is refused before gigabytes are on their way.
        self.ask("/v1/uploads", head, answers.UPLOAD)
        try:
            answer = self.send("/v1/weights", head, upload.size, body(source, upload, head, progress), answers.PUT)
        except BackendError as error:
            # It may be there: a second put of the same files would be another version of them.
            error.hint = f"strongroom ls {name} shows whether it is there; if not, put it again: it goes on"
            raise
        return PutResult.from_json(answer)

    def trace(
        self,
        path: Path,
        *,
        by: str,
        weights: str | None,
        progress: Progress,
        text: bool = False,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """See `strongroom.client.tracing.trace`. UsageError ``trace.limit``: how long is for the custodian to say."""
        from strongroom.client.tracing import trace

        if seconds is not None:
            raise UsageError(
                "trace.limit",
                "how long a search takes is said where the room is served",
                hint="without --limit; on the custodian's host: strongroom serve --trace-limit 1h",
            )

        return trace(self, path, by=by, weights=weights, progress=progress, text=text)

    def find(self, ref: str) -> Named:
        """The version that `ref` names: the newest active one for a name alone."""
        wanted = Ref.parse(ref)
        if wanted.number is not None:
            return Named(wanted.name, wanted.number)
        numbers = [info.number for info in self.ls(wanted.name) if info.state != "shredded"]
        if not numbers:
            raise NotFound("version.missing", f"there are no weights {ref} in this room", hint="strongroom ls")
        return Named(wanted.name, max(numbers))

    def read_log(self) -> Callable[[str], bytes]:
        """How a verifier reads the log: takes the right to audit."""
        return lambda name: self.get_bytes(f"/v1/log/{name.removeprefix('log/')}")

    def cosigned_note(self, note: bytes) -> bytes:
        return note

    def blobs_at(self, url: str) -> Blobs:
        return open_blobs(url)

    def read_copy(self, store: str, name: str) -> bytes:
        # One connection of each thread for all pieces of a copy, each of which would else begin with a handshake.
        with self._lock:
            if self._copied is None or self._copied.url != store:
                if self._copied is not None:
                    self._copied.close()
                self._copied = ServedBlobs(store)
            copied = self._copied
        return copied.read_at_once(name)

    # -- requests ------------------------------------------------------------------------------------------------

    def get(self, path: str, members: Mapping[str, Kind]) -> dict[str, Any]:
        return answers.parse(self.get_bytes(path), members)

    def get_bytes(self, path: str) -> bytes:
        return self._session.request("GET", path, headers=self._call("GET", path, b""))

    def stop(self, path: str, members: Mapping[str, Kind]) -> dict[str, Any]:
        """DELETE: end what this principal began."""
        return answers.parse(self._session.request("DELETE", path, headers=self._call("DELETE", path, b"")), members)

    def ask(self, path: str, head: bytes, members: Mapping[str, Kind]) -> dict[str, Any]:
        """Whether what `head` announces would be taken."""
        return answers.parse(self._session.request("POST", path, head, self._call("POST", path, head)), members)

    def send(
        self, path: str, head: bytes, size: int, pieces: Iterable[memoryview], members: Mapping[str, Kind]
    ) -> dict[str, Any]:
        """Send `pieces`: the length of `head`, `head`, and the `size` bytes that it announces."""
        headers = self._call("POST", path, head)
        return answers.parse(self._session.send(path, 4 + len(head) + size, pieces, headers), members)

    def post(
        self,
        path: str,
        members: Mapping[str, Kind],
        value: dict[str, Any] | None = None,
        *,
        again: bool = True,
    ) -> dict[str, Any]:
        body = json.dumps(value or {}).encode()
        return answers.parse(self._session.request("POST", path, body, {}, again=again), members)

    def voice(self, by: str) -> Voice:
        """The principal `by`, to speak with the key that this machine has; AuthRequired ``identity.missing``."""
        return Voice(self.id.hex(), by, signer_of(self.identities, self.sessions, by, self.clock()), self.clock)

    def _call(self, method: str, path: str, body: bytes) -> dict[str, str]:
        return authorization(self.voice(self.principal(self._principal)), method, path, body)


class ServedCustodian:
    """`strongroom.vault.custodian.Custodian`, as far as it is offered over HTTP."""

    def __init__(self, room: ServedRoom) -> None:
        self._room = room
        self.ledger = self
        self.apikeys = ServedApiKeys(room)

    def authorise(self, by: str, *actions: str, ref: str = "", recorded: bool = True) -> None:
        """Nothing is decided here: the custodian asks its policy at every call."""

    def challenge(self) -> bytes:
        return bytes.fromhex(self._room.post("/v1/challenges", answers.CHALLENGE)["nonce"])

    def release(self, envelope: str, reason: Private | None = None) -> ServedAnswer:
        # Not sent twice: its challenge is good for one, and what was sealed before is sealed to nobody else.
        value = {"statement": envelope, "reason": _reason(reason)}
        found = self._room.post("/v1/releases", answers.RELEASE, value, again=False)
        return ServedAnswer(
            answers.decode(found["entry"]),
            found["index"],
            tuple(map(answers.decode, found["proof"])),
            answers.decode(found["checkpoint"]),
            answers.decode(found["sealed"]),
            answers.store(found["store"], self._room.card),
        )

    def consistency(self, old: int, new: int) -> list[bytes]:
        found = self._room.get(f"/v1/log/consistency?{urlencode({'old': old, 'new': new})}", answers.PROOF)
        return [answers.decode(each) for each in found["proof"]]

    def ceilings(self, ref: str) -> dict[str, int]:
        return self._room.get(f"/v1/ceilings?{urlencode({'ref': ref})}", answers.CEILINGS)

    def acted(self, envelope: str, reason: Private | None = None) -> dict[str, Any]:
        said = Statement.decode(envelope)
        about = f"/v1/policies/{said.body['proposal']}/enact" if said.kind == "enact" else "/v1/acts"
        return self._post(about, answers.acted(said.kind), envelope, reason)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The audit path of the entry at `index` in the tree of `size`, made of the server's tiles: it holds if the
        root that it leads to was signed."""
        return inclusion_proof(index, size, _Tiles(self._room.get_bytes, size).subtree)

    def checkpoint(self) -> tuple[Checkpoint, bytes]:
        note = self._room.get_bytes("/v1/log/checkpoint")
        return self._room.log_key.open(note), note

    def proven(self, begin: int, end: int) -> list[bytes]:
        """The encoded entries from `begin` to before `end`, each proven to be in the tree that the log key signed.

        Takes the right to audit. Tampered ``log.inclusion``.
        """
        checkpoint, _ = self.checkpoint()
        tiles = _Tiles(self._room.get_bytes, checkpoint.size)
        found: list[bytes] = []
        first = begin // WIDTH
        for index in range(first, -(-end // WIDTH)):
            entries = decode_bundle(self._room.get_bytes(f"/v1/log/{tiles.at(None, index).path}"))
            if len(entries) != tiles.at(None, index).width:
                raise Tampered("log.bundle", f"the server's bundle {index} does not have all of its entries")
            leaves = [leaf_hash(data) for data in entries]
            verify_leaves(index * WIDTH, leaves, checkpoint.size, checkpoint.root, tiles.node)
            found += entries
        return found[begin - first * WIDTH : end - first * WIDTH]

    def private(self, index: int, entry: Entry) -> dict[str, str]:  # noqa: ARG002 - it stays with the custodian
        return {}

    def request(self, envelope: str, reason: Private) -> dict[str, Any]:
        return self._post("/v1/requests", answers.REQUEST, envelope, reason)

    def requests(self) -> list[dict[str, Any]]:
        return list(self._room.get("/v1/requests", answers.REQUESTS)["requests"])

    def show_request(self, identifier: str) -> dict[str, Any]:
        return self._room.get(f"/v1/requests/{quote(identifier, safe='')}", answers.REQUEST)

    def approve(self, envelope: str) -> dict[str, Any]:
        return self._post(f"/v1/requests/{_about(envelope)}/approve", answers.REQUEST, envelope)

    def deny(self, envelope: str, reason: Private) -> dict[str, Any]:
        return self._post(f"/v1/requests/{_about(envelope)}/deny", answers.REQUEST, envelope, reason)

    def renew(self, envelope: str) -> dict[str, Any]:
        return self._post(f"/v1/leases/{_about(envelope)}/renew", answers.REQUEST, envelope)

    def revoke(self, envelope: str, reason: Private) -> dict[str, Any]:
        return self._post("/v1/revocations", answers.REVOKED, envelope, reason)

    def change_principal(self, envelope: str) -> dict[str, Any]:
        return self._post("/v1/principals", answers.CHANGED, envelope)

    def show_principal(self, path: str) -> dict[str, Any]:
        return self._room.get(f"/v1/principals/{quote(path)}", answers.PRINCIPAL)

    def known(self, path: str) -> Known:
        found = self.show_principal(path)
        return Known(found["state"], found["entry"])

    def change_passkey(self, envelope: str) -> dict[str, Any]:
        return self._post("/v1/passkeys", answers.CHANGED_PASSKEY, envelope)

    def change_authority(self, envelope: str) -> dict[str, Any]:
        return self._post("/v1/authorities", answers.CHANGED_AUTHORITY, envelope)

    def authorities(self) -> list[dict[str, Any]]:
        return list(self._room.get("/v1/authorities", answers.AUTHORITIES)["authorities"])

    def login(self, envelope: str, proof: Mapping[str, Any]) -> dict[str, Any]:
        value = {"statement": envelope, "proof": dict(proof)}
        return self._room.post("/v1/logins", answers.LOGIN, value)

    def who(self, ref: str) -> list[dict[str, Any]]:
        return list(self._room.get(f"/v1/reach?{urlencode({'ref': ref})}", answers.ACCESS)["access"])

    def reach(self, path: str) -> list[dict[str, Any]]:
        return list(self._room.get(f"/v1/reach?{urlencode({'principal': path})}", answers.ACCESS)["access"])

    def policy(self, digest: str | None = None) -> dict[str, Any]:
        query = f"?{urlencode({'digest': digest})}" if digest else ""
        return self._room.get(f"/v1/policies{query}", answers.POLICY)

    def propose(self, envelope: str, text: str, reason: Private) -> dict[str, Any]:
        return self._post("/v1/policies", answers.PROPOSED, envelope, reason, text=text)

    def budget(self, ref: str) -> dict[str, Any]:
        """What has left of a version as answers, by the budgets of the room's gateway."""
        return self._room.get(f"/v1/budgets?{urlencode({'ref': ref})}", answers.BUDGETS)

    def review(self) -> Review:
        return Review.from_json(self._room.get("/v1/reviews", answers.REVIEW))

    def _post(
        self, path: str, members: Mapping[str, Kind], envelope: str, reason: Private | None = None, **more: str
    ) -> dict[str, Any]:
        value = {"statement": envelope, "reason": _reason(reason), **more}
        return self._room.post(path, members, value)


class ServedApiKeys:
    """`strongroom.vault.apikeys.ApiKeys`, over HTTP."""

    def __init__(self, room: ServedRoom) -> None:
        self._room = room

    def change(self, envelope: str) -> dict[str, Any]:
        return self._room.post("/v1/apikeys", answers.CHANGED_APIKEY, {"statement": envelope})

    def ls(self, _: str, principal: str | None = None) -> list[dict[str, Any]]:
        query = f"?{urlencode({'principal': principal})}" if principal else ""
        return list(self._room.get(f"/v1/apikeys{query}", answers.APIKEYS)["apikeys"])


class _Tiles:
    """The hashes of a log of `size`, by its tiles, each of which is asked for once."""

    def __init__(self, read: Callable[[str], bytes], size: int) -> None:
        self._read, self._size = read, size
        self._tiles: dict[str, bytes] = {}

    def at(self, level: int | None, index: int) -> Tile:
        return Tile(level, index, min(WIDTH, (self._size >> 8 * (level or 0)) - index * WIDTH))

    def node(self, level: int, position: int) -> bytes:
        """The hash of a complete subtree of a level that is a multiple of 8."""
        tile = self.at(level // 8, position // WIDTH)
        if tile.path not in self._tiles:
            self._tiles[tile.path] = self._read(f"/v1/log/{tile.path}")
        begin = position % WIDTH * HASH
        value = self._tiles[tile.path][begin : begin + HASH]
        if len(value) != HASH:
            raise Tampered("log.tile", f"the server's {tile.path} does not have all of its hashes")
        return value

    def subtree(self, level: int, position: int) -> bytes:
        """The hash of a complete subtree of any level."""
        stored = level // 8 * 8
        span = 1 << (level - stored)
        hashes = [self.node(stored, position * span + each) for each in range(span)]
        while len(hashes) > 1:
            hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
        return hashes[0]


def _about(envelope: str) -> str:
    body = Statement.decode(envelope).body
    return str(body.get("request", body.get("lease")))[:16]


def _reason(reason: Private | None) -> dict[str, str] | None:
    if reason is None:
        return None
    return {"value": reason.value, "salt": base64.b64encode(reason.salt).decode()}
