"""Passkeys as people use them: the page in a real browser, with an authenticator that the browser plays."""

from __future__ import annotations

import queue
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from types import SimpleNamespace

import pytest

from cli.browser import chromium
from strongroom.client import Room, passkey
from strongroom.errors import AuthRequired
from vault.rooms import write_model

REF = "acme/tiny@1"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium(tmp_path_factory.mktemp("chromium"))
    if isinstance(found, str):
        pytest.skip(found)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found[0], args=found[1])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    devtools = context.new_cdp_session(page)
    devtools.send("WebAuthn.enable")
    options = {
        "protocol": "ctap2",
        "transport": "internal",
        "hasResidentKey": True,
        "hasUserVerification": True,
        "isUserVerified": True,
        "automaticPresenceSimulation": True,
    }
    page.authenticator = devtools.send("WebAuthn.addVirtualAuthenticator", {"options": options})["authenticatorId"]
    page.devtools = devtools
    yield page
    context.close()


@pytest.fixture
def rooms(tmp_path):
    room, _ = Room.init(tmp_path / "room", owner="user/olga")
    found = {"olga": room}
    room.put(write_model(tmp_path / "model"), "acme/tiny", share="1/2")
    for name, role in (("ana", "researcher"), ("ben", "officer"), ("eva", "executive")):
        room.principal_add(f"user/{name}", roles=[role])
        found[name] = Room(tmp_path / "room", f"user/{name}")
    yield found
    for each in found.values():
        each.close()


@pytest.fixture
def too_late(monkeypatch):
    """Time stands still for the page, until this is called with its address: then nobody has signed in time."""
    now = [0.0]
    monkeypatch.setattr(passkey, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def call(address):
        now[0] = 301.0
        parts = urllib.parse.urlsplit(address)
        with suppress(ConnectionRefusedError):  # it has looked at the time by itself
            socket.create_connection((parts.hostname, parts.port), timeout=60).close()  # it looks at the time again

    return call


def in_browser(page, work, look=lambda page: None):
    """Do `work`, which takes a `show`, while somebody clicks on the page that it shows."""
    shown: queue.Queue[str] = queue.Queue()
    ended: list[object] = []

    def run():
        try:
            ended.append(work(shown.put))
        except BaseException as error:  # noqa: BLE001 - handed over
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    page.goto(shown.get(timeout=60))
    look(page)
    page.get_by_role("button").click()
    page.get_by_role("status").get_by_text("Done.").wait_for()
    thread.join(60)
    (found,) = ended
    if isinstance(found, BaseException):
        raise found
    return found


def test_added_and_asked_at_every_approval(page, rooms):
    added = in_browser(page, rooms["ben"].passkeys.add)
    assert added["state"] == "active"
    texts = []
    for reason in ("<script>alert(1)</script>", "again"):
        asked = rooms["ana"].request(REF, reason=reason)
        done = in_browser(
            page,
            lambda show, asked=asked: rooms["ben"].approve(asked["id"], show=show),
            lambda page: texts.append(page.get_by_role("main").inner_text()),
        )
        assert done["approved_by"] == ["user/ben"]
        assert rooms["eva"].approve(asked["id"])["state"] == "approved"
        assert asked["id"] in texts[-1]
        assert REF in texts[-1]
        assert "user/ana" in texts[-1]
    assert page.problems == []  # the page's own policy refuses nothing of it
    credentials = page.devtools.send("WebAuthn.getCredentials", {"authenticatorId": page.authenticator})["credentials"]
    assert credentials[0]["signCount"] >= 2
    with rooms["olga"]._vault.custodian.ledger.view() as state:
        assert state.requests[asked["id"]].approvals[0].method == "passkey"
    assert rooms["olga"].log.verify()["ok"]


def test_a_request_that_is_denied_by_a_passkey(page, rooms):
    in_browser(page, rooms["ben"].passkeys.add)
    asked = rooms["ana"].request(REF, reason="x")
    denied = in_browser(page, lambda show: rooms["ben"].deny(asked["id"], reason="no", show=show))
    assert denied["state"] == "denied"


def test_an_authenticator_that_does_not_know_who_is_there(page, rooms, too_late):
    in_browser(page, rooms["ben"].passkeys.add)
    page.devtools.send("WebAuthn.setUserVerified", {"authenticatorId": page.authenticator, "isUserVerified": False})
    asked = rooms["ana"].request(REF, reason="x")
    shown: queue.Queue[str] = queue.Queue()
    caught: list[BaseException] = []

    def run():
        try:
            rooms["ben"].approve(asked["id"], show=shown.put)
        except AuthRequired as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    address = shown.get(timeout=60)
    page.goto(address)
    page.get_by_role("button").click()
    page.get_by_role("status").get_by_text("Nothing was signed").wait_for()
    too_late(address)
    thread.join(60)
    assert [error.code for error in caught] == ["passkey.nobody"]
    assert rooms["ana"].requests()[0]["approved_by"] == []


class TestThePage:
    """Without a browser: what others on this machine, or pages in its browser, can do to it."""

    @pytest.fixture
    def asked(self, too_late):
        return lambda visit: self.ask(visit, too_late)

    def ask(self, visit, too_late):
        shown: queue.Queue[str] = queue.Queue()
        ended: list[object] = []

        def run():
            try:
                ended.append(passkey.ask("get", {"challenge": "AA"}, "a <b>", {"<i>": "</dd>"}, "go", shown.put))
            except AuthRequired as error:
                ended.append(error.code)

        thread = threading.Thread(target=run)
        thread.start()
        address = shown.get(timeout=60)
        found = visit(address)
        too_late(address)
        thread.join(60)
        return found, ended[0]

    def test_texts_are_no_markup_and_the_policy_is_strict(self, asked):
        def visit(address):
            with urllib.request.urlopen(address, timeout=60) as answer:
                return answer.read().decode(), answer.headers["Content-Security-Policy"]

        (page, policy), _ = asked(visit)
        assert "<b>" not in page
        assert "&lt;i&gt;" in page
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy

    @pytest.mark.parametrize(
        ("path", "headers"),
        [("/", {}), ("/guess", {}), (None, {"Host": "evil.example"}), (None, {"Host": "127.0.0.1"})],
    )
    def test_others_get_nothing_and_say_nothing(self, asked, path, headers):
        def visit(address):
            base, _, secret = address.rpartition("/")
            target = base + (path or f"/{secret}")
            codes = []
            for data in (None, b'{"id":"x"}'):
                request = urllib.request.Request(target, data=data, headers=headers)
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(request, timeout=60)
                codes.append(caught.value.code)
                caught.value.close()
            return codes

        codes, ended = asked(visit)
        assert codes == [404, 404]
        assert ended == "passkey.nobody"
