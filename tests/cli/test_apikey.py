"""API keys on the command line: shown once, listed without themselves, ended."""

from __future__ import annotations

import re

import pytest

from cli.desk import Desk, desk_in, write_model
from strongroom.client import Room
from strongroom.formats.apikey import digest_of, is_one
from strongroom.vault.callers import Callers

REF = "acme/tiny@1"


@pytest.fixture(scope="module")
def team(tmp_path_factory) -> Desk:
    desk = desk_in(tmp_path_factory.mktemp("team"))
    write_model(desk.model)
    assert desk.run("init", "--owner", "user/olga").code == 0
    assert desk.run("put", "model", "acme/tiny").code == 0
    for name, role in (("pat", "partner"), ("ana", "researcher"), ("ben", "officer")):
        assert desk.run("principal", "add", f"user/{name}", "--role", role, "--as", "user/olga").code == 0
    return desk


def test_a_key_is_shown_once_and_is_good_until_it_is_ended(team):
    ended = team.run("apikey", "new", "--name", "evaluation", "--as", "user/pat")
    key = ended.out.strip()
    assert is_one(key)
    assert "Authorization: Bearer" in ended.err
    identifier = digest_of(key)[:16]
    assert f"→ {identifier}: for user/pat, until 20" in ended.err
    shown = team.run("apikey", "ls", "--as", "user/pat")
    assert re.search(rf"^{identifier} +user/pat +evaluation +20.*Z +\d+$", shown.out, re.MULTILINE)
    assert key not in shown.out + team.run("log", "tail", "--as", "user/olga").out
    assert f"{identifier} (evaluation)" in team.run("principal", "show", "user/pat", "--as", "user/olga").out
    with Room(team.room, "user/olga") as room:
        callers = Callers(room._vault)
        assert callers.by_key(digest_of(key))[0].principal == "user/pat"
        done = team.run("apikey", "end", identifier, "--as", "user/pat", "--json").json
        assert (done["id"], done["state"]) == (identifier, "ended")
        assert callers.by_key(digest_of(key)) is None
        account = {"gateway": "0" * 32, "records": 1, "head": "1" * 64, "requests": 7, "refused": 2}
        callers.record(REF, {**account, "tokens": 5, "bits": 85, "settings": "2" * 64})
    tail = team.run("log", "tail", "--as", "user/olga").out
    assert f"{identifier} (evaluation) ended" in tail
    assert "7 requests, 2 refused, 5 tokens, 85 bits" in tail
    assert "no API key" in team.run("apikey", "ls", "--as", "user/pat").out


def test_what_programs_read(team):
    made = team.run("apikey", "new", "--expires", "1h", "--as", "user/ana", "--json").json
    assert set(made) == {"key", "id", "principal", "name", "expires_at", "entry", "infers"}
    assert (made["principal"], made["name"], made["id"]) == ("user/ana", "default", digest_of(made["key"])[:16])
    (listed,) = team.run("apikey", "ls", "user/ana", "--as", "user/ben", "--json").json["apikeys"]
    assert listed == {name: made[name] for name in made if name not in ("key", "infers")} | {
        "key": digest_of(made["key"])
    }
    ended = team.run("apikey", "end", made["id"], "--as", "user/ben", "--json").json  # who may grant may end it
    assert set(ended) == {"id", "principal", "name", "expires_at", "state", "entry", "infers"}


@pytest.mark.parametrize(
    ("arguments", "who", "exit_code", "code"),
    [
        (("ls", "user/pat"), "user/ana", 3, "denied.default"),
        (("end", "0123456789abcdef"), "user/ana", 8, "apikey.missing"),
        (("end", "sr-" + "a" * 43), "user/ana", 2, "apikey.malformed"),
        (("new", "--name", "Not This"), "user/ana", 2, "apikey.name"),
        (("new", "--expires", "400d"), "user/ana", 2, "apikey.time"),
        (("new", "--expires", "soon"), "user/ana", 2, "usage"),
        (("new",), "user/nobody", 4, "principal.unknown"),
    ],
)
def test_what_is_refused(team, arguments, who, exit_code, code):
    ended = team.run("apikey", *arguments, "--as", who, "--json")
    assert ended.code == exit_code
    assert ended.error["code"].startswith(code)


def test_whoever_infers_is_told_of_keys(team):
    ended = team.run("reach", "user/pat", "--as", "user/olga")
    assert "infer" in ended.out
    assert "strongroom apikey ls" in ended.err
    for feature in ("infer_logprobs", "infer_embeddings", "infer_steering", "infer_many"):
        assert feature not in ended.out
    assert "apikey" not in team.run("reach", "user/ben", "--as", "user/olga").err


def test_a_key_that_policy_gives_nothing_is_made_and_says_so(team):
    ended = team.run("apikey", "new", "--as", "user/ben")  # an officer, who asks no model anything
    assert (ended.code, is_one(ended.out.strip())) == (0, True)
    assert "strongroom: policy lets user/ben infer on no version that is here with an API key" in ended.err
    assert "strongroom --as user/ben reach user/ben --all" in ended.err
    assert "infer on no version" not in team.run("apikey", "new", "--as", "user/pat").err
