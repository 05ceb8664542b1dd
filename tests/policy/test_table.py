"""The shipped policies against the tables of what they are meant to do, and the tables themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import UsageError
from strongroom.policy.engine import ACTIONS, ROLES, SHIPPED, Policies
from strongroom.policy.table import Table

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_policy_does_what_its_table_says(name):
    table = Table.parse((HERE / f"{name}.toml").read_text())
    outcomes = table.run(Policies.shipped(name))
    assert [each.as_json() for each in outcomes if not each.passed] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_table_asks_every_role_about_every_action(name):
    table = Table.parse((HERE / f"{name}.toml").read_text())
    asked = {(each.query.subject.roles, each.query.action) for each in table.expectations}
    assert asked >= {(roles, action) for action in ACTIONS for roles in [(), *((role,) for role in ROLES)]}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_rule_of_a_shipped_policy_decides_something_in_its_table(name):
    policies = Policies.shipped(name)
    outcomes = Table.parse((HERE / f"{name}.toml").read_text()).run(policies)
    assert {rule for each in outcomes for rule in each.rules} == set(policies.ids)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_rule_of_a_shipped_policy_says_why_and_what_to_do(name):
    for rule in Policies.shipped(name).rules.values():
        assert rule.reason.endswith(".")
        assert bool(rule.ask) == (rule.effect == "forbid")


@pytest.mark.parametrize("name", SHIPPED)
def test_no_case_of_a_table_depends_on_the_order_of_roles(name):
    table = Table.parse((HERE / f"{name}.toml").read_text())
    turned = []
    for each in table.expectations:
        subject = replace(each.query.subject, roles=tuple(reversed(each.query.subject.roles)))
        turned.append(replace(each, query=replace(each.query, subject=subject)))
    assert all(each.passed for each in Table(tuple(turned)).run(Policies.shipped(name)))


SMALL = """
[subjects]
ana = { roles = ["operator"] }
bob = { roles = ["auditor"] }

[[case]]
name = "put"
action = "put"
allow = ["ana"]
rules = { ana = "operators-put" }
"""


def test_who_is_not_named_is_expected_to_be_refused():
    outcomes = Table.parse(SMALL).run(Policies.shipped("team"))
    assert [(each.expectation.subject, each.allowed, each.passed) for each in outcomes] == [
        ("ana", True, True),
        ("bob", False, True),
    ]


def test_a_rule_that_permits_too_much_fails_without_being_thought_of():
    text = Policies.shipped("team").text + '@id("x") permit(principal, action, resource);'
    outcomes = Table.parse(SMALL).run(Policies.parse(text))
    assert [each.passed for each in outcomes] == [True, False]
    assert outcomes[1].as_json() == {
        "case": "put",
        "subject": "bob",
        "action": "put",
        "expected": False,
        "allowed": True,
        "expected_rule": "",
        "rules": ["x"],
        "passed": False,
    }


def test_the_right_decision_by_another_rule_fails():
    outcomes = Table.parse(SMALL.replace("operators-put", "officers-grant")).run(Policies.shipped("team"))
    assert [each.passed for each in outcomes] == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "= 1",
        "[subjects]\nana = {}",
        SMALL.replace("action", "acton"),
        SMALL.replace('"put"\nallow', '"steal"\nallow'),
        SMALL.replace('allow = ["ana"]', ""),
        SMALL.replace('allow = ["ana"]', 'allow = "ana"'),
        SMALL.replace('allow = ["ana"]', 'allow = ["eve"]'),
        SMALL.replace("{ ana = ", "{ eve = "),
        SMALL.replace('"operators-put"', "1"),
        SMALL.replace('"operator"', '"op\\"erator"'),
        SMALL.replace("roles = [", "role = ["),
        SMALL.replace("bob = {", "bob = { suspended = 0,"),
        SMALL.replace('name = "put"', 'name = "put\\n"'),
        SMALL + "situation = { leased = true }",
        SMALL + "situation = { lease = 1 }",
        SMALL + "situation = { now = -1 }",
        SMALL + "situation = { now = 1.5 }",
        SMALL + "situation = 1",
        SMALL + 'resource = { ref = "room", frozen = true }',
        SMALL + 'resource = { ref = "../x" }',
        SMALL + "resource = { max_holders = true }",
        SMALL + "[other]",
        SMALL.replace("[[case]]", "[case]"),
        f"x = {'[' * 100_000}",
        f"x = {'9' * 10_000}",
        "#" + "x" * (1 << 20),
        "x = '\ud800'",
    ],
)
def test_a_malformed_table_is_refused(text):
    with pytest.raises(UsageError) as caught:
        Table.parse(text)
    assert caught.value.code == "table.malformed"


@given(st.text(max_size=200))
def test_any_text_is_a_table_or_refused(text):
    try:
        Table.parse(text)
    except UsageError as error:
        assert error.code == "table.malformed"
