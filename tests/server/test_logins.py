"""Logins on the command line, to a served room: with a browser, from a CI, by a workload."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

from cli.desk import PROGRAM, environment, here
from server.provider import CLIENT, TrustDomain
from server.served import REF, Served
from strongroom.cli.output import Output
from strongroom.core.clock import unix
from strongroom.formats.card import Card
from strongroom.server import listen

CI = "spiffe://example.org/ci/eval-7"
REPOSITORY = "repo:acme/models:ref:refs/heads/main"


@pytest.fixture(scope="module")
def served(tmp_path_factory, provider, domain):
    folder = tmp_path_factory.mktemp("served")
    found = Served(folder)
    found.cli("trust", str(found.folder / "card.json"))
    (folder / "ca.pem").write_text(provider.ca)
    (folder / "bundle.pem").write_text(domain.bundle)
    about = ["--issuer", provider.issuer, "--audience", CLIENT, "--ca", str(folder / "ca.pem")]
    for arguments in (about, ["--trust-domain", "example.org", "--bundle", str(folder / "bundle.pem")]):
        asked = found.host("authority", "add", *arguments)
        found.cli("approve", asked["id"], as_="user/eva")
    found.host("principal", "add", "user/ida", "--role", "researcher", "--oidc", f"{provider.issuer}#ida@example.com")
    found.host("principal", "add", "workload/ci", "--role", "researcher", "--spiffe", CI)
    yield found
    found.stop()


def machine(served, folder, *arguments, as_, check=0, stdin=""):
    """The command line on a machine that has no key of anybody."""
    env = environment(STRONGROOM_STATE=str(folder / "state"), STRONGROOM_IDENTITIES=str(folder / "none"))
    who = ("--as", as_) if as_ else ()
    ended = here("--room", served.url, *who, "--json", *arguments, env=env, cwd=folder, given=stdin)
    assert ended.code == check, ended
    return ended.json


@pytest.fixture
def away(served, tmp_path):
    card = tmp_path / "card.json"
    card.write_bytes(Card.decode((served.folder / "card.json").read_bytes()).encode())
    machine(served, tmp_path, "trust", str(card), as_=None)
    return tmp_path


def ask(served, folder, as_, check=0):
    return machine(served, folder, "request", REF, "--reason", "evaluation", as_=as_, check=check)


def test_a_login_with_a_token_on_stdin(served, provider, away):
    who = "user/ida"
    assert ask(served, away, who, check=4)["error"]["code"] == "identity.missing"
    asked = machine(served, away, "login", "--prepare", as_=who)
    token = provider.token(sub="ida@example.com", nonce=asked["nonce"])
    done = machine(served, away, "login", "--oidc-token", "-", "--duration", "1h", as_=who, stdin=f"{token}\n")
    assert done["principal"] == who
    assert 0 < done["expires_at"] - unix() <= 3600
    (kept,) = (away / "state" / "logins").rglob("*.login")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert ask(served, away, who)["by"] == who
    assert ask(served, away, None)["by"] == who  # the only one that this machine can speak as
    # The provider's word is not enough to decide for others.
    refused = machine(served, away, "authority", "rm", "example.org", as_=who, check=3)
    assert refused["error"]["code"].startswith("denied") or refused["error"]["evidence"]
    machine(served, away, "login", "--end", as_=who)
    ask(served, away, who, check=4)


def test_a_token_for_another_key(served, provider, away, tmp_path_factory):
    """Whoever reads a token on its way, and makes a key of its own for it."""
    thief = tmp_path_factory.mktemp("thief")
    card = away / "card.json"
    machine(served, thief, "trust", str(card), as_=None)
    asked = machine(served, away, "login", "--prepare", as_="user/ida")
    machine(served, thief, "login", "--prepare", as_="user/ida")
    token = provider.token(sub="ida@example.com", nonce=asked["nonce"])
    said = machine(served, thief, "login", "--oidc-token", "-", as_="user/ida", check=4, stdin=token)
    assert said["error"]["code"] == "login.refused"
    assert machine(served, thief, "login", "--oidc-token", "-", as_="user/ben", check=8, stdin=token)


def test_a_login_that_has_ended_says_which_command(served, provider, away):
    asked = machine(served, away, "login", "--prepare", as_="user/ida")
    token = provider.token(sub="ida@example.com", nonce=asked["nonce"])
    machine(served, away, "login", "--oidc-token", "-", as_="user/ida", stdin=token)
    (kept,) = (away / "state" / "logins").rglob("*.login")
    value = json.loads(kept.read_text())
    kept.write_text(json.dumps({**value, "expires_at": unix() - 1}))
    said = ask(served, away, "user/ida", check=4)["error"]
    assert (said["code"], said["hint"]) == ("login.expired", f"strongroom --room {served.url} login --as user/ida")


def test_a_login_by_certificate(served, domain, away):
    chain, key = domain.svid(CI)
    (away / "svid.pem").write_text(chain)
    (away / "svid.key").write_bytes(key)
    machine(served, away, "login", "--svid", "svid.pem", "svid.key", as_="workload/ci")
    assert ask(served, away, "workload/ci")["by"] == "workload/ci"
    chain, key = TrustDomain().svid(CI)
    (away / "svid.pem").write_text(chain)
    (away / "svid.key").write_bytes(key)
    said = machine(served, away, "login", "--svid", "svid.pem", "svid.key", as_="workload/ci", check=4)
    assert said["error"]["code"] == "login.refused"


def test_a_login_with_a_browser(served, provider, away):
    """The browser is a client that follows redirects, and believes the provider's authority."""
    provider.subject = "ida@example.com"
    env = environment(STRONGROOM_STATE=str(away / "state"), STRONGROOM_IDENTITIES=str(away / "none"))
    (away / "ca.pem").write_text(provider.ca)
    command = [*PROGRAM, "--room", served.url, "--as", "user/ida", "login", "--browser"]
    command += ["--issuer", provider.issuer, "--client-id", CLIENT, "--ca", "ca.pem"]
    with subprocess.Popen(
        command, env=env, cwd=away, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as login:
        line = ""
        while "/authorize?" not in line:
            line = login.stderr.readline()
            assert line, login.stdout.read()
        address = line[line.index("https://") :].split()[0]
        # Another page of the browser's tries first.
        back = urllib.parse.parse_qs(urllib.parse.urlsplit(address).query)["redirect_uri"][0]
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{back}?code=x&state=guess", timeout=30)
        context = ssl_of(provider)
        opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), urllib.request.HTTPCookieProcessor(CookieJar())
        )
        with opener.open(address, timeout=30) as page:
            assert b"can be closed" in page.read()
        out, err = login.communicate(timeout=60)
    assert login.returncode == 0, (out, err)
    assert ask(served, away, "user/ida")["by"] == "user/ida"


def ssl_of(provider):
    import ssl

    return ssl.create_default_context(cadata=provider.ca)


def test_whom_the_room_trusts_is_listed(served, provider, away):
    found = served.cli("authority", "ls", as_="user/ben")["authorities"]
    assert {each["name"] for each in found} == {provider.issuer, "example.org"}
    assert served.cli("principal", "show", "user/ida", as_="user/ben")["subject"]


def test_a_role_is_changed_and_the_binding_stays(served):
    before = served.cli("principal", "show", "user/ida", as_="user/ben")["subject"]
    served.host("principal", "role", "user/ida", "researcher", "auditor")
    assert served.cli("principal", "show", "user/ida", as_="user/ben")["subject"] == before


def test_the_log_holds_together(served):
    served.host("log", "verify")


def test_a_revoked_certificate_introduces_no_key(served, domain, away):
    crl = away / "crl.pem"
    crl.write_bytes(domain.crl(begin=-600))
    url, process = served.start("--crl", str(crl)), served.processes[-1]
    try:
        chain, key = domain.svid(CI)
        (away / "svid.pem").write_text(chain)
        (away / "svid.key").write_bytes(key)
        env = environment(STRONGROOM_STATE=str(away / "state"), STRONGROOM_IDENTITIES=str(away / "none"))
        card = away / "card.json"
        card.write_bytes((served.folder / "card.json").read_bytes())
        here("--room", url, "trust", str(card), env=env, cwd=away)
        login = ("login", "--svid", str(away / "svid.pem"), str(away / "svid.key"))

        def code():
            return here("--room", url, "--as", "workload/ci", "--json", *login, env=env, cwd=away).code

        def hangup(data, expected):
            before = len(Path(served.log.name).read_text())
            crl.write_bytes(data)
            process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 120
            while expected not in Path(served.log.name).read_text()[before:]:
                assert time.monotonic() < end
                time.sleep(0.02)

        assert code() == 0
        hangup(domain.crl(chain, begin=-300), "in force: revoked certificates: 1 (before: 0), until ")
        assert code() == 4
        hangup(domain.crl(begin=-400), "the revocation lists stay as they were")
        assert code() == 4
    finally:
        process.terminate()
        process.wait(30)


def test_who_hangs_up_as_it_is_told_that_there_is_a_server_does_not_end_it(served, domain, away, monkeypatch):
    crl, card = away / "crl.pem", served.folder / "card.json"
    crl.write_bytes(domain.crl(begin=-600))
    before, again = card.read_bytes(), threading.Event()
    answer, note = Output.answer, Output.note

    def answered(output, *said):
        assert callable(signal.getsignal(signal.SIGHUP))
        os.kill(os.getpid(), signal.SIGHUP)
        answer(output, *said)

    def noted(output, text):
        note(output, text)
        if "new revocation lists are in force" in text:
            again.set()

    monkeypatch.setattr(Output, "answer", answered)
    monkeypatch.setattr(Output, "note", noted)
    monkeypatch.setattr(listen, "run", lambda *_: again.wait(60))
    try:
        serve = ("serve", "--listen", "127.0.0.1:0", "--crl", str(crl))
        ended = here("--room", str(served.folder), *serve, env=environment(), cwd=away)
    finally:
        card.write_bytes(before)
    assert ended.code == 0, ended
    assert again.is_set()
