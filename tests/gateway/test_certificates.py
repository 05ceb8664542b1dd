"""Callers that show a certificate in the handshake: who they are, until when, and what is not believed."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import ssl
import subprocess
import sys
import threading
import time

import openai
import pytest

from gateway.places import ANA, OWNER, REF, STREAM, Gateway, Place, chat, token, whole
from loopback import free_port
from server.provider import TrustDomain, usage
from strongroom.cli.main import execute
from strongroom.crypto.authority import Authority as WebAuthority
from strongroom.errors import BackendError
from strongroom.formats.authority import X509, Authority
from strongroom.gateway import certificates
from strongroom.gateway.reload import Reload

EVAL, SPARE = "workload/eval-7", "workload/spare"
ID = {EVAL: "spiffe://example.org/eval/7", SPARE: "spiffe://example.org/spare"}


@pytest.fixture(scope="module")
def house(tmp_path_factory, domain):
    folder = tmp_path_factory.mktemp("place")
    made = Place(folder)
    authority = WebAuthority(folder / "web", "Gateway")
    with made.room() as room:
        room.authority_add(Authority(X509, domain.name, bundle=domain.bundle))
        for path, spiffe in ID.items():
            room.principal_add(path, roles=["researcher"], spiffe=spiffe)
    chain = folder / "server.pem"
    made.certificate, made.ca, made.authority = (chain, chain), authority.pem, authority
    renew(made)
    yield made
    made.stop()


def renew(place):
    with place.authority.issued(["127.0.0.1"]) as path:
        place.certificate[0].write_bytes(path.read_bytes())


@pytest.fixture
def gateway(place):
    return place.gateway('[records]\ndurable = "before"\n', certificate=place.certificate)


@pytest.fixture
def call(gateway, tmp_path):
    made = []

    def one(shown: tuple[str, bytes] | None = None, **context) -> Caller:
        made.append(Caller(gateway, tmp_path, shown, **context))
        return made[-1]

    yield one
    for each in made:
        each.connection.close()


class Caller:
    """A connection with a certificate, or without."""

    def __init__(self, gateway, folder, shown: tuple[str, bytes] | None, **context) -> None:
        self.tls = ssl.create_default_context(cadata=gateway.place.ca)
        for name, value in context.items():
            setattr(self.tls, name, value)
        if shown is not None:
            (folder / "svid.pem").write_text(shown[0])
            (folder / "svid.key").write_bytes(shown[1])
            self.tls.load_cert_chain(folder / "svid.pem", folder / "svid.key")
        self.connection = http.client.HTTPSConnection("127.0.0.1", gateway.port, timeout=60, context=self.tls)

    def post(self, **headers: str) -> tuple[int, str]:
        """Status, and the content or the error's code."""
        body = json.dumps(chat())
        self.connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json", **headers})
        answer = self.connection.getresponse()
        said = json.loads(answer.read())
        return answer.status, said["error"]["code"] if "error" in said else said["choices"][0]["message"]["content"]


GONE = (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)
NOBODY = (401, "invalid_api_key")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_workload_is_who_its_certificate_says(place, call, domain):
    eval7 = call(domain.svid(ID[EVAL]))
    assert eval7.post() == (200, "Hello.")
    assert (place.records()[-1]["by"], place.records()[-1]["key"]) == (EVAL, "")
    # Whoever shows a key, too, is the same by both, and every way to show it wrong stays one.
    assert eval7.post(**bearer(place.keys[ANA])) == NOBODY
    assert eval7.post(**bearer("sr-" + "A" * 43)) == NOBODY
    assert eval7.post(authorization="Basic YTpi") == NOBODY
    assert eval7.post() == (200, "Hello.")
    # Without one it is as everywhere.
    plain = call()
    assert plain.post() == NOBODY
    assert plain.post(**bearer("certificate")) == NOBODY
    assert plain.post(**bearer(place.keys[ANA])) == (200, "Hello.")


def test_a_key_of_its_own_beside_the_certificate(place, call, domain):
    """It counts, then: its limits, and its end."""
    chain, key = domain.svid(ID[EVAL])
    with place.room(EVAL) as room:
        room.login().with_certificate(chain, key, ID[EVAL])
    with place.room(EVAL) as room:
        own = room.apikeys.new("beside", 600)
    caller = call(domain.svid(ID[EVAL]))
    assert caller.post(**bearer(own["key"])) == (200, "Hello.")
    assert place.records()[-1]["key"] == own["id"]
    assert call(domain.svid(ID[SPARE])).post(**bearer(own["key"])) == NOBODY


def test_openais_client_with_a_certificate(gateway, call, domain):
    with openai.DefaultHttpxClient(verify=call(domain.svid(ID[EVAL])).tls) as http:
        client = openai.OpenAI(
            base_url=f"https://127.0.0.1:{gateway.port}/v1",
            api_key="certificate",
            http_client=http,
        )
        assert [each.id for each in client.models.list()] == [REF]


def test_no_header_speaks_of_a_certificate(place, call, domain):
    chain, _ = domain.svid(ID[EVAL])
    one_line = chain.replace("\n", "")
    headers = {
        "x-forwarded-client-cert": f"By=spiffe://example.org/door;URI={ID[EVAL]}",
        "x-ssl-client-cert": one_line,
        "ssl-client-cert": one_line,
        "client-cert": f":{one_line}:",
        "x-client-verify": "SUCCESS",
    }
    assert call().post(**headers) == NOBODY
    # Nor does it make somebody of who has shown another.
    assert call(domain.svid("spiffe://example.org/nobody")).post(**headers) == NOBODY


@pytest.mark.parametrize(
    ("handshake", "uris", "wrong"),
    [
        (True, (ID[EVAL],), {"end": -1}),
        (True, (ID[EVAL],), {"begin": 3000}),
        (False, (ID[EVAL],), {"usage": usage(signs=True, certificates=True)}),
        (False, (ID[EVAL], ID[SPARE]), {}),
        (False, (), {}),
        (False, ("spiffe://example.org/nobody",), {}),
        (False, ("spiffe://elsewhere.org/eval/7",), {}),
        (False, ("https://example.org/eval/7",), {}),
    ],
)
def test_certificates_that_are_nobodys(call, domain, handshake, uris, wrong):
    """Some OpenSSL refuses in the handshake; the rest are told what everybody else is told."""
    caller = call(domain.svid(*uris, **wrong))
    if handshake:
        with pytest.raises(GONE):
            caller.post()
    else:
        assert caller.post() == NOBODY


def test_a_certificate_of_another_authority_ends_the_handshake(call):
    stranger = TrustDomain()  # of the same name, which is not what decides
    with pytest.raises(GONE):
        call(stranger.svid(ID[EVAL])).post()


def test_a_chain_with_a_certificate_between(call, domain):
    """SPIRE's servers have authorities of their own below that of the bundle."""
    below = domain.between()
    chain, key = below.svid(ID[EVAL])
    assert call((chain + below.bundle, key)).post() == (200, "Hello.")


def test_each_connection_has_proved_the_key(call, domain, monkeypatch):
    """TLS 1.2 could resume a session, with a certificate whose key nobody has proved again."""
    shown = domain.svid(ID[EVAL])
    with pytest.raises(ssl.SSLError):
        call(shown, maximum_version=ssl.TLSVersion.TLSv1_2).post()
    caller = call(shown)
    assert caller.post() == (200, "Hello.")
    assert caller.connection.sock is not None
    session = caller.connection.sock.session
    assert session is None or not session.has_ticket
    monkeypatch.setattr(certificates, "_FRESH", -1.0)
    assert caller.post() == (200, "Hello.")
    assert caller.connection.sock is None  # the gateway has said that it closes it
    assert caller.post() == (200, "Hello.")  # on another one


def test_a_connection_is_worth_no_more_than_a_login(place, call, domain, monkeypatch):
    """The authority's `longest` holds for what it says here, too."""
    begin = time.time()
    monkeypatch.setattr(certificates.time, "time", lambda: begin - 9 * 3600)
    caller = call(domain.svid(ID[EVAL], begin=-10 * 3600))
    caller.connection.connect()
    assert caller.post() == NOBODY


def test_whoever_is_suspended_is_cut_off_under_way(place, call, domain):
    begun = threading.Event()

    def slow(_):
        yield STREAM
        yield token(" word")
        begun.set()
        while True:
            yield token(" word")
            yield 0.05

    place.inference.script = slow
    caller = call(domain.svid(ID[SPARE]))
    body = json.dumps(chat(stream=True, max_tokens=4096))
    caller.connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = caller.connection.getresponse()
    assert begun.wait(60)
    with place.room(OWNER) as room:
        room.principal_change(SPARE, state="suspended")
    last = answer.read().split(b"\n\n")[-2]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "invalid_api_key"
    place.inference.script = lambda _: [whole()]
    assert caller.post() == NOBODY


def test_a_domain_comes_and_goes_while_the_gateway_runs(place, call):
    other = TrustDomain("other.org")
    shown = other.svid("spiffe://other.org/job")
    with place.room() as room:
        room.authority_add(Authority(X509, other.name, bundle=other.bundle))
        room.principal_add("workload/job", roles=["researcher"], spiffe="spiffe://other.org/job")

    def found() -> tuple[int, str] | None:
        try:
            return call(shown).post()
        except GONE:
            return None

    end = time.monotonic() + 60
    while found() != (200, "Hello."):
        assert time.monotonic() < end
    kept = call(shown)
    assert kept.post() == (200, "Hello.")
    with place.room() as room:
        room.authority_rm(other.name)
    while kept.post() != NOBODY:
        assert time.monotonic() < end + 60
    assert found() == NOBODY


def test_a_new_certificate_of_its_own(place, gateway, call):
    """Certificates end, and a gateway that has to be started again for it cuts everybody off."""
    app, loop = place.newest, place.server.servers[0].get_loop()
    prepared = Reload(app, place.server.config.ssl, place.certificate)

    def again() -> tuple[str, ...]:
        async def both() -> tuple[str, ...]:
            await prepared.prepare(app.settings)
            return await prepared.take()

        return asyncio.run_coroutine_threadsafe(both(), loop).result(60)

    def serial() -> str:
        caller = call()
        caller.connection.connect()
        return caller.connection.sock.getpeercert()["serialNumber"]

    before = serial()
    good = place.certificate[0].read_bytes()
    place.certificate[0].write_bytes(good[: len(good) // 3])
    with pytest.raises(BackendError) as caught:
        again()
    assert caught.value.code == "gateway.certificate"
    assert caught.value.hint.startswith("--certificate FILE")
    assert serial() == before
    renew(place)
    assert again() == ("the gateway's certificate",)
    assert serial() != before
    assert call().post(**bearer(place.keys[ANA])) == (200, "Hello.")


@pytest.mark.parametrize("workers", [1, 2])
def test_as_it_is_started_and_what_is_revoked_while_it_runs(place, domain, tmp_path, workers):
    port = free_port(3)  # with a worker's metrics beside those of the other
    chain, crl, said = str(place.certificate[0]), tmp_path / "crl.pem", tmp_path / "stderr"
    crl.write_bytes(domain.crl(begin=-600))
    command = [sys.executable, "-m", "strongroom.cli", "--room", str(place.folder), "--json", "gateway"]
    upstream = ["--upstream", f"http://127.0.0.1:{place.inference.port}", "--listen", f"127.0.0.1:{port}"]
    tls = ["--certificate", chain, "--key", chain, "--client-certificates", "--crl", str(crl)]
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, *upstream, *tls, "--workers", str(workers), "--metrics", f"127.0.0.1:{port + 1}"],
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    made = []

    def one(shown) -> Caller:
        made.append(Caller(Gateway(place, port), tmp_path, shown))
        return made[-1]

    def hangup(list_: bytes, expected: str) -> None:
        crl.write_bytes(list_)
        before = len(said.read_text())
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 120
        while expected not in (found := said.read_text()[before:]):
            assert time.monotonic() < end, found
            time.sleep(0.02)

    try:
        assert json.loads(line := process.stdout.readline()).get("url") == f"https://127.0.0.1:{port}/v1", line
        shown, other = domain.svid(ID[EVAL]), domain.svid(ID[EVAL])
        streaming, begun = one(shown), threading.Event()

        def slow(_):
            yield STREAM
            yield token(" word")
            begun.set()
            while True:
                yield token(" word")
                yield 0.05

        place.inference.script = slow
        body = json.dumps(chat(stream=True, max_tokens=4096))
        streaming.connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = streaming.connection.getresponse()
        assert begun.wait(60)
        place.inference.script = lambda _: [whole()]
        kept, others = [one(shown) for _ in range(6)], one(other)
        assert {each.post() for each in (*kept, others)} == {(200, "Hello.")}
        begin = time.time()
        list_, end = domain.crl(shown[0], begin=-300), time.time()
        hangup(list_, "revoked certificates: 1 (before: 0), until ")
        # Connections that were made before are closed, also those that are not asked on, and what is under way ends.
        for each in kept:
            each.connection.sock.settimeout(60)
            assert each.connection.sock.recv(1) == b""
        last = answer.read().split(b"\n\n")[-2]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "invalid_api_key"
        assert one(shown).post() == NOBODY
        assert others.post() == (200, "Hello.")
        # What can't be used leaves in force what is.
        for wrong, why in (
            (domain.crl(begin=-5000), "is in force"),
            (domain.crl(begin=-100, end=-1), "ended"),
            (TrustDomain().crl(), "no authority of this room has signed"),
            (b"", "is no list of revoked certificates"),
        ):
            hangup(wrong, why)
            assert one(shown).post() == NOBODY
        assert one(other).post() == (200, "Hello.")
        assert begin - 1 <= Gateway(place, port).metrics(port + 1)["strongroom_gateway_crl_end"] - 3600 <= end + 1
        hangup(domain.crl(begin=-200), "revoked certificates: 0 (before: 1), until ")
        assert one(shown).post() == (200, "Hello.")
    finally:
        for each in made:
            each.connection.close()
        process.terminate()
        process.wait(120)
        process.stdout.close()


def test_a_gateway_does_not_start_with_a_list_that_has_ended(place, domain, tmp_path, capsys):
    crl = tmp_path / "crl.pem"
    crl.write_bytes(domain.crl(begin=-100, end=-1))
    chain = str(place.certificate[0])
    tls = ["--certificate", chain, "--key", chain, "--client-certificates", "--crl", str(crl)]
    listen = ["--listen", "127.0.0.1:0", "--upstream", f"http://127.0.0.1:{place.inference.port}"]
    code = execute(["--room", str(place.folder), "--json", "gateway", *listen, *tls])
    assert (code, json.loads(capsys.readouterr().out)["error"]["code"]) == (2, "revocation.expired")


def test_revoked_certificates_are_those_of_callers(place, capsys):
    code = execute(["--room", str(place.folder), "--json", "gateway", "--upstream", "http://127.0.0.1:1", "--crl", "x"])
    assert (code, json.loads(capsys.readouterr().out)["error"]["code"]) == (2, "gateway.crl")


@pytest.mark.parametrize("more", [[], ["--certificate", "x", "--key", "x", "--behind-proxy"]])
def test_certificates_are_shown_to_whoever_ends_tls(place, capsys, more):
    """Behind a proxy they would be the proxy's, or words in a header."""
    upstream = ["--upstream", "http://127.0.0.1:1"]
    code = execute(["--room", str(place.folder), "--json", "gateway", *upstream, "--client-certificates", *more])
    assert (code, json.loads(capsys.readouterr().out)["error"]["code"]) == (2, "gateway.client_certificates")
