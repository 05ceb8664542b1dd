"""``strongroom trace``: whose copy a found file is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from strongroom.cli.custody import Duration
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, number, seconds, size, table
from strongroom.core.files import write_whole
from strongroom.errors import BackendError, UsageError
from strongroom.vault.effort import STOPPED

_CODES = {"unrelated": 0, "not-named": 0, "weights-only": 13, "named": 14}


@command(
    "trace",
    explain="""Each tensor of the file is compared with the original in the room, after renaming, transposition,
    permutation and rescaling are undone. At every marked position the difference says which variant it came from; the
    code word of every principal that the room ever had is scored against that, and so is every principal's stamp. Each
    score has a bound on an innocent reaching it that holds under any attack (Chernoff, Hoeffding); somebody is named
    only if that bound, times all candidates and all that was tried, is under 1e-9. The trace is an entry of the log
    before its outcome is told. With --text the original is run on the text in memory, and the gradient of its
    likelihood takes the place of the difference: it depends on text and original alone, so the same bounds hold.""",
)
@click.argument("path", required=False)
@click.option("--text", metavar="FILE", help="Instead of weights: text that a model wrote (JSON lines).")
@click.option("--weights", metavar="REF", help="The version to compare with, under your approved request for it.")
@click.option(
    "--limit",
    "limit",
    type=Duration(),
    help="Align no longer than this, and tell what was found by then.  [default: as long as it takes]",
)
@click.option("--report", metavar="FILE.html", help="Also write the report as one page, a new file.")
@pass_options
def trace(
    options: Options, path: str | None, text: str | None, weights: str | None, limit: int | None, report: str | None
) -> int:
    """Say whether a found file, or text, is of these weights, and whose copy.

    Ends with 14 when somebody is named, 13 when they are our weights and nobody can be, 0 when they are unrelated, or
    when a text names nobody.
    """
    output = options.output
    what = text if path is None else path
    if what is None or (path is not None and text is not None):
        raise UsageError(
            "trace.what", "either a file of weights or one of text is traced", hint="strongroom trace PATH"
        )
    page = _page(report)
    with options.open() as room, output.progress(f"trace {Path(what).name}") as progress:
        begun = time.monotonic()
        try:
            found = room.trace(path, weights=weights, text=text, progress=progress, seconds=limit)
        except KeyboardInterrupt:
            output.note(
                "  → the search was stopped: nothing of it is told, and no use of a lease is spent; a served room's "
                "custodian gives it up, and records that"
            )
            raise
    took = time.monotonic() - begun
    if page is not None:
        from strongroom.cli.tracepage import page as written

        try:
            write_whole(page, written(found).encode("utf-8", "replace"))
        except OSError as error:
            raise BackendError("trace.report", f"can't write the report: {error.strerror}", hint="--report") from None
    output.answer({**found, "seconds": round(took, 3)}, lines(found, took))
    if page is not None:
        output.note(f"  → the report is in {page}")
    for hint in _hints(found, what):
        output.note(f"  → {hint}")
    return _CODES[found["verdict"]]


def _page(report: str | None) -> Path | None:
    """Where the report goes: known to be free before a long search."""
    if report is None:
        return None
    if (path := Path(report)).exists():
        raise UsageError("trace.report", f"{report} is there already", hint="--report NEW.html")
    if not path.parent.is_dir():
        raise UsageError("trace.report", f"there is no folder {path.parent} for {report}", hint=f"mkdir {path.parent}")
    return path


def verdict(found: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    if found["verdict"] == "named":
        who = " and ".join(each["holder"] for each in found["accused"])
        # Everybody was counted in each of them: an innocent among them is not more likely than the least sure says.
        bound = max(each["false_accusation"] for each in found["accused"])
        that = "this" if len(found["accused"]) == 1 else "one of them"
        is_it = "This was written by" if found["text"] else "This is"
        return (
            f"{is_it} {found['weights']}, out of the copy of {who}; "
            f"that {that} is wrong has a chance of {chance(bound)} at most."
        )
    if found["verdict"] == "not-named":
        return f"Nobody's copy of {found['weights']} can be said to have written this; more text may say more."
    if found["verdict"] == "unrelated":
        return f"Nothing in this room is like it (the nearest has a likeness of {found['likeness']:.3f}, of 1)."
    weights = f"These are the weights of {found['weights']} or of a relative"
    if not found["carries_marks"]:
        return f"{weights}. This version carries no marks, so nobody can be named."
    if found["withheld"] and found["marked"]:
        return (
            f"This is {found['weights']}, and a copy that came out of the room: it has marks. Whose copy it is takes "
            "an approved request."
        )
    if found["withheld"]:
        return (
            f"{weights}; no mark was found where all copies of it have some. Whose copy it is, if it is one, takes an "
            "approved request."
        )
    if found["marked"]:
        it = "What wrote this" if found["text"] else "This"
        return f"{it} came out of the room as {found['weights']}, and whose copy it is can't be said with certainty."
    return f"{weights}, without a mark that can be read."


def chance(bound: float) -> str:
    """How likely a false accusation is, at most, wherever that is said."""
    return f"{bound:.0e}" if bound > 1e-299 else "1e-299"


def what_chance_is(found: dict[str, Any]) -> str:
    """What `chance` is the chance of."""
    return (
        "how likely it is, at most, that somebody who never had this copy would be named by such a file, with "
        f"everything counted that was tried; somebody is named under {chance(found['false_accusation_bound'])}"
    )


def lines(found: dict[str, Any], took: float) -> list[str]:
    """A report for people; it took so many seconds."""
    suspect = found["suspect"]
    told = [verdict(found), ""]
    if found["accused"]:
        rows = [
            (
                each["holder"],
                each["person"],
                f"{each['layer1']['sigma']:.1f}",
                f"{each['layer2']['z']:.1f}",
                chance(each["false_accusation"]),
                _given(each["releases"]),
            )
            for each in found["accused"]
        ]
        header = ("HOLDER", "PERSON", "CODE WORD σ", "STAMP σ", "CHANCE", "RELEASES")
        told += [*table(header, rows, right=(2, 3, 4)), f"CHANCE: {what_chance_is(found)}", ""]
    if fitting := versions_that_fit(found):
        told.append(fitting)
    if found["weights"] and found["carries_marks"] and not found["withheld"]:
        told.append(
            f"{number(found['positions_used'])} of {number(found['positions'])} positions and "
            f"{number(found['elements'])} elements compared, {counted(found['candidates'], 'candidate')}"
        )
    if found["transformations"]:
        told.append(f"found: {'; '.join(found['transformations'])}")
    if stopped := what_was_left(found):
        told.append(stopped)
    if found["text"]:
        told.append(f"{written(found['text'])}")
    what = "text" if found["text"] else counted(suspect["tensors"], "tensor")
    told.append(
        f"{suspect['name']}: {what}, {size(suspect['bytes'])}, {seconds(took)}; entry {found['entry']} of the log"
    )
    return told


def what_was_left(found: dict[str, Any]) -> str:
    """That not everything was looked for, and how more is."""
    if STOPPED not in found["transformations"]:
        return ""
    count = len(found["versions"])
    more = f": all {count} versions share it, and --weights REF gives it to one" if count > 1 else ""
    return f"not everything that could have been done to the file was looked for: the search ended at its budget{more}"


def versions_that_fit(found: dict[str, Any]) -> str:
    """All versions that this may be, where there are several."""
    fitting = [each for each in found["versions"] if each["fits"]]
    if len(fitting) < 2:
        return ""
    told = [f"{each['ref']} ({'has its marks' if each['marked'] else 'none of its marks'})" for each in fitting]
    return f"versions that fit: {', '.join(told)}"


def written(text: dict[str, Any]) -> str:
    """What is known of a text that was traced, in one line."""
    left = f", {counted(text['left_out'], 'more completion')} not looked at" if text["left_out"] else ""
    return (
        f"{counted(text['tokens'], 'token')} of {counted(text['pieces'], 'completion')}{left}; fits a temperature of "
        f"{text['temperature']:.2f} best, with {-text['log_likelihood']:.2f} nats a token"
    )


def _given(releases: list[dict[str, Any]]) -> str:
    from strongroom.cli.tracepage import what_left

    shown = [f"{what_left(item)} in entry {item['entry']}" for item in releases[:3]]
    more = [f"{len(releases) - 3} more"] if len(releases) > 3 else []
    return ", ".join(shown + more) or "none in the log"


def _hints(found: dict[str, Any], path: str) -> list[str]:
    if found["withheld"] and found["carries_marks"]:
        ref = found["weights"]
        return [
            f"strongroom request {ref} --action trace --reason TEXT",
            f"strongroom trace {path} --weights {ref} says whose copy it is, once that, or one before it, is approved",
        ]
    if found["verdict"] == "named":
        hints = ["keep the file as it is: its SHA-256 is in the log"]
        for each in found["accused"]:
            holder = each["holder"]
            hints += [
                f"strongroom log prove {item['entry']} is the proof of a release" for item in each["releases"][:1]
            ]
            hints.append(f"strongroom revoke {holder} --reason TEXT ends what {holder} can still do")
        return hints
    return []
