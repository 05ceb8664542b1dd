"""``strongroom trace`` as its users meet it: refused, asked for, approved, and a page that can be filed."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser

import pytest

from cli.desk import Desk, desk_in, write_model
from strongroom.cli.trace import lines
from strongroom.cli.tracepage import page
from strongroom.client import Room
from strongroom.core.clock import text as time_of

REF = "acme/tiny@1"


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Desk:
    """A team's room out of which Pia, a partner, has a plaintext copy: `leak`, with names that she has chosen."""
    desk = desk_in(tmp_path_factory.mktemp("traced"))
    write_model(desk.model)
    assert desk.run("init", "--owner", "user/olga").code == 0
    assert desk.run("put", "model", "acme/tiny").code == 0
    people = (("oto", "operator"), ("ben", "officer"), ("eva", "executive"), ("pia", "partner"), ("ana", "researcher"))
    for name, role in people:
        assert desk.run("principal", "add", f"user/{name}", "--role", role, "--as", "user/olga").code == 0
    asked = desk.run("request", REF, "--action", "copy", "--reason", "x", "--as", "user/pia", "--json").json["id"]
    for name in ("ben", "eva"):
        assert desk.run("approve", asked, "--as", f"user/{name}").code == 0
    assert desk.run("copy", REF, "--to", "user/pia", "--out", "leak", "--as", "user/pia").code == 0
    path = desk.folder / "leak" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["<script>alert(1)</script>"] = header.pop("layers.0.weight")
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return desk


def lease(team, who="user/ben"):
    asked = team.run("request", REF, "--action", "trace", "--uses", "1", "--reason", "case 12", "--as", who, "--json")
    assert asked.code == 0, asked.out
    identifier = asked.json["id"]
    assert team.run("approve", identifier, "--as", "user/eva").code == 0
    return identifier


def test_which_version_it_is_may_be_asked_and_nobody_is_named(team):
    ended = team.run("trace", "leak", "--as", "user/oto")
    assert ended.code == 13
    assert ended.out.startswith(
        f"This is {REF}, and a copy that came out of the room: it has marks. Whose copy it is takes an approved "
        "request."
    )
    assert "pia" not in ended.out + ended.err
    assert f"request {REF} --action trace --reason TEXT" in ended.err
    found = team.run("trace", "leak", "--as", "user/oto", "--json").json
    assert (found["withheld"], found["accused"], found["scores"]) == (True, [], [])
    assert "pia" not in json.dumps(found)
    # So is whether it has marks at all.
    unmarked = team.run("trace", "model", "--as", "user/oto")
    assert unmarked.out.startswith(
        f"These are the weights of {REF} or of a relative; no mark was found where all copies of it have some. Whose "
        "copy it is, if it is one, takes an approved request."
    )
    assert "like it" not in unmarked.out  # nothing else is


def test_all_versions_that_fit_are_listed_with_whether_their_marks_are_in_it(team):
    """The same weights put twice: what left as the first has no marks of the second."""
    assert team.run("put", "model", "acme/twin", "--as", "user/oto").code == 0
    try:
        found = team.run("trace", "leak", "--as", "user/oto", "--json").json
        assert [(each["ref"], each["fits"], each["marked"]) for each in found["versions"]] == [
            (REF, True, True),
            ("acme/twin@1", True, False),
        ]
        ended = team.run("trace", "leak", "--report", "twins.html", "--as", "user/oto")
        assert ended.out.startswith(f"This is {REF}, and a copy")
        for said in (ended.out, Page((team.folder / "twins.html").read_text()).text):
            assert f"ersions that fit: {REF} (has its marks), acme/twin@1 (none of its marks)" in said
        assert "pia" not in ended.out
    finally:
        twin = ("acme/twin@1", "--confirm", "acme/twin@1")
        assert team.run("shred", *twin, "--as", "user/olga").code == 0


@pytest.mark.parametrize("who", ["user/pia", "user/ana", "user/eva"])
def test_who_may_not_trace_is_refused(team, who):
    for more in ((), ("--weights", REF)):
        ended = team.run("trace", "leak", *more, "--as", who, "--json")
        assert (ended.code, ended.error["code"]) == (3, "denied.default")


def test_without_an_approved_request_it_is_refused(team):
    ended = team.run("trace", "leak", "--weights", REF, "--as", "user/ben", "--json")
    assert (ended.code, ended.error["code"]) == (3, "denied.default")
    assert f"request {REF} --action trace --for user/ben" in ended.error["hint"]


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.links = re.findall(r"(?:src|href)\s*=|url\(|@import", text)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_under_an_approved_request_it_names_and_the_page_can_be_filed(team):
    identifier = lease(team)
    ended = team.run("trace", "leak", "--weights", REF, "--report", "case.html", "--as", "user/ben")
    assert ended.code == 14
    assert ended.out.startswith(f"This is {REF}, out of the copy of user/pia; that this is wrong has a chance of ")
    assert "copy in entry" in ended.out
    assert "strongroom --as user/ben revoke user/pia --reason TEXT" in ended.err
    text = (team.folder / "case.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text  # as text
    assert page.links == []
    assert "default-src 'none'" in text
    assert {"svg", "table", "h1"} <= set(page.tags)
    for said in ("user/pia", "What would make this wrong", "Keeping the evidence", "c2sp.org/tlog-proof@v1"):
        assert said in page.text
    # It was for one use.
    again = team.run("trace", "leak", "--weights", REF, "--as", "user/ben", "--json")
    assert again.code == 3
    shown = team.run("log", "tail", "--as", "user/ben", "--json").out
    assert identifier in shown
    assert team.run("log", "verify", "--as", "user/ben").code == 0


def test_the_page_and_the_report_say_who_asked_when_and_who_agreed_and_what_is_recorded(team):
    identifier = lease(team)
    arguments = ("--weights", REF, "--report", "filed.html", "--as", "user/ben", "--json")
    found = team.run("trace", "leak", *arguments).json
    (entry,) = team.run("log", "tail", "-n", "1", "--as", "user/ben", "--json").json["entries"]
    proven = team.run("log", "prove", str(entry["index"]), "--as", "user/ben", "--json").json
    assert (found["entry"], found["at"], found["by"]) == (entry["index"], entry["at"], "user/ben")
    origin = team.run("log", "verify", "--as", "user/ben", "--json").json["origin"]
    assert (found["leaf"], f"strongroom/{found['room']}") == (proven["leaf"], origin)
    assert found["request"] == {"id": identifier, "by": "user/ben", "approved_by": ["user/eva"]}
    said = Page((team.folder / "filed.html").read_text()).text
    (release,) = found["accused"][0]["releases"]
    for each in (
        *(time_of(found["at"]), "UTC", found["room"], f"entry {found['entry']}", found["leaf"], "user/ben"),
        *(identifier, "user/eva", release["leaf"], release["proof"].strip()),
    ):
        assert each in said
    without = team.run("trace", "leak", "--report", "open.html", "--as", "user/oto", "--json").json
    assert (without["request"], without["by"]) == (None, "user/oto")
    assert "no request" in Page((team.folder / "open.html").read_text()).text


def report(word, **more):
    """A report in which everything that is text is `word`."""
    release = {"entry": 1, "action": word, "at": 0, "lease": word, "person": word, "leaf": word, "proof": word}
    accused = {"holder": word, "person": word, "log10_p": -20.0, "false_accusation": 3e-12, "releases": [release]}
    accused |= {"layer1": {"sigma": 1.0, "log10_p": -2.0, "decoder": word}, "layer2": {"z": 9.0, "log10_p": -20.0}}
    return {
        **dict.fromkeys(("weights", "by", "room", "leaf"), word),
        **dict.fromkeys(("positions", "positions_used", "elements", "candidates", "ways", "entry", "at"), 1),
        **dict.fromkeys(("likeness", "threshold_log10_p", "marked_log10_p"), 0.0),
        "verdict": "named",
        "marked": True,
        "withheld": False,
        "text": None,
        "accused": [accused],
        "false_accusation_bound": 1e-9,
        "request": {"id": word, "by": word, "approved_by": [word]},
        "transformations": [word],
        "versions": [{"ref": word, "likeness": 0.5, "part": 0.5, "fits": True, "marked": True}],
        "carries_marks": True,
        "scores": [{"holder": word, "log10_p": -2.0, "stamp_log10_p": -20.0}],
        "tensors": [{"name": word, "elements": 1, "partner": word, "cosine": 1.0, "transformations": [word]}],
        "suspect": {"name": word, "tensors": 1, "bytes": 1, "files": [{"path": word, "bytes": 1, "sha256": word}]},
        **more,
    }


def test_whatever_a_report_says_is_text_on_the_page():
    """Names of tensors, files and people; what a custodian says of a request."""
    evil = "<img src=x onerror=alert(1)>"
    made = Page(page(report(evil)))
    assert not {"img", "script"} & set(made.tags)
    assert made.text.count(evil) > 15


def test_how_likely_a_false_accusation_is_is_said_by_one_figure():
    """It is that with all that was tried counted, 3e-12, and never the score's alone, 1e-20; and what it is is said."""
    found = report("user/pia")
    told = "\n".join(lines(found, 1.0))
    written = page(found)
    for text in (told, written):
        assert text.count("3e-12") == 2  # in the headline, and beside who is named
        assert "e-20" not in text
        assert "would be named by such a file, with everything counted that was tried" in text
        assert "1e-09" in text  # under what somebody is named
    assert "10^-20" not in written.partition("All candidates")[0]
    assert "of that score alone" in written
    # Everybody is counted in each: of two the less sure says how likely an innocent is among them.
    two = found | {"accused": [found["accused"][0] | {"false_accusation": each} for each in (4e-10, 3e-12)]}
    assert "that one of them is wrong has a chance of 4e-10 at most" in lines(two, 1.0)[0]
    assert "1e-299" in page(found | {"accused": [found["accused"][0] | {"false_accusation": 1e-300}]})


def test_the_threshold_is_seen_in_the_plot_however_far_beyond_it_somebody_is():
    found = report("user/pia")
    sure = {"holder": "user/pia", "log10_p": -9.0, "stamp_log10_p": -140516.9}
    others = [{"holder": "", "log10_p": -1.0, "stamp_log10_p": 0.0}] * 5000
    written = page(found | {"scores": [sure, *others], "threshold_log10_p": -12.7})
    plot = written.partition("<svg")[2].partition("</svg>")[0]
    assert "10⁻³⁰⁰ and less" in plot
    assert "4,000 best of 5,001" in plot
    line, ground = (float(each) for each in re.findall(r'<line [^>]*y1="([\d.]+)"', plot))
    assert ground - line > 20
    assert plot.count("stroke-width") == 2  # the code word and the stamp of who is named


def test_that_a_search_ended_at_its_budget_is_said():
    stopped = "alignment stopped at its budget"
    versions = report("acme/x@1")["versions"] * 2
    for found, more in ((report("x"), ""), (report("x", versions=versions), "all 2 versions share it, and --weights")):
        found["transformations"] = []
        assert "budget" not in "\n".join(lines(found, 1.0)) + page(found)
        found["transformations"] = [stopped]
        for text in ("\n".join(lines(found, 1.0)), page(found)):
            assert "ot everything that could have been done to the file was looked for" in text
            assert more in text


def test_a_frozen_version_is_traced(team):
    assert team.run("revoke", REF, "--reason", "it leaked", "--as", "user/ben").code == 0
    try:
        lease(team)
        found = team.run("trace", "leak", "--weights", REF, "--as", "user/ben", "--json")
        assert found.code == 14
        assert [each["holder"] for each in found.json["accused"]] == ["user/pia"]
    finally:
        assert team.run("thaw", REF, "--reason", "it is known", "--as", "user/ben").code == 0


def test_a_report_is_a_new_file(team):
    (team.folder / "there.html").write_text("mine")
    for name in ("there.html", "no/such/folder.html"):
        ended = team.run("trace", "leak", "--report", name, "--as", "user/ben", "--json")
        assert (ended.code, ended.error["code"]) == (2, "trace.report")
    assert (team.folder / "there.html").read_text() == "mine"


def test_what_is_not_there_or_no_model(team):
    ended = team.run("trace", "nothing", "--as", "user/ben", "--json")
    assert (ended.code, ended.error["code"]) == (8, "source.missing")
    (team.folder / "three").mkdir()
    (team.folder / "three" / "x.safetensors").write_bytes(b"abc")
    ended = team.run("trace", "three", "--as", "user/ben", "--json")
    assert (ended.code, ended.error["code"]) == (2, "safetensors.malformed")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: None, "source.missing"),
        (lambda folder: folder.mkdir(), "source.empty"),
        (lambda folder: (folder.mkdir(), (folder / "x").symlink_to("/etc/hostname")), "source.link"),
        (lambda folder: (folder.mkdir(), (folder / "x").symlink_to("nowhere")), "source.link"),
        (lambda folder: (folder.mkdir(), os.mkfifo(folder / "x")), "source.special"),
        (lambda folder: (folder.mkdir(), (folder / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 60)), "gguf.malformed"),
        (lambda folder: (folder.mkdir(), (folder / "x.safetensors").write_bytes(b"abc")), "safetensors.malformed"),
        (
            lambda folder: (
                folder.mkdir(),
                (folder / "x.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            ),
            "source.lfs_pointer",
        ),
    ],
)
def test_what_can_not_be_read_is_said_as_of_a_find(team, tmp_path, make, code):
    """Nobody has a publisher to ask for it again, and nobody puts it."""
    make(tmp_path / "found")
    for more in ((), ("--weights", REF)):
        if more:
            lease(team)
        error = team.run("trace", str(tmp_path / "found"), *more, "--as", "user/ben", "--json").error
        assert error["code"] == code
        for word in ("put", "--follow-links", "publisher", "download", "name a model", "git lfs"):
            assert word not in error["hint"]
        assert "trace" in error["hint"]


def test_to_interrupt_it_means_that_nothing_is_told_or_spent(team, monkeypatch):
    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Room, "trace", interrupted)
    ended = team.run("trace", "leak", "--as", "user/ben")
    assert ended.code == 130
    assert "the search was stopped: nothing of it is told, and no use of a lease is spent" in ended.err


def test_what_is_unrelated(team):
    write_model(team.folder / "other", seed=9)
    ended = team.run("trace", "other", "--as", "user/ben", "--json")
    assert (ended.code, ended.json["verdict"]) == (0, "unrelated")
