"""``strongroom budget``: how much of a version has left as answers, and how much may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, table
from strongroom.core.clock import text

_UNITS = ((365.2425 * 86_400, "year"), (86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


@command(
    "budget",
    explain="""Each answer is metered as the most that its tokens could carry: tokens · log2 of the vocabulary. The
    smallest artefact worth stealing is parameters · 4 bits ÷ 16: weights are quantised to 4 bits with little loss, and
    what a model says of itself compresses 16- to 100-fold (arXiv 2601.01296). Budgets are shares of that. The counters
    are in the room's database and include what gateways have drawn in advance, which is much where an alarm has
    sounded; the accounts in the log, which come some seconds later, are what gateways have answered for. A copy, or a
    release, is the whole artefact, whatever the budgets say.""",
)
@click.argument("ref")
@click.option(
    "--settings",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Those that the gateway runs with.  [default: the budgets of a gateway without]",
)
@pass_options
def budget(options: Options, ref: str, settings: Path | None) -> None:
    """How much of a version has left as answers, and how much may.

    Used and left, by scope and window; and how long carrying off the weights that way would take.
    """
    with options.open() as room:
        found = room.budget(ref, settings)
    options.output.answer(found, _lines(found))
    if settings is None and options.served is None:
        options.output.note("  → limits of a gateway whose settings have no [budgets]; if they have: --settings FILE")
    if found["gone_bits"] < found["logged"]["bits"]:
        options.output.warn(
            f"the counters have {_bits(found['gone_bits'])}, and gateways have accounted for "
            f"{_bits(found['logged']['bits'])} in the log: the database was set back, or written to, "
            "or a gateway away from the room has said more than it drew, or ended before it could charge all and was "
            "not started again"
        )
    if found["too_small"]:
        options.output.warn(
            f"{found['ref']} is too small for its budget to mean anything: budgets that are alarms are less than one "
            "answer, and sound none; of those that refuse, floors count"
        )
    if found["verified"] is not None and found["verified"]["alarm"]:
        options.output.warn(f"answers do not verify: {found['verified']['alarm']}")


def _lines(found: dict[str, Any]) -> list[str]:
    size, times = max(found["effective_bits"], 1), found["exfiltration"]
    rows = [
        (
            each["scope"],
            each["window"],
            each["who"] or "all callers",
            _bits(each["used"]),
            "-" if each["accounted"] is None else _bits(each["accounted"]),
            _bits(each["left"]),
            _bits(each["limit"]),
            f"{each['used'] * 100 // each['limit']} %" if each["used"] <= each["limit"] > 0 else "over",
            text(each["resets_at"]) if each["resets_at"] else "never",
            "refused" if each["hard"] else "alarm",
        )
        for each in found["budgets"]
    ]
    header = ("SCOPE", "WINDOW", "WHO", "USED", "ACCOUNTED", "LEFT", "LIMIT", "", "RESETS", "BEYOND IT")
    held = [
        f"{each['holder']}: {counted(each['releases'], 'release')}, of which copies {each['copies']}"
        for each in found["artefacts"]
    ]
    return [
        f"{found['ref']}: worth stealing from {_bits(size)} on "
        f"({found['parameters']:,} parameters · {found['bits_per_parameter']} bits ÷ {found['compression']})",
        "",
        *table(header, rows, right=(3, 4, 5, 6, 7)),
        "used: with what gateways have drawn in advance; accounted: what they have answered, by the log, which does "
        "not say who called",
        "",
        f"charged for answers so far, with what gateways have drawn in advance: {_bits(found['gone_bits'])}, "
        f"{found['gone_bits'] * 100 / size:.3g} % of it",
        f"accounted for in the log: {_bits(found['logged']['bits'])}",
        *_verified(found),
        "To carry it off as answers takes",
        f"  at the current rate, {_bits(found['bits_a_day'])} a day that gateways have accounted for: "
        f"{_long(times['current_seconds'])}",
        f"  at the rate that is charged, {_bits(found['charged_bits_a_day'])} a day with what they have drawn in "
        f"advance: {_long(times['charged_seconds'])}",
        f"  one caller, at the greatest allowed rate: {_long(times['caller_seconds'])}",
        f"  all callers together, at the greatest allowed rate: {_long(times['together_seconds'])}",
        f"  all callers together, without an alarm: {_long(times['alarm_seconds'])}",
        "",
        f"{counted(found['releases'], 'release')} of the weights themselves, each the whole artefact"
        + (":" if held else ""),
        *(f"  {line}" for line in held),
    ]


def _verified(found: dict[str, Any]) -> list[str]:
    """E_v: how much of that could be hidden bits all the same."""
    said = found["verified"]
    if said is None:
        return []
    return [
        f"run again: {said['tokens']:,} tokens, of which {said['good']:,} good, {said['suspicious']:,} suspicious, "
        f"{said['dangerous']:,} dangerous ({said['arithmetic']}, term {said['term']})",
        f"  at most {said['bits']:.3g} bits a token could still be hidden: {_bits(said['hidden_bits'])} of what left",
    ]


def _bits(count: int) -> str:
    """To three digits."""
    for size, unit in ((10**12, "Tbit"), (10**9, "Gbit"), (10**6, "Mbit"), (10**3, "kbit")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size:,} {unit}"
    return f"{count} bit"


def _long(seconds: int | None) -> str:
    """How long that is, in the largest unit that fits, and never more than it is."""
    if seconds is None:
        return "never"
    if seconds == 0:
        return "no budget bounds it"
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    return counted(int(seconds // size), unit)
