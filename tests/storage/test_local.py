"""A local folder under faults: killed at every call, full, read-only, short and slow reads, things planted in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from strongroom.errors import BackendError, Conflict, NotFound, Tampered, Truncated
from strongroom.storage.local import LocalBlobs

NAME = "packs/ab/object"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    return LocalBlobs(folder)


# -- killed ------------------------------------------------------------------------------------------------------------


def test_killed_at_every_call_a_write_leaves_all_or_nothing(tmp_path):
    program = Path(__file__).with_name("kill_at_every_call.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    for kill in kills:
        assert kill["state"] in ("absent", "whole"), kill
        assert kill["listed"] == ({"packs/ab/object": 30_000} if kill["state"] == "whole" else {}), kill
        assert kill["leftovers"] in (0, 1), kill
        assert kill["fresh_swept"] == 0, kill
        assert kill["swept"] == kill["leftovers"], kill
        assert kill["left"] == 0, kill
        assert kill["again"] == 30_000, kill
        assert kill["rewritten"], kill
    seen = {(kill["phase"], kill["call"]) for kill in kills}
    calls = {"open", "write", "fsync", "link", "unlink", "close", "flock"}
    assert {(phase, call) for phase in ("before", "after") for call in calls | {"mkdir"}} | {("half", "write")} <= seen
    assert {kill["state"] for kill in kills} == {"absent", "whole"}
    # The name appears with the link, not sooner and not later.
    assert {kill["state"] for kill in kills if kill["call"] == "link" and kill["phase"] == "before"} == {"absent"}
    assert {kill["state"] for kill in kills if kill["call"] == "link" and kill["phase"] == "after"} == {"whole"}
    assert {kill["leftovers"] for kill in kills if kill["call"] == "write"} == {1}


def test_what_must_be_durable_is_synced_in_order(folder, monkeypatch):
    """A power cut can't be had in a test; that each fsync is there, and before what relies on it, can."""
    events: list[tuple[str, str]] = []

    def path_of(descriptor: int) -> str:
        path = os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), folder)
        return "temporary" if path.startswith("tmp/") else path

    def record(name, describe):
        real = getattr(os, name)

        def call(*args, **kwargs):
            events.append((name, describe(*args, **kwargs)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    record("fsync", path_of)
    record("write", lambda descriptor, data: path_of(descriptor))

    def inside(path, descriptor: int | None) -> str:
        above = folder if descriptor is None else Path(f"/proc/self/fd/{descriptor}").readlink()
        return os.path.relpath(above / path, folder)

    record("mkdir", lambda path, *mode, dir_fd=None: inside(path, dir_fd))
    record("link", lambda source, target, *, dst_dir_fd=None, **how: inside(target, dst_dir_fd))
    store = LocalBlobs(folder)
    store.write(NAME, [b"one", b"two"])

    def at(*event: str) -> int:
        return events.index(event)

    assert at("write", "temporary") < at("fsync", "temporary") < at("link", NAME)
    last_write = max(k for k, event in enumerate(events) if event == ("write", "temporary"))
    assert last_write < at("fsync", "temporary")
    after_link = events[at("link", NAME) :]
    assert ("fsync", "packs/ab") in after_link
    for made, parent in ((".", ".."), ("tmp", "."), ("packs", "."), ("packs/ab", "packs")):
        assert ("fsync", parent) in events[at("mkdir", made) :], (made, events)
        if made != "tmp":
            assert at("mkdir", made) < at("link", NAME)
    assert ("fsync", "packs") in events[: at("link", NAME)]

    # Another process may have made the folders and been killed before it synced them: a new one does it again.
    events.clear()
    LocalBlobs(folder).write("packs/ab/second", [b"x"])
    assert {("fsync", "packs"), ("fsync", "packs/ab"), ("fsync", ".")} <= set(events)
    # One that knows them to be durable does not.
    events.clear()
    store.write("packs/ab/third", [b"x"])
    assert [event for event in events if event[0] == "fsync"] == [("fsync", "temporary"), ("fsync", "packs/ab")]
    events.clear()
    store.delete("packs/ab/third")
    assert events == [("fsync", "packs/ab")]


def test_the_loser_of_a_race_makes_the_winners_object_durable(store, folder, monkeypatch):
    store.write(NAME, [b"same"])
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), real(fd))[1]
    )
    store.write(NAME, [b"same"])
    assert str(folder / NAME) in synced
    assert str(folder / "packs/ab") in synced


def test_sweep_spares_what_is_being_written(store, folder):
    def chunks():
        yield b"x" * 100
        assert len(store.leftovers()) == 1
        assert store.sweep(older_than_s=0) == 0
        assert LocalBlobs(folder).sweep(older_than_s=0) == 0
        yield b"y"

    assert store.write(NAME, chunks()) == 101
    assert store.read(NAME, limit=101) == b"x" * 100 + b"y"


def test_sweep_spares_what_is_young_what_is_no_file_and_what_no_write_made(store, folder, tmp_path):
    tmp = folder / "tmp"
    tmp.mkdir(parents=True)
    old, young, linked, inner = (letter * 32 for letter in "0a5f")
    (tmp / old).write_bytes(b"123")
    (tmp / young).write_bytes(b"4")
    others = ["a" * 31, "b" * 33, "A" * 32, "g" * 32, f"{'c' * 32}.txt", f".{'d' * 31}", "e" * 32 + "\n", "thesis.txt"]
    for name in others:
        (tmp / name).write_bytes(b"not ours")
    (tmp_path / "elsewhere").write_bytes(b"kept")
    (tmp / linked).symlink_to(tmp_path / "elsewhere")
    (tmp / inner).mkdir()
    long_ago = time.time() - 7200
    for path in (tmp / old, *(tmp / name for name in others), tmp / inner, tmp_path / "elsewhere"):
        os.utime(path, (long_ago, long_ago))
    os.utime(tmp / linked, (long_ago, long_ago), follow_symlinks=False)
    assert sorted(store.leftovers()) == [(f"tmp/{old}", 3), (f"tmp/{young}", 1)]
    assert store.sweep() == 1
    assert store.leftovers() == [(f"tmp/{young}", 1)]
    assert {entry.name for entry in tmp.iterdir()} == {young, linked, inner, *others}
    assert (tmp_path / "elsewhere").read_bytes() == b"kept"


# -- full, read-only, broken ------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path, in_namespace):
    found = in_namespace(
        """
        from strongroom.errors import BackendError
        from strongroom.storage.local import LocalBlobs
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", sys.argv[1]], check=True)
        store = LocalBlobs(sys.argv[1])
        store.write("before", [b"kept"])
        try:
            store.write("packs/ab/big", [bytes(300_000)] * 10)
            error = None
        except BackendError as caught:
            error = [caught.code, caught.hint, caught.evidence]
        store.write("after", [bytes(700_000)])
        facts = store.check()
        print(json.dumps({
            "error": error, "names": sorted(dict(store.list())), "leftovers": store.leftovers(),
            "kept": store.read("before", limit=10).decode(), "facts": facts,
        }))
        """,
        str(tmp_path),
    )
    code, hint, evidence = found["error"]
    assert (code, evidence["errno"]) == ("store.full", "ENOSPC")
    assert "free space" in hint
    assert found["names"] == ["after", "before"]
    assert found["leftovers"] == []
    assert found["kept"] == "kept"
    assert found["facts"]["durable"] is False  # tmpfs
    assert "memory" in found["facts"]["problems"][0]
    assert found["facts"]["free_bytes"] < 1 << 20


def test_a_read_only_disk(tmp_path, in_namespace):
    found = in_namespace(
        """
        from strongroom.errors import BackendError
        from strongroom.storage.local import LocalBlobs
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1]], check=True)
        store = LocalBlobs(sys.argv[1])
        store.write("packs/ab/one", [b"kept"])
        subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
        codes = []
        for call in (
            lambda: store.write("packs/ab/two", [b"x"]),
            lambda: LocalBlobs(sys.argv[1]).write("new/folder/two", [b"x"]),
            lambda: store.delete("packs/ab/one"),
            lambda: store.check(),
        ):
            try:
                call()
                codes.append(None)
            except BackendError as caught:
                codes.append([caught.code, caught.evidence["errno"]])
        print(json.dumps({"codes": codes, "kept": LocalBlobs(sys.argv[1]).read("packs/ab/one", limit=10).decode(),
                          "names": sorted(dict(store.list()))}))
        """,
        str(tmp_path),
    )
    assert found["codes"] == [["store.read_only", "EROFS"]] * 4
    assert (found["kept"], found["names"]) == ("kept", ["packs/ab/one"])


def test_the_limit_on_file_sizes(store):
    """A real refusal by the kernel in the middle of a write, wherever the tests run."""
    store.write("before", [b"kept"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BackendError) as caught:
            store.write(NAME, [bytes(60_000)] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.code, caught.value.evidence["errno"]) == ("store.full", "EFBIG")
    assert dict(store.list()) == {"before": 4}
    assert store.leftovers() == []


FAULTS = [
    (errno.ENOSPC, "store.full"),
    (errno.EDQUOT, "store.full"),
    (errno.EROFS, "store.read_only"),
    (errno.EACCES, "store.read_only"),
    (errno.EIO, "store.failed"),
    (errno.EMFILE, "store.failed"),
    (errno.ESTALE, "store.failed"),
]


@pytest.mark.parametrize("call", ["write", "fsync", "link", "mkdir", "open"])
@pytest.mark.parametrize(("number", "code"), FAULTS)
def test_each_fault_of_each_call_of_a_write_is_told_apart_and_leaves_nothing(store, monkeypatch, call, number, code):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(BackendError) as caught:
            store.write(NAME, [b"x"])
    assert caught.value.code == code
    assert caught.value.evidence["errno"] == errno.errorcode[number]
    assert caught.value.hint
    assert dict(store.list()) == {}
    assert store.leftovers() == []
    store.write(NAME, [b"x"])
    assert store.read(NAME, limit=1) == b"x"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, "store.failed"), (errno.EACCES, "store.refused"), (errno.ESTALE, "store.failed")]
)
def test_each_fault_of_a_read_is_told_apart(store, monkeypatch, number, code):
    store.write(NAME, [b"x"])

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    for call, read in (
        ("preadv", lambda: store.read_into(NAME, 0, memoryview(bytearray(1)))),
        ("preadv", lambda: store.read(NAME, limit=9)),
        ("open", lambda: LocalBlobs(store._folder).read_into(NAME, 0, memoryview(bytearray(1)))),
        ("scandir", lambda: list(store.list())),
        ("stat", lambda: store.size(NAME)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(BackendError) as caught:
                read()
        assert caught.value.code == code, call


def test_a_write_may_be_taken_in_small_pieces(store, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    data = bytes(range(256)) * 4
    store.write(NAME, [data, b"", data])
    assert store.read(NAME, limit=9999) == data * 2


def test_short_and_slow_reads_are_continued(store, monkeypatch):
    data = bytes(range(256)) * 20
    store.write(NAME, [data])
    real, calls = os.preadv, []

    def slow(descriptor, buffers, offset):
        calls.append(offset)
        time.sleep(0.0001)
        return real(descriptor, [buffers[0][: 1 + len(calls) % 97]], offset)

    monkeypatch.setattr(os, "preadv", slow)
    buffer = bytearray(4000)
    store.read_into(NAME, 1000, memoryview(buffer))
    assert buffer == data[1000:5000]
    assert store.read(NAME, limit=9999) == data
    assert len(calls) > 50
    with pytest.raises(Truncated):
        store.read_into(NAME, 5000, memoryview(bytearray(121)))


def test_a_file_cut_while_it_is_read_is_truncated(store, folder):
    store.write(NAME, [bytes(1000)])
    buffer = memoryview(bytearray(600))
    store.read_into(NAME, 400, buffer)
    os.truncate(folder / NAME, 500)
    with pytest.raises(Truncated) as caught:
        store.read_into(NAME, 400, buffer)
    assert caught.value.evidence["got"] == 100
    assert store.size(NAME) == 500


# -- descriptors ------------------------------------------------------------------------------------------------------


def _open_in(folder: Path) -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += str(entry.readlink()).startswith(str(folder))
        except FileNotFoundError:  # the descriptor of this very listing
            continue
    return count


def test_descriptors_are_few_and_never_mixed_up_under_many_threads(folder):
    store = LocalBlobs(folder, descriptors=3)
    for k in range(12):
        store.write(f"packs/{k}", [bytes([k]) * 5000])
    wrong, most = [], []

    def read(seed: int) -> None:
        for step in range(400):
            k = (seed * 5 + step * 7) % 12
            buffer = bytearray(4000)
            store.read_into(f"packs/{k}", 1000, memoryview(buffer))
            if buffer != bytes([k]) * 4000:
                wrong.append(k)
        most.append(_open_in(folder))

    threads = [threading.Thread(target=read, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    # Those remembered, and for each running read its file, or a folder and what is just opened in it.
    assert max(most) <= 3 + 2 * 6
    assert _open_in(folder) <= 3
    store.close()
    assert _open_in(folder) == 0


def test_what_is_read_often_stays_open(folder, monkeypatch):
    store = LocalBlobs(folder, descriptors=4)
    for k in range(20):
        store.write(f"packs/{k}", [b"x"])
    opened = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **how: (opened.append(Path(path).name), real(path, *rest, **how))[1]
    )
    for k in range(1, 20):
        store.read_into("packs/0", 0, memoryview(bytearray(1)))
        store.read_into(f"packs/{k}", 0, memoryview(bytearray(1)))
    assert opened.count("0") == 1


def test_size_sees_what_was_replaced_behind_the_stores_back(store, folder):
    store.write(NAME, [b"old"])
    buffer = bytearray(3)
    store.read_into(NAME, 0, memoryview(buffer))
    (folder / "other").write_bytes(b"newer")
    (folder / "other").replace(folder / NAME)
    assert store.size(NAME) == 5
    store.read_into(NAME, 0, memoryview(buffer))
    assert buffer == b"new"
    (folder / NAME).unlink()
    with pytest.raises(NotFound):
        store.size(NAME)
    with pytest.raises(NotFound):
        store.read_into(NAME, 0, memoryview(buffer))


# -- the folder -------------------------------------------------------------------------------------------------------


def test_only_the_owner_may_look(store, folder):
    old = os.umask(0)
    try:
        store.write(NAME, [b"x"])
    finally:
        os.umask(old)
    assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o600
    for made in (folder, folder / "tmp", folder / "packs", folder / "packs/ab"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_links_pipes_and_folders_in_the_store_are_not_followed(store, folder, tmp_path):
    store.write(NAME, [b"x"])
    secret = tmp_path / "secret"
    secret.write_bytes(b"elsewhere")
    (folder / "packs/ab/link").symlink_to(secret)
    os.mkfifo(folder / "packs/ab/pipe")
    (folder / "packs/ab/.hidden").write_bytes(b"not ours")
    (folder / "packs/ab/folder").mkdir()
    for name in ("packs/ab/link", "packs/ab/pipe"):
        for read in (
            lambda name=name: store.read(name, limit=99),
            lambda name=name: store.read_into(name, 0, memoryview(bytearray(1))),
            lambda name=name: store.size(name),
        ):
            with pytest.raises(Tampered) as caught:
                read()
            assert caught.value.code == "store.not_a_file"
        with pytest.raises((Conflict, Tampered)):
            store.write(name, [b"elsewhere"])
    assert dict(store.list()) == {NAME: 1}
    assert secret.read_bytes() == b"elsewhere"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_linked_tmp_is_not_followed(store, folder, tmp_path):
    store.write(NAME, [b"x"])
    home = tmp_path / "home"
    home.mkdir()
    for name in ("thesis.txt", "a" * 32):  # the second is named as a temporary file is
        (home / name).write_bytes(b"years of work")
        os.utime(home / name, (1, 1))
    before = _contents(home)
    (folder / "tmp").rmdir()
    (folder / "tmp").symlink_to(home)
    for call in (
        store.sweep,
        lambda: store.sweep(older_than_s=0),
        lambda: LocalBlobs(folder).sweep(older_than_s=0),
        store.leftovers,
        lambda: store.write("packs/ab/new", [b"y"]),
        lambda: LocalBlobs(folder).write("packs/ab/new", [b"y"]),
    ):
        with pytest.raises(Tampered) as caught:
            call()
        assert caught.value.code == "store.not_a_folder"
        assert caught.value.evidence["folder"] == "tmp"
        assert _contents(home) == before
    assert dict(store.list()) == {NAME: 1}
    assert store.read(NAME, limit=1) == b"x"


@pytest.mark.parametrize("linked", ["packs", "packs/ab"])
@pytest.mark.parametrize("known", [True, False], ids=["same process", "new process"])
def test_a_linked_folder_is_not_followed(store, folder, tmp_path, linked, known):
    store.write(NAME, [b"x"])
    elsewhere = tmp_path / "elsewhere"
    (folder / linked).rename(elsewhere)
    (folder / linked).symlink_to(elsewhere)
    before = _contents(elsewhere)
    assert list(before.values()) == [b"x"]
    if not known:
        store = LocalBlobs(folder)
    for call in (
        lambda: store.write("packs/ab/new", [b"y"]),
        lambda: store.write(NAME, [b"x"]),
        lambda: store.write("packs/ab/deeper/new", [b"y"]),
        lambda: store.delete(NAME),
        lambda: store.read(NAME, limit=9),
        lambda: store.read_into(NAME, 0, memoryview(bytearray(1))),
        lambda: store.size(NAME),
        lambda: list(store.list()),
        lambda: list(store.list("packs")),
        lambda: list(store.list("packs/ab")),
    ):
        with pytest.raises(Tampered) as caught:
            call()
        assert caught.value.code == "store.not_a_folder"
        assert caught.value.evidence["folder"] == linked
        assert _contents(elsewhere) == before
    assert store.leftovers() == []
    (folder / linked).unlink()
    elsewhere.rename(folder / linked)
    assert dict(store.list()) == {NAME: 1}
    assert store.write("packs/ab/new", [b"y"]) == 1


def test_a_folder_swapped_for_a_link_while_an_object_is_written(store, folder, tmp_path):
    store.write(NAME, [b"x"])
    elsewhere = tmp_path / "elsewhere"

    def chunks():
        yield b"first"
        (folder / "tmp").rename(tmp_path / "moved")
        elsewhere.mkdir()
        (folder / "tmp").symlink_to(elsewhere)
        (folder / "packs/ab").rename(tmp_path / "ab")
        (folder / "packs/ab").symlink_to(elsewhere)
        yield b"second"

    with pytest.raises(Tampered) as caught:
        store.write("packs/ab/new", chunks())
    assert caught.value.evidence["folder"] == "packs/ab"
    assert _contents(elsewhere) == {}
    assert _contents(tmp_path / "moved") == {}  # the temporary file went all the same
    assert _contents(tmp_path / "ab") == {"object": b"x"}


def test_the_stores_own_folder_may_be_a_link(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    folder.symlink_to(disk)
    store = LocalBlobs(folder)
    store.write(NAME, [b"x"])
    assert dict(store.list()) == {NAME: 1}
    assert (disk / NAME).read_bytes() == b"x"
    store.delete(NAME)
    assert dict(store.list()) == {}


def test_no_call_leaves_a_folder_open(store, folder):
    store.write(NAME, [b"x"])
    (folder / "packs/link").symlink_to(folder)
    for call in (
        lambda: store.write("packs/link/new", [b"y"]),
        lambda: store.delete("packs/link/new"),
        lambda: next(store.list()),
    ):
        with pytest.raises(Tampered):
            call()
    (folder / "packs/link").unlink()
    listing = store.list()
    assert next(listing) == (NAME, 1)  # and no more is asked for
    store.delete("packs/none/such")
    store.sweep(older_than_s=0)
    store.size(NAME)
    store.delete(NAME)
    assert _open_in(folder) == 0


def test_an_object_is_no_folder(store):
    store.write("a", [b"x"])
    with pytest.raises(Conflict):
        store.write("a/b", [b"y"])
    store.write("c/d", [b"z"])
    with pytest.raises(Conflict):
        store.write("c", [b"y"])
    assert dict(store.list()) == {"a": 1, "c/d": 1}
    assert store.leftovers() == []


def test_a_store_that_should_be_there_but_is_not(folder):
    with pytest.raises(BackendError) as caught:
        LocalBlobs(folder, create=False)
    assert caught.value.code == "store.not_there"
    assert not folder.exists()
    empty = LocalBlobs(folder)
    assert list(empty.list()) == []
    assert empty.leftovers() == []
    assert not folder.exists()  # made by the first write


def test_folders_removed_meanwhile_are_made_again(store, folder):
    store.write(NAME, [b"x"])
    store.delete(NAME)
    (folder / "packs/ab").rmdir()
    (folder / "tmp").rmdir()
    store.write(NAME, [b"y"])
    assert store.read(NAME, limit=1) == b"y"


def test_a_file_system_without_locks_stores_all_the_same(store, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store.write(NAME, [b"x"])
    assert store.read(NAME, limit=1) == b"x"


def test_two_who_check_it_at_the_same_time(store, folder, monkeypatch):
    """The folder that both try a write in is removed by the first to be done, before the other's object is there."""
    publish, other = LocalBlobs._publish, LocalBlobs(folder)

    def late(blobs, *args):
        if blobs is store:
            monkeypatch.undo()
            assert other.check()["writable"]
        publish(blobs, *args)

    monkeypatch.setattr(LocalBlobs, "_publish", late)
    assert store.check()["writable"]
    assert [path.name for path in folder.iterdir()] == ["tmp"]
