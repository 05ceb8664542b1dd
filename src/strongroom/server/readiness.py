"""Whether this custodian can do its work: asked by anybody, so asked of the key store at most every few seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from strongroom.errors import BackendError, StrongroomError

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

_FRESH = 5.0  # seconds that an answer of the key store is good for
_PATIENCE = 5.0  # seconds that it is waited for
_LOG = logging.getLogger("strongroom.server")


class Readiness:
    """One question to the key store at a time, whoever asks: a stranger can't make this hammer it, nor fill this
    process with threads that wait for it."""

    def __init__(
        self, vault: Vault, *, patience: float = _PATIENCE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._vault, self._patience, self._clock = vault, patience, clock
        self._lock = threading.Lock()
        self._asked, self._trouble = float("-inf"), ""
        self._asking: threading.Thread | None = None

    def check(self) -> None:
        """BackendError ``server.not_ready`` while the room is sealed, or its log or key store does not answer."""
        try:
            self._vault.custodian.challenge()  # the room is unsealed
            self._vault.custodian.ledger.checkpoint()
            trouble = self._keystore()
        except StrongroomError as error:
            trouble = f"{error.code}: {error.message}"
        if trouble:
            _LOG.warning("not ready: %r", trouble)
            raise BackendError("server.not_ready", "sealed, or its log or key store can't be read")

    def _keystore(self) -> str:
        """What is wrong with the key store, or nothing. The keys are in memory; that they can be had again, after a
        start or a rotation, is what is asked."""
        with self._lock:  # those who wait for it are answered by what this finds
            if self._clock() - self._asked < _FRESH:
                return self._trouble
            if self._asking is None or not self._asking.is_alive():
                self._asking = threading.Thread(target=self._ask, daemon=True, name="readiness")
                self._asking.start()
            self._asking.join(self._patience)
            if self._asking.is_alive():
                self._trouble = "the key store does not answer in time"
            self._asked = self._clock()
            return self._trouble

    def _ask(self) -> None:
        try:
            facts = self._vault.keys.keystore.check()
            self._trouble = "" if facts["reachable"] else f"the key store: {facts.get('notes', '')}"
        except Exception as error:  # noqa: BLE001 - a check that dies must not leave the last answer standing
            self._trouble = f"the key store: {error}"
