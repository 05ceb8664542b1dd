"""Limits in one process: all scopes or none, bursts, what is given back, and that the idle are forgotten."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.callers import REF, Asker, Clock
from strongroom.errors import LimitExceeded
from strongroom.gateway.limits import Limits, scopes_of
from strongroom.gateway.settings import Rate, Scopes, Settings

FREE = Rate()


def limits(clock, *, scale=1.0, role=(), **scopes):
    kept = dict.fromkeys(("key", "identity", "team", "model", "everybody"), FREE) | scopes
    return Limits(Settings(limits=Scopes(**kept), role=role), clock, scale=scale)


def refused(made, caller, tokens=1, ref=REF):
    with pytest.raises(LimitExceeded) as caught:
        made.admit(caller, ref, tokens)
    return caught.value


def test_a_burst_and_then_the_rate():
    clock = Clock()
    made = limits(clock, identity=Rate(requests=60, burst=5))
    for _ in range(5):
        made.admit(Asker(), REF, 10).done(10)
    error = refused(made, Asker())
    assert (error.code, error.evidence) == ("rate.requests", {"scope": "identity", "limit": 60, "retry_after": 1})
    clock.now += 1
    made.admit(Asker(), REF, 10)
    refused(made, Asker())
    clock.now += 100
    for _ in range(5):
        made.admit(Asker(), REF, 10)
    refused(made, Asker())


def test_tokens_are_taken_before_and_given_back_after():
    clock = Clock()
    made = limits(clock, key=Rate(tokens=600, tokens_burst=1000))
    first = made.admit(Asker(), REF, 900)
    error = refused(made, Asker(), 200)
    assert (error.code, error.evidence["scope"], error.evidence["retry_after"]) == ("rate.tokens", "key", 10)
    first.done(100)
    second = made.admit(Asker(), REF, 900)
    second.done(900)
    second.done(0)  # once
    refused(made, Asker(), 1)


def test_an_answer_that_was_longer_than_it_might_be_is_charged():
    clock = Clock()
    made = limits(clock, key=Rate(tokens=600, tokens_burst=1000))
    made.admit(Asker(), REF, 100).done(1100)
    assert refused(made, Asker(), 1).evidence["retry_after"] == 11


def test_more_than_a_burst_is_never_let_through():
    made = limits(Clock(), team=Rate(tokens=600, tokens_burst=1000))
    error = refused(made, Asker(), 1001)
    assert error.evidence == {"scope": "team", "limit": 600, "retry_after": None}
    made.admit(Asker(), REF, 1000)


def test_concurrency():
    made = limits(Clock(), identity=Rate(concurrency=2))
    under_way = [made.admit(Asker(key=key), REF, 1) for key in "ab"]
    assert refused(made, Asker(key="c")).code == "rate.concurrency"
    made.admit(Asker("user/ben"), REF, 1)
    under_way[0].done(0)
    under_way[0].done(0)
    made.admit(Asker(key="c"), REF, 1)
    refused(made, Asker(key="d"))


def test_what_is_refused_has_taken_nothing():
    """Of all scopes: the last one refuses, and the ones before it have lost nothing."""
    clock = Clock()
    many = Rate(requests=60, burst=10, tokens=600, tokens_burst=100, concurrency=10)
    made = limits(clock, key=many, identity=many, team=many, model=many, everybody=Rate(requests=60, burst=1))
    made.admit(Asker(), REF, 10).done(10)
    for _ in range(50):
        assert refused(made, Asker(), 10).evidence["scope"] == "everybody"
    clock.now += 1
    admission = made.admit(Asker(), REF, 10)
    told = dict(admission.headers)
    # 10 of a burst, less two, of which a second has given one back.
    assert told[b"x-ratelimit-remaining-requests"] == b"9"
    assert told[b"x-ratelimit-remaining-tokens"] == b"90"


def test_keys_of_one_identity_and_identities_of_one_team():
    made = limits(Clock(), identity=Rate(requests=60, burst=2), team=Rate(requests=60, burst=3))
    for key in "ab":
        made.admit(Asker(key=key), REF, 1)
    assert refused(made, Asker(key="c")).evidence["scope"] == "identity"
    made.admit(Asker("user/ben"), REF, 1)
    assert refused(made, Asker("user/eva")).evidence["scope"] == "team"
    made.admit(Asker("user/eva", teams=("team/blue",)), REF, 1)
    assert refused(made, Asker("user/kim", teams=("team/blue", "team/red"))).evidence["scope"] == "team"


def test_models_apart_and_everybody_together():
    made = limits(Clock(), model=Rate(requests=60, burst=1), everybody=Rate(requests=60, burst=2))
    made.admit(Asker(), "acme/tiny@1", 1)
    assert refused(made, Asker("user/ben"), ref="acme/tiny@1").evidence["scope"] == "model"
    made.admit(Asker(), "acme/other@1", 1)
    assert refused(made, Asker(), ref="acme/third@1").evidence["scope"] == "everybody"


def test_a_role_tightens_and_never_loosens():
    settings = Settings.parse(
        "[limits.identity]\nrequests = 60\nburst = 5\n[role.partner.identity]\nrequests = 30\nburst = 2\n"
        "[role.officer.identity]\nburst = 50\n"
    )
    made = Limits(settings, Clock())
    for _ in range(2):
        made.admit(Asker(roles=("officer", "partner")), REF, 1)
    assert refused(made, Asker(roles=("officer", "partner"))).evidence["limit"] == 30


def test_the_role_of_a_caller_changes():
    """Another role has other limits at once, and what was used under the old one does not come back with it."""
    settings = Settings.parse("[limits.identity]\nrequests = 60\nburst = 2\n[role.partner.identity]\nburst = 1\n")
    made = Limits(settings, Clock())
    made.admit(Asker(), REF, 1)
    made.admit(Asker(), REF, 1)
    refused(made, Asker())
    made.admit(Asker(roles=("partner",)), REF, 1)
    refused(made, Asker(roles=("partner",)))
    refused(made, Asker())


def test_without_a_key_there_is_no_key_to_limit():
    assert scopes_of(Asker(key=""), REF)[0] == ("identity", "user/ana")
    made = limits(Clock(), key=Rate(requests=60, burst=1))
    for _ in range(9):
        made.admit(Asker(key=""), REF, 1)


def test_headers():
    clock = Clock()
    made = limits(clock, key=Rate(requests=60, burst=10, tokens=600), identity=Rate(requests=60, burst=5))
    admission = made.admit(Asker(), REF, 100)
    assert admission.headers == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"4"),
        (b"x-ratelimit-reset-requests", b"1s"),
        (b"x-ratelimit-limit-tokens", b"600"),
        (b"x-ratelimit-remaining-tokens", b"500"),
        (b"x-ratelimit-reset-tokens", b"10s"),
    ]
    assert limits(clock).admit(Asker(), REF, 1).headers == []


def test_headers_do_not_tell_how_busy_others_are():
    made = limits(Clock(), team=Rate(requests=60), model=Rate(requests=60), everybody=Rate(requests=60))
    assert made.admit(Asker(), REF, 1).headers == []


def test_a_worker_has_its_part():
    made = limits(Clock(), scale=0.25, identity=Rate(requests=60, burst=10, concurrency=2))
    for _ in range(2):
        made.admit(Asker(), REF, 1).done(1)
    assert refused(made, Asker()).evidence["limit"] == 15
    assert Rate(requests=3).scaled(0.25) == Rate(requests=1)


def test_the_idle_are_forgotten_and_the_busy_are_not():
    clock = Clock()
    made = limits(clock, identity=Rate(requests=60, burst=1, concurrency=1))
    busy = made.admit(Asker("user/busy"), REF, 1)
    for number in range(20_000):
        made.admit(Asker(f"user/u{number}", key=f"k{number}"), REF, 1).done(1)
        clock.now += 0.1
    assert len(made._cells) < 4000
    assert len(made._found) < 4000
    assert refused(made, Asker("user/busy", key="other")).code == "rate.concurrency"
    busy.done(1)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 20),
        st.sampled_from(["admit", "end"]),
        st.integers(0, 2),
        st.integers(0, 400),
        st.floats(0, 1),
    ),
    max_size=120,
)


@given(STEPS)
def test_no_more_than_burst_and_rate(steps):
    """Of every scope, at every time: requests, tokens that were generated, and requests under way."""
    clock = Clock()
    rate = Rate(requests=30, burst=4, tokens=600, tokens_burst=500, concurrency=3)
    both = Rate(requests=40, burst=6, tokens=900, tokens_burst=700, concurrency=4)
    made = limits(clock, identity=rate, everybody=both)
    under_way, requests, tokens = [], defaultdict(int), defaultdict(float)
    begin = clock.now
    for wait, what, number, amount, part in steps:
        clock.now += wait
        who = f"user/u{number}"
        if what == "admit":
            try:
                under_way.append((who, made.admit(Asker(who, key=""), REF, amount), amount))
            except LimitExceeded as error:
                assert error.evidence["retry_after"] is None or error.evidence["retry_after"] >= 1
                continue
            for scope in (who, ""):
                requests[scope] += 1
                tokens[scope] += amount
        elif under_way:
            whose, admission, taken = under_way.pop(number % len(under_way))
            admission.done(round(taken * part))
            for scope in (whose, ""):
                tokens[scope] -= taken - round(taken * part)
        passed = clock.now - begin
        for scope, limit in [*((name, rate) for name in requests if name), ("", both)]:
            assert requests[scope] <= limit.burst + passed * limit.requests / 60 + 0.01
            assert tokens[scope] <= limit.tokens_burst + passed * limit.tokens / 60 + 0.01
            running = sum(1 for whose, *_ in under_way if scope in ("", whose))
            assert running <= limit.concurrency


@given(st.lists(st.floats(0, 3), max_size=60))
def test_what_retry_after_says_is_enough(waits):
    clock = Clock()
    made = limits(clock, identity=Rate(requests=30, burst=2, tokens=100, tokens_burst=60))
    for wait in waits:
        clock.now += wait
        try:
            made.admit(Asker(), REF, 20).done(20)
        except LimitExceeded as error:
            clock.now += error.evidence["retry_after"]
            made.admit(Asker(), REF, 20).done(20)
