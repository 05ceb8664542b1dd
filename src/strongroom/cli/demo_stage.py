"""What every step of the demo stands on: the room, the people in it, and how a step is printed."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from strongroom.cli.demo_model import Original
from strongroom.cli.output import Output
from strongroom.errors import IntegrityError, StrongroomError

if TYPE_CHECKING:
    from strongroom.client import Room

OWNER, ANA, BEN, EVA, KIM = "user/demo", "user/ana", "user/ben", "user/eva", "user/kim"
LIA, MAX = "user/lia", "user/max"  # partners
E = TypeVar("E", bound=StrongroomError)


class Stage:
    """The room in `folder`, which holds `original` as `ref`. `figures`: those of every step that was told."""

    def __init__(self, output: Output, original: Original, folder: Path) -> None:
        self.output, self.original, self.folder = output, original, folder
        self.name = f"demo/{original.kind}"
        self.ref = f"{self.name}@1"
        self.figures: dict[str, Any] = {}
        self._step = 0
        self._width = max(60, min(110, shutil.get_terminal_size((110, 24)).columns))

    def _heading(self, title: str) -> None:
        self._step += 1
        self.output.say()
        self.output.heading(f"{self._step:2} {title}")

    def _tell(self, text: str) -> None:
        for line in textwrap.wrap(text, self._width - 3, break_long_words=False, break_on_hyphens=False):
            self.output.say(f"   {line}")

    def _typed(self, text: str) -> None:
        self.output.say(f"   $ strongroom {text}")

    def _room(self, principal: str = OWNER) -> Room:
        # Opened for each step, as each command would: looking through the database's files while it is open in the same
        # process would take its locks away.
        from strongroom.client import Room

        return Room(self.folder, principal)

    def _refused(self, kind: type[E], attempt: Callable[[], object], *, otherwise: str) -> E:
        """The error of `kind` that `attempt` ends with, told; if it ends without one, the story is not true."""
        try:
            attempt()
        except kind as error:
            self._tell(f"Refused: {error.message}.")
            return error
        raise broken(otherwise, {})


def broken(text: str, evidence: dict[str, Any]) -> IntegrityError:
    """The story is not true."""
    return IntegrityError("demo.broken", text, hint="this is a fault in Strongroom; please report it", report=evidence)
