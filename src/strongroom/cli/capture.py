"""``strongroom capture``: prompts and answers that a gateway has sealed for an auditor."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import click

from strongroom.cli.options import Group, Options, command, pass_options
from strongroom.cli.output import facts
from strongroom.core.clock import text
from strongroom.errors import BackendError, IntegrityError, Tampered, UsageError


@click.group("capture", cls=Group)
def capture() -> None:
    """Prompts and answers that a gateway has sealed for an auditor: the key, and opening them."""


@command(
    "keygen",
    explain="""Made on this machine, in a file that only you can read, and shown to nobody. The public half goes into
    the gateway's settings: [capture] key = "...". Whoever has the private half reads all that is captured under it;
    without it nobody does, the gateway and the room's officers included.""",
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@pass_options
def keygen(options: Options, file: Path) -> None:
    """Make a key that a gateway seals prompts and answers to."""
    from strongroom.crypto.capture import CaptureKey

    key = CaptureKey()
    try:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UsageError("capture.exists", f"{file} is there already", hint="strongroom capture keygen FILE") from None
    except OSError as error:
        raise BackendError("capture.unwritable", f"can't write {file}: {error.strerror}") from None
    with os.fdopen(opened, "w", encoding="ascii") as out:
        out.write(key.private_bytes().hex() + "\n")
    answer = {"public_key": key.public_key.hex(), "key": key.key_id, "file": str(file)}
    options.output.answer(answer, facts(list(answer.items())))
    options.output.note(f'  → in the gateway\'s settings: [capture] key = "{answer["public_key"]}"')


@command(
    "open",
    explain="""Reads FOLDER/STREAM.sealed and the records in FOLDER/STREAM.jsonl beside it, and nothing else: it opens
    no room, asks no gateway, and so leaves no entry in the log. Each record is hashed from the first line on; what was
    captured opens only for the record that it was sealed with, and has to be what that record says. Whether the
    records are those that the log has is another question, which takes the room.""",
)
@click.argument("files", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE...", nargs=-1)
@click.option(
    "--key", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE", help="The private half."
)
@click.option("--by", metavar="PRINCIPAL", help="Those of one principal.")
@click.option("--record", type=click.IntRange(0), metavar="N", help="That of one record.")
@pass_options
def open_(options: Options, files: tuple[Path, ...], key: Path, by: str | None, record: int | None) -> int:
    """Open what a gateway has captured, with the private key; offline, without an entry in the log.

    Ends with 6 when something of it is not what its record says, or is not there.
    """
    from strongroom.gateway.unsealing import opened

    if not files:
        raise UsageError(
            "capture.nothing", "which file?", hint="strongroom capture open inference/STREAM.sealed --key FILE"
        )
    private = _private(key)
    found: list[dict[str, Any]] = []
    problems = []
    for path in files:
        try:
            found.extend(
                each
                for each in opened(path, private)
                if (by is None or each["record"]["by"] == by) and (record is None or each["record"]["n"] == record)
            )
        except Tampered as error:  # what is left of it is shown all the same
            problems.append(f"{path}: {error.message}")
    mine = [each for each in found if "other_key" not in each]
    others = [each for each in found if "other_key" in each]
    answer = {"captured": mine, "others": others, "problems": problems}
    options.output.answer(answer, [line for each in mine for line in _lines(each)] or ["nothing"])
    for each in others:
        said = f"record {each['record']['n']} was sealed to another key, {each['other_key'][:16]}…"
        options.output.warn(said)
    for problem in problems:
        options.output.warn(problem)
    return IntegrityError.exit_code if problems else 0


def _private(path: Path) -> Any:
    from strongroom.crypto.capture import CaptureKey

    try:
        said = path.read_text("ascii").strip()
        others = bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("capture.key", f"can't read {path}: {error}", hint="strongroom capture keygen FILE") from None
    if others:
        raise UsageError("capture.key", f"others may read or write {path}", hint=f"chmod 600 {path}")
    try:
        return CaptureKey(bytes.fromhex(said))
    except ValueError:
        raise UsageError(
            "capture.key", f"{path} has no key of 64 hexadecimal digits", hint="strongroom capture keygen FILE"
        ) from None


def _lines(found: dict[str, Any]) -> list[str]:
    record, asked = found["record"], found["asked"]
    said = [f"{each['role']}: {each['content']}" for each in asked.get("messages", ())]
    given = asked.get("prompt", asked.get("input"))
    said += [str(each) for each in (given if isinstance(given, list) else [given]) if each is not None]
    at = text(record["at"] // 1000)
    return [
        f"{at}  record {record['n']}  {record['by']}  {found['ref']}  status {record['status']}",
        *(f"  > {line}" for each in said for line in each.splitlines() or [""]),
        *(f"  < {line}" for each in found["answers"] for line in each.splitlines() or [""]),
        "",
    ]


for each in (keygen, open_):
    capture.add_command(each)
