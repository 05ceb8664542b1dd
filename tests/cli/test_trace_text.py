"""``strongroom trace --text`` as its users meet it: from answers to a page that can be filed."""

from __future__ import annotations

import json

import pytest

from cli.desk import Desk, desk_in
from vault.writers import lines, write_model, written

REF = "acme/writer@1"


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    """A room of one person, with a model that writes and a copy of it in `leak`."""
    made = desk_in(tmp_path_factory.mktemp("texts"))
    write_model(made.folder / "writer")
    assert made.run("init", "--owner", "user/olga", "--custody", "solo").code == 0
    assert made.run("put", "writer", "acme/writer").code == 0
    assert made.run("copy", REF, "--to", "user/olga", "--out", "leak").code == 0
    return made


def test_answers_name_whose_copy_wrote_them(desk):
    from safetensors.torch import load_file

    leaked = {name: each.float() for name, each in load_file(desk.folder / "leak" / "model.safetensors").items()}
    lines(desk.folder / "answers.jsonl", written(leaked, 450))
    ended = desk.run("trace", "--text", "answers.jsonl", "--weights", REF, "--report", "case.html")
    assert ended.code == 14
    assert ended.out.startswith(f"This was written by {REF}, out of the copy of user/olga; that this is wrong has a")
    assert "28,800 tokens of 450 completions; fits a temperature of " in ended.out
    assert "Loading" not in ended.err  # transformers draws no bar of its own
    page = (desk.folder / "case.html").read_text()
    assert "What had to be undone" not in page
    assert "28,800 tokens of 450 completions" in page
    assert "which copy was asked" in page


def test_little_text_names_nobody(desk):
    (desk.folder / "short.jsonl").write_text('{"prompt": "w5 w6", "completion": "w7 w8"}\n')
    ended = desk.run("trace", "--text", "short.jsonl", "--weights", "acme/writer")
    assert ended.code == 0
    assert ended.out.startswith(f"Nobody's copy of {REF} can be said to have written this; more text may say more.")
    found = desk.run("trace", "--text", "short.jsonl", "--weights", REF, "--json").json
    assert (found["verdict"], found["accused"], found["text"]["tokens"]) == ("not-named", [], 2)
    assert json.dumps(found["scores"]).count("olga") == 0


def test_either_weights_or_text(desk):
    (desk.folder / "a.txt").write_text("w5 w6")
    for arguments, code in (
        (("leak", "--text", "a.txt", "--weights", REF), "trace.what"),
        ((), "trace.what"),
        (("--text", "a.txt"), "trace.text_version"),
    ):
        ended = desk.run("trace", *arguments, "--json")
        assert (ended.code, ended.error["code"]) == (2, code)
        assert "strongroom trace" in ended.error["hint"]
    ended = desk.run("trace", "--text", "nothing.txt", "--weights", REF, "--json")
    assert (ended.code, ended.error["code"]) == (8, "source.missing")
