"""The demo's steps about custody: who asks, who approves, when it ends, and the log of it all."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from strongroom.cli.demo_stage import ANA, BEN, EVA, Stage, broken
from strongroom.cli.output import number, seconds
from strongroom.core.clock import text
from strongroom.errors import Denied, IntegrityError, Rollback

_PEOPLE = {ANA: "researcher", BEN: "officer", EVA: "executive"}


class CustodySteps(Stage):
    """Ana wants to load the model; Ben and Eva have a say in it."""

    def denied(self) -> dict[str, Any]:
        """A researcher takes weights as if they were hers."""
        for path, role in _PEOPLE.items():
            self._add(path, role)
        self._tell("The room knows three more people now. None of them was given the model.")
        error = self._load_is_refused("a researcher got the weights without anybody's approval")
        return {"code": error.code, "needs": error.evidence["needs"], "entry": self._newest("refused")["index"]}

    def approved(self) -> dict[str, Any]:
        """A request, its author's own approval, and those of two others."""
        hours = 2
        self._typed(f'request {self.name} --duration {hours}h --reason "evaluation 7" --as {ANA}')
        with self._room(ANA) as room:
            asked = room.request(self.ref, reason="evaluation 7", duration=hours * 3600)
        identifier = asked["id"]
        self._typed(f"approve {identifier} --as {ANA}")
        own = self._refused(
            Denied, lambda: self._approve(identifier, ANA), otherwise="somebody approved a request of their own"
        )
        self._typed(f"approve {identifier} --as {BEN}")
        half = self._approve(identifier, BEN)
        if half["state"] != "pending":
            raise broken("one approval was enough", half)
        self._tell(f"Recorded. Still needed: {'; '.join(half['needs'])}.")
        self._typed(f"approve {identifier} --as {EVA}")
        found = self._approve(identifier, EVA)
        if not found["lease"]:
            raise broken("two approvals were not enough", found)
        self._tell(f"That is what the policy asks for: {ANA} has a lease until {text(found['expires_at'])}.")
        self._tell(
            "Each request and approval is a statement, signed with the key of whoever makes it; an approval names the "
            "whole request by its hash, and holds for no other."
        )
        return {
            "own": own.code,
            "needed_after_one": half["needs"],
            "state": found["state"],
            "approved_by": found["approved_by"],
            "lease": found["lease"]["id"],
            "entry": found["entry"],
        }

    def revoked(self) -> dict[str, Any]:
        """The lease ends, and an older database does not bring it back."""
        lease = self.figures["approved"]["lease"]
        database = self.folder / "room.db"
        before = database.read_bytes()
        self._typed(f'revoke {lease} --reason "the evaluation is over" --as {BEN}')
        with self._room(BEN) as room:
            entry = room.revoke(lease, reason="the evaluation is over")["entry"]
        self._tell(f"Recorded as entry {entry}, and in force for everything after it.")
        error = self._load_is_refused("a lease was good for something after it had been revoked")
        self._tell("Somebody puts back the database of a minute ago, in which the lease holds. She tries once more:")
        after = database.read_bytes()
        database.write_bytes(before)
        try:
            rollback = self._refused(Rollback, self._load, otherwise="an older database brought a lease back")
        finally:
            database.write_bytes(after)
        self._tell(
            "The database is put right again. What she got before, she has; strongroom rotate makes those keys "
            "worthless for what is in the store."
        )
        return {"entry": entry, "code": error.code, "rollback": rollback.code}

    def log(self) -> dict[str, Any]:
        """The log is checked by its public key alone; then a copy of it that somebody has edited."""
        self._typed("log verify")
        with self._room() as room:
            begun = time.perf_counter()
            report = room.log.verify()
            took = time.perf_counter() - begun
            key = room.log.key
        self._tell(
            f"{number(report['size'])} entries hold together under one signed root, and the {report['statements']} "
            f"statements in them are signed by whom they name ({seconds(took)}). All that it takes is the published "
            "files and the log's public key."
        )
        release = self.figures["run"]["entry"]
        self._tell(f"In a copy of the log, entry {release} is edited: it was Eva who loaded the model, and not Ana.")
        self._typed(f"log verify COPY --key {key[:27]}…")
        refused = self._edited(release, report["size"], key)
        if refused.evidence.get("entry") != release:
            raise broken("log verify did not say which entry was edited", refused.as_json())
        return {**report, "seconds": round(took, 3), "edited": release, "edited_refused": refused.code}

    # -- inside --------------------------------------------------------------------------------------------------

    def _add(self, path: str, role: str) -> None:
        self._typed(f"principal add {path} --role {role}")
        with self._room() as room:
            room.principal_add(path, roles=[role])

    def _approve(self, identifier: str, principal: str) -> dict[str, Any]:
        with self._room(principal) as room:
            return room.approve(identifier)

    def _load(self) -> None:
        with self._room(ANA) as room:
            room.load(self.ref)

    def _load_is_refused(self, otherwise: str) -> Denied:
        self._typed(f"run {self.name} --as {ANA} -- python evaluate.py")
        return self._refused(Denied, self._load, otherwise=otherwise)

    def _lease(self, holder: str) -> dict[str, Any]:
        """A lease for `holder`, who asks; Ben and Eva approve."""
        with self._room(holder) as room:
            asked = room.request(self.ref, reason="the demo", duration=3600)
        self._approve(asked["id"], BEN)
        return self._approve(asked["id"], EVA)

    def _newest(self, kind: str) -> dict[str, Any]:
        """The newest entry of a kind; it is one of the last few."""
        with self._room() as room:
            found = [entry for entry in room.log.tail() if entry["type"] == kind]
        if not found:
            raise broken(f"the log has no entry {kind}", {})
        return found[-1]

    def _edited(self, index: int, size: int, key: str) -> IntegrityError:
        """What verifying says of a copy of the published log in which entry `index` names somebody else."""
        from strongroom.client import verify_log
        from strongroom.formats.tiles import WIDTH, Tile, decode_bundle, encode_bundle

        begin = index // WIDTH * WIDTH
        with tempfile.TemporaryDirectory(prefix="log-", dir=self.folder.parent) as temporary:
            copy = Path(temporary) / "log"
            shutil.copytree(self.folder / "log", copy)
            bundle = copy / Tile(None, begin // WIDTH, min(WIDTH, size - begin)).path
            entries = decode_bundle(bundle.read_bytes())
            entries[index - begin] = entries[index - begin].replace(f'"by":"{ANA}"'.encode(), f'"by":"{EVA}"'.encode())
            bundle.write_bytes(encode_bundle(entries))
            return self._refused(
                IntegrityError, lambda: verify_log(copy, key), otherwise="log verify did not see an edited entry"
            )
