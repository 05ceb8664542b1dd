"""What a gateway sees of a room: who calls, what each may have, and what is accounted for in the log."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time

import pytest

from server.provider import CLIENT, TrustDomain
from strongroom.client import Room
from strongroom.errors import AuthRequired, BackendError, Conflict, Denied, NotFound, StrongroomError, UsageError
from strongroom.formats.apikey import digest_of, make
from strongroom.formats.authority import (
    AUDIENCE,
    X509,
    Authority,
    audience_name,
    gateway_audience,
    gateway_nonce,
    key_name,
)
from strongroom.formats.statement import Statement
from strongroom.formats.stream import DAY, KEPT
from strongroom.gateway.door import Door
from strongroom.ledger import log as log_module
from strongroom.policy import usage
from strongroom.policy.engine import Policies
from strongroom.policy.query import FEATURES
from strongroom.vault.callers import Caller, Callers
from vault.rooms import write_model
from vault.team import Team
from vault.test_logins import CI, HOUR, Lobby, oidc

REF = "acme/tiny@1"


def used(team, ref, begin):
    with team.olga._vault.custodian.ledger.view() as state:
        return usage.since(state, ref, begin)


ACCOUNT = {
    "gateway": "0" * 32,
    "records": 3,
    "head": "1" * 64,
    "requests": 3,
    "refused": 1,
    "tokens": 10,
    "bits": 170,
    "settings": "2" * 64,
}


def by_key(callers, room, name="default"):
    return callers.by_key(digest_of(room.apikeys.new(name)["key"]))[0]


@pytest.fixture
def team(team_folder):
    made = Team(team_folder)
    made.pat, made.ada = made.add("user/pat", "partner"), made.add("user/ada", "auditor")
    made.callers = Callers(made.olga._vault)
    return made


def denied(callers, caller, action="infer", ref=REF):
    with pytest.raises(Denied) as caught:
        callers.decide(caller, action, ref)
    return caught.value


def enact(team, rules):
    """Another policy, at once."""
    text = team.olga.policy()["text"] + rules
    asked = team.olga.propose(text, reason="x")
    team.eva.approve(asked["id"])
    team.olga.enact(asked["id"], break_glass="for a test")


class TestDeciding:
    def test_whoever_makes_a_key_is_told_whether_it_is_good_for_anything(self, team):
        """As the gateway will ask: policy may tell a key of its own from an API key."""
        assert team.pat.apikeys.new("one")["infers"]
        assert not team.ada.apikeys.new("one")["infers"]
        enact(
            team,
            '@id("no-passwords") forbid (principal in Strongroom::Role::"partner", action, resource) '
            'when { context.authentication == "apikey" };',
        )
        assert not team.pat.apikeys.new("two")["infers"]
        found = by_key(team.callers, team.pat, "three")
        denied(team.callers, found)

    def test_policy_says_who_may_infer(self, team):
        pat, ada = by_key(team.callers, team.pat), by_key(team.callers, team.ada)
        assert pat == Caller("user/pat", ("partner",), (), "user/pat", pat.key, "apikey")
        team.callers.decide(pat, "infer", REF)
        error = denied(team.callers, ada)
        assert error.code == "denied.default"
        assert set(error.evidence["roles"]) == {"researcher", "operator", "partner"}
        assert "strongroom principal role user/ada" in error.hint

    def test_features_are_permitted_by_their_names_only(self, team):
        pat = by_key(team.callers, team.pat)
        for feature in FEATURES:
            assert denied(team.callers, pat, feature).evidence["action"] == feature
        enact(
            team,
            '@id("everything") permit (principal in Strongroom::Role::"partner", action, resource);'
            '@id("many") permit (principal, action == Strongroom::Action::"infer_many", resource);',
        )
        for feature in FEATURES[:-1]:
            denied(team.callers, pat, feature)
        team.callers.decide(pat, "infer_many", REF)
        # What may not infer has no features, whatever names them.
        team.ben.principal_change("user/pat", roles=["auditor"])
        assert denied(team.callers, pat, "infer_many").evidence["action"] == "infer"

    def test_what_forbids_inference_forbids_its_features(self, team):
        """The rules of a policy that is older than the features do not name them."""
        enact(team, '@id("many") permit (principal, action == Strongroom::Action::"infer_many", resource);')
        pat = by_key(team.callers, team.pat)
        team.callers.decide(pat, "infer_many", REF)
        team.ben.revoke(REF, reason="leaked")
        for action in ("infer", "infer_many"):
            assert denied(team.callers, pat, action).code == "version.frozen"
        team.ben.thaw(REF, reason="it was not")
        team.callers.decide(pat, "infer_many", REF)

    def test_that_a_version_is_frozen_is_told_to_those_who_could_use_it(self, team):
        ada = by_key(team.callers, team.ada)
        before = denied(team.callers, ada)
        team.ben.revoke(REF, reason="leaked")
        after = denied(team.callers, ada)
        assert (before.code, before.message) == (after.code, after.message)

    def test_a_decision_is_about_the_principal_as_it_is_now(self, team):
        pat = by_key(team.callers, team.pat)
        team.ben.principal_change("user/pat", roles=[])
        denied(team.callers, pat)
        team.ben.principal_change("user/pat", state="suspended")
        with pytest.raises(AuthRequired):
            team.callers.decide(pat, "infer", REF)
        with pytest.raises(AuthRequired):
            team.callers.models(pat)

    def test_policy_sees_that_it_is_an_api_key(self, team):
        pat = by_key(team.callers, team.pat)
        enact(
            team,
            '@id("no-keys") forbid (principal, action == Strongroom::Action::"infer", resource) '
            'when { context.authentication == "apikey" };',
        )
        assert denied(team.callers, pat).evidence["rule"] == "no-keys"

    def test_other_actions_are_none_of_a_gateway_s(self, team):
        pat = by_key(team.callers, team.pat)
        for action in ("load", "copy", "adapt", "administer", "", "infer_"):
            with pytest.raises(UsageError):
                team.callers.decide(pat, action, REF)

    def test_what_is_not_there(self, team):
        pat = by_key(team.callers, team.pat)
        for ref in ("acme/tiny@2", "acme/other@1", "acme/tiny", "../x", "", "room", "acme/tiny@01"):
            with pytest.raises(StrongroomError):
                team.callers.decide(pat, "infer", ref)

    def test_a_policy_of_before_permits_no_feature(self, team):
        old = Policies.parse('@id("all") permit (principal, action, resource);')
        assert old.permits("infer")
        assert not any(map(old.permits, FEATURES))


class TestModels:
    def test_what_a_model_is(self, team):
        (found,) = team.callers.models(by_key(team.callers, team.pat))
        shown = team.olga.show(REF)
        assert found.ref == REF
        assert found.bytes == sum(each["bytes"] for each in shown["files"])
        assert abs(found.created - time.time()) < 3600
        with team.olga.load(REF, break_glass="to count") as weights:
            count = sum(weights[name].size for name in weights)
        assert found.parameters == count
        # No config.json of these tests says either: the tensor that makes logits does.
        assert (found.vocabulary, found.hidden) == (200, 128)

    @pytest.mark.parametrize(
        ("config", "vocabulary", "hidden"),
        [
            ({"vocab_size": 999, "hidden_size": 77}, 999, 77),
            ({"text_config": {"vocab_size": 5, "hidden_size": 6}}, 5, 6),
            ({"vocab_size": "many", "hidden_size": -1}, 200, 128),
            ({"vocab_size": True}, 200, 128),
        ],
    )
    def test_config_says_how_many_tokens_there_are(self, team, tmp_path, config, vocabulary, hidden):
        folder = write_model(tmp_path / "other")
        (folder / "config.json").write_text(json.dumps(config))
        team.olga.put(folder, "acme/other", share="1/2")
        found = team.callers.model("acme/other@1")
        assert (found.vocabulary, found.hidden) == (vocabulary, hidden)

    def test_only_those_that_one_may_use(self, team, tmp_path):
        pat, ada = by_key(team.callers, team.pat), by_key(team.callers, team.ada)
        team.olga.put(write_model(tmp_path / "two"), "acme/tiny", share="1/2")
        assert [each.ref for each in team.callers.models(pat)] == [REF, "acme/tiny@2"]
        assert team.callers.models(ada) == []
        team.ben.revoke("acme/tiny@2", reason="leaked")
        assert [each.ref for each in team.callers.models(pat)] == [REF]
        team.olga.shred(REF, confirm=REF)
        assert team.callers.models(pat) == []
        with pytest.raises(NotFound):
            team.callers.model(REF)

    def test_one_whose_bytes_are_not_what_was_signed_is_left_out(self, team):
        pat = by_key(team.callers, team.pat)
        for path in (team.folder / "room" / "store").rglob("*.manifest"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert team.callers.models(pat) == []

    def test_a_name_is_its_newest_version(self, team, tmp_path):
        folder = write_model(tmp_path / "two")
        for _ in range(10):
            team.olga.put(folder, "acme/tiny", share="1/2")
        assert team.callers.resolve("acme/tiny") == "acme/tiny@11"
        assert team.callers.resolve("acme/tiny@2") == "acme/tiny@2"
        team.olga.shred("acme/tiny@11", confirm="acme/tiny@11")
        assert team.callers.resolve("acme/tiny") == "acme/tiny@10"
        for wrong in (
            "acme/tiny@11",
            "acme/tin",
            "acme",
            "",
            "ACME/tiny",
            "acme/tiny@",
            "acme/tiny@1@2",
            "a\n",
            "room",
        ):
            with pytest.raises(NotFound):
                team.callers.resolve(wrong)


class TestVersion:
    def test_changes_with_what_decides_and_with_nothing_else(self, team):
        def changed(act):
            before = team.callers.version()
            act()
            return team.callers.version() != before

        made = team.pat.apikeys.new()
        assert not changed(lambda: team.callers.record(REF, ACCOUNT))
        assert not changed(lambda: team.callers.decide(team.callers.by_key(digest_of(made["key"]))[0], "infer", REF))

        def refused():
            with pytest.raises(Denied):
                team.ana.apikeys.ls("user/pat")
            assert team.olga.log.tail(1)[0]["type"] == "refused"

        assert not changed(refused)
        assert changed(lambda: team.pat.apikeys.end(made["id"]))
        assert changed(team.pat.apikeys.new)
        assert changed(lambda: team.ben.principal_change("user/pat", state="suspended"))
        assert changed(lambda: team.ben.principal_change("user/pat", state="active"))
        assert changed(lambda: team.ben.revoke(REF, reason="x"))
        assert changed(lambda: team.ben.thaw(REF, reason="x"))
        assert changed(lambda: enact(team, '@id("x") forbid (principal, action, resource) when { false };'))
        assert changed(lambda: team.olga.authority_add(Authority(X509, "example.org", bundle=TrustDomain().bundle)))
        assert changed(lambda: team.olga.shred(REF, confirm=REF))

    def test_is_that_of_another_process_s_entries_too(self, team):
        before = team.callers.version()
        with Room(team.folder / "room", "user/pat") as other:
            other.apikeys.new()
        assert team.callers.version() != before


class TestAccounts:
    def test_are_entries_by_the_custodian_which_the_log_proves(self, team):
        index = team.callers.record(REF, ACCOUNT)
        entry = team.olga.log.show(index)
        assert (entry["type"], entry["by"], entry["ref"], entry["body"]) == ("inference", "custodian", REF, ACCOUNT)
        team.callers.record("", {**ACCOUNT, "records": 4, "head": "4" * 64})
        assert team.olga.log.verify()["ok"]

    @pytest.mark.parametrize(
        ("ref", "changes"),
        [
            ("acme/other@1", {}),
            ("acme/tiny", {}),
            (REF, {"tokens": -1}),
            (REF, {"bits": 1.5}),
            (REF, {"gateway": "x"}),
            (REF, {"head": ""}),
            (REF, {"prompt": "secret"}),
            (REF, {"settings": None}),
        ],
    )
    def test_of_nothing_or_of_too_much_are_refused(self, team, ref, changes):
        size = team.olga._vault.custodian.ledger.checkpoint()[0].size
        with pytest.raises(UsageError) as caught:
            team.callers.record(ref, {**ACCOUNT, **changes})
        assert caught.value.code == "inference.malformed"
        assert team.olga._vault.custodian.ledger.checkpoint()[0].size == size

    @pytest.mark.parametrize("wrong", [{"records": 2}, {"head": "9" * 64}, {"records": 0, "head": "0" * 64}])
    def test_that_a_verifier_would_refuse_are_not_written(self, team, wrong):
        """Two threads of a gateway that write in the wrong order would else spoil the log for ever."""
        team.callers.record(REF, ACCOUNT)
        with pytest.raises(Conflict) as caught:
            team.callers.record(REF, {**ACCOUNT, **wrong})
        assert caught.value.code == "inference.behind"
        team.callers.record("", ACCOUNT)
        team.callers.record(REF, {**ACCOUNT, "gateway": "7" * 32, **wrong})
        assert team.olga.log.verify()["ok"]

    def test_sums_that_no_integer_has_do_not_end_the_log(self, team, monkeypatch):
        """A snapshot of them could not be written, and with it no entry any more: whoever has a gateway's key could
        end the room."""
        monkeypatch.setattr(log_module, "_SNAPSHOT_EVERY", 1)
        most = 2**53 - 1
        for records in (3, 9):
            said = {**ACCOUNT, "records": records, **dict.fromkeys(("requests", "refused", "tokens", "bits"), most)}
            team.callers.record(REF, said)
        kept = team.olga._vault.custodian.ledger._snapshot_due
        while team.olga._vault.custodian.ledger._snapshot_due == kept:  # until the next one is
            team.callers.record(REF, {**ACCOUNT, "records": 12})
        assert used(team, REF, 0).as_json() == dict.fromkeys(("requests", "refused", "tokens", "bits"), most)
        assert team.olga.log.verify()["ok"]

    def test_sums_are_kept_by_version_and_day_for_as_long_as_they_matter(self, team):
        team.later(-team.clock() % DAY + DAY // 2)  # at noon: no day ends here but where it says so
        team.callers.record(REF, ACCOUNT)
        team.later(DAY)
        team.callers.record(REF, {**ACCOUNT, "records": 9})
        team.callers.record("", {**ACCOUNT, "records": 9, "tokens": 0})
        with team.olga._vault.custodian.ledger.view() as state:
            assert set(state.gateways) == {ACCOUNT["gateway"]}
        assert used(team, REF, 0).as_json() == {"requests": 6, "refused": 2, "tokens": 20, "bits": 340}
        assert used(team, REF, team.clock()).tokens == 10
        assert used(team, "", 0).tokens == 0
        team.later((KEPT - 1) * DAY)
        team.callers.record(REF, {**ACCOUNT, "gateway": "8" * 32})
        assert used(team, REF, 0).tokens == 20  # of the first day no more
        with team.olga._vault.custodian.ledger.view() as state:
            assert len(state.usage) == 2
            assert list(state.gateways) == ["8" * 32]  # nobody has heard of the other for a year


def test_threads_ask_at_once(team):
    pat, digest = by_key(team.callers, team.pat), digest_of(team.pat.apikeys.new()["key"])
    failures = []

    def ask(number):
        try:
            for _ in range(10):
                team.callers.version()
                assert team.callers.by_key(digest)[0].principal == "user/pat"
                team.callers.decide(pat, "infer", REF)
                assert len(team.callers.models(pat)) == 1
                gateway = f"{number:032x}"
                team.callers.record(REF, {**ACCOUNT, "gateway": gateway})
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failures == []
    assert used(team, REF, 0).requests == 120
    assert team.olga.log.verify()["ok"]


# -- tokens and logins -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory, provider, domain):
    folder = tmp_path_factory.mktemp("lobby")
    room, _ = Room.init(folder / "room", owner="user/olga")
    with room:
        room.put(write_model(folder / "model"), "acme/tiny", share="1/2")
        room.authority_add(oidc(provider))
        room.authority_add(Authority(X509, "example.org", bundle=domain.bundle))
        room.principal_add("user/ana", roles=["partner"], oidc=f"{provider.issuer}#ana@example.com")
        room.principal_add("workload/ci", roles=["partner"], spiffe=CI)
    return folder / "room"


@pytest.fixture
def lobby(tmp_path, template, provider, domain, monkeypatch):
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    shutil.copytree(template, tmp_path / "room")
    found = Lobby(tmp_path / "room", provider, domain)
    found.callers = Callers(found.vault)
    yield found
    found.vault.close()


def shown(lobby, **claims):
    """A token for the gateway of this room."""
    return lobby.provider.token(**{"nonce": gateway_nonce(lobby.vault.id), **claims})


def refuses(lobby, token, code="login.refused"):
    with pytest.raises(AuthRequired) as caught:
        lobby.callers.by_token(token)
    assert caught.value.code == code, caught.value
    return caught.value


class TestTokens:
    def test_say_who_calls_until_they_expire(self, lobby):
        token = shown(lobby)
        caller, until = lobby.callers.by_token(token)
        assert caller == Caller("user/ana", ("partner",), (), "user/ana", "", "oidc")
        assert until == pytest.approx(time.time() + 300, abs=60)
        lobby.callers.decide(caller, "infer", REF)
        assert lobby.callers.by_token(token) == (caller, until)  # it is for more than one request
        lobby.offset = 240  # and not the last second, which a busy machine has slept through
        lobby.callers.by_token(token)
        lobby.offset = 301
        refuses(lobby, token)

    def test_are_no_good_for_longer_than_a_login(self, lobby):
        """An issuer that gives out tokens for a year has not asked this room."""
        now = int(time.time())
        _, until = lobby.callers.by_token(shown(lobby, iat=now - 700, exp=now + 400 * DAY))
        assert until == now - 700 + 8 * HOUR
        refuses(lobby, shown(lobby, iat=now - 9 * HOUR, exp=now + 400 * DAY))

    @pytest.mark.parametrize(
        "claims",
        [
            {"nonce": None},
            {"nonce": "gateway-" + "0" * 32},
            {"aud": "another"},
            {"aud": [CLIENT, "another"]},
            {"aud": f"strongroom-gateway:{'0' * 32}"},
            {"azp": "another"},
            {"exp": "never"},
            {"exp": float("inf")},
            {"nbf": int(time.time()) + 10**6},
            {"iat": int(time.time()) + 10**6},
            {"iss": "https://127.0.0.1:1"},
            {"iss": 5},
            {"sub": ""},
        ],
    )
    def test_that_are_for_something_else(self, lobby, claims):
        token = shown(lobby, **claims)
        refuses(lobby, token, "token.refused" if claims.get("iss") == "https://127.0.0.1:1" else "login.refused")

    def test_of_a_login_open_no_gateway_and_of_a_gateway_introduce_no_key(self, lobby):
        """What was shown for one purpose must not be used by whoever saw it for another."""
        signer = lobby.signer()
        refuses(lobby, lobby.provider.token(nonce=key_name(lobby.vault.id, signer.public_key)))
        lobby.refused("login.refused", lobby.login, token=shown(lobby), signer=signer)

    def test_where_the_audience_says_what_they_are_for(self, lobby):
        changed = oidc(lobby.provider, binding=AUDIENCE)
        lobby.authority(changed.name, changed.encode())
        aud = gateway_audience(lobby.vault.id)
        assert lobby.callers.by_token(lobby.provider.token(aud=aud))[0].principal == "user/ana"
        assert lobby.callers.by_token(lobby.provider.token(aud=[aud]))[0].principal == "user/ana"
        signer = lobby.signer()
        for wrong in (CLIENT, [aud, CLIENT], audience_name(lobby.vault.id, signer.public_key), aud.upper()):
            refuses(lobby, shown(lobby, aud=wrong))
        lobby.refused("login.refused", lobby.login, token=lobby.provider.token(aud=aud), signer=signer)

    def test_that_the_issuer_has_not_signed(self, lobby):
        token = shown(lobby)
        header, _, signature = token.split(".")
        payload = shown(lobby, sub="ben@example.com").split(".")[1]
        for wrong in (
            f"{header}.{payload}.{signature}",
            f"{token}x",
            token[:-8],
            "",
            "a.b.c",
            "sr-" + "a" * 43,
            "x" * 9,
        ):
            refuses(lobby, wrong)

    def test_of_nobody_here_are_refused_in_the_same_words(self, lobby):
        errors = [refuses(lobby, shown(lobby, sub="ben@example.com"), "token.refused")]
        lobby.principal("user/ana", state="suspended")
        errors.append(refuses(lobby, shown(lobby), "token.refused"))
        lobby.principal("user/ana", state="removed")
        errors.append(refuses(lobby, shown(lobby), "token.refused"))
        assert len({str(each) for each in errors}) == 1

    def test_of_an_authority_that_is_taken_at_its_word_no_more(self, lobby):
        token = shown(lobby)
        lobby.callers.by_token(token)
        before = lobby.callers.version()
        lobby.authority(lobby.provider.issuer, "")
        refuses(lobby, token, "token.refused")
        assert lobby.callers.version() != before

    def test_an_issuer_that_answers_nothing_lets_nobody_in(self, lobby):
        changed = oidc(lobby.provider, ca="")
        lobby.authority(changed.name, changed.encode())
        with pytest.raises(BackendError):
            lobby.callers.by_token(shown(lobby))


class TestCertificates:
    def test_say_who_calls_until_they_end(self, lobby, domain):
        chain, _ = domain.svid(CI)
        now = int(time.time())
        caller, until = lobby.callers.by_certificate(chain, now)
        assert caller == Caller("workload/ci", ("partner",), (), "workload/ci", "", "x509")
        assert until == pytest.approx(now + 3600, abs=10)
        lobby.callers.decide(caller, "infer", REF)
        lobby.offset = 3540
        lobby.callers.by_certificate(chain, now)
        lobby.offset = 3601
        self.refused(lobby, chain, now, "login.refused")

    def test_are_worth_no_more_than_a_login(self, lobby, domain):
        chain, _ = domain.svid(CI, begin=-9 * HOUR)
        now = int(time.time())
        assert lobby.callers.by_certificate(chain, now - 7 * HOUR - 1800)[1] == now + 1800
        self.refused(lobby, chain, now - 8 * HOUR, "login.refused")

    def test_that_the_domain_has_not_signed(self, lobby, domain):
        chain, _ = TrustDomain().svid(CI)
        self.refused(lobby, chain, int(time.time()), "login.refused")
        for wrong in ("", "x", chain.replace("A", "B"), domain.bundle):
            self.refused(lobby, wrong, int(time.time()))
        self.refused(lobby, domain.svid("spiffe://example.org/nobody")[0], int(time.time()))
        self.refused(lobby, domain.svid(CI, ca=True)[0], int(time.time()), "login.refused")
        for uri in (f"spiffe://{'EXAMPLE'}.org/ci", "spiffe://example.org", CI + "?x", "https://example.org/ci"):
            self.refused(lobby, domain.svid(uri)[0], int(time.time()))

    def test_of_a_domain_or_a_principal_that_has_ended(self, lobby, domain):
        chain, now = domain.svid(CI)[0], int(time.time())
        assert lobby.callers.bundles() == [domain.bundle]
        lobby.principal("workload/ci", state="suspended")
        self.refused(lobby, chain, now)
        lobby.principal("workload/ci", state="active")
        lobby.callers.by_certificate(chain, now)
        before = lobby.callers.version()
        lobby.authority("example.org", "")
        self.refused(lobby, chain, now)
        assert lobby.callers.version() != before
        assert lobby.callers.bundles() == []

    def refused(self, lobby, chain, at, code="token.refused"):
        with pytest.raises(AuthRequired) as caught:
            lobby.callers.by_certificate(chain, at)
        assert caught.value.code == code


class TestUnderALogin:
    """Who has no key of its own: what a login makes ends with it."""

    def make(self, lobby, by, signer, seconds=600):
        key = make()
        body = {"key": digest_of(key), "principal": by, "name": "ci", "state": "active"}
        body["expires_at"] = lobby.vault.clock() + seconds
        lobby.custodian.apikeys.change(lobby.say("apikey", by, body, signer))
        return digest_of(key)

    def verify(self, lobby):
        with Room(lobby.folder, "user/olga") as room:
            assert room.log.verify()["ok"]

    def test_a_workload_has_keys_that_say_how_it_came(self, lobby):
        digest = self.make(lobby, "workload/ci", lobby.arrive())
        caller, _ = lobby.callers.by_key(digest)
        assert (caller.principal, caller.method) == ("workload/ci", "x509")
        lobby.callers.decide(caller, "infer", REF)
        assert lobby.callers.by_key(self.make(lobby, "user/ana", lobby.login()))[0].method == "oidc"
        self.verify(lobby)

    def test_but_none_that_outlives_it(self, lobby):
        signer = lobby.login(duration=HOUR)
        with pytest.raises(UsageError) as caught:
            self.make(lobby, "user/ana", signer, HOUR + 60)
        assert caught.value.code == "apikey.time"
        assert "--expires 5" in caught.value.hint
        self.make(lobby, "user/ana", signer, HOUR - 60)

    @pytest.mark.parametrize("how", ["authority", "role", "suspend", "clock", "time"])
    def test_what_ends_the_login_ends_the_key_for_good(self, lobby, how):
        signer = lobby.login(duration=HOUR)
        digest = self.make(lobby, "user/ana", signer)
        assert lobby.callers.by_key(digest)
        match how:
            case "authority":
                lobby.authority(lobby.provider.issuer, "")
            case "role":
                lobby.principal("user/ana", roles=["auditor"])
            case "suspend":
                lobby.revoke("user/ana", by="user/olga")
            case "clock":
                with Room(lobby.folder, "user/olga") as room:
                    lobby.offset = 2000
                    lobby.principal("workload/ci", roles=["auditor"])
                    lobby.offset = 0
                    room.set_clock("it had been ahead")
            case "time":
                lobby.offset = 601
        assert lobby.callers.by_key(digest) is None
        if how == "role":
            # The same key, introduced once more, brings none of them back.
            lobby.login(signer=signer, duration=HOUR, jti="another token")
            assert lobby.callers.by_key(digest) is None
        self.verify(lobby)

    def test_a_statement_under_a_login_that_ended(self, lobby):
        signer = lobby.login()
        lobby.principal("user/ana", roles=["auditor"])
        with pytest.raises(AuthRequired):
            self.make(lobby, "user/ana", signer)

    def test_a_digest_that_is_in_the_log(self, lobby):
        signer = lobby.login()
        digest = self.make(lobby, "user/ana", signer)
        body = {"key": digest, "principal": "workload/ci", "name": "ci", "state": "active"}
        body["expires_at"] = lobby.vault.clock() + 60
        with pytest.raises(Conflict):
            lobby.custodian.apikeys.change(lobby.say("apikey", "workload/ci", body, lobby.arrive()))


def test_the_statement_that_makes_a_key_has_no_key_in_it(team):
    made = team.pat.apikeys.new()
    entry = team.olga.log.show(made["entry"])
    assert made["key"].encode() not in Statement.decode(entry["body"]["statement"]).payload


def test_a_gateway_keeps_apart_what_a_principal_may_by_a_token_and_by_a_key(lobby):
    """Policy may look at how somebody came: what it said of a token is not its word about a key."""
    with Room(lobby.folder, "user/olga") as room:
        room.principal_add("user/pat", roles=["partner"])
        room.principal_bind("user/pat", oidc=f"{lobby.provider.issuer}#pat@example.com")
        room.principal_add("user/ben", roles=["officer"])
        rule = (
            '@id("no-keys") forbid (principal, action == Strongroom::Action::"infer", resource) '
            'when { context.authentication == "apikey" };'
        )
        asked = room.propose(room.policy()["text"] + rule, reason="x")
        with Room(lobby.folder, "user/ben") as ben:
            ben.approve(asked["id"])
        room.enact(asked["id"], break_glass="for a test")
        with Room(lobby.folder, "user/pat") as pat:
            key = pat.apikeys.new()["key"]

    async def ask(*tokens):
        door = Door(lobby.callers)
        await door.look()
        told = []
        for token in tokens:
            caller = await door.caller(token)
            assert caller.principal == "user/pat"
            try:
                await door.allow(caller, ["infer"], REF, REF)
                told.append((True, len(await door.models(caller))))
            except NotFound:
                told.append((False, len(await door.models(caller))))
        return told

    token = shown(lobby, sub="pat@example.com")
    assert asyncio.run(ask(token, key)) == [(True, 1), (False, 0)]
    assert asyncio.run(ask(key, token)) == [(False, 0), (True, 1)]
