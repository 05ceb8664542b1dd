import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import replace

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.cases import TINY, ask, someone
from strongroom.errors import UsageError
from strongroom.policy.engine import ACTIONS, POLICY_ERROR, ROLES, SHIPPED, Policies, Query, Resource, Situation
from strongroom.policy.query import NAMED

TEAM = Policies.shipped("team")
PERMIT_ALL = '@id("all") @reason("Everybody may.") permit (principal, action, resource);\n'
# Valid under the schema, and it errs for every `now` but 0: the product is no Long.
ERRING = "context.now * 9223372036854775807 > 0"


def refused(text):
    with pytest.raises(UsageError) as caught:
        Policies.parse(text)
    assert caught.value.code == "policy.invalid"
    return caught.value


# -- parsing -------------------------------------------------------------------------------------------------------


def test_a_set_has_its_text_its_digest_and_its_ids_in_order():
    text = '@id("b") permit (principal, action, resource);\n\n@id("a") @ask("x") forbid (principal, action, resource);'
    policies = Policies.parse(text)
    assert policies.text == text
    assert policies.digest == hashlib.sha256(text.encode()).hexdigest()
    assert policies.ids == ("b", "a")
    assert [(rule.effect, rule.ask, rule.line) for rule in policies.rules.values()] == [
        ("permit", "", 1),
        ("forbid", "x", 3),
    ]
    assert policies == Policies.parse(text)


def test_roles_are_those_that_the_policies_speak_of():
    text = """@id("a") permit (principal in Strongroom::Role::"x", action, resource)
    unless { principal in [Strongroom::Role::"y", Strongroom::Role::"x"] || principal in Strongroom::Team::"z" };"""
    assert Policies.parse(text).roles == ("x", "y")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "// nothing but a comment",
        "permit",
        "permit (principal, action, resource)",
        PERMIT_ALL + "}",
        PERMIT_ALL + ";",
        "permit (principal, action, resource);",
        "@id permit (principal, action, resource);",
        '@id("") permit (principal, action, resource);',
        '@id("Not Kebab") permit (principal, action, resource);',
        '@id("a--b") permit (principal, action, resource);',
        '@id("policy-error") permit (principal, action, resource);',
        '@id("default") permit (principal, action, resource);',
        f'@id("{"a" * 65}") permit (principal, action, resource);',
        '@id("a") @id("b") permit (principal, action, resource);',
        PERMIT_ALL + PERMIT_ALL,
        '@id("a") @reason("two\\nlines") permit (principal, action, resource);',
        f'@id("a") @reason("{"x" * 301}") permit (principal, action, resource);',
        '@id("a") @ask("\\u{1b}[2J") permit (principal, action, resource);',
        '@id("a") permit (principal == ?principal, action, resource);',
        PERMIT_ALL + '@id("a") forbid (principal, action, resource == ?resource);',
        '@id("a") permit (principal, action == Strongroom::Action::"steal", resource);',
        '@id("a") permit (principal == Strongroom::Usr::"user/ana", action, resource);',
        '@id("a") permit (principal, action == Action::"load", resource);',
        '@id("a") permit (principal, action, resource) when { context.holders == "1" };',
        '@id("a") permit (principal, action, resource) when { 1 };',
        '@id("a") permit (principal, action, resource) when { ip(context.stage).isLoopback() };',
        PERMIT_ALL + "\x00",
        PERMIT_ALL + "\ud800",
        PERMIT_ALL + "//" + "x" * (1 << 20),
        PERMIT_ALL + "//" + "\u00e9" * (1 << 19),
    ],
)  # fmt: skip
def test_what_is_no_valid_set_of_policies_is_refused(text):
    refused(text)


def test_an_unknown_attribute_is_refused_with_rule_line_and_problem():
    error = refused(PERMIT_ALL + '\n@id("typo")\nforbid (principal, action, resource) when { principal.suspnded };')
    assert error.evidence["rule"] == "typo"
    assert error.evidence["line"] == 3
    assert "suspnded" in error.evidence["problems"][0]["problem"]
    assert "suspnded" in error.message


def test_an_attribute_that_only_weights_have_is_refused_where_the_room_may_be_meant():
    refused('@id("a") forbid (principal, action, resource) when { resource.frozen };')
    Policies.parse('@id("a") forbid (principal, action, resource is Strongroom::Weights) when { resource.frozen };')


def test_a_syntax_error_has_the_line_of_its_policy():
    error = refused(PERMIT_ALL + '// a comment; with a semicolon\n@id("b;")\npermit (principal, action resource);')
    assert error.evidence["line"] == 3


def test_a_has_is_refused_because_a_misspelt_one_would_never_apply():
    error = refused('@id("a")\nforbid (principal, action, resource)\nwhen { principal has suspnded };')
    assert error.evidence["line"] == 3
    Policies.parse(
        '// has\n@id("a") @reason("has") permit (principal, action, resource) when { context.asked == "has" };'
    )


@pytest.mark.parametrize("hidden", ["\u202e", "\u200b", "\ufeff", "\u2028", "\r", "\x1b", "\x7f"])
def test_what_a_reviewer_does_not_see_is_refused(hidden):
    error = refused(f"{PERMIT_ALL}// harmless{hidden} forbid\n")
    assert error.evidence["line"] == 2


def test_letters_of_any_language_and_line_ends_of_windows_are_text():
    text = '// § 12: über Gewichte\r\n@id("a") @reason("Für alle.")\r\npermit (principal, action, resource);\r\n'
    assert Policies.parse(text).rules["a"].line == 2


DEEP = {
    "parentheses": "(" * 20_000 + "true" + ")" * 20_000,
    "sets": "[" * 20_000 + "]" * 20_000,
    "records": "{a: " * 20_000 + "1" + "}" * 20_000,
    "ifs": "if true then " * 5_000 + "true" + " else false" * 5_000,
    "else": "if true then true else " * 5_000 + "true",
    "ands": "true" + " && true" * 50_000,
    "sums": "1" + " + 1" * 50_000 + " > 0",
    "accesses": "context" + ".now" * 20_000,
    "indexes": "context" + '["now"]' * 20_000,
    "clauses": "true } when { true" * 20_000,
    "calls": "context.contains(" * 5_000 + "1" + ")" * 5_000,
    "quotes": '"' + '\\"' * 400_000,
}


@pytest.mark.parametrize("name", DEEP)
def test_a_text_that_would_end_the_process_is_refused_before_cedar_reads_it(name):
    refused(f'@id("a") permit (principal, action, resource) when {{ {DEEP[name]} }};')


@pytest.mark.parametrize(
    "condition",
    [
        "context" + ".nope" * 100,
        "context" + '["nope"]' * 100,
        "context.now" + ".contains(1)" * 100,
        "1" + " + 1" * 120,
        "if context.lease then true else " * 40 + "1",
        "true" + " && true" * 120 + " && 1",
        "(" * 13 + "1" + ")" * 13,
    ],
)
def test_as_deep_as_a_text_may_be_the_validator_still_finds_the_error(condition):
    # Cedar's validator passes what it has no stack for. A small one, so that larger ones have something to spare.
    found = []

    def parse():
        try:
            found.append(Policies.parse(f'@id("a") permit (principal, action, resource) when {{ {condition} }};'))
        except UsageError as error:
            found.append(error.evidence.get("problems"))

    before = threading.stack_size(1 << 20)
    try:
        thread = threading.Thread(target=parse)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert isinstance(found[0], list)


@given(st.text(max_size=300) | st.text('permitforbd(),;{}[]@"\\/ :=!&|.?\n', max_size=300))
def test_any_text_is_a_policy_or_refused(text):
    for each in (text, PERMIT_ALL + text):
        try:
            Policies.parse(each)
        except UsageError as error:
            assert error.code == "policy.invalid"


def test_there_are_two_shipped_policies():
    assert [Policies.shipped(name).text[:2] for name in SHIPPED] == ["//", "//"]
    with pytest.raises(UsageError) as caught:
        Policies.shipped("../team")
    assert caught.value.code == "policy.unknown"


def test_cedar_is_loaded_when_the_first_policy_is():
    code = "import sys, strongroom.policy.table, strongroom.policy.reach; sys.exit('cedarpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- deciding ------------------------------------------------------------------------------------------------------


def test_what_nothing_permits_is_denied_without_a_rule():
    decision = TEAM.decide(ask("put", "researcher"))
    assert (decision.allowed, decision.rules, decision.errors) == (False, (), ())
    assert decision.reason == "no rule permits it"


def test_a_decision_names_all_rules_that_determine_it_in_the_order_of_the_text():
    allowed = TEAM.decide(ask("approve", "officer", "executive"))
    assert (allowed.allowed, allowed.rules) == (True, ("officers-approve", "executives-approve"))
    assert allowed.reason == "Officers approve what others ask for.; Executives approve what others ask for."
    denied = TEAM.decide(ask("copy", "officer", "auditor", stage="release", lease=True))
    assert (denied.allowed, denied.rules) == (False, ("officers-never-copy", "auditors-hold-nothing"))


@pytest.mark.parametrize("action", NAMED)
def test_what_a_rule_for_every_action_did_not_mean_it_does_not_permit(action):
    """Who permitted everything did not permit what did not exist then; who forbids everything forbids that, too."""
    old = Policies.parse('@id("all") permit (principal, action, resource);')
    assert not old.permits(action)
    assert not old.decide(ask(action, "officer")).allowed
    named = f'@id("named") permit (principal, action == Strongroom::Action::"{action}", resource);'
    assert Policies.parse(named).decide(ask(action, "officer")).allowed
    nobody = '@id("none") forbid (principal, action, resource);'
    assert Policies.parse(named + nobody).decide(ask(action, "officer")).rules == ("none",)


def test_a_forbid_wins_over_every_permit():
    text = PERMIT_ALL + '@id("no") forbid (principal, action, resource) when { context.break_glass };'
    policies = Policies.parse(text)
    assert policies.decide(ask("load")).rules == ("all",)
    assert policies.decide(ask("load", break_glass=True)).rules == ("no",)


def test_weights_are_in_their_names_and_in_the_room():
    for name, kind in (("acme/tiny@1", "Weights"), ("acme/tiny", "Weights"), ("acme", "Weights"), ("room", "Room")):
        text = f'@id("in") permit (principal, action, resource in Strongroom::{kind}::"{name}");'
        assert Policies.parse(text).decide(ask("load")).allowed, name
        assert Policies.parse(text).decide(ask("administer", resource=Resource.room())).allowed == (kind == "Room")
    for other in ("acme/tiny@2", "acme/tin", "tiny", "acme/"):
        text = f'@id("in") permit (principal, action, resource in Strongroom::Weights::"{other}");'
        assert not Policies.parse(text).decide(ask("load")).allowed, other


def test_weights_called_room_are_not_the_room():
    text = '@id("in") permit (principal, action, resource == Strongroom::Room::"room");'
    version = Resource("room@1", 1, 1, 1, frozen=False)
    assert not Policies.parse(text).decide(ask("administer", resource=version)).allowed


def test_teams_workloads_and_persons_can_be_named():
    text = """
    @id("team") permit (principal in Strongroom::Team::"team/safety", action == Strongroom::Action::"infer", resource);
    @id("robot") permit (principal == Strongroom::Workload::"workload/ci", action == Strongroom::Action::"put",
    resource);
    @id("kind") permit (principal is Strongroom::Workload, action == Strongroom::Action::"trace", resource);
    @id("human") permit (principal, action, resource) when { principal.person == "user/bob" };
    """
    policies = Policies.parse(text)

    def rules(action, subject):
        return policies.decide(Query(subject, action, TINY, Situation())).rules

    assert rules("infer", someone(teams=("team/safety", "team/x"))) == ("team",)
    assert rules("put", someone(path="workload/ci")) == ("robot",)
    assert rules("put", someone(path="user/ci")) == ()
    assert rules("trace", someone(path="workload/x")) == ("kind",)
    assert rules("load", someone(person="user/bob")) == ("human",)


def test_every_attribute_of_the_situation_reaches_the_policy():
    condition = """context.stage == "grant" && context.approvals == {total: 9, operators: 2, officers: 3, executives: 4}
    && context.lease && context.duration == 5 && context.now == 1767225600 && context.hour == 0 && context.weekday == 4
    && context.network.known && context.network.address.isInRange(ip("10.0.0.0/8"))
    && context.attestation == {verified: true, kind: "sev-snp", measurement: "ab"}
    && context.egress == {used: 6, budget: 7} && context.holders == 8 && context.copies == 9 && context.copiers == 10
    && context.break_glass && context.same_person && context.asked == "copy"
    && resource.max_holders == 10 && resource.max_copies == 5 && resource.max_copiers == 3 && !resource.frozen
    && !principal.suspended"""
    text = f'@id("all") permit (principal, action == Strongroom::Action::"load", resource) when {{ {condition} }};'
    everything = {
        "stage": "grant", "approvals": 9, "operators": 2, "officers": 3, "executives": 4, "lease": True, "duration": 5,
        "now": 1_767_225_600,  # 2026-01-01T00:00:00Z, a Thursday
        "address": "::ffff:10.1.2.3",  # the same address as 10.1.2.3
        "attested": True, "evidence": "sev-snp", "measurement": "ab", "egress_used": 6, "egress_budget": 7,
        "holders": 8, "copies": 9, "copiers": 10, "break_glass": True, "same_person": True, "asked": "copy",
    }  # fmt: skip
    policies = Policies.parse(text)
    assert policies.decide(ask("load", **everything)).allowed
    for name in everything:
        assert not policies.decide(ask("load", **{**everything, name: getattr(Situation(), name)})).allowed, name


@pytest.mark.parametrize(
    ("now", "hour", "weekday"),
    [(0, 0, 4), (3599, 0, 4), (3600, 1, 4), (259_200, 0, 7), (345_599, 23, 7), (345_600, 0, 1)],
)
def test_hour_and_weekday_follow_from_the_time(now, hour, weekday):
    assert (Situation(now=now).hour, Situation(now=now).weekday) == (hour, weekday)


def test_an_unknown_address_is_in_no_range():
    text = (
        '@id("near") permit (principal, action, resource) when { context.network.address.isInRange(ip("0.0.0.0/0")) };'
    )
    policies = Policies.parse(text)
    assert not policies.decide(ask("load")).allowed
    assert policies.decide(ask("load", address="192.0.2.1")).allowed


# -- what errs never allows ----------------------------------------------------------------------------------------


def test_cedar_alone_would_allow_past_a_forbid_that_errs():
    """The trap itself: if this fails, Cedar has changed, and `decide` may be made simpler."""
    policies = Policies.parse(f'{PERMIT_ALL}@id("no") forbid (principal, action, resource) when {{ {ERRING} }};')
    query = ask("load", now=2)
    result = cedarpy.is_authorized(query.request(), policies.text, json.loads(query.entities()))
    assert result.allowed
    assert result.diagnostics.errors


def test_a_forbid_that_errs_never_allows():
    policies = Policies.parse(f'{PERMIT_ALL}@id("no") forbid (principal, action, resource) when {{ {ERRING} }};')
    decision = policies.decide(ask("load", now=2))
    assert (decision.allowed, decision.rules) == (False, (POLICY_ERROR,))
    assert "`no`" in decision.errors[0]
    assert policies.decide(ask("load", now=0)).allowed


def test_a_permit_that_errs_never_allows_even_beside_one_that_permits():
    policies = Policies.parse(f'{PERMIT_ALL}@id("some") permit (principal, action, resource) when {{ {ERRING} }};')
    assert policies.decide(ask("load", now=2)).rules == (POLICY_ERROR,)


def test_a_forbid_that_hits_is_named_beside_one_that_errs():
    text = f'{PERMIT_ALL}@id("a") forbid (principal, action, resource) when {{ {ERRING} }};'
    policies = Policies.parse(text + '@id("b") forbid (principal, action, resource);')
    decision = policies.decide(ask("load", now=2))
    assert (decision.allowed, decision.rules) == (False, (POLICY_ERROR, "b"))


def test_an_attribute_of_somebody_who_is_not_asking_errs_and_never_allows():
    text = '@id("a") permit (principal, action, resource) unless { Strongroom::User::"user/eve".suspended };'
    assert Policies.parse(text).decide(ask("load")).rules == (POLICY_ERROR,)


CHANGES = [
    ("situation", "now", 2**63),
    ("situation", "now", "1"),
    ("situation", "lease", 1),
    ("situation", "address", "nowhere"),
    ("situation", "asked", None),
    ("subject", "suspended", None),
    ("subject", "person", None),
    ("subject", "roles", 1),
    ("subject", "roles", [["x"]]),
    ("subject", "teams", (None,)),
    ("resource", "frozen", "no"),
    ("resource", "max_copies", 2**70),
    ("query", "action", "steal"),
    ("query", "action", None),
    ("query", "subject", None),
]


@pytest.mark.parametrize(("where", "name", "value"), CHANGES)
def test_a_query_that_got_past_its_checks_is_denied_and_not_raised_about(where, name, value):
    query = ask("load", stage="release", lease=True, resource=replace(TINY))
    object.__setattr__(query if where == "query" else getattr(query, where), name, value)
    decision = Policies.parse(PERMIT_ALL).decide(query)
    assert (decision.allowed, decision.rules) == (False, (POLICY_ERROR,))
    assert decision.errors


# -- names ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    'ana"',
    "ana\\",
    "ana\n",
    "a\x00",
    'x"), action, resource); permit(principal',
    "ana\\u{0}",
    "\u0430na",
    "Ana",
    "",
    "a/../b",
    "../officer",
    'User::"ana"',
    "ana ",
    "a" * 65,
    "ana\u202e",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_before_it_reaches_cedar(name):
    for make in (
        lambda: someone(path=f"user/{name}", person="user/ana"),
        lambda: someone(path=f"workload/{name}", person="user/ana"),
        lambda: someone(path=name, person="user/ana"),
        lambda: someone(teams=(f"team/{name}",)),
        lambda: someone(teams=(name,)),
        lambda: someone(name),
        lambda: replace(TINY, ref=name),
        lambda: replace(TINY, ref=f"{name}@1"),
        lambda: replace(TINY, ref=f"acme/{name}@1"),
        lambda: replace(TINY, ref=f"acme/tiny@{name}"),
        lambda: ask(name),
    ):
        with pytest.raises(UsageError):
            make()


def test_a_team_does_not_act():
    with pytest.raises(UsageError) as caught:
        someone(path="team/safety")
    assert caught.value.code == "policy.subject"


@pytest.mark.parametrize(
    "changes",
    [
        {"person": ""},
        {"person": "a\nb"},
        {"person": "x" * 257},
        {"person": "\u00e9"},
        {"suspended": None},
        {"suspended": 0},
        {"teams": ("user/ana",)},
    ],
)
def test_a_subject_is_checked(changes):
    with pytest.raises(UsageError):
        replace(someone(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "later"},
        {"asked": "steal"},
        {"now": -1},
        {"now": 2**63},
        {"now": True},
        {"now": 1.0},
        {"lease": 1},
        {"lease": "yes"},
        {"break_glass": None},
        {"evidence": "a\nb"},
        {"measurement": "\u00e9"},
        {"measurement": "x" * 257},
        {"address": "10.0.0.0/8"},
        {"address": ""},
        {"address": "fe80::1%eth0"},
        {"address": "localhost"},
    ],
)
def test_a_situation_is_checked(changes):
    with pytest.raises(UsageError) as caught:
        Situation(**changes)
    assert caught.value.code == "policy.situation"


@pytest.mark.parametrize("action", ["load", "copy", "infer", "adapt"])
def test_the_room_as_a_whole_is_not_loaded(action):
    with pytest.raises(UsageError) as caught:
        ask(action, resource=Resource.room())
    assert caught.value.code == "policy.action"


names = st.text(max_size=40) | st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)


@given(names, names, names)
def test_any_name_is_refused_or_decided_as_itself(path, role, ref):
    try:
        query = Query(someone(role, path=f"user/{path}"), "load", replace(TINY, ref=f"{ref}@1"), Situation())
    except UsageError:
        return
    text = f"""@id("a") permit (principal == Strongroom::User::"user/{path}", action, resource in
    Strongroom::Weights::"{ref}") when {{ principal in Strongroom::Role::"{role}" }};"""
    assert Policies.parse(text).decide(query).allowed


# -- properties ----------------------------------------------------------------------------------------------------

counts = st.integers(0, 4)
queries = st.builds(
    lambda roles, action, frozen, suspended, situation: Query(
        someone(*roles, suspended=suspended),
        action,
        Resource("acme/tiny@1", 3, 2, 1, frozen=frozen),
        Situation(**situation),
    ),
    st.lists(st.sampled_from(ROLES), max_size=3, unique=True),
    st.sampled_from(ACTIONS),
    st.booleans(),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "stage": st.sampled_from(["grant", "release", "direct"]),
            "approvals": counts,
            "officers": counts,
            "executives": counts,
            "holders": counts,
            "copies": counts,
            "copiers": counts,
            "now": st.sampled_from([0, 1, 2, 10**9]),
            **dict.fromkeys(("lease", "break_glass", "same_person"), st.booleans()),
        }
    ),
)
conditions = st.recursive(
    st.sampled_from(
        [
            "true", "false", "context.lease", "context.break_glass", "principal.suspended", "context.holders > 1",
            'principal in Strongroom::Role::"officer"', "resource is Strongroom::Weights", "context.now > 1", ERRING,
            "context.approvals.total + context.holders < 3", 'context.stage == "grant"',
        ]
    ),
    lambda inner: st.builds("({} && {})".format, inner, inner)
    | st.builds("({} || {})".format, inner, inner)
    | st.builds("!({})".format, inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(SHIPPED), conditions, st.sampled_from(["when", "unless"]), queries)
def test_one_more_forbid_never_turns_a_denial_into_an_allow(name, condition, kind, query):
    policies = Policies.shipped(name)
    more = Policies.parse(
        f'{policies.text}\n@id("more") forbid (principal, action, resource) {kind} {{ ({condition}) }};'
    )
    before, after = policies.decide(query), more.decide(query)
    assert before.allowed or not after.allowed
    if after.allowed:
        assert after.rules == before.rules
    if before.allowed and not after.allowed:
        assert after.rules in (("more",), (POLICY_ERROR,))


@given(queries)
def test_a_decision_is_a_function_of_the_query(query):
    assert TEAM.decide(query) == Policies.parse(TEAM.text).decide(query)


@given(queries)
def test_what_is_shipped_never_errs(query):
    for name in SHIPPED:
        assert Policies.shipped(name).decide(query).errors == ()


def test_two_hundred_policies_are_parsed_once_and_decide_as_the_few_among_them_that_matter():
    more = "".join(
        f"""@id("never-{number}") forbid (principal in Strongroom::Role::"role-{number}", action, resource)
        when {{ context.hour == {number % 24} && context.approvals.total < {number} && principal.person != "user/x" }};
        """
        for number in range(200 - len(TEAM.ids))
    )
    policies = Policies.parse(TEAM.text + more)
    assert len(policies.ids) == 200
    for action in ACTIONS:
        for role in ROLES:
            query = ask(action, role, stage="release", lease=True)
            assert policies.decide(query) == TEAM.decide(query)
    query = ask("load", "researcher", stage="release", lease=True)
    result = cedarpy.is_authorized(query.request(), policies._slice("load").parsed, query.entities())
    assert result.metrics["policies_pre_parsed"] == 1
    assert policies.decide(ask("load", "researcher", "role-3", stage="release", lease=True, now=3 * 3600)).rules == (
        "never-3",
    )


@pytest.mark.parametrize("name", ["team", "solo"])
def test_what_the_slice_of_an_action_decides_is_what_all_policies_decide(name):
    policies = Policies.shipped(name)
    whole = cedarpy.PolicySet.from_str(policies.text)
    for action in ACTIONS:
        for role in ROLES:
            for stage, more in (("release", {"lease": True}), ("release", {"break_glass": True}), ("direct", {})):
                query = ask(action, role, stage=stage, **more)
                decision = cedarpy.is_authorized(query.request(), whole, query.entities()).decision
                assert policies.decide(query).allowed == (decision is cedarpy.Decision.Allow)
