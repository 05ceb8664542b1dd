"""Tiles and entry bundles: names, sizes, one spelling for each; and a real log, written by Tessera."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS
from strongroom.crypto.signatures import verify
from strongroom.errors import LimitExceeded, StrongroomError, Tampered, Truncated, UsageError
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)
from strongroom.formats.note import Note, VerifierKey, verify_note
from strongroom.formats.tiles import WIDTH, Tile, all_tiles, decode_bundle, encode_bundle, new_tiles
from strongroom.formats.tlogproof import LogProof
from strongroom.formats.witness import AddCheckpoint

# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 0), "tile/0/000"),
        (Tile(0, 1234067), "tile/0/x001/x234/067"),  # the specification's example
        (Tile(0, 999), "tile/0/999"),
        (Tile(0, 1000), "tile/0/x001/000"),
        (Tile(3, 5, 1), "tile/3/005.p/1"),
        (Tile(63, 0, 255), "tile/63/000.p/255"),
        (Tile(None, 1234067, 17), "tile/entries/x001/x234/067.p/17"),
        (Tile(None, 0), "tile/entries/000"),
    ],
)
def test_paths(tile, path):
    assert tile.path == path
    assert Tile.parse(path) == tile


@given(st.none() | st.integers(0, 63), st.integers(0, LIMITS.log_size // WIDTH - 1), st.integers(1, WIDTH))
def test_a_path_is_parsed_again(level, index, width):
    tile = Tile(level, index, width)
    assert Tile.parse(tile.path) == tile


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile",
        "tile/0",
        "tile/0/",
        "/tile/0/000",
        "tile/0/000/",
        "tile/0/000\n",
        "tile/00/000",
        "tile/64/000",
        "tile/-1/000",
        "tile/+1/000",
        "tile/data/000",
        "tile/0/0",
        "tile/0/00",
        "tile/0/0000",
        "tile/0/x000/000",
        "tile/0/x000/x001/000",
        "tile/0/001/000",
        "tile/0/x001/x000",
        "tile/0/x1/000",
        "tile/0/x001x000",
        "tile/0/\u0660\u0660\u0660",
        "tile/0/000.p",
        "tile/0/000.p/",
        "tile/0/000.p/0",
        "tile/0/000.p/01",
        "tile/0/000.p/256",
        "tile/0/000.p/300",
        "tile/0/000.p/-1",
        "tile/0/000.p/1/",
        "tile/0/x001.p/1/000",
        "tile/0/../000",
        "tile/entries/x018/x014/x398/x509/x481/984",  # beyond any log
        "tile/0/" + "x001/" * 5000 + "000",
    ],
)
def test_what_is_no_path(path):
    with pytest.raises(Tampered):
        Tile.parse(path)


@given(
    st.text(max_size=40)
    | st.from_regex(re.compile(r"tile/[0-9a-z]{1,3}/[x0-9/]{1,20}(\.p/[0-9]{1,3})?"), fullmatch=True)
)
def test_any_text_into_a_path(text):
    with contextlib.suppress(StrongroomError):
        assert Tile.parse(text).path == text


# -- which tiles a log has ---------------------------------------------------------------------------------------------


def test_the_example_of_the_specification():
    tiles = list(all_tiles(70_000))
    full = {level: sum(t.level == level and t.width == WIDTH for t in tiles) for level in (None, 0, 1, 2)}
    assert full == {None: 273, 0: 273, 1: 1, 2: 0}
    partial = {tile.level: tile.width for tile in tiles if tile.width < WIDTH}
    assert partial == {None: 112, 0: 112, 1: 17, 2: 1}
    assert [t for t in all_tiles(256) if t.level is not None] == [Tile(0, 0), Tile(1, 0, 1)]


sizes = st.integers(0, 3000) | st.integers(65_000, 67_000)


@given(sizes)
def test_tiles_are_those_of_the_definition(size):
    expected = set()
    for level in (None, 0, 1, 2, 3):
        count = size // 256 ** (level or 0)
        expected |= {Tile(level, index) for index in range(count // 256)}
        if count % 256:
            expected.add(Tile(level, count // 256, count % 256))
    tiles = list(all_tiles(size))
    assert len(tiles) == len(expected)
    assert set(tiles) == expected


@given(sizes, sizes)
def test_what_is_new_is_what_was_not_there(one, two):
    old, new = sorted((one, two))
    tiles = list(new_tiles(old, new))
    assert set(tiles) == set(all_tiles(new)) - set(all_tiles(old))
    assert len(tiles) == len(set(tiles))


@pytest.mark.parametrize(("old", "new"), [(-1, 5), (5, 4), (0, -1), (0, LIMITS.log_size)])
def test_logs_that_do_not_extend(old, new):
    with pytest.raises(UsageError):
        list(new_tiles(old, new))


# -- entry bundles -----------------------------------------------------------------------------------------------------

entries = st.lists(st.binary(max_size=40), max_size=20)


def test_the_layout_of_a_bundle():
    assert encode_bundle([b"one", b"", b"three"]) == b"\x00\x03one\x00\x00\x00\x05three"
    assert encode_bundle([b"x" * 0x0102])[:2] == b"\x01\x02"


@given(entries)
def test_a_bundle_survives_its_encoding(entries):
    data = encode_bundle(entries)
    assert decode_bundle(data) == entries
    ends = {0}
    for entry in entries:
        ends.add(max(ends) + 2 + len(entry))
    for shorter in set(range(len(data))) - ends:  # what ends between entries is a smaller bundle
        with pytest.raises(Truncated):
            decode_bundle(data[:shorter])


@given(st.binary(max_size=300))
def test_any_bytes_into_a_bundle(data):
    with contextlib.suppress(StrongroomError):
        assert encode_bundle(decode_bundle(data)) == data


def test_limits_of_a_bundle():
    largest = [b"x" * LIMITS.entry] * WIDTH
    assert decode_bundle(encode_bundle(largest)) == largest
    with pytest.raises(LimitExceeded):
        encode_bundle([b"x" * (LIMITS.entry + 1)])
    with pytest.raises(LimitExceeded):
        encode_bundle([b""] * (WIDTH + 1))
    with pytest.raises(LimitExceeded):
        decode_bundle(bytes(2 * (WIDTH + 1)))
    with pytest.raises(LimitExceeded):
        decode_bundle(encode_bundle(largest) + b"\x00\x00")


# -- a log that somebody else wrote ------------------------------------------------------------------------------------

TESSERA = Path(__file__).resolve().parents[3] / "shared" / "vectors" / "tlog" / "tessera-log"
# The key of Tessera's own tests.
TESSERA_KEY = VerifierKey.parse("example.com/log/testdata+33d7b496+AeHTu4Q3hEIMHNqc6fASMsq3rKNx280NI+oO5xCFkkSx")
SIZES = range(16)


class TestTessera:
    """The log of github.com/transparency-dev/tessera, testdata/log: sizes 0 to 15."""

    @pytest.fixture
    def log(self):
        if not TESSERA.is_dir():
            if os.environ.get("CI"):
                pytest.fail(f"{TESSERA} is missing")
            pytest.skip(f"{TESSERA} is missing")
        return TESSERA

    @pytest.fixture
    def checkpoints(self, log):
        """By size; each one's signature is checked on the way."""
        found = {}
        for size in SIZES:
            note = Note.decode((log / f"checkpoint.{size}").read_bytes())
            assert verify_note(note, [TESSERA_KEY], verify) == [TESSERA_KEY.name]
            found[size] = Checkpoint.decode(note.text)
        return found

    @pytest.fixture
    def leaves(self, log):
        data = (log / Tile(0, 0, 15).path).read_bytes()
        return [data[at : at + 32] for at in range(0, len(data), 32)]

    @pytest.fixture
    def node(self, leaves):
        def node(level, position):
            if level == 0:
                return leaves[position]
            return node_hash(node(level - 1, 2 * position), node(level - 1, 2 * position + 1))

        return node

    @pytest.mark.parametrize("size", SIZES)
    def test_checkpoints_are_read_and_written_the_same(self, log, checkpoints, size):
        data = (log / f"checkpoint.{size}").read_bytes()
        note = Note.decode(data)
        assert note.encode() == data
        assert checkpoints[size].encode() == note.text
        assert (checkpoints[size].origin, checkpoints[size].size) == (TESSERA_KEY.name, size)

    @pytest.mark.parametrize("size", SIZES)
    def test_no_signature_is_of_another_checkpoint(self, log, size):
        note = Note.decode((log / f"checkpoint.{size}").read_bytes())
        other = Note.decode((log / f"checkpoint.{(size + 1) % 16}").read_bytes())
        with pytest.raises(Tampered):
            verify_note(Note(other.text, note.signatures), [TESSERA_KEY], verify)

    @pytest.mark.parametrize("size", SIZES[1:])
    def test_tiles_and_bundles_give_the_signed_root(self, log, checkpoints, size):
        tiles = {tile.level: tile for tile in all_tiles(size)}
        assert set(tiles) == {None, 0}
        data = (log / tiles[None].path).read_bytes()
        entries = decode_bundle(data)
        assert len(entries) == size
        assert encode_bundle(entries) == data
        frontier = Frontier()
        made = frontier.extend([leaf_hash(entry) for entry in entries])
        assert b"".join(value for level, _, value in made if level == 0) == (log / tiles[0].path).read_bytes()
        assert frontier.root() == checkpoints[size].root

    def test_every_file_of_the_log_has_a_name_that_is_parsed(self, log):
        names = sorted(str(path.relative_to(log)) for path in (log / "tile").rglob("*") if path.is_file())
        assert len(names) == 30
        assert all(Tile.parse(name).path == name for name in names)
        written = {tile.path for size in SIZES[1:] for tile in new_tiles(size - 1, size)}
        assert written == set(names)

    def test_every_size_extends_every_smaller_one(self, checkpoints, node):
        for old in SIZES:
            for new in SIZES[old:]:
                path = consistency_proof(old, new, node)
                roots = checkpoints[old].root, checkpoints[new].root
                verify_consistency(old, roots[0], new, roots[1], path)
                if old < new:
                    with pytest.raises(Tampered):
                        verify_consistency(old, roots[1], new, roots[0], path)

    def test_every_entry_is_in_every_log_that_has_it(self, log, checkpoints, leaves, node):
        for size in SIZES[1:]:
            note = (log / f"checkpoint.{size}").read_bytes()
            for index in range(size):
                path = inclusion_proof(index, size, node)
                verify_inclusion(leaves[index], index, size, path, checkpoints[size].root)
                proof = LogProof.decode(LogProof(index, tuple(path), note).encode())
                assert proof.verify(leaves[index], TESSERA_KEY, verify) == checkpoints[size]
                with pytest.raises(Tampered):
                    proof.verify(leaves[index - 1] if size > 1 else bytes(32), TESSERA_KEY, verify)

    def test_a_request_to_a_witness(self, log, checkpoints, node):
        note = (log / "checkpoint.15").read_bytes()
        request = AddCheckpoint(7, tuple(consistency_proof(7, 15, node)), note)
        again = AddCheckpoint.decode(request.encode())
        assert again == request
        verify_consistency(again.old, checkpoints[7].root, 15, checkpoints[15].root, again.proof)
