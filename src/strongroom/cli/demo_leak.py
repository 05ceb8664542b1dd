"""The demo's steps about a leak: two partners get plaintext copies, one is disguised and found; then both are mixed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from strongroom.cli import demo_thief
from strongroom.cli.demo_custody import CustodySteps
from strongroom.cli.demo_stage import BEN, EVA, LIA, MAX, broken
from strongroom.cli.output import counted, number, seconds
from strongroom.cli.trace import verdict
from strongroom.cli.tracepage import page


class LeakSteps(CustodySteps):
    """Lia and Max are partners, and have a copy each."""

    def copies(self) -> dict[str, Any]:
        """Two plaintext copies leave, each with its holder's marks and stamp."""
        begun = time.perf_counter()
        for partner in (LIA, MAX):
            self._add(partner, "partner")
            with self._room(partner) as room:
                asked = room.request(self.ref, action="copy", reason="on our own machines", duration=3600, uses=1)
            self._approve(asked["id"], BEN)
            self._approve(asked["id"], EVA)
            self._typed(f"copy {self.name} --to {partner} --out {self._copy(partner).name} --as {partner}")
            with self._room(partner) as room:
                room.copy(self.ref, partner, self._copy(partner))
        took = time.perf_counter() - begun
        self._tell("Ben and Eva approved both. The custodian wrote the copies itself: marked, and stamped all over.")
        return {"seconds": round(took, 3)}

    def leak(self) -> dict[str, Any]:
        """Lia trains, quantises, moves and renames; the file turns up; it names her."""
        found, before, after = demo_thief.trained(self.original.kind, self._copy(LIA))
        steps = counted(demo_thief.STEPS, "step")
        self._tell(
            f"Somebody trains all weights of a copy ({steps}, loss {before:.4f} to {after:.4f}), rounds every matrix "
            "to four bits, puts the hidden units in another order, and calls the tensors t0001, t0002 …"
        )
        leak = demo_thief.write(demo_thief.disguised(found), self._copies / "found.safetensors")
        return self._traced(leak, {LIA})

    def together(self) -> dict[str, Any]:
        """The mean of both copies names both."""
        self._tell("Lia and Max have heard of marks. They take the mean of their two copies, element by element.")
        hers, his = demo_thief.arrays(self._copy(LIA)), demo_thief.arrays(self._copy(MAX))
        mean: demo_thief.Arrays = {name: (hers[name] + his[name]) / 2 for name in hers}
        found = self._traced(demo_thief.write(mean, self._copies / "mixed.safetensors"), {LIA, MAX})
        shutil.rmtree(self._copies)
        return found

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _copies(self) -> Path:
        """Where copies and finds are: beside the original, in memory if that is."""
        return (
            self.folder.parent / "elsewhere" if self.original.kind == "minilm" else self.original.folder / "elsewhere"
        )

    def _copy(self, holder: str) -> Path:
        return self._copies / holder.partition("/")[2]

    def _traced(self, leak: Path, guilty: set[str]) -> dict[str, Any]:
        """Ben asks to trace, Eva approves, and what comes out is who it was."""
        with self._room(BEN) as room:
            asked = room.request(self.ref, action="trace", reason="a file that was found", duration=3600, uses=1)
        self._approve(asked["id"], EVA)
        report = self.folder.parent / f"{leak.stem}.html"
        self._typed(f"trace {leak.name} --weights {self.ref} --report {report.name} --as {BEN}")
        begun = time.perf_counter()
        with self._room(BEN) as room, self.output.progress("trace") as progress:
            found = room.trace(leak, weights=self.ref, progress=progress)
        took = time.perf_counter() - begun
        if {each["holder"] for each in found["accused"]} != guilty:
            raise broken("a leak did not name those who leaked it", {"accused": found["accused"]})
        report.write_text(page(found), encoding="utf-8")
        self._tell(verdict(found))
        for each in found["accused"]:
            given = each["releases"][-1]
            self._tell(
                f"{each['holder']}: code word {each['layer1']['sigma']:.1f} σ, stamp {each['layer2']['z']:.0f} σ; "
                f"the copy is entry {given['entry']} of the log."
            )
        if found["transformations"]:
            self._tell(f"Undone: {'; '.join(found['transformations'])}.")
        self._tell(
            f"{number(found['elements'])} elements, {counted(found['candidates'], 'candidate')}, {seconds(took)}. "
            f"The trace is entry {found['entry']}; its page: {report.name}."
        )
        kept = ("verdict", "false_accusation_bound", "likeness", "candidates", "entry", "transformations")
        return {
            **{name: found[name] for name in kept},
            "accused": [each["holder"] for each in found["accused"]],
            "seconds": round(took, 3),
        }
