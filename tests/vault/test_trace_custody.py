"""The custody of a search: what it is done under, and what that comes to while it goes on."""

from __future__ import annotations

import pytest

from strongroom.errors import Denied, Pending
from vault.team import Team

REF = "acme/tiny@1"


@pytest.fixture
def team(team_folder):
    return Team(team_folder)


@pytest.fixture
def leak(team):
    return team.folder / "model" / "model-00001-of-00002.safetensors"


def to_trace(team, **options):
    asked = team.ben.request(REF, action="trace", reason="case 12", **options)
    return team.eva.approve(asked["id"])["lease"]["id"]


def meanwhile(act):
    """A progress that does something while the search goes on, once."""
    left = [act]

    def progress(_done, _total):
        if left:
            left.pop()()

    return progress


def test_the_time_of_a_lease_may_be_over_before_the_search_is(team, leak):
    lease = to_trace(team, duration=3600)
    found = team.ben.trace(leak, weights=REF, progress=meanwhile(lambda: team.later(7 * 3600)))
    assert found["weights"] == REF
    assert team.ben.show_request(lease)["lease"]["used"] == 1
    assert team.olga.log.verify()["ok"]
    with pytest.raises(Denied):
        team.ben.trace(leak, weights=REF, progress=lambda _d, _t: None)


@pytest.mark.parametrize("target", ["lease", REF])
def test_what_was_revoked_meanwhile_is_not_told(team, leak, target):
    lease = to_trace(team)
    target = lease if target == "lease" else target
    with pytest.raises(Denied) as caught:
        team.ben.trace(leak, weights=REF, progress=meanwhile(lambda: team.eva.revoke(target, reason="x")))
    assert caught.value.code == "trace.lease"
    assert "ended meanwhile: revoked in entry" in caught.value.message
    assert "what was found is not told" in caught.value.message
    assert team.olga.log.tail(1)[0]["type"] == "refused"


def test_a_request_that_waits_is_named_and_not_asked_for_again(team, leak):
    asked = team.ben.request(REF, action="trace", reason="case 12")["id"]
    with pytest.raises(Pending) as caught:
        team.ben.trace(leak, weights=REF, progress=lambda _d, _t: None)
    message, hint = caught.value.message, caught.value.hint
    assert f"the request {asked} waits for 1 more approval by others" in message
    assert "officer" in message
    assert hint.startswith(f"strongroom requests {asked}")
    assert f"strongroom approve {asked}" in hint
    assert caught.value.evidence == {"request": asked}
    team.eva.deny(asked, reason="no")
    with pytest.raises(Denied) as caught:
        team.ben.trace(leak, weights=REF, progress=lambda _d, _t: None)
    assert f"strongroom request {REF} --action trace" in caught.value.hint


def ended(told):
    return [(each["id"], each["action"], each["holder"]) for each in told["ended"]]


@pytest.mark.parametrize("how", ["frozen", "revoked", "suspended", "removed", "another key", "the lease"])
def test_what_ends_leases_says_which(team, how):
    """Freezing a version that leaked ends the searches for whose copy it was, too."""
    lease = to_trace(team)
    other = team.lease()["lease"]["id"]  # Ana's, to load
    all_of_it, bens = [(lease, "trace", "user/ben"), (other, "load", "user/ana")], [(lease, "trace", "user/ben")]
    match how:
        case "frozen":
            assert ended(team.eva.revoke(REF, reason="it leaked")) == all_of_it
        case "revoked":
            assert ended(team.eva.revoke("user/ben", reason="x")) == bens
        case "the lease":
            assert ended(team.eva.revoke(lease, reason="x")) == bens
        case "another key":
            asked = team.eva.principal_key("user/ana", "5" * 64)
            assert ended(asked) == [all_of_it[1]]
        case _:
            assert ended(team.eva.principal_change("user/ben", state=how)) == bens
            assert ended(team.eva.principal_add("user/kim", roles=["researcher"])) == []
    assert team.olga.log.verify()["ok"]


def test_a_lease_that_was_over_is_not_said_to_end(team):
    to_trace(team, duration=60)
    team.later(3600)
    assert team.eva.revoke(REF, reason="it leaked")["ended"] == []
