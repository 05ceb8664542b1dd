"""The room behind a gateway, as one worker has it: in the folder that it opens itself, or served elsewhere
(spec/gateway.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from strongroom.gateway.door import Callers as DoorCallers
from strongroom.gateway.door import Model
from strongroom.gateway.spelt import Spelling
from strongroom.vault.callers import Callers
from strongroom.vault.revocations import Revocations
from strongroom.vault.vault import Vault
from strongroom.watch.drawing import Counting, OwnCounters
from strongroom.watch.tallies import Kept, Tallies
from strongroom.watch.verdict import Tally

if TYPE_CHECKING:
    from strongroom.gateway.settings import Budgets, Settings


class RoomCallers(DoorCallers, Protocol):
    """What a worker asks beside what its door does. `model` answers from memory of what `resolve` has named."""

    def model(self, ref: str) -> Model: ...
    def spelling(self, ref: str) -> Spelling: ...


class Keeping(Protocol):
    """The tallies of verified inference of one term."""

    @property
    def term(self) -> int: ...
    def add(self, ref: str, arithmetic: str, tally: Tally) -> Kept: ...
    def now(self) -> list[Kept]: ...


class Behind(Protocol):
    """`name`: the same for all gateways of the room; `stream` a new one for a worker's records, empty for any;
    `threads`: so many questions may be asked at a time."""

    @property
    def name(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def callers(self) -> RoomCallers: ...

    def stream(self) -> str: ...
    def counters(self, budgets: Budgets) -> Counting: ...
    def tallies(self, term: int) -> Keeping: ...
    def revocations(self, paths: Sequence[Path]) -> Revocations:
        """The lists of revoked certificates in `paths`; UsageError where they are others' to know."""
        ...

    def check(self, settings: Settings) -> None:
        """Whatever of these settings the room can't do, or has otherwise: UsageError, Conflict. It may take a while."""
        ...

    def close(self) -> None: ...


class InFolder:
    """`Behind`, of a room that this process has opened."""

    threads = 2  # whoever sends keys that don't exist keeps these busy, and nothing else

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self.name, self.callers = vault.id.hex(), Callers(vault)

    @classmethod
    def opened(cls, folder: Path) -> InFolder:
        vault = Vault(folder)
        try:
            vault.keys.log_signer  # noqa: B018 - asked for now, at the terminal, and not for the first record
        except BaseException:
            vault.close()
            raise
        return cls(vault)

    def stream(self) -> str:
        return ""

    def counters(self, budgets: Any) -> Counting:  # noqa: ARG002 - by which a served room reckons, too
        return OwnCounters(self._vault.db)

    def tallies(self, term: int) -> Keeping:
        return Tallies(self._vault.db, term)

    def revocations(self, paths: Sequence[Path]) -> Revocations:
        return Revocations(self._vault, paths)

    def check(self, settings: Any) -> None:
        """All of them can be done here."""

    def close(self) -> None:
        self._vault.close()


Open = Callable[[], Behind]
