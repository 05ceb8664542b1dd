"""The decoder finds in every vector what expected.json says, and the encoder writes every vector again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import decoder

VECTORS = Path(__file__).resolve().parents[2] / "vectors"
FOLDERS = sorted(path.parent for path in VECTORS.glob("*/expected.json"))
VALID = [folder for folder in FOLDERS if not folder.name.startswith("bad-")]
# The only vectors whose geometry is on purpose not the writer's.
OTHER_GEOMETRY = {"other-geometry", "ends-marked"}


def name(folder):
    return folder.name


def expected(folder):
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def secrets_of(folder):
    """The anchor, V, R and c0."""
    values = json.loads((folder / "secrets.json").read_text(encoding="utf-8"))
    anchor = decoder.Anchor(
        values["suite"],
        bytes.fromhex(values["room"]),
        bytes.fromhex(values["version"]),
        values["revision"],
        values["positions"],
        bytes.fromhex(values["manifest_digest"]),
        bytes.fromhex(values["public_key"]),
    )
    return anchor, bytes.fromhex(values["V"]), bytes.fromhex(values["R"]), values["c0"]


def outcome(read):
    try:
        files = read()
    except decoder.Refused as refused:
        return {"refused": refused.reason}
    return {"files": {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}}


def custodian(folder):
    anchor, version_key, mark_root, _ = secrets_of(folder)
    return decoder.read_as_custodian(folder / "store", anchor, version_key, mark_root)


def test_there_are_vectors() -> None:
    assert len(VALID) >= 12
    assert len(FOLDERS) - len(VALID) >= 20


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_decoder_as_holder(folder) -> None:
    found = outcome(lambda: decoder.read_as_holder(folder / "store", (folder / "bundle").read_bytes()))
    assert found == expected(folder)["holder"]


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_decoder_as_custodian(folder) -> None:
    assert outcome(lambda: custodian(folder)[1]) == expected(folder)["custodian"]


@pytest.mark.parametrize("folder", VALID, ids=name)
def test_bundle_is_that_of_the_code_word(folder) -> None:
    anchor, version_key, mark_root, c0 = secrets_of(folder)
    bundle = decoder.read_bundle((folder / "bundle").read_bytes())
    assert bundle.anchor == anchor
    decoder.check_bundle(bundle, version_key, mark_root, c0)


@pytest.mark.parametrize("folder", VALID, ids=name)
def test_geometry_is_the_writers(folder) -> None:
    index, _ = custodian(folder)
    if folder.name in OTHER_GEOMETRY:
        with pytest.raises(decoder.Refused, match=r"^geometry\.rule"):
            decoder.check_writer_rule(index)
    else:
        decoder.check_writer_rule(index)


def segments(folder):
    """(types, runs cut at the ends) of each marked segment, and the sizes of the common ones."""
    layout = custodian(folder)[0].layout
    marked = [layout.pieces(at, at + size) for kind, _, at, size in layout.segments() if kind == decoder.MARKED]
    common = [size for kind, _, _, size in layout.segments() if kind == decoder.COMMON]
    return layout, marked, common


def test_vectors_show_what_they_say() -> None:
    _, marked, _ = segments(VECTORS / "crossing")
    assert any(len({kind for _, _, kind, _ in pieces}) > 1 for pieces in marked)

    _, marked, _ = segments(VECTORS / "special-values")
    covered = {kind: sum(e - b for pieces in marked for b, e, k, _ in pieces if k == kind) for kind in decoder.TYPES}
    # They come again every 32 elements.
    assert all(covered[kind] >= 2 * 32 * decoder.TYPES[kind][0] for kind in decoder.TYPES)

    layout, marked, _ = segments(VECTORS / "gguf-blocks")
    assert {kind for _, _, kind in layout.runs} >= set(decoder.BLOCKS)
    assert {kind for pieces in marked for _, _, kind, _ in pieces} >= {"Q8_0", "Q5_1", "Q4_K", "Q6_K"}
    cut = {k for pieces in marked for b, _, k, origin in pieces if k in decoder.BLOCKS and b > origin}
    assert len(cut) > 4, "blocks that begin in one segment and end in the next"
    old, _, _ = segments(VECTORS / "gguf")
    assert not {kind for _, _, kind in old.runs} & set(decoder.BLOCKS), "from before there were any"

    _, marked, _ = segments(VECTORS / "nothing-markable")
    assert marked == []

    layout, _, common = segments(VECTORS / "last-is-short")
    assert common[-1] == 1
    assert common[0] == layout.common

    layout, marked, common = segments(VECTORS / "ends-marked")
    assert layout.stripes[-1] == 2
    assert common[-1] == layout.common

    layout, _, _ = segments(VECTORS / "misaligned")
    assert [kind for _, _, kind in layout.runs] == ["F32", "F16"]

    layout, _, common = segments(VECTORS / "only-an-empty-file")
    assert (layout.image, common) == (0, [])

    old, new = custodian(VECTORS / "suite-1")[1], custodian(VECTORS / "revision-2")[1]
    assert old == new
    held = [expected(VECTORS / folder)["holder"] for folder in ("suite-1", "revision-2")]
    assert held[0] == held[1], "a rotation leaves the marks"
    assert held[0] != expected(VECTORS / "suite-1")["custodian"], "the holder's files are marked"


def test_both_variants_are_held_somewhere() -> None:
    words = [decoder.read_bundle((folder / "bundle").read_bytes()).word for folder in VALID]
    assert {bit for word in words for bit in word} == {0, 1}


def test_each_vector_is_explained_and_small() -> None:
    page = (VECTORS / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in FOLDERS if f"| {folder.name} | {expected(folder)['shows']} |" not in page] == []
    reasons = {
        part.get("refused")
        for folder in FOLDERS
        for part in (expected(folder)["holder"], expected(folder)["custodian"])
    }
    assert [reason for reason in reasons if reason and f"`{reason}`" not in page[: page.index("## The vectors")]] == []
    sizes = {folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in FOLDERS}
    assert [folder.name for folder, size in sizes.items() if size > 150_000] == []
    assert sum(sizes.values()) < 2_200_000


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }


def test_vectors_are_written_again_byte_for_byte(tmp_path) -> None:
    specification = importlib.util.spec_from_file_location("generate_vectors", VECTORS / "generate.py")
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    generator.generate(tmp_path)
    again, stored = contents(tmp_path), contents(VECTORS)
    assert sorted(again) == sorted(stored)
    assert [path for path, data in stored.items() if again[path] != data] == []


def test_decoder_is_a_program() -> None:
    def run(folder):
        command = [sys.executable, decoder.__file__, str(folder / "store"), str(folder / "bundle")]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env={"PYTHONUTF8": "1"})

    good = run(VECTORS / "suite-1")
    assert good.returncode == 0
    lines = [line.split("  ", 1) for line in good.stdout.splitlines()]
    assert {path: digest for digest, path in lines} == expected(VECTORS / "suite-1")["holder"]["files"]
    bad = run(VECTORS / "bad-segment-altered")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("refused: segment.hash")
