"""``strongroom records``: what gateways have kept of each request, and whether it is what the log has."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from strongroom.cli.custody import Duration
from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, number, table
from strongroom.core.clock import text
from strongroom.errors import Denied, IntegrityError, NotFound, UsageError

if TYPE_CHECKING:
    from strongroom.client import Room

_TIME = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?", re.ASCII)


class Since(click.ParamType[int]):
    """``24h``, ``7d`` ago, or a time in UTC, ``2026-03-01`` or ``2026-03-01T09:30:00Z``: seconds since 1970."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if _TIME.fullmatch(value):
            try:
                return int(datetime.fromisoformat(value.rstrip("Z")).replace(tzinfo=UTC).timestamp())
            except ValueError:
                self.fail(f"{value!r} is not a time that a calendar has", param, ctx)
        return max(0, int(time.time()) - Duration().convert(value, param, ctx))


@command(
    "records",
    explain="""Each worker of a gateway keeps a chain of records, one a request, in a file; the log has the hash of the
    newest every few seconds. The files are hashed from their first line on, and compared with every entry about them:
    who has edited a record, or taken one away, is found out. What the records come to is compared with the sums in
    the log, and these with the budget's counters, which can only be more. No prompt and no answer is in a record.""",
)
@click.option("--by", metavar="PRINCIPAL", help="Those of one principal.")
@click.option("--ref", metavar="REF", help="Those of one version, or of all versions of a name.")
@click.option("--since", type=Since(), metavar="WHEN", help="From then on: 24h ago, or 2026-03-01T09:30:00Z.")
@click.option(
    "--records",
    "folders",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where gateways keep them; may be repeated, for several machines.  [default: inference, in the room]",
)
@pass_options
def records(options: Options, by: str | None, ref: str | None, since: int | None, folders: tuple[Path, ...]) -> int:
    """What gateways have answered, checked against the log.

    Ends with 6 when records are not what the log has, or are not there.
    """
    from strongroom.client.records import Wanted

    wanted = Wanted(by or "", ref or "", since or 0)
    with options.open() as room:
        found = room.log.records(list(folders) or [_own(options)], wanted)
        for each in found["accounts"]:
            each["counters"] = _gone(room, each["ref"])
    options.output.answer(found, _lines(found))
    young = sum(each["records"] - each["accounted"] for each in found["streams"] if not each["code"])
    if young:
        told = "came after the newest entry of the log about them, and nobody vouches for these"
        options.output.note(f"  → {counted(young, 'record')} {told}")
    if any(each["code"] == "records.elsewhere" for each in found["streams"]):
        options.output.note("  → a gateway on another machine has its records there: --records FOLDER for each of them")
    for each in found["accounts"]:
        if each["counters"] is not None and each["counters"] < each["bits"]:
            options.output.warn(
                f"the budget's counters have {each['counters']:,} bits of {each['ref']}, and gateways have accounted "
                f"for {each['bits']:,} in the log: the database was set back, or written to, "
                "or a gateway away from the room has said more than it drew"
            )
    return 0 if found["ok"] else IntegrityError.exit_code


def _gone(room: Room, ref: str) -> int | None:
    """What the budget's counters have that left of a version; None where that can't be said: it was shredded, or
    whoever asks may not see it."""
    try:
        return int(room.budget(ref)["gone_bits"])
    except (NotFound, Denied):
        return None


def _own(options: Options) -> Path:
    try:
        return options.folder / "inference"
    except UsageError:
        raise UsageError(
            "records.folder",
            "a served room has no folder here in which a gateway could have kept its records",
            hint="--records FOLDER, as `strongroom gateway` was started with",
        ) from None


def _lines(found: dict[str, Any]) -> list[str]:
    streams = found["streams"]
    wrong = [each for each in streams if each["code"]]
    whole = counted(sum(each["records"] for each in streams), "record")
    lines = [
        f"{counted(len(streams), 'stream')}, {whole}: "
        + ("all as the log has them" if not wrong else f"{counted(len(wrong), 'stream')} NOT as the log has them")
    ]
    lines += [f"  {each['stream']}: {each['problem']}" for each in wrong]
    if any(each["code"] == "records.sums" for each in wrong):
        lines.append("  (a gateway whose disk was full, or that lost the log's answer, differs so, too)")
    sums: dict[tuple[str, str], list[int]] = {}
    for each in found["records"]:
        if each["status"] == 100:
            continue
        row = sums.setdefault((each["by"], each["ref"]), [0, 0, 0, 0, 0])
        for at, more in enumerate((1, each["status"] >= 400, each["tokens"], each["bits"])):
            row[at] += more
        row[4] = max(row[4], each["at"])
    rows = [
        (by, ref or "none", *map(number, row[:4]), text(row[4] // 1000))
        for (by, ref), row in sorted(sums.items(), key=lambda item: (-item[1][3], item[0]))
    ]
    header = ("PRINCIPAL", "VERSION", "REQUESTS", "REFUSED", "TOKENS", "BITS", "LAST")
    return [*lines, "", *table(header, rows, right=(2, 3, 4, 5))] if rows else [*lines, "no such request"]
