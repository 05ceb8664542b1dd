from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strongroom.crypto import sealing
from strongroom.crypto.keystores import create_keystore, open_keystore
from strongroom.errors import IntegrityError, Sealed, StrongroomError, Tampered, Truncated, UsageError

ROOM = "0123456789abcdef0123456789abcdef"
KEY = bytes(range(32))
CONTEXT = "room key of 0123"
WORDS = "correct horse battery staple"
HEAD = 8 + 12 + 16


def source(words: str):
    return lambda purpose: words


def with_checksum(inner: bytes, context: str = CONTEXT) -> bytes:
    """What somebody writes who knows the format and alters a wrapped key on purpose."""
    return inner + hashlib.sha256(len(inner).to_bytes(8, "big") + inner + context.encode()).digest()[:8]


@pytest.fixture
def store(tmp_path):
    return create_keystore("passphrase:", ROOM, tmp_path, passphrase=source(WORDS))


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    store = create_keystore("passphrase:", ROOM, tmp_path_factory.mktemp("room"), passphrase=source(WORDS))
    return store.wrap(KEY, CONTEXT)


@pytest.fixture
def refuses_to_ask(tmp_path):
    """A key store that fails the test when it gets as far as asking for the passphrase."""

    def ask(purpose):
        raise AssertionError("asked for the passphrase")

    return open_keystore("passphrase:", ROOM, tmp_path, passphrase=ask)


def test_round_trip_in_another_process_to_be(wrapped, tmp_path):
    asked = []

    def ask(purpose):
        asked.append(purpose)
        return WORDS

    store = open_keystore("passphrase:", ROOM, tmp_path, passphrase=ask)
    assert asked == []
    assert store.unwrap(wrapped, CONTEXT) == KEY
    assert store.unwrap(store.wrap(KEY, "another"), "another") == KEY
    assert asked == ["open"]


def test_the_layout_is_the_documented_one(wrapped):
    # Opened here by hand, from the documentation and RFC 9106's second recommended option.
    assert wrapped[:8] == b"SRPW\x01\x00\x00\x00"
    assert struct.unpack(">III", wrapped[8:20]) == (65536, 3, 4)
    key = Argon2id(salt=wrapped[20:36], length=32, iterations=3, lanes=4, memory_cost=65536).derive(WORDS.encode())
    assert sealing.unseal(key, wrapped[36:-8], CONTEXT) == KEY
    assert wrapped == with_checksum(wrapped[:-8])


def test_a_wrong_passphrase(wrapped, tmp_path):
    store = open_keystore("passphrase:", ROOM, tmp_path, passphrase=source(WORDS + "!"))
    with pytest.raises(Sealed) as caught:
        store.unwrap(wrapped, CONTEXT)
    assert caught.value.code == "keystore.wrong_passphrase"
    assert WORDS not in str(caught.value) + str(caught.value.as_json())


def test_damage_and_a_wrong_context_are_told_from_a_wrong_passphrase(wrapped, refuses_to_ask):
    for bit in range(8 * len(wrapped)):
        altered = bytearray(wrapped)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Tampered):
            refuses_to_ask.unwrap(bytes(altered), CONTEXT)
    for size in range(len(wrapped)):
        with pytest.raises(Truncated):
            refuses_to_ask.unwrap(wrapped[:size], CONTEXT)
    with pytest.raises(Tampered):
        refuses_to_ask.unwrap(wrapped, CONTEXT + " ")
    with pytest.raises(Tampered):
        refuses_to_ask.unwrap(wrapped + bytes(5000), CONTEXT)


@pytest.mark.parametrize("place", [20, 35, HEAD, HEAD + 9, HEAD + 41, HEAD + 73, -9])
def test_alterations_with_a_new_checksum_are_caught_by_the_cryptography(store, wrapped, place):
    altered = bytearray(wrapped[:-8])
    altered[place if place >= 0 else place + 8] ^= 1
    with pytest.raises((Sealed, Tampered)):
        store.unwrap(with_checksum(bytes(altered)), CONTEXT)


def test_another_context_with_a_new_checksum(store, wrapped):
    with pytest.raises(Sealed):
        store.unwrap(with_checksum(wrapped[:-8], "another"), "another")


@pytest.mark.parametrize(
    "parameters",
    [
        (2**32 - 1, 1, 4),  # 4 TiB
        (2 * 1024 * 1024 + 1, 1, 4),
        (65536, 17, 4),
        (65536, 2**32 - 1, 4),
        (65536, 3, 17),
        (65536, 3, 0),
        (65536, 0, 4),
        (65535, 3, 4),
        (0, 3, 4),
        (2 * 1024 * 1024, 3, 4),
    ],
)
def test_parameters_out_of_bounds_cost_nothing(wrapped, refuses_to_ask, parameters):
    inner = wrapped[:8] + struct.pack(">III", *parameters) + wrapped[20:-8]
    with pytest.raises(Tampered) as caught:
        refuses_to_ask.unwrap(with_checksum(inner), CONTEXT)
    assert caught.value.code == "keystore.parameters"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(junk=st.binary(max_size=300))
def test_any_bytes_raise_only_our_errors(refuses_to_ask, junk):
    for candidate in (junk, b"SRPW\x01\x00\x00\x00" + junk):
        with pytest.raises(IntegrityError):
            refuses_to_ask.unwrap(candidate, CONTEXT)


@pytest.mark.parametrize("words", ["", "brief", "elevenchars"])
def test_a_short_passphrase_is_refused(tmp_path, words):
    with pytest.raises(UsageError) as caught:
        create_keystore("passphrase:", ROOM, tmp_path, passphrase=source(words))
    assert caught.value.code == "keystore.passphrase_short"
    assert not words or words not in str(caught.value)


@pytest.mark.parametrize("words", ["x" * 1025, "\ud800 is half a letter"])
def test_passphrases_that_have_no_form(tmp_path, words):
    with pytest.raises(UsageError):
        create_keystore("passphrase:", ROOM, tmp_path, passphrase=source(words))


def test_the_same_letters_from_another_keyboard(tmp_path):
    words = "Zürich über Köln"
    store = create_keystore("passphrase:", ROOM, tmp_path, passphrase=source(unicodedata.normalize("NFC", words)))
    wrapped = store.wrap(KEY, CONTEXT)
    other = open_keystore("passphrase:", ROOM, tmp_path, passphrase=source(unicodedata.normalize("NFD", words)))
    assert other.unwrap(wrapped, CONTEXT) == KEY


def test_rotation_asks_for_the_new_passphrase(wrapped, tmp_path):
    words = {"open": WORDS, "rotate": "a quite different one"}
    store = open_keystore("passphrase:", ROOM, tmp_path, passphrase=words.__getitem__)
    second = store.rotate()
    assert second.uri == "passphrase:"
    rewrapped = second.wrap(store.unwrap(wrapped, CONTEXT), CONTEXT)
    with pytest.raises(Sealed, match="passphrase is not the one"):
        second.unwrap(wrapped, CONTEXT)
    assert store.unwrap(wrapped, CONTEXT) == KEY
    store.retire()
    with pytest.raises(Sealed) as caught:
        store.unwrap(wrapped, CONTEXT)
    assert caught.value.code == "keystore.retired"
    assert second.unwrap(rewrapped, CONTEXT) == KEY


def test_rotation_to_a_short_one_changes_nothing(wrapped, tmp_path):
    words = {"open": WORDS, "rotate": "brief"}
    store = open_keystore("passphrase:", ROOM, tmp_path, passphrase=words.__getitem__)
    with pytest.raises(UsageError):
        store.rotate()
    assert store.unwrap(wrapped, CONTEXT) == KEY


@pytest.mark.usefixtures("no_environment")
class TestEnvironment:
    def test_variable(self, wrapped, tmp_path, monkeypatch):
        monkeypatch.setenv("STRONGROOM_PASSPHRASE", WORDS)
        assert open_keystore("passphrase:", ROOM, tmp_path).unwrap(wrapped, CONTEXT) == KEY

    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    def test_descriptor_comes_first(self, wrapped, tmp_path, monkeypatch, end):
        reader, writer = os.pipe()
        os.write(writer, (WORDS + end).encode())
        os.close(writer)
        monkeypatch.setenv("STRONGROOM_PASSPHRASE_FD", str(reader))
        monkeypatch.setenv("STRONGROOM_PASSPHRASE", "not this one at all")
        try:
            store = open_keystore("passphrase:", ROOM, tmp_path)
            assert store.unwrap(wrapped, CONTEXT) == KEY
            with pytest.raises(Sealed, match="once only"):
                open_keystore("passphrase:", ROOM, tmp_path).unwrap(wrapped, CONTEXT)
        finally:
            os.close(reader)

    @pytest.mark.parametrize("number", ["-1", "three", "99999", "12345678901", "²"])
    def test_a_descriptor_that_is_none(self, wrapped, tmp_path, monkeypatch, number):
        monkeypatch.setenv("STRONGROOM_PASSPHRASE_FD", number)
        with pytest.raises((UsageError, Sealed)):
            open_keystore("passphrase:", ROOM, tmp_path).unwrap(wrapped, CONTEXT)

    def test_endless_and_binary_descriptors(self, wrapped, tmp_path, monkeypatch):
        for path in ("/dev/zero", "/dev/urandom"):
            descriptor = os.open(path, os.O_RDONLY)
            monkeypatch.setenv("STRONGROOM_PASSPHRASE_FD", str(descriptor))
            with pytest.raises(StrongroomError):
                open_keystore("passphrase:", ROOM, tmp_path).unwrap(wrapped, CONTEXT)
            os.close(descriptor)

    def test_new_passphrase_has_its_own_variable(self, tmp_path, monkeypatch):
        monkeypatch.setenv("STRONGROOM_PASSPHRASE", WORDS)
        monkeypatch.setenv("STRONGROOM_NEW_PASSPHRASE", "a quite different one")
        second = create_keystore("passphrase:", ROOM, tmp_path).rotate()
        rewrapped = second.wrap(KEY, CONTEXT)
        monkeypatch.setenv("STRONGROOM_PASSPHRASE", "a quite different one")
        assert open_keystore("passphrase:", ROOM, tmp_path).unwrap(rewrapped, CONTEXT) == KEY

    def test_nothing_to_ask(self, wrapped, tmp_path, monkeypatch):
        with Path(os.devnull).open() as nothing:
            monkeypatch.setattr(sys, "stdin", nothing)
            store = open_keystore("passphrase:", ROOM, tmp_path)
            with pytest.raises(Sealed) as caught:
                store.unwrap(wrapped, CONTEXT)
            assert caught.value.code == "keystore.no_passphrase"
            assert "STRONGROOM_PASSPHRASE_FD" in caught.value.hint
            assert store.check()["reachable"] is False

    def test_check_says_where_it_comes_from_and_does_not_read_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("STRONGROOM_PASSPHRASE", WORDS)
        report = open_keystore("passphrase:", ROOM, tmp_path).check()
        assert report["reachable"] is True
        assert report["key_type"] == "Argon2id, 64 MiB, 3 passes, 4 lanes; AES-256-GCM"
        assert "other processes" in str(report["notes"])
        assert WORDS not in str(report)


CHILD = """
import sys
from pathlib import Path
from strongroom.crypto.keystores import create_keystore
from strongroom.errors import StrongroomError
try:
    store = create_keystore("passphrase:", "00", Path("."))
    print("made", store.unwrap(store.wrap(bytes(32), "c"), "c") == bytes(32))
except StrongroomError as error:
    print("code", error.code)
"""


@pytest.mark.parametrize(
    ("second", "outcome"), [(WORDS, "made True"), ("something else", "code keystore.passphrase_mismatch")]
)
def test_a_terminal_asks_twice_and_echoes_nothing(second, outcome):
    terminal, inside = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=inside,
        stdout=subprocess.PIPE,
        stderr=inside,
        start_new_session=True,  # not the terminal of whoever runs the tests
        env={"PYTHONPATH": str(Path(sealing.__file__).parents[2])},
    )
    os.close(inside)
    seen = b""
    for prompt, words in ((b"New passphrase of the room: ", WORDS), (b"The same again: ", second)):
        while prompt not in seen:
            seen += os.read(terminal, 1024)
        os.write(terminal, words.encode() + b"\n")
    output, _ = child.communicate(timeout=60)
    with contextlib.suppress(OSError):  # Linux says EIO when the other side of a terminal is closed
        while part := os.read(terminal, 1024):
            seen += part
    os.close(terminal)
    assert child.returncode == 0
    assert output.decode().strip() == outcome
    assert WORDS not in seen.decode()


@pytest.mark.parametrize("uri", ["passphrase:hunter2 hunter2", "passphrase://"])
def test_the_passphrase_never_stands_in_the_uri(tmp_path, uri):
    for make in (create_keystore, open_keystore):
        with pytest.raises(UsageError) as caught:
            make(uri, ROOM, tmp_path, passphrase=source(WORDS))
        assert caught.value.code == "keystore.bad_uri"
        assert "hunter2" not in str(caught.value)
