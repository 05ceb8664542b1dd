"""Files that are there whole or not at all."""

from __future__ import annotations

import threading

import pytest

from strongroom.core.files import locked, write_whole


def test_two_threads_that_write_one_file_leave_one_of_both(tmp_path):
    path, failures = tmp_path / "file", []
    data = [bytes([number]) * 5000 for number in range(4)]

    def write(number):
        try:
            for _ in range(20):
                write_whole(path, data[number])
                if path.read_bytes() not in data:
                    failures.append("half a file")
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == [path]


def test_of_many_who_make_a_new_file_one_does(tmp_path):
    path, made = tmp_path / "file", []

    def make(number):
        try:
            write_whole(path, bytes([number]) * 100, new=True)
            made.append(bytes([number]) * 100)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [path.read_bytes()]
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "lock") as mine:
        assert mine
        with locked(tmp_path / "lock", wait=False) as second:
            assert not second
    with locked(tmp_path / "lock", wait=False) as again:
        assert again


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), locked(tmp_path / "lock"):  # noqa: PT011 - ELOOP has no class of its own
        pass
    assert not (tmp_path / "elsewhere").exists()
