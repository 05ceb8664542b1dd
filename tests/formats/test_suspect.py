"""What is said of found files before they are sent: it comes back as it was, and nothing else is one."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.crypto.signatures import Signer
from strongroom.errors import LimitExceeded, StrongroomError, UsageError
from strongroom.formats.statement import Voice
from strongroom.formats.suspect import FoundFile, FoundFiles, suspect_digest

FILES = (FoundFile("a.safetensors", 3, "a" * 64), FoundFile("b/c.gguf", 0, "b" * 64))
VOICE = Voice("0" * 32, "user/ana", Signer(b"k" * 32), lambda: 1000)


def found(files=FILES, **more):
    said = VOICE.say(
        more.pop("kind", "trace"),
        more.pop("body", {"suspect": suspect_digest(files), "ref": "acme/tiny@1", "lease": None}),
    )
    return FoundFiles("leak", files, said.envelope, more.pop("text", False))


def changed(**members):
    return canonical.encode({**canonical.decode(found().encode()), **members})


def test_it_comes_back():
    made = found()
    assert FoundFiles.decode(made.encode()) == made
    assert made.size == 3
    assert made.said("user/ana").body["ref"] == "acme/tiny@1"


def test_text_is_said_to_be_text():
    made = found(text=True)
    assert FoundFiles.decode(made.encode()) == made
    assert made.text
    assert "text" not in canonical.decode(found().encode())
    for value in (False, 1, "true", None):
        with pytest.raises(UsageError) as caught:
            FoundFiles.decode(changed(text=value))
        assert caught.value.code == "trace.malformed"


def test_one_file_is_known_by_its_own_digest_and_several_by_that_of_their_list():
    assert suspect_digest(FILES[:1]) == "a" * 64
    listed = b'[["a.safetensors","' + b"a" * 64 + b'"],["b/c.gguf","' + b"b" * 64 + b'"]]'
    assert suspect_digest(FILES) == hashlib.sha256(listed).hexdigest()


def test_a_statement_about_something_else_is_refused():
    with pytest.raises(UsageError) as caught:
        found().said("user/ben")
    assert caught.value.code == "trace.other"
    for other in (
        found(body={"suspect": "0" * 64, "ref": None, "lease": None}),
        found(kind="put", body={"name": "acme/x", "files": "0" * 64}),
    ):
        with pytest.raises(UsageError) as caught:
            other.said("user/ana")
        assert caught.value.code == "trace.other"


@pytest.mark.parametrize(
    "members",
    [
        {"format": 2},
        {"more": 1},
        {"name": ""},
        {"name": "x" * 256},
        {"name": "a\nb"},
        {"name": 1},
        {"statement": None},
        {"files": []},
        {"files": {}},
        {"files": [5]},
        {"files": [{"path": "a", "size": 1}]},
        {"files": [{"path": 1, "size": 1, "sha256": "a" * 64}]},
        {"files": [{"path": "a", "size": -1, "sha256": "a" * 64}]},
        {"files": [{"path": "a", "size": True, "sha256": "a" * 64}]},
        {"files": [{"path": "a", "size": 1, "sha256": "A" * 64}]},
        {"files": [{"path": "a", "size": 1, "sha256": "a" * 64}] * 2},
        {"files": [{"path": name, "size": 1, "sha256": "a" * 64} for name in "ba"]},
    ],
)
def test_what_is_none(members):
    with pytest.raises(UsageError) as caught:
        FoundFiles.decode(changed(**members))
    assert caught.value.code == "trace.malformed"


def test_so_many_files_and_no_more():
    files = tuple(FoundFile(f"{k:04}", 1, "a" * 64) for k in range(LIMITS.suspect_files + 1))
    assert FoundFiles.decode(found(files[:-1]).encode()).size == LIMITS.suspect_files
    listed = [{"path": file.path, "size": 1, "sha256": file.sha256} for file in files]
    for refused in (lambda: found(files).encode(), lambda: FoundFiles.decode(changed(files=listed))):
        with pytest.raises(LimitExceeded) as caught:
            refused()
        assert caught.value.code == "trace.too_large"
    with pytest.raises(LimitExceeded):
        FoundFiles.decode(b" " * (LIMITS.upload + 1))


@given(st.binary(max_size=200) | st.binary(max_size=20).map(lambda data: found().encode() + data))
def test_any_bytes_raise_only_our_errors(data):
    with contextlib.suppress(StrongroomError):
        assert FoundFiles.decode(data).encode() == data
