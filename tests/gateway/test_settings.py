"""Settings: every key known, every default written down, one digest for one meaning."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from strongroom.errors import UsageError
from strongroom.gateway.settings import Rate, Settings
from strongroom.watch.rules import RULES, Rule

PAGE = Path(__file__).parents[2] / "docs/reference/gateway-settings.md"
FULL = """
[limits.identity]
requests = 100
[role.partner]
max_tokens = 256
[role.partner.key]
concurrency = 2
[answer]
max_tokens = 2048
[timeouts]
first_byte = 5
[requests]
unknown_fields = "drop"
words = ["plutonium"]
patterns = ["(?i)how to .* a bomb"]
[records]
durable = "before"
[budgets]
compression = 32
[[budgets.rule]]
scope = "model"
window = "day"
share = 2e-3
hard = true
[[budgets.rule]]
scope = "identity"
window = "month"
share = 1e-4
[[upstream]]
url = "http://127.0.0.1:8000"
models = { "acme/tiny" = "tiny", "acme/big@2" = "big" }
channel = "keys/channel"
[redis]
url = "redis://gate:hunter2@cache:6379/1"
down = "share"
"""


def leaves(kind, path=""):
    """(key, default, meaning) of every setting, as the page has them."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        name, hint = path + each.name, hints[each.name]
        if is_dataclass(hint):
            yield from leaves(hint, f"{name}.") if hint is not Rate else [(name, rate(each.default))]
        elif (
            get_origin(hint) is tuple
            and get_origin(inner := get_args(hint)[0]) is tuple
            and is_dataclass(get_args(inner)[1])
        ):
            yield from leaves(get_args(inner)[1], f"{name}.ROLE.")
        elif get_origin(hint) is tuple and is_dataclass(get_args(hint)[0]):
            yield from leaves(get_args(hint)[0], f"{name}[].")
        else:
            yield name, toml(each.default), each.metadata["doc"]


def rate(value):
    said = [f"{each.name} {getattr(value, each.name)}" for each in fields(Rate) if getattr(value, each.name)]
    return ", ".join(said) or "no limits"


def toml(value):
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case tuple():
            return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value)


def test_the_page_has_every_setting_and_no_other():
    said = [
        tuple(cell.strip().replace("\\|", "|").replace("`", "") for cell in line.strip()[1:-1].split(" | "))
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `")
    ]
    real = [
        *leaves(Settings),
        *((f"RATE.{each.name}", toml(each.default), each.metadata["doc"]) for each in fields(Rate)),
    ]
    plain = [tuple(cell.replace("`", "") for cell in row) for row in real]
    assert sorted(said) == sorted(plain)


def test_what_the_page_shows_is_read():
    text = PAGE.read_text().split("```toml\n")[1].split("```")[0]
    assert Settings.parse(text) != Settings()


def test_everything_said():
    found = Settings.parse(FULL)
    assert found.limits.identity.requests == 100
    assert found.limits.identity.burst == Settings().limits.identity.burst
    assert found.rates("key", ("partner",)).concurrency == 2
    assert found.rates("key", ("officer",)) == Settings().limits.key
    assert found.rates("team", ("partner",)) == Settings().limits.team
    assert (found.max_tokens(("partner",)), found.max_tokens()) == (256, 2048)
    assert found.timeouts.first_byte == 5.0
    assert found.upstream[0].models == (("acme/big@2", "big"), ("acme/tiny", "tiny"))
    rules = {(rule.scope, rule.window): rule for rule in found.budgets.rules}
    assert rules["model", "day"] == Rule("model", "day", 2e-3, hard=True)
    assert rules["identity", "month"] == Rule("identity", "month", 1e-4)
    assert rules["identity", "day"] == RULES[0]
    assert len(rules) == len(RULES) + 1


def test_nothing_said():
    assert Settings.parse("") == Settings()
    assert Settings().budgets.rules == RULES
    assert Settings().requests.unknown_fields == "refuse"
    assert Settings().capture.key == ""


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("speed = 1", "settings.unknown", "'speed'"),
        ("[limits.identity]\nrequest = 1", "settings.unknown", "[limits.identity]"),
        ("[limits.nobody]\nrequests = 1", "settings.unknown", "'nobody'"),
        ("[role.partner.team]\nrequests = 1", "settings.unknown", "[role.partner]"),
        ("[limits.identity]\nrequests = -1", "settings.malformed", "limits.identity.requests"),
        ("[limits.identity]\nrequests = 1.5", "settings.malformed", "whole number"),
        ("[limits.identity]\nrequests = true", "settings.malformed", "whole number"),
        ("[limits.identity]\nrequests = '9'", "settings.malformed", "whole number"),
        ("limits = 5", "settings.malformed", "is a table"),
        ("upstream = 5", "settings.malformed", "is a list"),
        ("[role]\n'a b' = {}", "settings.malformed", "roles"),
        ("[timeouts]\nwhole = inf", "settings.malformed", "from"),
        ("[timeouts]\nwhole = nan", "settings.malformed", "from"),
        ("[timeouts]\nwhole = 0", "settings.malformed", "from"),
        ("[answer]\nmax_tokens = 10", "settings.malformed", "max_tokens_default"),
        ("[requests]\nunknown_fields = 'pass'", "settings.malformed", "refuse, drop"),
        ("[requests]\npatterns = ['(']", "settings.malformed", "regular expressions"),
        ("[requests]\nwords = [5]", "settings.malformed", "texts"),
        ("[records]\ncapture = 'on'", "settings.unknown", "capture"),
        ("[[budgets.rule]]\nshare = 0.5", "settings.malformed", "scope"),
        ("[[budgets.rule]]\nscope='key'\nwindow='day'", "settings.malformed", "budgets.rule.scope"),
        ("[[budgets.rule]]\nscope='team'\nwindow='day'\n" * 2, "settings.malformed", "once"),
        ("[[upstream]]\nurl = 'ftp://x'", "settings.malformed", "upstream.url"),
        ("[[upstream]]\nurl = 'http://'", "settings.malformed", "upstream.url"),
        ("[[upstream]]\nurl = 'http://a b'", "settings.malformed", "upstream.url"),
        ("[[upstream]]\nurl = 'http://a:99999999'", "settings.malformed", "upstream.url"),
        ("[[upstream]]\nurl = 'http://a'\nmodels = { x = 5 }", "settings.malformed", "texts"),
        ("[redis]\nurl = 'http://a'", "settings.malformed", "redis://"),
        ("a = ", "settings.malformed", "no TOML"),
        ("a = " + "[" * 50_000, "settings.malformed", "no TOML"),
    ],
)
def test_what_is_refused(text, code, says):
    with pytest.raises(UsageError) as caught:
        Settings.parse(text)
    assert caught.value.code == code
    assert says in caught.value.message


def test_a_file(tmp_path):
    path = tmp_path / "gateway.toml"
    for make in (lambda: None, lambda: path.write_bytes(b"\xff"), lambda: path.write_bytes(b"#" * (1 << 21))):
        make()
        with pytest.raises(UsageError) as caught:
            Settings.read(path)
        assert caught.value.code == "settings.unreadable"
    path.write_text(FULL)
    assert Settings.read(path) == Settings.parse(FULL)


def test_the_digest_is_of_the_meaning():
    assert len(Settings().digest) == 64
    same = "\n# other\n[answer]\nmax_tokens = 4096\n[timeouts]\nwhole = 600\n"
    assert Settings.parse(same).digest == Settings().digest
    digests = {Settings.parse(FULL).digest, Settings().digest}
    for loosened in (FULL.replace("100", "101"), FULL.replace("2e-3", "3e-3"), FULL.replace("hard = true", "")):
        digests.add(Settings.parse(loosened).digest)
    assert len(digests) == 5


def test_a_password_can_not_be_guessed_by_the_digest():
    assert Settings.parse(FULL).digest == Settings.parse(FULL.replace("hunter2", "hunter3")).digest
    assert Settings.parse(FULL).digest != Settings.parse(FULL.replace("cache:", "other:")).digest
