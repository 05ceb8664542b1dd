"""The same attacks through the gateway, as somebody whom policy permits `infer` and nothing else: all are stopped."""

from __future__ import annotations

import contextlib
import secrets

import pytest

from gateway.places import listening
from infer.running import Running
from infer.small import REF, make_room
from strongroom.gateway.rooms import InFolder
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application
from strongroom.redteam.extraction import ATTACKS, judge, run, sampling
from strongroom.redteam.target import Target
from strongroom.vault.vault import Vault

# Rates are not what stops a patient attacker, and would only make the test longer.
SETTINGS = """
[limits.key]
requests = 0
[limits.identity]
requests = 0
"""


@pytest.fixture(scope="module")
def door(small, tmp_path_factory):
    """A gateway's URL and a key to it, before `strongroom infer` on its private channel."""
    folder = tmp_path_factory.mktemp("guarded")
    channel = folder / "channel"
    channel.write_text(secrets.token_hex(32))
    channel.chmod(0o600)
    with make_room(folder / "room", small) as room:
        key = room.apikeys.new()["key"]
    running = Running(folder / "room", "acme/small", "--rows", "32", "--channel", str(channel))
    vault = Vault(folder / "room")
    upstream = f'[[upstream]]\nurl = "{running.url}"\nchannel = "{channel}"\n'
    app = application(InFolder(vault), Settings.parse(SETTINGS + upstream), folder / "inference")
    with contextlib.closing(vault), listening(app) as port:
        yield f"http://127.0.0.1:{port}/v1", key
    running.stop()


@pytest.fixture
def target(door):
    found = Target(door[0], REF, key=door[1])
    yield found
    found.close()


# What a try with OpenAI's own fields is refused for: not for a name that the gateway just does not know.
REFUSED = {
    "full log-probabilities": "parameter_invalid",
    "top-20 with logit_bias": "parameter_invalid",
    "top-5 with logit_bias": "parameter_forbidden",
    "top-1 with logit_bias": "parameter_forbidden",
    "argmax text with logit_bias": "permission_denied",
    "ban-only bias, top-1": "parameter_forbidden",
    "ban-only bias, text": "permission_denied",
    "forced token": "parameter_forbidden",
    "allowed tokens": "parameter_forbidden",
    "prompt_logprobs": "parameter_forbidden",
    "echo": "parameter_forbidden",
    "embeddings": "permission_denied",
}


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "sampling alone"])
def test_it_gets_nothing(target, setup, attack):
    found = run(target, setup, attack)
    print(found, dict(target.cost.codes))
    assert (found.verdict, found.found, found.tokens) == ("STOPPED", None, 0)
    assert found.refused == found.requests
    assert REFUSED[attack] in target.cost.codes


def test_text_comes_and_tells_next_to_nothing(target, setup):
    found = judge(setup, sampling(target, setup, alone=20))
    print(found, target.cost)
    assert target.cost.tokens >= 15 * setup.columns  # so the door was open all the time
    verdict, hidden, _, overlap = found
    assert verdict == "STOPPED"
    assert hidden != setup.hidden
    assert overlap < 0.1
