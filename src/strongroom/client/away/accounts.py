"""What a worker of a gateway elsewhere says that it has answered, each account once (spec/ledger.md, section 12)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from strongroom.client import answers
from strongroom.client.away.line import Line
from strongroom.errors import BackendError, Conflict, Sealed, StrongroomError
from strongroom.formats.stream import fresh

_TRIES, _PAUSE = 3, 1.0  # at the end, of an account whose answer was lost
_log = logging.getLogger("strongroom.gateway")


class Accounts:
    """Those of one stream. `say` takes over what it is given unless it raises: an account whose answer is lost is said
    again, with its number, before another one is."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.stream = fresh(line.room, line.principal)
        self._lock = threading.Lock()
        self._next = 0
        self._unsure: dict[str, Any] | None = None

    def say(self, ref: str, body: Mapping[str, Any]) -> int:
        """The index of the entry, or -1 if that is not known. Errors: nothing of it is in the log, or will be."""
        with self._lock:
            self._again()
            said = {"account": self._next, "ref": ref, **body}
            try:
                return self._send(said)
            except (BackendError, Sealed) as error:
                if isinstance(error, Sealed) and error.code == "gateway.refused":
                    raise  # the room has answered
                self._unsure = said
                if not body["requests"]:
                    raise  # nothing is counted by it, and somebody waits to know whether it is there
                _log.warning("it is not known whether the log has account %d: %s", said["account"], error)
                return -1

    def _again(self) -> None:
        if self._unsure is not None:
            self._send(self._unsure)
            self._unsure = None

    def _send(self, said: Mapping[str, Any]) -> int:
        try:
            found = self._line.say("/v1/gateway/accounts", "inference", said, answers.ACTED)["entry"]
        except Conflict as error:
            if error.code != "inference.told" or error.evidence.get("accounts") != said["account"] + 1:
                raise
            found = -1
        self._next = said["account"] + 1
        return int(found)

    def close(self) -> None:
        """Say what is not known to have been heard, or leave it to the records."""
        with self._lock:
            for last in (*[False] * (_TRIES - 1), True):
                try:
                    self._again()
                except StrongroomError as error:
                    if last:
                        _log.error("account %d of %s may not be in the log: %s", self._next, self.stream, error)
                    else:
                        time.sleep(_PAUSE)
                else:
                    return
