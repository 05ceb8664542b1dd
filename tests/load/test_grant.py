"""What a child is handed: sealed, read any number of times, by it and its own children, and worth nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from strongroom.errors import NotFound, StrongroomError, Tampered, Truncated, UsageError
from strongroom.load import source
from strongroom.load.grant import (
    VARIABLE,
    Grant,
    decode,
    encode,
    granted_refs,
    hold,
    read_grants,
    reader_from_grant,
    variable,
)
from strongroom.load.source import register_opener, resolve
from strongroom.load.weights import Weights

GRANTS = st.lists(st.builds(Grant, st.text(max_size=40), st.binary(max_size=200)), min_size=1, max_size=5)


@pytest.fixture
def held(room, tmp_path):
    """The descriptor of a grant for acme/tiny@1, acme/tiny@2 and acme/other@1; w counts the versions."""
    grants = []
    for number, name in enumerate(["acme/tiny", "acme/tiny", "acme/other"], 1):
        save_file({"w": np.full(100, number, np.int32)}, tmp_path / "m.safetensors")
        ref = room.put(tmp_path / "m.safetensors", name)
        grants.append(Grant(room.vault.blobs.url, room.vault.bundle(ref, "user/ana").encode()))
    fd = hold(grants)
    yield fd
    os.close(fd)


@given(GRANTS)
def test_what_is_held_is_read_back_again_and_again(grants):
    fd = hold(grants)
    try:
        assert read_grants(variable(fd)) == grants
        assert read_grants(variable(fd)) == grants
    finally:
        os.close(fd)
    assert decode(encode(grants)) == grants


def test_nobody_can_change_what_is_held():
    fd = hold([Grant("file:///store", b"bundle")])
    try:
        assert os.get_inheritable(fd)
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 1),
            lambda: os.ftruncate(fd, 1000),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC),
        ):
            with pytest.raises(PermissionError):
                change()
        assert read_grants(variable(fd)) == [Grant("file:///store", b"bundle")]
    finally:
        os.close(fd)


def test_a_bundle_does_not_show_in_a_repr():
    assert "secret" not in repr(Grant("file:///store", b"secret"))


@given(GRANTS, st.data())
def test_bytes_that_are_no_grant_raise_only_our_errors(grants, data):
    whole = bytearray(encode(grants))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if change == "flip":
            whole[at] ^= data.draw(st.integers(1, 255))
        elif change == "cut":
            del whole[at:]
            if not whole:
                break
        else:
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    try:
        found = decode(bytes(whole))
    except StrongroomError:
        return
    assert encode(found) == bytes(whole)


@given(st.binary(max_size=100))
def test_noise_raises_only_our_errors(noise):
    with pytest.raises(Tampered):
        decode(noise)
    with pytest.raises(Tampered):
        decode(b"SRGRANT1" + noise)


@pytest.mark.parametrize("value", ["", "3", "fd:", "fd:-1", "fd:x", "fd:3 ", "path:/x", "fd:" + "9" * 30])
def test_other_values_of_the_variable_are_refused(value):
    with pytest.raises(UsageError) as error:
        read_grants(value)
    assert error.value.code == "grant.variable"


def test_a_descriptor_that_is_not_there_or_is_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(encode([Grant("", b"")]))
    with (tmp_path / "file").open("rb") as file:
        for fd in (file.fileno(), 1000):
            with pytest.raises(UsageError) as error:
                read_grants(f"fd:{fd}")
            assert error.value.code == "grant.gone"


def test_memory_that_could_still_be_changed_is_refused():
    fd = os.memfd_create("strongroom-grant", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, encode([Grant("", b"")]))
        with pytest.raises(Tampered):
            read_grants(variable(fd))
    finally:
        os.close(fd)


def test_the_reader_is_that_of_the_version_named_or_of_the_newest(held):
    value = variable(held)
    assert granted_refs(value) == ["acme/tiny@1", "acme/tiny@2", "acme/other@1"]
    for ref, number in (("acme/tiny", 2), ("acme/tiny@1", 1), ("acme/tiny@2", 2), ("acme/other", 3)):
        with Weights(reader_from_grant(ref, value)) as weights:
            assert (weights["w"] == number).all()
    for ref in ("acme/tiny@3", "acme/nobody", "acme/other@2"):
        with pytest.raises(NotFound) as error:
            reader_from_grant(ref, value)
        assert error.value.code == "grant.other"
    with pytest.raises(UsageError):
        reader_from_grant("NOT A REF", value)


def test_a_bundle_that_was_damaged_is_refused(held):
    grant = read_grants(variable(held))[0]
    for bundle in (grant.bundle[:-1], b"", grant.bundle[:-1] + bytes([grant.bundle[-1] ^ 1])):
        fd = hold([Grant(grant.store_url, bundle)])
        try:
            with pytest.raises((Tampered, Truncated)):
                reader_from_grant("acme/tiny", variable(fd))
        finally:
            os.close(fd)


def test_resolving_prefers_the_grant_and_does_not_get_round_it(held, room, monkeypatch):
    monkeypatch.setattr(source, "_openers", [])
    with pytest.raises(UsageError) as error:
        resolve("acme/tiny")
    assert error.value.code == "weights.no_room"
    register_opener(room.reader)
    assert resolve("acme/tiny@1").bundle.ref == "acme/tiny@1"
    reader = room.reader()
    assert resolve(reader) is reader
    assert resolve(Weights(reader)) is reader
    monkeypatch.setenv(VARIABLE, variable(held))
    assert resolve("acme/tiny").bundle.ref == "acme/tiny@2"
    with pytest.raises(NotFound):
        resolve("acme/nobody")


CHILD = """
import sys
from strongroom.load.torch import state_dict
from strongroom.load.source import resolve
from strongroom.load.weights import Weights
print(int(Weights(resolve("acme/tiny"))["w"][0]), int(Weights(resolve("acme/other"))["w"].sum()))
if sys.argv[1:] == ["again"]:
    import subprocess
    # As most programs start others: with no descriptors but the standard ones.
    subprocess.run([sys.executable, "-c", sys.stdin.read(), "last"], check=True, close_fds=True)
"""


def test_a_child_reads_with_it_and_so_do_its_children(held):
    env = {**os.environ, VARIABLE: variable(held), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, "again"]
    done = subprocess.run(
        command, env=env, pass_fds=[held], input=CHILD, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout.split("\n") == ["2 300", "2 300", ""]


STRANGER = """
import os, time
if os.fork():
    os.wait()
    raise SystemExit
started_by = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == started_by:
    time.sleep(0.01)
from strongroom.load.grant import reader_from_grant
try:
    reader_from_grant("acme/tiny")
except Exception as error:
    print(error.code)
"""


def test_a_stranger_with_the_variable_alone_has_nothing(held):
    env = {**os.environ, VARIABLE: variable(held), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STRANGER]  # its last process belongs to nobody who holds the grant
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "grant.gone", done.stderr


def test_reading_leaves_no_descriptors_behind(held):
    def open_grants():  # and not what anybody else opens or closes meanwhile
        found = []
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
                found.append(each.readlink().name)
        return [name for name in found if "strongroom-grant" in name]

    assert len(open_grants()) == 1
    for _ in range(5):
        read_grants(variable(held))
    assert len(open_grants()) == 1
