"""Plaintext copies on their way: pieces that open for one release only, end with what allowed them, and can be asked
for again."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from strongroom.client.ahead import Ahead
from strongroom.client.copy import CopyReader
from strongroom.client.receive import receive
from strongroom.core import canonical
from strongroom.crypto.copying import CopyCipher, copying_key
from strongroom.errors import Conflict, Denied, NotFound, StrongroomError, Tampered, Truncated
from strongroom.formats.copybundle import PIECE, CopiedFile, CopyBundle
from strongroom.marking.code import Code
from strongroom.vault.copies import Copy
from strongroom.vault.originals import Originals
from strongroom.vault.source import ModelSource
from strongroom.vault.vault import Vault
from vault.test_release import REF, hall, template  # noqa: F401 - fixtures

BUNDLE = CopyBundle(
    room=b"r" * 16,
    version=b"v" * 16,
    revision=2,
    manifest_digest=b"m" * 32,
    signer=b"s" * 32,
    ref=REF,
    holder="user/ana",
    key=b"k" * 32,
    piece=PIECE,
    image=1000,
    files=(CopiedFile("a/b.txt", 0, 10), CopiedFile("c", 16, 900)),
    marked=True,
)


class TestBundle:
    def test_comes_back_as_it_was(self):
        assert CopyBundle.decode(BUNDLE.encode()) == BUNDLE

    def test_does_not_show_its_key(self):
        assert "6b6b" not in repr(BUNDLE)
        assert "b'kkk" not in repr(BUNDLE)

    @pytest.mark.parametrize(
        "files",
        [
            (("../x", 0, 1),),
            (("/etc/passwd", 0, 1),),
            (("a", 0, 1), ("a", 8, 1)),
            (("a", 0, 20), ("b", 10, 1)),
            (("a", 0, 1001),),
            (("a", 996, 8),),
            (("", 0, 1),),
            (("a\\b", 0, 1),),
            (("a\x00", 0, 1),),
        ],
    )
    def test_of_files_that_no_copy_has(self, files):
        value = canonical.decode(BUNDLE.encode(), what="it")
        data = canonical.encode({**value, "files": [list(each) for each in files]})
        with pytest.raises(Tampered):
            CopyBundle.decode(data)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("format", 2),
            ("key", "00"),
            ("piece", 0),
            ("piece", 1 << 40),
            ("image", 1 << 52),
            ("revision", -1),
            ("room", ""),
            ("files", None),
            ("files", [["a", 0]]),
            ("more", 1),
            ("holder", None),
        ],
    )
    def test_of_other_members(self, name, value):
        found = canonical.decode(BUNDLE.encode(), what="it")
        with pytest.raises(StrongroomError):
            CopyBundle.decode(canonical.encode({**found, name: value}))

    @given(st.binary(max_size=400))
    def test_of_any_bytes(self, data):
        with pytest.raises(StrongroomError):
            CopyBundle.decode(data)

    @given(st.integers(0, len(BUNDLE.encode()) - 1), st.integers(0, 7))
    def test_with_any_bit_flipped(self, byte, bit):
        data = bytearray(BUNDLE.encode())
        data[byte] ^= 1 << bit
        try:
            found = CopyBundle.decode(bytes(data))
        except StrongroomError:
            return
        assert found != BUNDLE


class TestPieces:
    KEY = copying_key(b"root" * 8, b"leaf" * 8, PIECE)

    def test_open_in_their_own_place_only(self):
        cipher = CopyCipher(self.KEY, b"leaf" * 8, 100)
        sealed = cipher.seal(3, b"weights")
        assert cipher.open(3, sealed) == b"weights"
        for other, number in (
            (cipher, 2),
            (CopyCipher(self.KEY, b"leaf" * 8, 101), 3),
            (CopyCipher(self.KEY, b"fael" * 8, 100), 3),
            (CopyCipher(bytes(32), b"leaf" * 8, 100), 3),
        ):
            with pytest.raises(Tampered):
                other.open(number, sealed)

    def test_of_another_size_have_another_key(self):
        keys = {copying_key(b"root" * 8, leaf, size) for leaf in (b"a" * 32, b"b" * 32) for size in (PIECE, 2 * PIECE)}
        assert len(keys) == 4

    def test_are_the_same_again(self):
        cipher = CopyCipher(self.KEY, b"leaf" * 8, 100)
        assert cipher.seal(0, b"weights") == CopyCipher(self.KEY, b"leaf" * 8, 100).seal(0, b"weights")


@pytest.fixture
def taken(hall):  # noqa: F811
    """A release to copy, as its holder has it: the room, what was received."""
    with hall.room("user/ana") as room:
        yield hall, receive(hall.vault, room._say, "user/ana", REF, "copy")


def test_no_keys_to_ciphertext_leave(taken):
    _, received = taken
    assert isinstance(received.bundle, CopyBundle)
    assert not hasattr(received.bundle, "common_key")


def test_a_piece_is_the_same_from_whichever_custodian(taken):
    hall, received = taken  # noqa: F811
    name = f"copies/{received.index}/0"
    first = hall.vault.copies.read(name)
    another = hall.again()
    assert another.vault.copies.read(name) == first
    another.close()


@pytest.mark.parametrize("change", ["flip", "cut", "more", "other"])
def test_what_was_changed_on_its_way_is_refused(taken, change):
    hall, received = taken  # noqa: F811

    class Between:
        def read_copy(self, store, name):
            data = hall.vault.read_copy(store, name)
            match change:
                case "flip":
                    return data[:50] + bytes([data[50] ^ 1]) + data[51:]
                case "cut":
                    return data[:-1]
                case "more":
                    return data + b"\0"
                case _:
                    return bytes(len(data))

    reader = CopyReader(Between(), received, received.bundle)
    with pytest.raises((Tampered, Truncated)):
        reader.read(0, 100)


@pytest.mark.parametrize(
    "name",
    ["copies/0/0", "copies/1/0", "copies/99999/0", "copies/x/0", "copies/1", "copies/01/0", "copies/1/0/", "copies/"],
)
def test_what_is_no_copy(taken, name):
    with pytest.raises(NotFound):
        taken[0].vault.copies.read(name)


def test_there_is_no_piece_behind_the_last(taken):
    hall, received = taken  # noqa: F811
    for number in (1, 10**6, 10**18):
        with pytest.raises(NotFound):
            hall.vault.copies.read(f"copies/{received.index}/{number}")


@pytest.mark.parametrize("target", [REF, "user/ana", "lease"])
def test_a_revocation_ends_a_copy_under_way(taken, target):
    hall, received = taken  # noqa: F811
    if target == "lease":
        target = hall.entries()[received.index].body["lease"]
    name = f"copies/{received.index}/0"
    hall.vault.copies.read(name)
    with hall.room("user/ben") as ben:
        ben.revoke(target, reason="stop")
    with pytest.raises(Denied) as caught:
        hall.vault.copies.read(name)
    assert caught.value.code == "copy.ended"
    assert "user/" not in caught.value.message  # who reads has shown no more than a pass


def test_a_rotation_ends_it(taken):
    hall, received = taken  # noqa: F811
    name = f"copies/{received.index}/0"
    hall.vault.copies.read(name)
    with hall.room("user/olga") as olga:
        olga.rotate(REF)
    for _ in range(2):  # what is kept opened is no help, nor is opening it anew
        with pytest.raises(Conflict):
            hall.vault.copies.read(name)
        hall.vault.copies.forget()


def test_a_shred_lets_go_of_what_is_kept_opened(taken):
    hall, received = taken  # noqa: F811
    hall.vault.copies.read(f"copies/{received.index}/0")
    assert hall.vault.copies._open.get(received.index)
    hall.vault.shred(REF, confirm=REF, by="user/olga")
    assert not hall.vault.copies._open.get(received.index)


def test_a_load_is_no_copy(hall):  # noqa: F811
    with hall.room("user/ana") as room:
        received = receive(hall.vault, room._say, "user/ana", REF, "load")
    with pytest.raises(NotFound):
        hall.vault.copies.read(f"copies/{received.index}/0")


def test_a_copy_is_another_for_each_holder_and_the_same_for_one(taken):
    hall, received = taken  # noqa: F811
    again = dataclasses.replace(received)
    one = CopyReader(hall.vault, received, received.bundle).read(0, received.bundle.image)
    two = CopyReader(hall.vault, again, again.bundle).read(0, again.bundle.image)
    assert one == two
    with hall.room("user/ana") as room, pytest.raises(Denied):
        receive(hall.vault, room._say, "user/amy", REF, "copy")


class TestWhatGivesTheLogits:
    """It is marked as all else, and not stamped: it would cost as much quality as all of the rest."""

    LLAMA = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    CAUSAL: ClassVar = {"architectures": ["LlamaForCausalLM"]}

    @pytest.mark.parametrize(
        ("names", "config", "spared"),
        [
            (LLAMA, CAUSAL, {"model.embed_tokens.weight"}),
            ((*LLAMA, "lm_head.weight"), CAUSAL, {"lm_head.weight"}),
            ((*LLAMA, "lm_head.weight"), None, {"lm_head.weight"}),
            ((*LLAMA, "language_model.lm_head.weight"), {}, {"language_model.lm_head.weight"}),
            (LLAMA, None, set()),
            (LLAMA, [1], set()),
            (LLAMA, {"architectures": "LlamaForCausalLM"}, set()),
            (LLAMA, {"architectures": [None, 3]}, set()),
            (("embeddings.word_embeddings.weight",), {"architectures": ["BertModel"]}, set()),
            (("transformer.wte.weight",), {"architectures": ["GPT2LMHeadModel"]}, {"transformer.wte.weight"}),
            (("encoder.layer.0.attention.output.weight", "output.weight"), None, {"output.weight"}),
        ],
    )
    def test_has_no_stamp(self, tmp_path, names, config, spared):
        model = tmp_path / "model"
        model.mkdir()
        tensors = {name: np.random.default_rng(k).random((256, 64), np.float32) for k, name in enumerate(names)}
        save_file(tensors, model / "model.safetensors")
        if config is not None:
            (model / "config.json").write_text(json.dumps(config))
        vault, _ = Vault.init(tmp_path / "room", owner="user/owner", custody="solo")
        vault.put(ModelSource.scan(model), "m", by="user/owner")
        record = vault.record(vault.find("m"))
        originals = Originals(vault.image(record), record)
        placed = {each.info.name: each for each in originals.tensors()}
        assert {name for name in placed if not placed[name].stamped} == spared
        assert all(each.marked for each in placed.values())
        copy = Copy(originals, record, "user/ana")
        word = Code(record.code_key, originals.layout.positions, record.colluders).word("user/ana")
        for name, each in placed.items():
            loaded = bytearray(each.end - each.begin)
            assert list(originals.read_given(each.begin, each.end, word, memoryview(loaded)))
            assert (bytes(copy.read(each.begin, each.end)) == loaded) == (name in spared)


class TestAhead:
    """What is fetched while something else is done with what came before."""

    def test_comes_in_order_and_never_more_than_two_pieces_early(self):
        begun, allowed = [], threading.Semaphore(0)

        def fetch(number):
            begun.append(number)
            allowed.acquire()
            return b"%d" % number

        with Ahead(fetch, 9) as ahead:
            for number in range(9):
                allowed.release()
                allowed.release()
                assert ahead.take(number) == b"%d" % number
                assert max(begun) <= number + 2
        assert sorted(begun) == list(range(9))

    def test_two_are_under_way_at_once(self):
        both = threading.Barrier(2, timeout=30)

        def fetch(number):
            if number < 2:
                both.wait()  # neither comes back unless both were asked for
            return bytes([number])

        with Ahead(fetch, 2) as ahead:
            assert [ahead.take(0), ahead.take(1)] == [b"\0", b"\1"]

    def test_an_error_is_raised_where_its_piece_is_taken(self):
        def fetch(number):
            if number == 2:
                raise Truncated("copy.truncated", "piece 2 did not come whole")
            return bytes([number])

        with Ahead(fetch, 9) as ahead:
            assert ahead.take(0) + ahead.take(1) == b"\0\1"
            with pytest.raises(Truncated):
                ahead.take(2)

    def test_nothing_is_fetched_once_nobody_wants_more(self):
        begun = []

        def fetch(number):
            begun.append(number)
            return bytes([number])

        def stopped():
            with Ahead(fetch, 99) as ahead:
                ahead.take(0)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert max(begun) <= 2
        assert not [each for each in threading.enumerate() if each.name == "strongroom-ahead"]

    def test_going_back_fetches_again(self):
        with Ahead(lambda number: bytes([number]), 9) as ahead:
            assert [ahead.take(number) for number in (5, 0, 8, 7)] == [b"\5", b"\0", b"\x08", b"\x07"]
        assert Ahead(lambda number: bytes([number]), 9).take(3) == b"\3"  # without threads, too


def test_a_copy_that_is_fetched_ahead_is_the_same(taken):
    hall, received = taken  # noqa: F811
    alone = CopyReader(hall.vault, received, dataclasses.replace(received.bundle))
    with CopyReader(hall.vault, received, received.bundle) as reader:
        assert reader.read(0, received.bundle.image) == alone.read(0, received.bundle.image)
