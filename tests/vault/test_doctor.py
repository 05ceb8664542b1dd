"""What the doctor says of the store and the database follows from what they say of themselves."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from strongroom.errors import BackendError
from strongroom.vault.status import Check, doctor
from strongroom.vault.vault import Vault


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    vault, _ = Vault.init(tmp_path / "room", owner="user/ana", custody="solo")
    yield vault
    vault.close()


def named(vault: Vault, name: str) -> Check:
    (found,) = (check for check in doctor(vault) if check.name == name)
    return found


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({}, "ok"),
        ({"problems": ["the folder is on tmpfs"]}, "warn"),
        ({"durable": False}, "warn"),
        ({"writable": False}, "fail"),
        ({"writable": False, "durable": False, "problems": ["what was written does not read back"]}, "fail"),
    ],
)
def test_the_store(vault: Vault, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], level: str) -> None:
    sound = {"url": "x", "kind": "local", "writable": True, "durable": True, "free_bytes": 1, "problems": []}
    monkeypatch.setattr(vault.blobs, "check", lambda: {**sound, **facts})
    found = named(vault, "store")
    assert found.level == level
    assert all(problem in found.message for problem in facts.get("problems", []))


def test_a_store_that_is_down(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, Any]:
        raise BackendError("store.unavailable", "no answer", hint="try again")

    monkeypatch.setattr(vault.blobs, "check", fail)
    assert named(vault, "store") == Check("store", "fail", "no answer", "try again")


def test_the_database_is_asked_for_its_faults(vault: Vault) -> None:
    assert named(vault, "database").level == "ok"
    with closing(sqlite3.connect(vault.folder / "room.db")) as database, database:
        database.execute("pragma foreign_keys = off")
        database.execute("pragma writable_schema = on")
        (table, column) = _reference(database)
        others = [row for row in database.execute(f"pragma table_info({table})") if row[1] != column]
        values = {column: "nowhere", **{row[1]: b"" if row[2] == "BLOB" else 1 for row in others if row[3]}}
        places = ", ".join("?" for _ in values)
        database.execute(f"insert into {table} ({', '.join(values)}) values ({places})", tuple(values.values()))
    found = named(vault, "database")
    assert found.level == "fail"
    assert table in found.message


def _reference(database: sqlite3.Connection) -> tuple[str, str]:
    """A table and its column that refers to another table."""
    tables = [row[0] for row in database.execute("select name from sqlite_master where type = 'table'")]
    for table in tables:
        for row in database.execute(f"pragma foreign_key_list({table})"):
            return table, row[3]
    raise AssertionError("no table refers to another")
