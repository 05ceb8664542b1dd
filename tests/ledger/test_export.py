"""The log in other systems' forms: every entry once, nothing private, and no entry that can pass for two."""

from __future__ import annotations

import json
import re

import pytest

from ledger.logs import KEY, NOW
from strongroom.errors import UsageError
from strongroom.formats.entry import BODIES, Entry, Private
from strongroom.formats.merkle import leaf_hash
from strongroom.ledger.export import FORMATS, export

_NOTE = Private.fresh("detail", "secret=|\n")
_VALUES = {
    "id": "0" * 16,
    "room": "0" * 32,
    "version": "0" * 32,
    "statement": "",
    "roles": [],
    "teams": [],
    "accused": [],
}
_VALUES |= {"lease": None, "uses": None, "proposal": None, "break_glass": False, "state": "active", "action": "load"}
_COUNTS = (
    "duration",
    "expires_at",
    "enact_after",
    "revision",
    "bytes",
    "positions",
    "release",
    "files",
    "before",
    "epoch",
)
_VALUES |= dict.fromkeys((*_COUNTS, "findings", "removed", "entry", "holders", "copies", "copiers", "size"), 5)
_VALUES |= {"gateway": "0" * 32} | dict.fromkeys(("records", "requests", "tokens", "bits"), 5)
_DIGESTS = ("head", "settings", "signer", "policy", "digest", "manifest", "key", "public_key", "challenge")
_VALUES |= dict.fromkeys(_DIGESTS, "0" * 64)
_HOSTILE = "a|b=c\\d\ne\r\u202e"


def one_of_each():
    for kind, members in BODIES.items():
        body = {name: _VALUES.get(name, _HOSTILE) for name in members}
        if kind == "renew":
            body["lease"] = "0" * 16
        if kind == "policy":
            body["proposal"] = "0" * 16
        if kind == "trace":
            body |= {"suspect": "0" * 64, "lease": None}
        if kind == "keystore":
            body["operation"] = "rotate"
        if kind == "session":
            body |= {"method": "oidc", "proof": "0" * 64}
        if kind == "reinstate":
            body |= {"key": "", "role": "officer"}
        if kind == "passkey":
            body |= {"key": "30" * 91, "state": "active"}
        if kind == "inference":
            body["refused"] = 5
        private = {"detail": _NOTE.commitment} if kind == "refused" else {}
        yield Entry(kind, NOW, "user/ana", "acme/tiny@1", body, private).encode()


@pytest.fixture(scope="module")
def entries():
    return list(one_of_each())


@pytest.mark.parametrize("form", FORMATS)
def test_every_entry_is_one_line(entries, form):
    lines = list(export(enumerate(entries), form, KEY.origin))
    assert len(lines) == len(entries) == len(BODIES)
    for index, (line, data) in enumerate(zip(lines, entries, strict=True)):
        assert len(line.splitlines()) == 1
        assert leaf_hash(data).hex() in line
        assert str(index) in line
        assert "secret" not in line


def test_json_lines_are_the_entries(entries):
    for line, data in zip(export(enumerate(entries), "jsonl", KEY.origin), entries, strict=True):
        value = json.loads(line)
        del value["index"], value["leaf"]
        assert value == json.loads(data)


def test_ocsf_has_what_its_class_requires(entries):
    required = {
        "activity_id",
        "actor",
        "api",
        "category_uid",
        "class_uid",
        "metadata",
        "severity_id",
        "src_endpoint",
        "time",
        "type_uid",
    }
    for line in export(enumerate(entries), "ocsf", KEY.origin):
        value = json.loads(line)
        assert required <= value.keys()
        assert value["type_uid"] == value["class_uid"] * 100 + value["activity_id"]
        assert value["time"] == NOW * 1000
        assert {"version", "product"} <= value["metadata"].keys()
        assert 1 <= value["severity_id"] <= 5


def test_cef_can_be_taken_apart_again(entries):
    """Seven bars that are not escaped, and fields whose names are at the only equals signs that are not."""
    for line, data in zip(export(enumerate(entries), "cef", KEY.origin), entries, strict=True):
        head = re.split(r"(?<!\\)\|", line, maxsplit=7)
        assert len(head) == 8
        assert head[0] == "CEF:0"
        assert 0 <= int(head[6]) <= 10
        names = re.findall(r"(?:^| )([A-Za-z0-9]+)(?<!\\)=", head[7])
        assert names == ["rt", "suser", "duid", "externalId", "outcome", "cs1Label", "cs1", "cs2Label", "cs2", "msg"]
        message = head[7].partition(" msg=")[2]
        body = json.loads(re.sub(r"\\([\\=])", r"\1", message))
        assert body == {name: value for name, value in json.loads(data)["body"].items() if name != "statement"}


def test_another_format(entries):
    with pytest.raises(UsageError):
        list(export(enumerate(entries), "xml", KEY.origin))
