import json
from dataclasses import replace

import pytest

from policy.cases import ask
from strongroom.errors import Denied, UsageError
from strongroom.policy.engine import Policies, Resource
from strongroom.policy.explain import either, explain

TEAM = Policies.shipped("team")
REQUEST = "strongroom request acme/tiny@1 --action load --for user/ana --duration 8h --reason TEXT"


def test_a_forbid_is_named_with_its_reason_and_what_to_do():
    found = explain(TEAM, ask("load", "researcher", stage="release", lease=True, holders=10))
    assert (found.rule, found.rules, found.needs, found.roles) == ("holders-ceiling", ("holders-ceiling",), (), ())
    assert found.message == (
        "user/ana may not load acme/tiny@1: As many hold these weights as may hold them. (rule holders-ceiling)"
    )
    assert found.hint == (
        "strongroom who acme/tiny@1 lists them; an officer raises it: strongroom ceiling acme/tiny@1 --holders N"
    )


def test_all_forbids_that_hit_are_named():
    found = explain(TEAM, ask("copy", "officer", "auditor", stage="grant", approvals=5, executives=5))
    assert found.rules == ("officers-never-copy", "auditors-hold-nothing")
    assert found.needs == ()
    assert "Officers write the rules" in found.message
    assert "Auditors read the log" in found.message


def test_a_forbid_without_advice_still_has_a_next_command():
    policies = Policies.parse('@id("no") forbid (principal, action, resource);')
    found = explain(policies, ask("load"))
    assert found.hint == "strongroom policy show no"
    assert "(rule no)" in found.message


def test_without_a_lease_the_lease_and_its_approvals_are_missing():
    found = explain(TEAM, ask("load", "researcher", stage="release"))
    assert found.rule == "default"
    assert found.needs == (
        "a lease to load acme/tiny@1",
        "2 more approvals by others (2 officers, or officer and executive, or 2 executives)",
    )
    assert found.hint == REQUEST
    assert found.message.startswith("user/ana may not load acme/tiny@1 yet: it needs a lease")


@pytest.mark.parametrize(
    ("action", "role", "given", "needs"),
    [
        (
            "load",
            "researcher",
            {},
            "2 more approvals by others (2 officers, or officer and executive, or 2 executives)",
        ),
        ("load", "researcher", {"officers": 1}, "1 more approval by others (officer, or executive)"),
        ("load", "researcher", {"operators": 3}, "1 more approval by others (officer, or executive)"),
        ("load", "partner", {}, "2 more approvals by others (officer and executive, or 2 executives)"),
        ("load", "partner", {"officers": 4}, "1 more approval by others (executive)"),
        ("copy", "researcher", {}, "2 more approvals by others (officer and executive, or 2 executives)"),
        ("copy", "researcher", {"executives": 1}, "1 more approval by others (officer, or executive)"),
        ("copy", "partner", {"officers": 2}, "1 more approval by others (executive)"),
    ],
)
def test_what_approvals_are_missing_is_the_smallest_number_that_would_do(action, role, given, needs):
    query = ask(action, role, stage="grant", approvals=sum(given.values()), **given)
    found = explain(TEAM, query)
    assert found.needs == (needs,)
    assert "strongroom approve" in found.hint


def test_what_is_said_to_be_missing_is_what_makes_it_allowed():
    for role in ("researcher", "operator", "partner"):
        for action in ("load", "copy"):
            assert explain(TEAM, ask(action, role, stage="grant")).needs
            for more in ({"officers": 1, "executives": 1}, {"executives": 2}):
                assert TEAM.decide(ask(action, role, stage="grant", approvals=2, **more)).allowed


def test_no_approvals_are_asked_for_that_nobody_may_give():
    """Operators count for this lease, but may not approve; and without officers nobody can grant it."""
    text = TEAM.text.replace("officers + context.approvals.executives >= 1", "operators >= 1")
    found = explain(Policies.parse(text), ask("load", "researcher", stage="grant"))
    assert found.needs == ()


def test_where_it_does_not_matter_who_approves_no_role_is_named():
    text = """
    @id("approve") permit (principal, action == Strongroom::Action::"approve", resource);
    @id("load") permit (principal, action == Strongroom::Action::"load", resource) when { context.approvals.total >= 2
    };
    """
    found = explain(Policies.parse(text), ask("load", stage="grant"))
    assert found.needs == ("2 more approvals by others",)


def test_more_approvals_than_a_room_has_people_for_are_never():
    text = TEAM.text.replace("context.approvals.total >= 2", "context.approvals.total >= 9")
    assert explain(Policies.parse(text), ask("load", "researcher", stage="grant")).needs == ()


def test_a_missing_role_is_no_need_that_approvals_meet():
    """Who has needs gets a request that others may approve; here they could not."""
    found = explain(TEAM, ask("load", stage="grant"))
    assert (found.rule, found.needs, found.roles) == ("default", (), ("researcher", "operator", "partner"))
    assert found.hint == "an officer or executive runs: strongroom principal role user/ana researcher"


def test_a_further_role_is_added_to_those_there_are():
    found = explain(TEAM, ask("put", "researcher"))
    assert found.roles == ("operator",)
    assert found.hint.endswith("strongroom principal role user/ana researcher operator")


def test_no_role_is_advised_that_does_not_go_with_those_there_are():
    room = Resource.room()
    found = explain(TEAM, ask("audit", "gateway", resource=room))
    assert found.roles == ("auditor",)
    assert "principal role" not in found.hint
    assert found.hint == (
        "auditor does not go with gateway: let another principal do it; if nobody has that role, "
        "an officer or executive runs: strongroom principal add user/NAME --role auditor --public-key KEY"
    )
    # Nor one that would take from a person what their own role is for: auditors, and gateways, hold no weights.
    for action, role in (("audit", "auditor"), ("relay", "gateway")):
        found = explain(TEAM, ask(action, "researcher", resource=room))
        assert found.roles == (role,)
        assert "principal role" not in found.hint
        assert f"--role {role} " in found.hint
    assert "workload/NAME" in found.hint
    # An officer holds none that an auditor might not; who has no role yet can have any.
    for action, roles, wanted in (
        ("audit", ("officer",), "officer auditor"),
        ("audit", (), "auditor"),
        ("relay", (), "gateway"),
    ):
        found = explain(TEAM, ask(action, *roles, resource=room))
        assert found.hint.endswith(f"strongroom principal role user/ana {wanted}"), found.hint


def test_roles_that_only_the_policy_knows_are_thought_of():
    policies = Policies.parse('@id("a") permit (principal in Strongroom::Role::"intern", action, resource);')
    assert explain(policies, ask("adapt")).roles == ("intern",)


def test_what_nothing_could_permit_is_said_to_be_so():
    found = explain(TEAM, ask("adapt", "researcher"))
    assert (found.rule, found.needs, found.roles) == ("default", (), ())
    assert found.message == (
        "user/ana may not adapt acme/tiny@1: no rule permits it, whatever lease, approvals or roles there are"
    )
    assert found.hint == "strongroom reach user/ana"


def test_a_lease_that_could_not_be_had_is_not_offered():
    text = TEAM.text.replace('context.stage == "grant"', 'context.stage == "grant" && context.hour == 3')
    assert explain(Policies.parse(text), ask("load", "researcher", stage="release")).needs == ()


def test_a_lease_that_takes_no_approvals_is_all_that_is_missing():
    text = """
    @id("ask") permit (principal, action, resource) when { context.stage == "grant" };
    @id("use") permit (principal, action, resource) when { context.stage == "release" && context.lease };
    """
    found = explain(Policies.parse(text), ask("load", stage="release"))
    assert found.needs == ("a lease to load acme/tiny@1",)


def test_the_room_is_spoken_of_as_the_room():
    found = explain(TEAM, ask("administer", "auditor", resource=Resource.room()))
    assert found.message == "user/ana may not administer in this room: that takes the role officer"


def test_a_policy_that_errs_is_the_rule_that_denies():
    text = '@id("a") permit (principal, action, resource) when { context.now * 9223372036854775807 > 0 };'
    found = explain(Policies.parse(text), ask("load", now=2))
    assert found.rule == "policy-error"
    assert found.denied().code == "denied.rule"
    assert "strongroom policy check" in found.hint


def test_an_explanation_becomes_an_error_with_evidence():
    error = explain(TEAM, ask("load", "researcher", stage="release")).denied()
    assert isinstance(error, Denied)
    assert (error.code, error.hint) == ("denied.default", REQUEST)
    assert error.evidence["rule"] == "default"
    assert error.evidence["principal"] == "user/ana"
    assert error.evidence["action"] == "load"
    assert error.evidence["ref"] == "acme/tiny@1"
    assert error.evidence["needs"][0] == "a lease to load acme/tiny@1"
    json.dumps(error.as_json())
    query = ask("load", "researcher", stage="release", lease=True)
    error = explain(TEAM, replace(query, subject=replace(query.subject, suspended=True))).denied()
    assert (error.code, error.evidence["rule"]) == ("denied.rule", "suspended")


def test_an_allowed_query_is_explained_by_the_rule_that_permits_it():
    found = explain(TEAM, ask("put", "operator"))
    assert (found.allowed, found.rule, found.hint) == (True, "operators-put", "")
    assert found.message.startswith("user/ana may put acme/tiny@1: Operators bring weights")
    with pytest.raises(UsageError):
        found.denied()


def test_an_explanation_never_contradicts_the_decision():
    for action in ("put", "load", "copy", "trace", "approve", "audit"):
        for role in ("researcher", "officer", "executive", "partner", "auditor"):
            for stage in ("grant", "release", "direct"):
                query = ask(action, role, stage=stage)
                assert explain(TEAM, query).allowed == TEAM.decide(query).allowed


def test_an_answer_is_called_by_its_name_and_what_the_policy_advises_is_filled_in():
    """Whoever revokes is not told that they may not approve, nor to run a command with a placeholder in it."""
    query = ask("approve", "partner", resource=Resource.room())
    found = explain(TEAM, query, act="renew", about="ab" * 8)
    assert found.message.startswith("user/ana may not renew in this room: A partner does not approve")
    assert found.hint == f"an officer or executive who is no partner runs: strongroom renew {'ab' * 8}"
    found = explain(TEAM, query, act="revoke", about="ab" * 8)
    assert found.hint.endswith(f"strongroom revoke {'ab' * 8} --reason TEXT")


def test_several_rights_that_would_do_are_named_together():
    refusals = [explain(TEAM, ask(each, resource=Resource.room())).denied() for each in ("audit", "administer")]
    found = either(refusals)
    assert found.message == "user/ana may not audit or administer in this room: that takes the role auditor or officer"
    assert found.evidence["roles"] == ["auditor", "officer"]
    assert either(refusals[:1]) is refusals[0]
