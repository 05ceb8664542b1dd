"""The only printer. Answers go to stdout, everything else (hints, warnings, progress, errors for people) to stderr.

Under ``--json`` stdout carries exactly one object: the answer, or ``{"error": {…}}``.

Names and times come from a database that somebody else may have written: nothing that a terminal would obey is printed
as it is, neither to people (`printable`) nor in JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from strongroom.core.progress import Progress
from strongroom.errors import StrongroomError

_FIRST_LINE = 2.0  # seconds before a job that is not watched on a terminal says how far it is
_NEXT_LINE = 5.0
_NO_ROOM = ("trust ", "identity ", "serve ")  # commands of which no room that is named here is the one


class Output:
    """Prints what one command has to say, for people or for programs."""

    def __init__(self, *, json: bool = False, quiet: bool = False, given: Mapping[str, str] | None = None) -> None:
        """`given`: the shared options that the command line has, with their values, ``--as`` for one: a command that is
        suggested is run by the same person, in the same room."""
        self.json = json
        self.quiet = quiet
        self._given = given or {}

    def answer(self, value: Mapping[str, Any], lines: Iterable[str] = ()) -> None:
        """The answer of a command, once: `value` as one JSON object under ``--json``, else `lines`."""
        text = _as_json(value) if self.json else printable("\n".join(lines))
        if text:
            print(text, flush=True)

    def say(self, text: str = "") -> None:
        """One line of a longer answer, as it comes about; nothing under ``--json``."""
        if not self.json:
            print(printable(text), flush=True)

    def line(self, text: str) -> None:
        """One record of an answer that is lines for a program, with or without ``--json``."""
        print(_escaped(text))

    def heading(self, text: str) -> None:
        """A line of an answer that begins something; bold where that can be shown."""
        bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if bold and not self.json:
            print(f"\x1b[1m{printable(text)}\x1b[0m", flush=True)
        else:
            self.say(text)

    def note(self, text: str) -> None:
        """A hint for a person; ``--quiet`` silences it."""
        if not self.quiet:
            arrow, _, command = text.partition("  → ")
            if not arrow and command:
                text = f"  → {self._carried(command)}"
            print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Something that must not be missed, ``--quiet`` or not."""
        print(f"strongroom: {printable(text)}", file=sys.stderr, flush=True)

    def error(self, error: StrongroomError) -> None:
        """The one shape of an error."""
        error.hint = self._carried(error.hint)
        if self.json:
            print(_as_json({"error": error.as_json()}), flush=True)
        else:
            self.warn(str(error))

    def _carried(self, hint: str) -> str:
        """A hint that is a command, with the options that were given and that it does not have. A command after a colon
        is somebody else's, who is not who asks here but is in the same room. What is run before there is a room, or
        where its folder is, is left as it is."""
        lead, _, rest = hint.partition("strongroom ")
        if not rest or (lead and not lead.endswith(": ")) or rest.startswith(_NO_ROOM):
            return hint
        given = {option: value for option, value in self._given.items() if not lead or option != "--as"}
        own = [f"{option} {shlex.quote(value)}" for option, value in given.items() if option not in rest]
        return lead + " ".join(["strongroom", *own, rest])

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """A callback of (bytes done, bytes in all) over the job: a bar on a terminal, else a line now and then."""
        if self.quiet:
            yield lambda *_: None
        elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            with _bar(label) as callback:
                yield callback
        else:
            yield _lines(self, label)


def prepare_streams() -> None:
    """A terminal that can't show a character gets another in its place; it is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def flush() -> None:
    """Hand on what is buffered; BrokenPipeError while somebody can still do something about it."""
    sys.stdout.flush()


def discard() -> None:
    """Stdout's reader has gone: what is still buffered must not raise once more when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def interactive() -> bool:
    """Whether a person can be asked something."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def traceback() -> None:
    """The traceback of the exception that is being handled, to stderr."""
    import traceback

    print(printable(traceback.format_exc()), end="", file=sys.stderr, flush=True)


# -- text --------------------------------------------------------------------------------------------------------


def printable(text: str, *, kept: str = "\n\t") -> str:
    r"""`text` with \xNN, \uNNNN or \UNNNNNNNN for every character that is not shown, except those `kept`.

    Control characters could repaint what a terminal has shown, and characters that turn the direction of writing could
    show another order than there is.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in kept else ascii(char)[1:-1] for char in text)


def _as_json(value: Mapping[str, Any]) -> str:
    return _escaped(json.dumps(value, ensure_ascii=False, default=str))


def _escaped(text: str) -> str:
    # JSON itself only wants U+0000 to U+001F escaped; a terminal obeys others, too.
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks, networks and GB/s have them: 269.1 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def seconds(value: float) -> str:
    """3.2 s, or 41 ms below one."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def number(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def counted(value: int, noun: str, many: str = "") -> str:
    """1 file, 2 files; 1 copy, 2 copies."""
    return f"{value:,} {noun if value == 1 else many or f'{noun}s'}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Lines of a table with columns as wide as they have to be; the columns `right` hold numbers."""
    # A line break in a cell would make a row of its own, which nobody wrote.
    cells = [tuple(header), *(tuple(printable(cell, kept="") for cell in row) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    numeric = set(right)
    return [
        "  ".join(
            cell.rjust(width) if k in numeric else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def facts(pairs: Iterable[tuple[str, object]]) -> list[str]:
    """Lines of ``name  value``, the values below each other."""
    shown = [(name, printable(str(value), kept="")) for name, value in pairs]
    width = max((len(name) for name, _ in shown), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in shown]


# -- progress ----------------------------------------------------------------------------------------------------


def _lines(output: Output, label: str) -> Progress:
    begun = time.monotonic()
    due = begun + _FIRST_LINE

    def callback(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due and total:
            due = now + _NEXT_LINE
            rate = size(done / (now - begun))
            output.note(f"{label}: {100 * done // total} % ({size(done)} of {size(total)}, {rate}/s)")

    return callback


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(label), total=None)

        def callback(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield callback
