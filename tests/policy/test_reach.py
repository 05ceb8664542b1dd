import json
from dataclasses import replace

from policy.cases import TINY, someone
from strongroom.policy.engine import ACTIONS, Policies, Resource, Situation
from strongroom.policy.query import FEATURES, NAMED
from strongroom.policy.reach import reach, who

TEAM = Policies.shipped("team")


def found(*roles, teams=(), policies=TEAM, resource=TINY, **more):
    subject = someone(*roles, teams=teams)
    return {each.action: each for each in reach(policies, subject, [resource], **more)}


def test_every_action_has_an_answer():
    assert list(found("researcher")) == list(ACTIONS)


def test_what_is_allowed_now_has_its_path_over_the_role():
    access = found("researcher", "operator")["put"]
    assert (access.state, access.answer, access.needs) == ("now", "now", ())
    assert access.path == ("user/ana", "role/operator", "operators-put")


def test_what_others_can_give_is_said():
    access = found("researcher")["load"]
    assert access.state == "approvals"
    assert access.answer == f"with approvals: {' and '.join(access.needs)}"
    assert access.needs[0] == "a lease to load acme/tiny@1"
    assert access.path == ("user/ana", "role/researcher", "release-under-lease")


def test_under_a_lease_it_is_now():
    access = found("researcher", leases={("user/ana", "load", "acme/tiny@1")})
    assert (access["load"].state, access["copy"].state) == ("now", "approvals")


def test_the_lease_of_somebody_else_is_none():
    leases = {
        ("user/bob", "load", "acme/tiny@1"),
        ("user/ana", "load", "acme/tiny@2"),
        ("user/ana", "copy", "acme/tiny@1"),
    }
    assert found("researcher", leases=leases)["load"].state == "approvals"


def test_what_somebody_can_do_alone_in_an_emergency_is_not_hidden():
    for role in ("officer", "executive"):
        access = found(role)
        assert (access["load"].state, access["load"].path) == (
            "break-glass",
            ("user/ana", f"role/{role}", "break-glass"),
        )
        assert access["copy"].state == "never"


def test_never_names_the_rule_that_forbids():
    assert found("officer")["copy"].path == ("user/ana", "officers-never-copy")
    assert found("researcher")["adapt"].path == ("user/ana",)
    access = found("researcher", situation=Situation(holders=10))["load"]
    assert (access.state, access.path) == ("never", ("user/ana", "holders-ceiling"))


def test_the_room_is_reached_for_what_is_about_the_room():
    access = found("officer", resource=Resource.room())
    assert list(access) == ["put", "trace", "approve", "grant", "audit", "administer", "relay"]
    assert access["administer"].path == ("user/ana", "role/officer", "officers-administer")


def test_paths_over_teams_over_several_groups_and_over_none():
    text = """
    @id("team") permit (principal in Strongroom::Team::"team/x", action == Strongroom::Action::"put", resource);
    @id("both") permit (principal in Strongroom::Team::"team/x", action == Strongroom::Action::"infer", resource)
    when { principal in Strongroom::Role::"a" };
    @id("all") permit (principal, action == Strongroom::Action::"audit", resource);
    """
    access = found("a", "b", teams=("team/x",), policies=Policies.parse(text))
    assert access["put"].path == ("user/ana", "team/x", "team")
    assert access["infer"].path == ("user/ana", "role/a", "role/b", "team/x", "both")
    assert access["audit"].path == ("user/ana", "all")


def test_who_asks_for_each_subject():
    subjects = [someone("operator"), someone("auditor", path="user/bob"), someone(path="workload/x")]
    now = {(each.principal, each.action) for each in who(TEAM, TINY, subjects) if each.state == "now"}
    assert now == {("user/ana", "put"), ("user/ana", "infer"), ("user/bob", "audit")}
    assert json.loads(json.dumps([each.as_json() for each in who(TEAM, TINY, subjects)]))[0]["answer"] == "now"


def test_in_a_room_of_one_the_owner_reaches_everything_without_anybody():
    access = found("operator", "officer", "researcher", policies=Policies.shipped("solo"))
    assert {each.state for name, each in access.items() if name not in NAMED} == {"now"}


def test_what_helps_to_steal_is_reached_by_a_rule_that_names_it_and_where_inference_is():
    solo = Policies.shipped("solo")
    access = found("operator", "officer", "researcher", policies=solo)
    assert {access[name].state for name in FEATURES} == {"never"}
    named = Policies.parse(
        solo.text + '@id("logprobs") permit (principal in Strongroom::Role::"researcher", '
        'action == Strongroom::Action::"infer_logprobs", resource);'
    )
    access = found("researcher", policies=named)
    assert (access["infer_logprobs"].state, access["infer_logprobs"].path) == (
        "now",
        ("user/ana", "role/researcher", "logprobs"),
    )
    assert access["infer_many"].state == "never"
    frozen = found("researcher", policies=named, resource=replace(TINY, frozen=True))
    assert (frozen["infer_logprobs"].state, frozen["infer_logprobs"].path) == ("never", ("user/ana", "frozen"))
