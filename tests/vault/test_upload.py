"""A model that comes over the network is judged as one on disk is, and stored the same."""

import hashlib
import pickle
from dataclasses import replace

import pytest

from strongroom.client.send import announce, body
from strongroom.core import canonical
from strongroom.core.clock import unix
from strongroom.core.limits import LIMITS
from strongroom.crypto.signatures import Signer
from strongroom.errors import Conflict, LimitExceeded, StrongroomError, UsageError
from strongroom.formats.statement import Voice
from strongroom.formats.upload import Upload, UploadFile
from strongroom.vault import packing
from strongroom.vault.source import ModelSource
from strongroom.vault.upload import UploadSource
from vault.rooms import NAME, OWNER, write_model


def sent(source, upload, *, chunk=10_000, stop=None):
    """A receiver of what a client sends, in pieces of at most `chunk` bytes; it ends early after `stop` bytes."""
    head = upload.encode()
    data = b"".join(map(bytes, body(source, upload, head, lambda *_: None)))
    assert data[:4] == len(head).to_bytes(4, "big")
    assert data[4 : 4 + len(head)] == head
    data = data[4 + len(head) :][:stop]
    at = 0

    def receive(buffer):
        nonlocal at
        piece = data[at : at + min(chunk, len(buffer))]
        buffer[: len(piece)] = piece
        at += len(piece)
        return len(piece)

    receive.left = lambda: len(data) - at
    return receive


VOICE = Voice("ab" * 16, OWNER, Signer(bytes(32)), unix)


def announced(source):
    return announce(source, NAME, "1/8", 64, "blake3", VOICE)


def put(house, source, upload, receive):
    return house.vault.put(UploadSource.begin(upload, receive), NAME, by=OWNER, share=upload.share, positions=64)


@pytest.mark.parametrize("chunk", [1 << 30, 10_000, 997])
def test_what_was_sent_reads_back_as_what_was_put_from_disk(house, source, chunk):
    model = ModelSource.scan(source)
    upload = announced(model)
    receive = sent(model, upload, chunk=chunk)
    result = put(house, model, upload, receive)
    assert receive.left() == 0
    assert result.files == tuple(file.path for file in model.files)
    shown = {item["path"]: item["sha256"] for item in house.vault.show(result.ref)["files"]}
    assert shown == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()}
    assert house.vault.verify(result.ref, deep=True).ok
    local = house.vault.put(model, "acme/local", by=OWNER, share=upload.share, positions=64)
    assert (local.bytes, local.segments, local.positions) == (result.bytes, result.segments, result.positions)


def test_a_single_file_is_a_model(house, source, tmp_path):
    model = ModelSource.scan(source / "model-00002-of-00002.safetensors")
    upload = announced(model)
    result = put(house, model, upload, sent(model, upload))
    assert result.files == ("model-00002-of-00002.safetensors",)


def test_an_upload_that_broke_off_goes_on_with_the_packs_that_are_there(house, source, monkeypatch):
    monkeypatch.setattr(packing, "PACK_BODY", 40_000)
    model = ModelSource.scan(source)
    upload = announced(model)
    before = house.vault.ls()
    with pytest.raises(Conflict) as caught:
        put(house, model, upload, sent(model, upload, stop=200_000))
    assert caught.value.code == "upload.interrupted"
    assert house.vault.ls() == before
    result = put(house, model, upload, sent(model, upload))
    assert result.resumed_packs > 0
    assert house.vault.verify(result.ref, deep=True).ok


def test_another_content_than_was_announced_never_becomes_a_version(house, source, tmp_path):
    model = ModelSource.scan(source)
    other = ModelSource.scan(write_model(tmp_path / "other", seed=9))
    # The same files in size, so that all of it comes, with the digests of others.
    upload = announced(other)
    assert [file.size for file in upload.files] == [file.size for file in model.files]
    before = house.vault.ls()
    with pytest.raises(Conflict) as caught:
        put(house, model, upload, sent(model, upload))
    assert caught.value.code == "source.changed"
    assert house.vault.ls() == before


def single(path, data, *, head=None):
    file = UploadFile(path, len(data), hashlib.sha256(data).hexdigest(), head)
    upload = Upload(NAME, "1/8", 64, "blake3", (file,), "", "0" * 64)
    at = 0

    def receive(buffer):
        nonlocal at
        piece = data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        at += len(piece)
        return len(piece)

    return UploadSource.begin(Upload.decode(upload.encode()), receive)


class TestWhatAClientMayNotSend:
    @pytest.mark.parametrize("path", ["x.bin", "config.json", "model.bin.txt"])
    def test_pickles(self, path):
        data = pickle.dumps(print)
        with pytest.raises(UsageError) as caught:
            single(path, data, head=len(data))
        assert caught.value.code == "source.pickle"

    def test_a_file_without_tensors_of_which_only_the_beginning_can_be_looked_at(self):
        data = b"{}" + b" " * 100 + pickle.dumps(print)
        with pytest.raises(UsageError) as caught:
            single("config.json", data, head=50)
        assert caught.value.code == "upload.head"

    def test_a_header_that_is_longer_than_what_came_of_it(self, source):
        data = (source / "model-00002-of-00002.safetensors").read_bytes()
        with pytest.raises(UsageError) as caught:
            single("model.safetensors", data, head=20)
        assert caught.value.code == "upload.head"

    @pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x10" + bytes(7) + b"[]" + b" " * 14])
    def test_safetensors_that_are_none(self, data):
        with pytest.raises(UsageError):
            single("model.safetensors", data, head=min(len(data), 24))

    @pytest.mark.parametrize("path", ["../x.json", "/etc/passwd", "a\\b.json", "a/../b.json", "a\nb.json"])
    def test_names_that_lead_elsewhere(self, path):
        with pytest.raises(UsageError) as caught:
            single(path, b"{}", head=2)
        assert caught.value.code == "source.name"

    def test_shards_that_are_not_all_there(self, source):
        model = ModelSource.scan(source)
        upload = announced(model)
        files = tuple(file for file in upload.files if "00001" not in file.path)
        short = replace(upload, files=files)
        left = ModelSource(model.root, tuple(file for file in model.files if "00001" not in file.path))
        with pytest.raises(UsageError) as caught:
            UploadSource.begin(short, sent(left, short))
        assert caught.value.code == "source.missing_shard"


FILE = {"path": "a", "size": 1, "sha256": "0" * 64, "head": 1}
HEAD = {"format": 1, "name": "a/b", "share": "1/8", "positions": 1, "suite": "blake3", "files": [FILE]}
HEAD |= {"statement": "{}", "salt": "0" * 64}


class TestTheHead:
    def test_it_comes_back(self):
        data = canonical.encode(HEAD)
        assert Upload.decode(data).encode() == data

    @pytest.mark.parametrize(
        "value",
        [
            None,
            [],
            {**HEAD, "format": 2},
            {**HEAD, "more": 1},
            {key: item for key, item in HEAD.items() if key != "share"},
            {**HEAD, "name": 1},
            {**HEAD, "positions": -1},
            {**HEAD, "positions": True},
            {**HEAD, "files": []},
            {**HEAD, "salt": "0" * 62},
            {**HEAD, "statement": None},
            {**HEAD, "files": {}},
            {**HEAD, "files": [FILE, FILE]},
            {**HEAD, "files": [{**FILE, "path": "b"}, FILE]},
            {**HEAD, "files": [{**FILE, "head": 2}]},
            {**HEAD, "files": [{**FILE, "size": LIMITS.image + 1}]},
            {**HEAD, "files": [{**FILE, "sha256": "0" * 63}]},
            {**HEAD, "files": [{**FILE, "sha256": "G" * 64}]},
            {**HEAD, "files": [{**FILE, "link": "/etc/passwd"}]},
        ],
    )
    def test_what_is_none(self, value):
        with pytest.raises(UsageError) as caught:
            Upload.decode(canonical.encode(value))
        assert caught.value.code == "upload.malformed"

    @pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":1,"a":1}'])
    def test_bytes_that_are_no_json(self, data):
        with pytest.raises(StrongroomError):
            Upload.decode(data)

    def test_more_than_is_kept_in_memory(self):
        size = LIMITS.upload_heads // 2 + 1
        files = [{**FILE, "path": path, "size": size, "head": size} for path in ("a", "b")]
        with pytest.raises(LimitExceeded) as caught:
            Upload.decode(canonical.encode({**HEAD, "files": files}))
        assert caught.value.code == "upload.heads"

    def test_a_list_without_end(self):
        with pytest.raises(LimitExceeded) as caught:
            Upload.decode(bytes(LIMITS.upload + 1))
        assert caught.value.code == "upload.too_large"
