"""What every store does alike: a folder and a real S3 server, side by side."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strongroom.errors import Conflict, LimitExceeded, NotFound, StrongroomError, Truncated, UsageError
from strongroom.storage.blobs import check_name, open_blobs
from strongroom.storage.local import LocalBlobs

STORES = [
    pytest.param("local", id="local"),
    pytest.param("s3", id="s3", marks=pytest.mark.server),
]


@pytest.fixture(params=STORES)
def blobs(request, tmp_path):
    local = request.param == "local"
    store = open_blobs(tmp_path / "store" if local else request.getfixturevalue("s3_url") + "/rooms/one")
    yield store
    store.close()


def _numbers(size: int) -> bytes:
    """Bytes of which no two stretches are alike."""
    return b"".join(k.to_bytes(4, "big") for k in range(size // 4 + 1))[:size]


# -- writing and reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 1 << 20, (9 << 20) + 5])
def test_what_is_written_is_read(blobs, size):
    data = _numbers(size)
    assert blobs.write("packs/ab/one", [data[: size // 3], bytearray(data[size // 3 :])]) == size
    assert blobs.size("packs/ab/one") == size
    assert blobs.read("packs/ab/one", limit=size) == data
    buffer = bytearray(size)
    blobs.read_into("packs/ab/one", 0, memoryview(buffer))
    assert buffer == data


def test_a_chunk_may_be_any_contiguous_memory_and_be_reused(blobs):
    def chunks():
        scratch = bytearray(1000)
        for k in range(1, 6):
            scratch[:] = bytes([k]) * 1000
            yield memoryview(scratch)
        yield memoryview(b"\1\0\2\0").cast("H")

    blobs.write("a", chunks())
    assert blobs.read("a", limit=10_000) == b"".join(bytes([k]) * 1000 for k in range(1, 6)) + b"\1\0\2\0"


def test_any_range_is_read_straight_into_the_buffer(blobs):
    data = _numbers(1 << 20)
    blobs.write("a/b", [data])
    for offset, size in [(0, 1), (0, 1 << 20), (5, 16384), ((1 << 20) - 1, 1), (1234, 0), (1 << 19, 1 << 19)]:
        buffer = bytearray(b"\xee" * (size + 2))
        blobs.read_into("a/b", offset, memoryview(buffer)[1:-1])
        assert buffer == b"\xee" + data[offset : offset + size] + b"\xee"


def test_many_ranges_at_once_in_any_order_overlapping_or_not(blobs):
    data = _numbers(12 << 20)
    blobs.write("a", [data])
    wanted = [
        (9 << 20, 3 << 20),
        (0, 10),
        (5, 10),
        (20, 0),
        (100_000, 70_000),
        (300_000, 5 << 20),
        (12 << 20, 0),
        (11, 1),
    ]
    buffers = [bytearray(size) for _, size in wanted]
    blobs.read_ranges_into("a", [(at, memoryview(to)) for (at, _), to in zip(wanted, buffers, strict=True)])
    for (offset, size), buffer in zip(wanted, buffers, strict=True):
        assert buffer == data[offset : offset + size]
    blobs.read_ranges_into("a", [])


def test_many_threads_read_at_once(blobs):
    data = _numbers(1 << 20)
    for k in range(5):
        blobs.write(f"packs/{k}", [bytes([k]), data])
    wrong: list[str] = []

    def read(seed: int) -> None:
        try:
            for step in range(20):
                k, offset = (seed + step) % 5, (seed * 7919 + step * 104_729) % 900_000
                buffer = bytearray(16384)
                blobs.read_into(f"packs/{k}", 1 + offset, memoryview(buffer))
                if buffer != data[offset : offset + 16384]:
                    wrong.append(f"packs/{k} at {offset}")
        except Exception as error:  # noqa: BLE001 - a thread's failure is the test's
            wrong.append(repr(error))

    threads = [threading.Thread(target=read, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (99, 2), (5000, 1), (90, 6 << 20)])
def test_reading_past_the_end_is_truncated(blobs, offset, size):
    blobs.write("a", [bytes(100)])
    with pytest.raises(Truncated) as caught:
        blobs.read_into("a", offset, memoryview(bytearray(size)))
    assert caught.value.code == "store.short_read"
    with pytest.raises(Truncated):
        blobs.read_ranges_into("a", [(0, memoryview(bytearray(10))), (offset, memoryview(bytearray(size)))])


def test_whole_reads_are_limited(blobs):
    blobs.write("a", [bytes(100)])
    assert blobs.read("a", limit=100) == bytes(100)
    with pytest.raises(LimitExceeded) as caught:
        blobs.read("a", limit=99)
    assert caught.value.evidence["size"] == 100


def test_what_is_missing_is_not_found(blobs):
    blobs.write("packs/ab/there", [b"x"])
    for name in ("packs/ab/not-there", "packs", "packs/ab", "packs/ab/there/below", "none"):
        with pytest.raises(NotFound) as caught:
            blobs.size(name)
        assert caught.value.code == "store.missing"
        with pytest.raises(NotFound):
            blobs.read(name, limit=10)
        with pytest.raises(NotFound):
            blobs.read_into(name, 0, memoryview(bytearray(1)))
        with pytest.raises(NotFound):
            blobs.read_ranges_into(name, [(0, memoryview(bytearray(1))), (9 << 20, memoryview(bytearray(1)))])


# -- create-only ------------------------------------------------------------------------------------------------------


def test_an_object_is_never_overwritten(blobs):
    blobs.write("a/b", [b"first"])
    for other in (b"other", b"first and more", b"fir", b""):
        with pytest.raises(Conflict) as caught:
            blobs.write("a/b", [other])
        assert caught.value.code == "store.exists"
    assert blobs.read("a/b", limit=100) == b"first"
    assert list(blobs.leftovers()) == []


def test_writing_the_same_again_succeeds(blobs):
    data = _numbers((5 << 20) + 3)
    assert blobs.write("a", [data]) == blobs.write("a", [data[:7], data[7:]]) == len(data)
    changed = bytearray(data)
    changed[-1] ^= 1
    with pytest.raises(Conflict):
        blobs.write("a", [changed])


@pytest.mark.parametrize("alike", [True, False])
def test_of_two_writers_of_one_name_one_wins(blobs, alike):
    for attempt in range(3):
        gate = threading.Barrier(4)
        outcomes: list[str] = []

        def write(
            k: int, attempt: int = attempt, gate: threading.Barrier = gate, outcomes: list[str] = outcomes
        ) -> None:
            content = bytes([0 if alike else k]) * 50_000
            gate.wait()
            try:
                blobs.write(f"race/{attempt}", [content])
                outcomes.append("wrote")
            except Conflict:
                outcomes.append("conflict")
            except Exception as error:  # noqa: BLE001 - a thread's failure is the test's
                outcomes.append(repr(error))

        threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == (["wrote"] * 4 if alike else ["conflict"] * 3 + ["wrote"])
        found = blobs.read(f"race/{attempt}", limit=50_000)
        assert len(found) == 50_000
        assert len(set(found)) == 1
    assert list(blobs.leftovers()) == []


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom("mine"), OSError(5, "mine"), KeyboardInterrupt("mine")])
@pytest.mark.parametrize("before", [0, 1000])
def test_an_error_of_the_chunks_is_passed_on_and_leaves_nothing(blobs, error, before):
    def chunks():
        yield bytes(before)
        raise error

    with pytest.raises(type(error)) as caught:
        blobs.write("a/b", chunks())
    assert caught.value is error
    assert list(blobs.list()) == []
    assert list(blobs.leftovers()) == []
    blobs.write("a/b", [b"now"])
    assert blobs.read("a/b", limit=10) == b"now"


# -- deleting, listing, checking --------------------------------------------------------------------------------------


def test_deleting_is_idempotent_and_makes_room_for_the_name(blobs):
    blobs.delete("a/b")
    blobs.write("a/b", [b"one"])
    buffer = bytearray(3)
    blobs.read_into("a/b", 0, memoryview(buffer))
    blobs.delete("a/b")
    blobs.delete("a/b")
    with pytest.raises(NotFound):
        blobs.read_into("a/b", 0, memoryview(buffer))
    blobs.write("a/b", [b"two"])
    blobs.read_into("a/b", 0, memoryview(buffer))
    assert buffer == b"two"
    blobs.delete("a")  # a folder is no object
    assert blobs.size("a/b") == 3


def test_listing_names_and_sizes_below_a_folder(blobs):
    sizes = {"packs/ab/1": 1, "packs/ab/2": 22, "packs/cd/3": 0, "packs-old/4": 4, "versions/0.manifest": 5}
    for name, size in sizes.items():
        blobs.write(name, [bytes(size)])
    assert dict(blobs.list()) == dict(blobs.list("")) == sizes
    assert dict(blobs.list("packs")) == dict(blobs.list("packs/")) == {k: v for k, v in sizes.items() if "packs/" in k}
    assert dict(blobs.list("packs/ab")) == {"packs/ab/1": 1, "packs/ab/2": 22}
    assert dict(blobs.list("nothing/here")) == {}
    assert dict(blobs.list("packs/ab/1/x")) == {}


def test_listing_more_than_a_page(blobs):
    names = {f"many/{k:04}" for k in range(1050)}
    threads = [
        threading.Thread(target=lambda part=part: [blobs.write(name, [b"x"]) for name in part])
        for part in (sorted(names)[k::8] for k in range(8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for name, _ in blobs.list("many")} == names


def test_check_tries_a_write_and_leaves_nothing(blobs):
    facts = blobs.check()
    assert facts["writable"] is True
    in_memory = facts.get("file_system") in ("tmpfs", "ramfs")  # as the folders of tests may be
    assert ["memory" in problem for problem in facts["problems"]] == [True] * in_memory
    assert facts["url"] == blobs.url
    assert list(blobs.list()) == []


def test_a_closed_store_comes_back(blobs):
    blobs.write("a", [bytes(9 << 20)])
    for _ in range(2):
        buffer = bytearray(9 << 20)
        blobs.read_into("a", 0, memoryview(buffer))
        blobs.close()


# -- names and URLs ---------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/..",
    "a/./b",
    ".hidden",
    "a/.hidden",
    "A",
    "a b",
    "a\nb",
    "a\n",
    "a\0b",
    "a\\b",
    "ä",
    "a?b",
    "a#b",
    "a%2e",
    "-a",
    "tmp",
    "tmp/x",
    "a" * 129,
    "/".join("a" * 17),
    "/".join(["a" * 100] * 6),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_by_every_method(blobs, name):
    outside = memoryview(bytearray(1))
    for call in (
        lambda: blobs.write(name, [b"x"]),
        lambda: blobs.read(name, limit=1),
        lambda: blobs.size(name),
        lambda: blobs.read_into(name, 0, outside),
        lambda: blobs.read_ranges_into(name, [(0, outside)]),
        lambda: blobs.delete(name),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == "store.malformed_name"
    if name.strip("/"):
        with pytest.raises(UsageError):
            list(blobs.list(name.removesuffix("/") if name != "a/" else ".."))


parts = st.text(alphabet=string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=40).filter(
    lambda part: part[0] not in "._-"
)
names = st.lists(parts, min_size=1, max_size=6).map("/".join).filter(lambda name: name.split("/")[0] != "tmp")


@given(name=names, data=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_good_name_is_stored_inside_the_folder(tmp_path, name, data):
    # A folder of its own for each example: one name may be a folder of another's.
    root = tmp_path / os.urandom(8).hex()
    store = LocalBlobs(root)
    store.write(name, [data])
    assert store.read(name, limit=200) == data
    assert dict(store.list()) == {name: len(data)}
    assert (root / name).read_bytes() == data
    assert {entry.name for entry in root.iterdir()} == {"tmp", name.split("/")[0]}


@given(name=st.text(max_size=40) | st.text(alphabet="ab./~tmp\0", max_size=12))
def test_any_text_is_a_name_inside_the_store_or_refused(name):
    try:
        check_name(name)
    except StrongroomError as error:
        assert error.code == "store.malformed_name"
    else:
        assert os.path.normpath(f"/store/{name}") == f"/store/{name}"
        assert not name.startswith("tmp/")


@given(
    url=st.text(max_size=60)
    | st.sampled_from(["s3", "gs", "az", "file"]).flatmap(lambda s: st.text().map(f"{s}://{{}}".format))
)
@settings(max_examples=200)
def test_any_text_is_the_url_of_a_store_or_a_usage_error(url):
    try:
        store = open_blobs(url)
    except StrongroomError as error:
        assert isinstance(error, UsageError), error
        assert "\0" not in error.message
    else:
        store.close()


def test_stores_by_url(tmp_path):
    folder = tmp_path / "a store"
    by_path = open_blobs(folder)
    by_path.write("a", [b"x"])
    assert open_blobs(by_path.url).read("a", limit=1) == b"x"
    assert open_blobs(str(folder), create=False).near is True
    for url in (
        "ftp://host/x",
        "http://host/x",
        "s3://",
        "s3://u:secret@bucket",
        "file://host/x",
        "file://",
        "file://[",
        "s3://b/../c",
    ):
        with pytest.raises(UsageError) as caught:
            open_blobs(url)
        assert "secret" not in str(caught.value)


def test_naming_a_store_imports_no_object_store_client():
    code = (
        "import sys; from strongroom.storage.blobs import open_blobs; open_blobs(sys.argv[1]); "
        "sys.exit(', '.join({'obstore', 'sqlalchemy', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, "/nonexistent"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
