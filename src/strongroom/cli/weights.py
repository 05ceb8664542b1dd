"""``strongroom put``, ``ls``, ``show``, ``verify``, ``rotate`` and ``shred``: versions of weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import click

from strongroom.cli.options import Options, command, pass_options
from strongroom.cli.output import counted, facts, number, seconds, size, table
from strongroom.errors import IntegrityError

if TYPE_CHECKING:
    from strongroom.vault.vault import PutResult
    from strongroom.vault.verify import Problem


@command(
    "put",
    explain="""The files are looked over, laid out one after another, and read once. Common segments are encrypted
    under one key; the marked share in two variants, each under its own. Whole packs are written and made durable,
    then the index and the signed manifest, and the version appears in one transaction at the very end. A job that
    was killed goes on with the first pack that is missing.""",
)
@click.argument("path")
@click.argument("name")
@click.option(
    "--share",
    default="auto",
    show_default=True,
    help="Which share of the weights is marked, 0 to 1/2; auto: 1/8, and up to 1/2 of a model below 256 MiB.",
)
@click.option(
    "--positions",
    type=int,
    default=16384,
    show_default=True,
    help="At most so many marked segments; fewer when the weights are small.",
)
@click.option("--suite", type=click.Choice(["blake3", "sha256"]), default="blake3", show_default=True, help="The hash.")
@click.option("--convert", is_flag=True, help="Convert pickle checkpoints to safetensors, in a sandbox.")
@click.option("--follow-links", is_flag=True, help="Take in files that links inside PATH point at elsewhere.")
@pass_options
def put(
    options: Options, path: str, name: str, share: str, positions: int, suite: str, convert: bool, follow_links: bool
) -> None:
    """Store a model as the next version of NAME.

    PATH is a model directory, a safetensors file or a GGUF file. The files themselves stay as they are.
    """
    output = options.output
    with options.open() as room, output.progress(f"put {name}") as progress:
        begun = time.monotonic()
        result = room.put(
            path,
            name,
            share=share,
            positions=positions,
            suite=suite,
            convert=convert,
            follow_links=follow_links,
            progress=progress,
        )
    took = time.monotonic() - begun
    output.answer({**result.as_json(), "seconds": round(took, 3)}, _put_lines(result, took))
    if not result.positions and (not positions or (share != "auto" and not Fraction(share))):
        output.note(
            "  → nothing is marked, as you asked: what is only loaded will not name its holder; copies are stamped"
        )
    elif not result.positions:
        output.note("  → nothing in it could be marked: copies of this version will not name their holder")
    elif result.positions < _FEW_POSITIONS:
        output.note(
            "  → these are few positions: what is only loaded of this version may not name its holder with any "
            "certainty; copies carry a stamp besides"
        )
    if result.same_as:
        output.warn(
            f"the very same files are in the room as {', '.join(result.same_as)}: whoever has both can find "
            "the marks by comparing them"
        )
        output.note(f"  → strongroom shred {result.ref} --confirm {result.ref}, if that was not meant")
    output.note("  → the original is still where it was, in plaintext; it is yours to remove")


_FEW_POSITIONS = 256  # one leaker scores about 0.67 standard deviations times the root of their number


def _put_lines(result: PutResult, took: float) -> list[str]:
    lines = [
        f"{result.ref} is in the room: {counted(len(result.files), 'file')}, {size(result.bytes)}, "
        f"{size(result.stored_bytes)} in the store, {seconds(took)}",
        f"{number(result.segments)} encrypted segments; {number(result.positions)} positions are marked",
    ]
    if result.unmarked:
        reasons = ", ".join(f"{size(count)} {reason}" for reason, count in sorted(result.unmarked.items()))
        lines.append(f"without a mark: {reasons}")
    if result.resumed_packs:
        lines.append(f"{counted(result.resumed_packs, 'pack')} were there already, from an interrupted put")
    return lines


@command(
    "ls",
    explain="""Read from the room's database, and whether a version is frozen from the log; no key is needed. What is
    frozen was revoked: nobody is given its keys before it is thawed.""",
)
@click.argument("name", required=False)
@pass_options
def ls(options: Options, name: str | None) -> None:
    """List the versions in the room."""
    with options.open() as room:
        found = room.ls(name)
    rows = [
        (item.ref, item.state, size(item.bytes), number(item.positions), item.created_at, item.created_by)
        for item in found
    ]
    header = ("REF", "STATE", "SIZE", "POSITIONS", "SINCE", "BY")
    options.output.answer({"versions": [item.as_json() for item in found]}, table(header, rows, right=(2, 3)))
    if not found:
        options.output.note("  → nothing here yet: strongroom put PATH NAME")


@command(
    "show",
    explain="""The room key opens the version's secrets, its signed manifest is checked, and the index is decrypted:
    names and sizes of files are as secret as the weights.""",
)
@click.argument("ref")
@pass_options
def show(options: Options, ref: str) -> None:
    """Everything about one version."""
    with options.open() as room:
        found = room.show(ref)
    by = f" by {found['created_by']}" if found["created_by"] else ""  # guests are not told
    marked = f"{size(found['marked_bytes'])} of {size(found['markable_bytes'])} that can carry a mark"
    lines = facts(
        [
            ("ref", found["ref"]),
            ("state", found["state"]),
            ("digest", found["digest"]),
            (
                "size",
                f"{size(found['bytes'])}, {size(found['stored_bytes'])} in {counted(found['packs'], 'pack')}",
            ),
            ("put", f"{found['created_at']}{by}, revision {found['revision']}"),
            ("segments", f"{number(found['segments'])} of at most {size(found['common_segment'])}"),
            ("marked", f"{number(found['positions'])} positions of {size(found['marked_segment'])}: {marked}"),
            ("suite", f"{found['suite']}, signed by {found['signed_by']}"),
            *([("at most", ceilings(found["ceiling"]))] if "ceiling" in found else []),
        ]
    )
    rows = [(item["path"], item["kind"], size(item["bytes"]), item["sha256"]) for item in found["files"]]
    options.output.answer(found, [*lines, "", *table(("FILE", "KIND", "SIZE", "SHA-256"), rows, right=(2,))])


def ceilings(found: Mapping[str, int]) -> str:
    """``100 holders, 5 copies, 3 people with copies``."""
    people = counted(found["copiers"], "person", "people")
    return f"{counted(found['holders'], 'holder')}, {counted(found['copies'], 'copy', 'copies')}, {people} with copies"


@command(
    "verify",
    explain="""The room's record of the version names the digest of its manifest; the manifest's signature has to be
    the room's, and it pins the index and every pack. Then each sealed segment is read and hashed, and compared with
    the signed digest. With --deep both variants of everything are also decrypted, the marks are taken out, and each
    file's SHA-256 is compared with that of the original. A segment that belongs elsewhere is reported as swapped,
    with its right place.""",
)
@click.argument("ref")
@click.option("--deep", is_flag=True, help="Also decrypt both variants and compare with what was put.")
@pass_options
def verify(options: Options, ref: str, deep: bool) -> int:
    """Check every byte of a version against what was signed.

    Ends with 6 when something is wrong; each problem names file, segment and kind.
    """
    output = options.output
    with options.open() as room, output.progress(f"verify {ref}") as progress:
        begun = time.monotonic()
        report = room.verify(ref, deep=deep, progress=progress)
    took = time.monotonic() - begun
    if report.ok:
        reach = "; both variants decrypt to exactly what was put" if deep else ""
        lines = [
            f"{report.ref} is whole: {number(report.segments)} segments, {size(report.bytes)} of ciphertext, "
            f"all as signed{reach} ({seconds(took)})"
        ]
    else:
        lines = [problem_line(problem) for problem in report.problems]
        lines.append(f"{report.ref} is damaged: {counted(len(report.problems), 'problem')}")
    output.answer({**report.as_json(), "seconds": round(took, 3)}, lines)
    if not report.ok:
        output.note("  → readers refuse what is damaged; restore the packs named above from a copy of the store")
    return 0 if report.ok else IntegrityError.exit_code


def problem_line(problem: Problem) -> str:
    """``tampered: model.safetensors, segment 17 variant A: what happened (pack …)``."""
    place = [problem.file] if problem.file else []
    if problem.segment is not None:
        place.append(f"segment {problem.segment}" + (f" variant {problem.variant}" if problem.variant else ""))
    pack = f" ({problem.pack})" if problem.pack else ""
    return ": ".join(part for part in (problem.kind, ", ".join(place), problem.message) if part) + pack


@command(
    "rotate",
    explain="""Every segment is decrypted and encrypted again under a new version key, the new revision is signed
    and takes the place of the old one in one transaction, and then the old packs are deleted. Marks and code words
    stay, so copies that left before can still be traced.""",
)
@click.argument("ref")
@pass_options
def rotate(options: Options, ref: str) -> None:
    """Re-encrypt a version under new keys."""
    output = options.output
    with options.open() as room, output.progress(f"rotate {ref}") as progress:
        done = room.rotate(ref, progress=progress)
    output.answer(done, [f"{done['ref']} is under new keys, revision {done['revision']}"])
    output.note(
        "  → key bundles of the old revision no longer open anything: whoever reads it and has a lease is released the "
        "new ones; what runs under strongroom run has to be started again"
    )


@command(
    "shred",
    explain="""The version's sealed secrets are removed from the database and overwritten there, then its objects
    are deleted. What that does and does not reach is in the answer.""",
)
@click.argument("ref")
@click.option("--confirm", required=True, metavar="REF", help="The version's full name once more: acme/tiny@3.")
@pass_options
def shred(options: Options, ref: str, confirm: str) -> None:
    """Destroy a version's keys and ciphertext. There is no way back."""
    with options.open() as room:
        done = room.shred(ref, confirm=confirm)
    lines = [f"{done['ref']} is shredded: {counted(done['objects_deleted'], 'object')} deleted"]
    options.output.answer(done, [*lines, *(f"  · {text}" for text in done["means"])])
