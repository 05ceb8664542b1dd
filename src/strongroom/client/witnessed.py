"""Witnesses at a release (spec/release.md, section 3): a key is opened only where enough of them have seen the log that
records it. So a custodian that shows this client a log of its own needs their help, too."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

from strongroom.crypto import signatures
from strongroom.errors import CannotVerify, Conflict
from strongroom.formats.checkpoint import verify_cosignature
from strongroom.formats.merkle import verify_consistency
from strongroom.formats.note import Note, VerifierKey
from strongroom.ledger.witness import cosign

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyLedger
    from strongroom.formats.card import Witnesses
    from strongroom.ledger.key import LogKey

_WAIT = 20.0  # seconds for all of them together


def require(note: bytes, wanted: Witnesses, log: LogKey, ledger: AnyLedger, *, wait: float = _WAIT) -> None:
    """CannotVerify ``release.unwitnessed`` unless a quorum of the `wanted` cosigns `note`, or what extends it."""
    answers: queue.Queue[tuple[str, str]] = queue.Queue()
    until = time.monotonic() + wait

    def ask(key: VerifierKey, url: str) -> None:
        try:
            _ask(key, url, note, log, ledger, until)
            answers.put((key.name, ""))
        except Exception as error:  # noqa: BLE001 - whatever it is: this witness has not signed
            answers.put((key.name, str(getattr(error, "message", error))))

    for each in wanted.named:
        # Not waited for, once there are enough: one that drips its answer holds nobody up.
        threading.Thread(target=ask, args=each, daemon=True).start()
    missing = {key.name: f"no answer within {wait:.0f} seconds" for key, _ in wanted.named}
    signed = 0
    for _ in wanted.named:
        try:
            name, why = answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        if why:
            missing[name] = why
            continue
        del missing[name]
        signed += 1
        if signed >= wanted.quorum:
            return
    raise CannotVerify(
        "release.unwitnessed",
        f"{signed} of the witnesses have cosigned the log of this release, and {wanted.quorum} have to: "
        + "; ".join(f"{name}: {why}" for name, why in sorted(missing.items())),
        hint="see that they answer, then try again; others instead: strongroom trust CARD --witness VKEY URL",
        missing=sorted(missing),
    )


def _ask(key: VerifierKey, url: str, note: bytes, log: LogKey, ledger: AnyLedger, until: float) -> None:
    if verify_cosignature(Note.decode(note), key, signatures.verify) is not None:
        return
    released = now = log.open(note)
    while True:
        try:
            cosign(url, key, note, ledger.consistency)
            return
        except Conflict as error:
            if error.code != "witness.ahead" or time.monotonic() >= until:
                raise
            # Somebody else's release came after this one and was cosigned before: what is cosigned has to extend this.
            # In a busy room that is so several times: each time the log has grown, or it is another log.
            newest, note = ledger.checkpoint()
            if newest.size <= now.size:
                raise
            path = ledger.consistency(released.size, newest.size)
            verify_consistency(released.size, released.root, newest.size, newest.root, path)
            now = newest
