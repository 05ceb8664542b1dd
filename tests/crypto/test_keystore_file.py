from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strongroom.crypto.keystores import create_keystore, open_keystore
from strongroom.errors import BackendError, Conflict, IntegrityError, Sealed, StrongroomError, UsageError

ROOM = "0123456789abcdef0123456789abcdef"
KEY = bytes(range(32))
CONTEXT = "room key of 0123"


@pytest.fixture
def store(tmp_path):
    return create_keystore("file:room.key", ROOM, tmp_path)


def test_round_trip_across_openings(store, tmp_path):
    wrapped = store.wrap(KEY, CONTEXT)
    assert KEY not in wrapped
    assert open_keystore(store.uri, ROOM, tmp_path).unwrap(wrapped, CONTEXT) == KEY
    with pytest.raises(IntegrityError):
        store.unwrap(wrapped, CONTEXT + " ")


def test_the_file_is_private_text(store, tmp_path):
    path = tmp_path / "room.key"
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    lines = path.read_text("ascii").splitlines()
    assert lines[0] == f"strongroom-key-v1 {ROOM}"
    assert [len(word) for word in lines[1].split()] == [64, 8]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_mode_does_not_depend_on_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        store = create_keystore("file:room.key", ROOM, tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "room.key").stat().st_mode) == 0o600
    assert store.unwrap(store.wrap(KEY, CONTEXT), CONTEXT) == KEY


def test_absolute_paths_and_file_urls(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    store = create_keystore(f"file://{elsewhere}/room.key", ROOM, tmp_path / "room")
    assert (elsewhere / "room.key").exists()
    wrapped = store.wrap(KEY, CONTEXT)
    assert open_keystore(f"file:{elsewhere}/room.key", ROOM, Path("/nowhere")).unwrap(wrapped, CONTEXT) == KEY


def test_two_creations_never_share_or_overwrite(store, tmp_path):
    before = (tmp_path / "room.key").read_bytes()
    with pytest.raises(Conflict) as caught:
        create_keystore("file:room.key", ROOM, tmp_path)
    assert caught.value.code == "keystore.exists"
    assert (tmp_path / "room.key").read_bytes() == before


@pytest.mark.parametrize("dangling", [True, False])
def test_creation_does_not_follow_a_link(tmp_path, dangling):
    target = tmp_path / "target"
    if not dangling:
        target.write_text("something else")
    (tmp_path / "room.key").symlink_to(target)
    with pytest.raises(Conflict):
        create_keystore("file:room.key", ROOM, tmp_path)
    assert target.exists() != dangling
    assert dangling or target.read_text() == "something else"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o601, 0o666])
def test_a_file_that_others_may_read_is_refused(store, tmp_path, mode):
    wrapped = store.wrap(KEY, CONTEXT)
    (tmp_path / "room.key").chmod(mode)
    for use in (lambda: store.wrap(KEY, CONTEXT), lambda: store.unwrap(wrapped, CONTEXT)):
        with pytest.raises(Sealed) as caught:
            use()
        assert caught.value.code == "keystore.exposed"
        assert "chmod 600" in caught.value.hint


def test_a_read_only_file_is_fine(store, tmp_path):
    wrapped = store.wrap(KEY, CONTEXT)
    (tmp_path / "room.key").chmod(0o400)
    assert store.unwrap(wrapped, CONTEXT) == KEY


def test_a_file_of_another_user_is_refused(store, tmp_path, monkeypatch):
    path = tmp_path / "room.key"
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # the same check from the other side: this process is not who owns the file
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(Sealed) as caught:
        store.wrap(KEY, CONTEXT)
    assert caught.value.code == "keystore.exposed"


def test_a_link_is_refused(store, tmp_path):
    wrapped = store.wrap(KEY, CONTEXT)
    (tmp_path / "room.key").rename(tmp_path / "real.key")
    (tmp_path / "room.key").symlink_to("real.key")
    with pytest.raises(Sealed) as caught:
        store.unwrap(wrapped, CONTEXT)
    assert caught.value.code == "keystore.symlink"


def test_a_directory_and_a_fifo_are_refused_at_once(tmp_path):
    store = open_keystore("file:room.key", ROOM, tmp_path)
    (tmp_path / "room.key").mkdir(mode=0o700)
    with pytest.raises(Sealed) as caught:
        store.wrap(KEY, CONTEXT)
    assert caught.value.code == "keystore.not_a_file"
    (tmp_path / "room.key").rmdir()
    os.mkfifo(tmp_path / "room.key", 0o600)
    with pytest.raises(Sealed) as caught:
        store.wrap(KEY, CONTEXT)
    assert caught.value.code == "keystore.not_a_file"


def test_a_missing_file_is_sealed_and_retryable(store, tmp_path):
    wrapped = store.wrap(KEY, CONTEXT)
    (tmp_path / "room.key").rename(tmp_path / "away")
    with pytest.raises(Sealed) as caught:
        store.unwrap(wrapped, CONTEXT)
    assert caught.value.code == "keystore.missing"
    assert caught.value.retryable
    (tmp_path / "away").rename(tmp_path / "room.key")
    assert store.unwrap(wrapped, CONTEXT) == KEY


def test_the_key_file_of_another_room(store, tmp_path):
    with pytest.raises(Sealed) as caught:
        open_keystore("file:room.key", "ff" * 16, tmp_path).wrap(KEY, CONTEXT)
    assert caught.value.code == "keystore.other_room"


def test_every_bit_flip_and_truncation_of_a_wrapped_key(store):
    wrapped = store.wrap(KEY, CONTEXT)
    for bit in range(8 * len(wrapped)):
        altered = bytearray(wrapped)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            store.unwrap(bytes(altered), CONTEXT)
    for size in range(len(wrapped)):
        with pytest.raises(IntegrityError):
            store.unwrap(wrapped[:size], CONTEXT)


def test_every_bit_flip_and_truncation_of_the_key_file(store, tmp_path):
    path = tmp_path / "room.key"
    wrapped, good = store.wrap(KEY, CONTEXT), path.read_bytes()
    for bit in range(8 * len(good)):
        altered = bytearray(good)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(Sealed):
            store.unwrap(wrapped, CONTEXT)
    for size in range(len(good) - 1):  # without its last line feed the file is still whole
        path.write_bytes(good[:size])
        with pytest.raises(Sealed):
            store.unwrap(wrapped, CONTEXT)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(junk=st.binary(max_size=2000))
def test_any_key_file_and_any_wrapped_bytes(store, tmp_path, junk):
    with pytest.raises(StrongroomError):
        store.unwrap(junk, CONTEXT)
    path = tmp_path / "junk.key"
    path.write_bytes(junk)
    path.chmod(0o600)
    with pytest.raises(Sealed):
        open_keystore("file:junk.key", ROOM, tmp_path).wrap(KEY, CONTEXT)


def test_errors_hold_no_key(store, tmp_path):
    path = tmp_path / "room.key"
    secret = path.read_text().split()[2]
    path.write_text(path.read_text().replace(secret, secret[:-1] + ("0" if secret[-1] != "0" else "1")))
    with pytest.raises(Sealed) as caught:
        store.wrap(KEY, CONTEXT)
    assert secret[:16] not in str(caught.value) + str(caught.value.as_json())


def test_rotation_keeps_the_old_key_until_it_is_retired(store, tmp_path):
    wrapped = store.wrap(KEY, CONTEXT)
    second = store.rotate()
    assert second.uri == "file:room.key.1"
    rewrapped = second.wrap(store.unwrap(wrapped, CONTEXT), CONTEXT)
    with pytest.raises(IntegrityError):
        second.unwrap(wrapped, CONTEXT)
    store.retire()
    assert not (tmp_path / "room.key").exists()
    with pytest.raises(Sealed):
        store.unwrap(wrapped, CONTEXT)
    assert open_keystore(second.uri, ROOM, tmp_path).unwrap(rewrapped, CONTEXT) == KEY
    store.retire()  # a second time does nothing
    assert second.rotate().uri == "file:room.key.2"


def test_rotation_steps_over_what_a_killed_one_left(store, tmp_path):
    (tmp_path / "room.key.1").write_text("half a ke")
    assert store.rotate().uri == "file:room.key.2"
    assert (tmp_path / "room.key.1").read_text() == "half a ke"


def test_retiring_overwrites_before_it_removes(store, tmp_path):
    path = tmp_path / "room.key"
    before = path.read_bytes()
    os.link(path, tmp_path / "second-name")
    store.retire()
    after = (tmp_path / "second-name").read_bytes()
    assert len(after) == len(before)
    assert before.split()[2] not in after


def test_retiring_a_read_only_file(store, tmp_path):
    (tmp_path / "room.key").chmod(0o400)
    store.retire()
    assert not (tmp_path / "room.key").exists()


def test_retiring_destroys_nothing_that_is_no_private_file(tmp_path):
    target = tmp_path / "target"
    target.write_text("something else")
    (tmp_path / "room.key").symlink_to(target)
    with pytest.raises(Sealed):
        open_keystore("file:room.key", ROOM, tmp_path).retire()
    assert target.read_text() == "something else"


def test_no_folder_and_a_full_disk(tmp_path, monkeypatch):
    with pytest.raises(BackendError) as caught:
        create_keystore("file:absent/room.key", ROOM, tmp_path)
    assert caught.value.code == "keystore.not_written"
    full = Path("/dev/full")
    assert full.exists()
    real = os.write
    descriptor = os.open(full, os.O_WRONLY)
    monkeypatch.setattr(os, "write", lambda _, data: real(descriptor, data))  # a real ENOSPC from the kernel
    try:
        with pytest.raises(BackendError, match="No space left"):
            create_keystore("file:room.key", ROOM, tmp_path)
    finally:
        monkeypatch.undo()
        os.close(descriptor)
    assert not (tmp_path / "room.key").exists()


def test_file_and_folder_are_synced_before_the_key_is_used(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    create_keystore("file:room.key", ROOM, tmp_path)
    assert synced == [stat.S_IFREG, stat.S_IFDIR]


def test_of_many_creations_at_once_one_wins(tmp_path):
    outcomes = []

    def create():
        try:
            outcomes.append(create_keystore("file:room.key", ROOM, tmp_path))
        except Conflict:
            outcomes.append(None)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    (winner,) = [outcome for outcome in outcomes if outcome is not None]
    assert winner.unwrap(winner.wrap(KEY, CONTEXT), CONTEXT) == KEY


def test_only_keys_are_wrapped(store):
    for size in (0, 31, 33):
        with pytest.raises(UsageError):
            store.wrap(bytes(size), CONTEXT)


def test_check_tells_what_doctor_shows(store, tmp_path):
    report = store.check()
    assert report["reachable"] is True
    assert report["permissions"] == "0600"
    assert "inside the room's folder" in str(report["notes"])
    (tmp_path / "room.key").chmod(0o644)
    report = store.check()
    assert report["reachable"] is False
    assert "0644" in str(report["notes"])


@pytest.mark.parametrize("uri", ["file:", "file://host/room.key", "file:folder/", "file:a\x00b", "file:\ud800"])
def test_uris_that_name_no_file(tmp_path, uri):
    with pytest.raises(UsageError) as caught:
        create_keystore(uri, ROOM, tmp_path)
    assert caught.value.code == "keystore.bad_uri"


@pytest.mark.parametrize("uri", ["", "other.key", "pkcs11:x", "my secret passphrase", "FILE:x", "/a/b"])
def test_an_unknown_scheme_lists_the_known_ones(tmp_path, uri):
    for make in (create_keystore, open_keystore):
        with pytest.raises(UsageError) as caught:
            make(uri, ROOM, tmp_path)
        assert caught.value.code == "keystore.unknown_scheme"
        assert caught.value.evidence["known"] == ["file:", "passphrase:", "openbao:", "vault:"]
        assert not uri or uri not in str(caught.value)
