"""Any bytes into an entry of the log: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.entry import Entry


def seeds() -> dict[str, bytes]:
    """Some that hold together."""
    short, digest = "0" * 16, "d" * 64
    lease = {"id": short, "holder": "user/ana", "action": "load", "ref": "acme/tiny@1", "expires_at": 9, "uses": None}
    approve = {"id": short, "duration": 60, "uses": 3, "roles": ["officer"], "statement": "", "lease": lease}
    release = {
        "action": "load",
        "holder": "user/ana",
        "lease": short,
        "revision": 1,
        "manifest": digest,
        "public_key": digest,
        "challenge": digest,
        "break_glass": True,
        "statement": "",
    }
    apikey = {
        "key": digest,
        "principal": "user/ana",
        "name": "ci",
        "expires_at": 9,
        "state": "active",
        "statement": "",
    }
    inference = {"gateway": "0" * 32, "records": 3, "head": digest, "settings": digest}
    inference |= {"requests": 2, "refused": 1, "tokens": 10, "bits": 170}
    refused = {"action": "load", "code": "auth.refused", "rule": "Schlüssel"}
    return {
        "approve": Entry("approve", 5, "user/ben", "acme/tiny@1", approve).encode(),
        "release": Entry("release", 5, "user/ana", "acme/tiny@1", release, {"reason": digest}).encode(),
        "apikey": Entry("apikey", 5, "user/ana", "user/ana", apikey).encode(),
        "inference": Entry("inference", 5, "custodian", "acme/tiny@1", inference).encode(),
        "refused": Entry("refused", 5, "user/ana", "", refused, {"detail": digest}).encode(),
    }


if __name__ == "__main__":
    fuzz(one_spelling(Entry.decode, Entry.encode, json=True), seeds())
