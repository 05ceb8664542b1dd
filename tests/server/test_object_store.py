"""A room whose ciphertext lies in an object store, which its clients have no credentials for."""

from __future__ import annotations

import sys

import pytest

from server.served import REF, Served

pytestmark = pytest.mark.server

PROGRAM = "import strongroom; f = strongroom.safe_open('acme/tiny@1', 'np'); print(len(f.keys()))"


@pytest.fixture
def served(tmp_path, s3_url):
    made = Served(tmp_path, store=f"{s3_url}/room")
    yield made
    made.stop()


def test_holders_read_through_the_custodian(served, s3, monkeypatch):
    served.cli("trust", str(served.folder / "card.json"))
    asked = served.cli("request", REF, "--reason", "evaluation")
    for who in ("user/ben", "user/eva"):
        served.cli("approve", asked["id"], as_=who)
    for name in s3.env:
        monkeypatch.delenv(name)
    assert int(served.cli("run", REF, "--", sys.executable, "-c", PROGRAM)) == 6
