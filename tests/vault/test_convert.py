"""Pickles become safetensors in memory; hostile ones do nothing, even where torch's allow-list lets them through."""

from __future__ import annotations

import gc
import json
import os
import pickle
import platform
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from strongroom.errors import Conflict, LimitExceeded, UsageError
from strongroom.vault import convert, sandbox, unpickle
from strongroom.vault.convert import converted, safetensors_name
from strongroom.vault.source import ModelSource, SourceFile

torch: Any = pytest.importorskip("torch")
safetensors_torch: Any = pytest.importorskip("safetensors.torch")

linux = pytest.mark.skipif(platform.system() != "Linux", reason="memory files and sandbox are Linux's")
pytestmark = linux


class Attack:
    """Leaves a file behind if anything runs it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.witness}",)


def content(source: ModelSource, path: str) -> bytes:
    file = next(file for file in source.files if file.path == path)
    with source.open(file) as fd:
        return os.pread(fd, file.size, 0)


def refused(path: Path) -> UsageError:
    gc.collect()  # what other tests have left is closed now, or, by their threads, in between
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UsageError) as caught, converted(path):
        pass
    assert caught.value.hint
    assert caught.value.message.isprintable()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    return caught.value


def some_tensors() -> dict[str, Any]:
    matrix = torch.randn(64, 32)
    return {
        "tied.a": matrix,
        "tied.b": matrix,
        "view": matrix.t()[:3],
        "bf16": torch.randn(4, 4).bfloat16(),
        "f16": torch.randn(4, 4).half(),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "byte": torch.tensor([7], dtype=torch.uint8),
        "complex": torch.randn(2, 2, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "grad": torch.nn.Parameter(torch.randn(3, 3)),
        "é\n": torch.zeros(1),
    }


def same(data: bytes, tensors: dict[str, Any]) -> None:
    read = safetensors_torch.load(data)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].contiguous().view(-1).view(torch.uint8), as_bytes(tensor))


def as_bytes(tensor: Any) -> Any:
    return tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("archive", [True, False])
def test_a_directory(tmp_path: Path, archive: bool) -> None:
    tensors = some_tensors()
    if not archive:
        del tensors["f8"]  # torch's old format has no form for it, and torch itself cannot read it back
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    (tmp_path / "config.json").write_text("{}")
    with converted(tmp_path) as source:
        assert [file.path for file in source.files] == ["config.json", "model.safetensors"]
        model = source.files[1]
        assert model.kind == "safetensors"
        assert source.unmarked_reasons["integer"].tensors == 3
        assert all(tensor.aligned(model.data_start) for tensor in model.tensors)
        same(content(source, "model.safetensors"), tensors)
        source.check_unchanged([])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
        # Nobody changes it any more, and it is nowhere but in memory.
        with pytest.raises(PermissionError):
            os.pwrite(model.memory or -1, b"x", 0)
        assert str(model.location.readlink()).startswith("/memfd:")
    with pytest.raises(Conflict), source.open(model):
        pass


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    parts = [{"a": torch.randn(4, 4), "b": torch.randn(2)}, {"c": torch.randn(8, 2).bfloat16()}]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with converted(tmp_path) as source:
        assert [file.path for file in source.files] == [
            "unet/model-00001-of-00002.safetensors",
            "unet/model-00002-of-00002.safetensors",
            "unet/model.safetensors.index.json",
        ]
        new = json.loads(content(source, "unet/model.safetensors.index.json"))
        first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
        assert new == {"metadata": {"total_size": 64 + 8 + 32}, "weight_map": {"a": first, "b": first, "c": second}}
        same(content(source, "unet/" + second), parts[1])
    (folder / names[1]).unlink()
    assert refused(tmp_path).code == "source.missing_shard"
    (folder / "pytorch_model.bin.index.json").unlink()
    assert refused(tmp_path).code == "source.missing_shard"


def test_a_single_file_and_a_checkpoint(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(2, 2)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "last.ckpt")
    with converted(tmp_path / "last.ckpt") as source:
        assert [file.path for file in source.files] == ["last.safetensors"]
        same(content(source, "last.safetensors"), tensors)


def test_what_the_publisher_converted_is_not_converted_again(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"w":"model.safetensors"}}')
    safetensors_torch.save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with converted(tmp_path) as source:
        assert [file.path for file in source.files] == ["model.safetensors", "model.safetensors.index.json"]
        assert source.skipped == ("pytorch_model.bin", "pytorch_model.bin.index.json")


def test_without_pickles_nothing_is_converted(tmp_path: Path) -> None:
    safetensors_torch.save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with converted(tmp_path) as source:
        assert source == ModelSource.scan(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("a/pytorch_model.fp16.bin", "a/model.fp16.safetensors"),
        ("adapter_model.BIN", "adapter_model.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("data.00", "data.00.safetensors"),
        ("weights", "weights.safetensors"),
    ],
)
def test_names(path: str, name: str) -> None:
    assert safetensors_name(path) == name


def test_names_that_become_one(tmp_path: Path) -> None:
    for name in ("x.pt", "X.pth"):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
    assert refused(tmp_path).code == "source.collision"


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_calls_is_refused_and_calls_nothing(tmp_path: Path, archive: bool) -> None:
    witness = tmp_path / "ran"
    torch.save({"w": Attack(witness)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    error = refused(tmp_path)
    assert error.code == "convert.refused"
    assert error.evidence["wants"] == "posix.system"
    assert not witness.exists()


@pytest.mark.parametrize(
    "value",
    [
        [torch.zeros(1)],
        {"w": torch.zeros(1), "lr": 0.1},
        {3: torch.zeros(1)},
        {"w": torch.zeros(1, dtype=torch.complex128)},
        {"w": torch.eye(2).to_sparse()},
        {"w": torch.zeros(2, device="meta")},
    ],
)
def test_more_than_tensors(value: object) -> None:
    with pytest.raises(unpickle._Unfit):
        unpickle._tensors(torch, value)


def test_more_than_tensors_is_said(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "lr": 0.1}, tmp_path / "optimizer.pt")
    error = refused(tmp_path)
    assert error.code == "convert.unfit"
    assert "'lr' is a float" in error.message


@pytest.mark.parametrize("data", [b"", b"\x80\x02}q\x00"])
def test_damaged_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    assert refused(tmp_path).code == "convert.unreadable"


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_newer_protocol_is_called_what_it_is(tmp_path: Path, protocol: int) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert refused(tmp_path).code == "convert.protocol"


def test_a_truncated_archive(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(100, 100)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: len(data) // 2])
    assert refused(tmp_path).code == "convert.unreadable"


def test_a_tensor_that_repeats_itself_beyond_measure(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(LimitExceeded) as caught, converted(tmp_path):
        pass
    assert caught.value.code == "convert.limit"


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # how Python itself says that a module is not to be had
    error = refused(tmp_path)
    assert error.code == "convert.no_torch"
    assert "strongroom[convert]" in error.hint


def test_where_there_are_no_memory_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    monkeypatch.delattr(os, "memfd_create")
    assert refused(tmp_path).code == "convert.no_sandbox"


def believed(file: SourceFile, memory: int, answer: object) -> None:
    convert._prepare(file, memory, answer)
    file = SourceFile.in_memory("x.safetensors", memory)
    file.parsed(partial(file.read, memory))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        3,
        [["w"]],
        [["w", "F33", [1]]],
        [["w", "F32", [-1]]],
        [["w", "F32", 1]],
        [["w", "F32", ["x"]]],
        [["w", "F4", [3]]],
        [["w", "F32", [2**40, 2**40]]],
        [["w", "F32", [1]], ["w", "F32", [1]]],
        [["__metadata__", "F32", [1]]],
        [["\ud800", "F32", [1]]],
        [["w", "F32", [1] * 9]],
    ],
)
def test_what_the_child_says_is_not_believed(tmp_path: Path, answer: object) -> None:
    (tmp_path / "x.pt").write_bytes(b"x")
    file = SourceFile.scan("x.pt", tmp_path / "x.pt")
    memory = os.memfd_create("test")
    try:
        with pytest.raises((UsageError, LimitExceeded)):
            believed(file, memory, answer)
        assert os.fstat(memory).st_size < 1000
    finally:
        os.close(memory)


# --- the sandbox by itself -----------------------------------------------------------


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as the child would be run."""
    return subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd="/",
    )


FILTERED = "from strongroom.vault import sandbox\nassert sandbox.filter_calls()\nimport os, socket, subprocess\n"


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket()",
        "socket.socketpair()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "open(sys.argv[1], 'w')",
        "open(sys.argv[1], 'r+')",
        "os.open(sys.argv[1], os.O_RDONLY | os.O_TRUNC)",
        "os.truncate(sys.argv[1], 0)",
        "os.unlink(sys.argv[1])",
        "os.rename(sys.argv[1], sys.argv[1] + 'x')",
        "os.link(sys.argv[1], sys.argv[1] + 'x')",
        "os.symlink(sys.argv[1], sys.argv[1] + 'x')",
        "os.mkdir(sys.argv[1] + 'x')",
        "os.chmod(sys.argv[1], 0)",
        "os.setxattr(sys.argv[1], 'user.x', b'')",
        "os.kill(os.getppid(), 0)",
        "os.memfd_create('x')",
    ],
)
def test_refused_calls(tmp_path: Path, attempt: str) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    result = python(FILTERED + attempt, str(path))
    assert result.returncode == 1
    assert "PermissionError" in result.stderr
    assert path.read_text() == "content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_reading_is_still_possible(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    result = python(FILTERED + "print(open(sys.argv[1]).read())", str(tmp_path / "file"))
    assert result.stdout == "content\n", result.stderr


def test_a_hostile_pickle_gets_nowhere_even_if_it_runs(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    load = "import pickle\nprint(pickle.load(open(sys.argv[1], 'rb')))"
    result = python(FILTERED + load, str(tmp_path / "x.pkl"))
    assert result.stdout != "0\n"
    assert not (tmp_path / "ran").exists()
    assert python(load, str(tmp_path / "x.pkl")).stdout == "0\n"
    assert (tmp_path / "ran").exists()  # without the sandbox it does run: the test tests something


def test_the_network_namespace(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)\n"
        assert python(connect).returncode == 0
        result = python("from strongroom.vault import sandbox\nprint(sandbox.leave_network())\n" + connect)
    if result.stdout == "False\n":
        pytest.skip("user namespaces are not permitted here")
    assert result.stdout == "True\n"
    assert result.returncode == 1
    assert "unreachable" in result.stderr


def test_limits(tmp_path: Path) -> None:
    start = "from strongroom.vault import sandbox\nsandbox.limit(memory=64 << 20, cpu_seconds=1)\nimport os\n"
    assert "MemoryError" in python(start + "bytearray(128 << 20)").stderr
    assert (
        "too large"
        in python(start + "os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), b'x')", str(tmp_path / "x")).stderr
    )
    assert (tmp_path / "x").stat().st_size == 0
    assert python(start + "while True: pass").returncode < 0


def child(before: str, path: Path) -> dict[str, Any]:
    """The child's first answer on `path`, in a process that ran `before`."""
    memory = os.memfd_create("test")
    source = os.open(path, os.O_RDONLY)
    code = f"{before}\nfrom strongroom.vault.unpickle import main\nmain({source}, {memory}, 1 << 30, 60)"
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
            pass_fds=(source, memory),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    finally:
        os.close(memory)
        os.close(source)
    answer: dict[str, Any] = json.loads(result.stdout.partition("\n")[0])
    return answer


def test_without_either_wall_nothing_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2, 3)}, tmp_path / "x.pt")
    neither = (
        "from strongroom.vault import sandbox\nassert sandbox.filter_calls()\n"
        "import platform\nplatform.machine = lambda: 'a machine whose calls we have no table of'\n"
    )
    assert child(neither, tmp_path / "x.pt")["error"] == "no_sandbox"


def test_the_tables_of_calls_agree() -> None:
    # Calls that only x86-64 has are older forms of calls that both have.
    older = set(sandbox._X86_64) - set(sandbox._AARCH64)
    assert older == {
        *("chmod", "chown", "creat", "fork", "lchown", "link", "mkdir", "mknod", "rename", "rmdir", "symlink"),
        *("unlink", "vfork"),
    }
    assert set(sandbox._AARCH64) < set(sandbox._X86_64)
    assert len(set(sandbox._X86_64.values())) == len(sandbox._X86_64)
    assert len(set(sandbox._AARCH64.values())) == len(sandbox._AARCH64)
