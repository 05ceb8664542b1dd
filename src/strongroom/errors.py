"""Every error that leaves Strongroom, in one tree.

A direct child of `StrongroomError` says what the caller has to do::

    StrongroomError
    ├── UsageError          fix the call                             exit 2   HTTP 400
    ├── Denied              ask for the right, or stop               exit 3   HTTP 403
    ├── AuthRequired        say who you are                          exit 4   HTTP 401
    ├── Pending             wait for approvals                       exit 5   HTTP 409
    ├── IntegrityError      stop: the bytes are not the room's       exit 6   HTTP 422
    │   ├── Tampered            bytes differ from what was signed
    │   ├── Truncated           bytes are missing
    │   ├── Rollback            an older state was offered as the newest
    │   └── Forked              two histories claim the same place
    ├── CannotVerify        could not check; says nothing about tampering   exit 6   HTTP 422
    ├── Sealed              unseal the room (key store down or locked)      exit 7   HTTP 503
    ├── BackendError        try again, or mend the store or database        exit 7   HTTP 503
    ├── NotFound            name something that exists               exit 8   HTTP 404
    ├── Conflict            somebody else got there first            exit 2   HTTP 409
    └── LimitExceeded       ask for less                             exit 9   HTTP 429
        └── BudgetExceeded      the egress budget is spent

Each error carries a stable `code` (``noun.reason``, which scripts may match), a `message` (what happened and what was
expected), a `hint` (the next command) and `evidence` (JSON values). Never put key material or plaintext into any of
them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class StrongroomError(Exception):
    """Root of the tree; raised directly never."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    recorded = False  # whether a log has it already, as a refusal

    def __init__(self, code: str, message: str, *, hint: str = "", **evidence: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.evidence: dict[str, Any] = evidence

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]" + (f"\n  → {self.hint}" if self.hint else "")

    def as_json(self) -> dict[str, Any]:
        """The one shape of an error on the wire and under ``--json``."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "evidence": self.evidence,
            "exit_code": self.exit_code,
        }


class UsageError(StrongroomError):
    exit_code = 2
    http_status = 400


class Denied(StrongroomError):
    exit_code = 3
    http_status = 403


class AuthRequired(StrongroomError):
    exit_code = 4
    http_status = 401


class Pending(StrongroomError):
    exit_code = 5
    http_status = 409


class IntegrityError(StrongroomError):
    exit_code = 6
    http_status = 422


class Tampered(IntegrityError):
    """Bytes differ from what was signed."""


class Truncated(IntegrityError):
    """Bytes that were signed are missing."""


class Rollback(IntegrityError):
    """An older state was offered as the newest."""


class Forked(IntegrityError):
    """Two histories claim the same place."""


class CannotVerify(StrongroomError):
    """The check itself could not be made: not a statement about the bytes."""

    exit_code = 6
    http_status = 422


class Sealed(StrongroomError):
    """The room's key is not to be had: the key store is down, locked, or refuses."""

    exit_code = 7
    http_status = 503
    retryable = True


class BackendError(StrongroomError):
    """The store or the database failed."""

    exit_code = 7
    http_status = 503
    retryable = True


class NotFound(StrongroomError):
    exit_code = 8
    http_status = 404


class Conflict(StrongroomError):
    exit_code = 2
    http_status = 409


class LimitExceeded(StrongroomError):
    exit_code = 9
    http_status = 429


class BudgetExceeded(LimitExceeded):
    """The egress budget is spent."""
