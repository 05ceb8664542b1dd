"""Logins, attacked: what a token or a certificate introduces, and what it does not (spec/ledger.md, section 9)."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hmac
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwk

from server.provider import CLIENT, Provider, TrustDomain, usage
from strongroom.client import Room
from strongroom.core.clock import unix
from strongroom.crypto import svid
from strongroom.crypto.release import ReleaseKey
from strongroom.crypto.signatures import Signer
from strongroom.errors import AuthRequired, BackendError, Conflict, Denied, StrongroomError, Tampered, UsageError
from strongroom.formats.authority import AUDIENCE, NONCE, OIDC, X509, Authority, audience_name, key_name, svid_message
from strongroom.formats.entry import Entry, Private
from strongroom.formats.statement import Statement
from strongroom.ledger.statements import Statements
from strongroom.storage.fetch import fetch
from strongroom.vault.logins import Logins
from strongroom.vault.vault import Vault
from vault.rooms import write_model

REF = "acme/tiny@1"
HOUR = 3600
CI = "spiffe://example.org/ci/eval-7"


class Lobby:
    """A team's room whose clock can be moved, in which Ana and a workload have no keys, and log in."""

    def __init__(self, folder, provider, domain) -> None:
        self.folder, self.provider, self.domain, self.offset = folder, provider, domain, 0
        self.still: int | None = None  # when the clock was stopped
        self.vault = Vault(folder, clock=lambda: (self.still or unix()) + self.offset)
        self.custodian = self.vault.custodian
        self.count = 0

    def signer(self) -> Signer:
        self.count += 1
        return Signer(self.count.to_bytes(32, "big"))

    def say(self, kind, by, body, signer=None, **how) -> str:
        signer = signer or self.vault.identities.signer(by)
        at = self.vault.clock()
        how = {"room": self.vault.id.hex(), "at": at, **how}
        return Statement.sign(kind, body, by=by, signer=signer, **how).envelope

    def login(self, by="user/ana", token=None, *, signer=None, named=None, duration=HOUR, how=(), **claims):
        """Ana's login, with a token that names `named` (the key that it is for), and has other `claims`."""
        signer = signer or self.signer()
        if token is None:
            nonce = key_name(self.vault.id, (named or signer).public_key)
            token = self.provider.token(**{"nonce": nonce, **claims})
        method = claims.get("method", OIDC)
        body = {
            "method": method,
            "authority": self.provider.issuer,
            "public_key": signer.public_key.hex(),
            "duration": duration,
        }
        self.custodian.login(self.say("login", by, body, signer, **dict(how)), {"token": token})
        return signer

    def arrive(self, by="workload/ci", made=None, *, signer=None, signs=None, domain="example.org", key=None):
        """A workload's login with its certificate."""
        signer = signer or self.signer()
        chain, private = made or self.domain.svid(CI)
        body = {"method": X509, "authority": domain, "public_key": signer.public_key.hex(), "duration": HOUR}
        envelope = self.say("login", by, body, signer)
        message = svid_message(self.vault.id, signs or Statement.decode(envelope).digest)
        signature = base64.b64encode(svid.sign(key or private, message)).decode()
        self.custodian.login(envelope, {"chain": chain, "signature": signature})
        return signer

    def request(self, by, signer):
        """Something signed with a key that was introduced."""
        note = Private.fresh("reason", "evaluation")
        body = {"action": "load", "ref": REF, "for": by, "duration": HOUR, "uses": None, "reason": note.commitment}
        envelope = self.say("request", by, body, signer)
        self.custodian.request(envelope, note)
        return Statement.decode(envelope)

    def approve(self, by, said, signer=None):
        body = {"request": said.digest, "duration": 0, "uses": None}
        return self.custodian.approve(self.say("approve", by, body, signer))

    def principal(self, path, by="user/olga", signer=None, **changes):
        before = self.custodian.known(path)
        body = {name: getattr(before, name) for name in ("key", "person", "roles", "teams", "state")}
        body |= {
            "principal": path,
            "before": before.entry,
            **({"subject": before.subject} if before.subject else {}),
            **changes,
        }
        return self.custodian.change_principal(self.say("principal", by, body, signer))

    def revoke(self, target, by="user/ben"):
        note = Private.fresh("reason", "gone")
        self.custodian.revoke(self.say("revoke", by, {"target": target, "reason": note.commitment}), note)

    def authority(self, name, text, by="user/olga", signer=None):
        return self.custodian.change_authority(self.say("authority", by, {"authority": name, "text": text}, signer))

    def entries(self):
        size = self.custodian.ledger.checkpoint()[0].size
        return [Entry.decode(data) for data in self.custodian.ledger.entries(0, size)]

    def refused(self, code, act, *args, **options):
        """Refused with `code`, and nothing was introduced."""
        with pytest.raises(StrongroomError) as caught:
            act(*args, **options)
        assert caught.value.code == code, caught.value
        with self.custodian.ledger.view() as state:
            assert not state.sessions
        return caught.value


@pytest.fixture(scope="module")
def template(tmp_path_factory, provider, domain):
    folder = tmp_path_factory.mktemp("lobby")
    room, _ = Room.init(folder / "room", owner="user/olga")
    with room:
        room.put(write_model(folder / "model"), "acme/tiny", share="1/2")
        room.authority_add(oidc(provider))
        room.authority_add(Authority(X509, "example.org", bundle=domain.bundle))
        room.principal_add("user/ana", roles=["researcher"], oidc=f"{provider.issuer}#ana@example.com")
        room.principal_add("workload/ci", roles=["researcher"], spiffe=CI)
        room.principal_add("user/ben", roles=["officer"])
        room.principal_add("user/eva", roles=["executive"])
        asked = room.principal_add(
            "user/ann", roles=["officer"], person="user/ana", oidc=f"{provider.issuer}#ann@example.com"
        )
    with Room(folder / "room", "user/eva") as second:
        second.approve(asked["id"])
    return folder / "room"


@pytest.fixture
def lobby(tmp_path, template, provider, domain, monkeypatch):
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    shutil.copytree(template, tmp_path / "room")
    found = Lobby(tmp_path / "room", provider, domain)
    yield found
    found.vault.close()
    provider.keys = {"one": provider.keys["one"]}
    provider.extra, provider.claims, provider.redirect, provider.subject = [], {}, "", "ana@example.com"
    provider.body = None


def oidc(provider, **more):
    return Authority(
        OIDC, provider.issuer, CLIENT, **{"binding": NONCE, "algorithms": ("RS256",), "ca": provider.ca, **more}
    )


def test_a_token_introduces_a_key_and_the_key_speaks(lobby):
    key = lobby.login()
    said = lobby.request("user/ana", key)
    assert lobby.custodian.show_request(said.id)["by"] == "user/ana"
    entry = lobby.entries()[-2]
    assert (entry.type, entry.by, entry.body["method"]) == ("session", "user/ana", "oidc")
    assert "ana@example.com" not in b"".join(each.encode() for each in lobby.entries()).decode()


def test_the_log_is_verified_with_statements_under_keys_of_logins(lobby):
    lobby.request("user/ana", lobby.login())
    lobby.request("workload/ci", lobby.arrive())
    with Room(lobby.folder, "user/olga") as room:
        assert room.log.verify()["statements"] > 0


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        pytest.param({"kid": None}, {}, id="no key is named"),
        pytest.param({"kid": "two"}, {}, id="an unknown key is named"),
        pytest.param({"typ": "at+jwt"}, {}, id="an access token"),
        pytest.param({"typ": "logout+jwt"}, {}, id="a logout token"),
        pytest.param({"alg": "PS256"}, {}, id="an algorithm that is not pinned"),
        pytest.param({}, {"exp": int(time.time()) - 120}, id="expired"),
        pytest.param({}, {"exp": "9999999999"}, id="ends at a text"),
        pytest.param({}, {"exp": True}, id="ends at true"),
        pytest.param({}, {"exp": float("inf")}, id="ends at infinity"),
        pytest.param({}, {"exp": float("nan")}, id="ends at no number"),
        pytest.param({}, {"iat": float("nan")}, id="made at no number"),
        pytest.param({}, {"nbf": -1}, id="good before there was time"),
        pytest.param({}, {"iat": int(time.time()) + 86_400}, id="made later"),
        pytest.param({}, {"iat": int(time.time()) - 900}, id="made long ago"),
        pytest.param({}, {"nbf": int(time.time()) + 86_400}, id="not good yet"),
        pytest.param({}, {"without": ("exp",)}, id="never ends"),
        pytest.param({}, {"without": ("iat",)}, id="was never made"),
        pytest.param({}, {"without": ("sub",)}, id="names nobody"),
        pytest.param({}, {"without": ("aud",)}, id="for no audience"),
        pytest.param({}, {"without": ("nonce",)}, id="for no key"),
        pytest.param({}, {"aud": "another"}, id="for another audience"),
        pytest.param({}, {"aud": [CLIENT, "another"]}, id="for others, too"),
        pytest.param({}, {"aud": []}, id="for an empty list"),
        pytest.param({}, {"azp": "another"}, id="given to somebody else"),
        pytest.param({}, {"iss": "https://127.0.0.1"}, id="by another issuer"),
        pytest.param({}, {"nonce": "x"}, id="with another nonce"),
        pytest.param({}, {"sub": 7}, id="names a number"),
    ],
)
def test_a_token_that_is_refused(lobby, header, claims):
    lobby.refused("login.refused", lobby.login, header=header, **claims)


def test_an_issuer_with_a_slash_is_another(lobby):
    lobby.refused("login.refused", lobby.login, iss=f"{lobby.provider.issuer}/")


def test_an_audience_alone_in_a_list(lobby):
    lobby.login(aud=[CLIENT])


def test_a_token_without_a_signature(lobby):
    key = lobby.signer()
    nonce = key_name(lobby.vault.id, key.public_key)
    _, payload, signature = lobby.provider.token(nonce=nonce).split(".")
    for algorithm in ("none", "None", "NONE", "", None):
        header = base64.urlsafe_b64encode(json.dumps({"alg": algorithm, "kid": "one"}).encode()).rstrip(b"=").decode()
        for end in ("", signature):
            lobby.refused("login.refused", lobby.login, token=f"{header}.{payload}.{end}", signer=key)


def test_the_public_key_is_no_secret_to_sign_with(lobby):
    """HS256 under the RSA public key: what a verifier that takes the algorithm from the token would believe."""
    for secret in (lobby.provider.keys["one"].as_pem(private=False), b"x" * 32):
        key = lobby.signer()
        nonce = key_name(lobby.vault.id, key.public_key)
        # By hand: the library would not sign with such a key.
        _, payload, _ = lobby.provider.token(nonce=nonce).split(".")
        header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"one","typ":"JWT"}').rstrip(b"=").decode()
        code = hmac.digest(secret, f"{header}.{payload}".encode(), "sha256")
        token = f"{header}.{payload}.{base64.urlsafe_b64encode(code).rstrip(b'=').decode()}"
        lobby.refused("login.refused", lobby.login, token=token, signer=key)


def test_another_key_under_the_same_name(lobby):
    other = jwk.RSAKey.generate_key(2048, private=True)
    lobby.refused("login.refused", lobby.login, key=other)
    lobby.refused("login.refused", lobby.login, key=other, header={"jwk": other.as_dict(private=False)})
    lobby.refused("login.refused", lobby.login, key=other, header={"jku": "https://127.0.0.1:1/jwks"})


def test_two_keys_of_one_name(lobby):
    provider = lobby.provider
    other = jwk.RSAKey.generate_key(2048, private=True)
    provider.extra = [{**other.as_dict(private=False), "kid": "one"}]
    lobby.refused("login.refused", lobby.login)


@pytest.mark.parametrize("change", [{"use": "enc"}, {"key_ops": ["encrypt"]}, {"alg": "PS256"}, {"kty": "EC"}], ids=str)
def test_a_key_for_something_else(lobby, change):
    key = jwk.RSAKey.generate_key(2048, private=True)
    lobby.provider.extra = [{**key.as_dict(private=False), "kid": "other", "use": "sig", **change}]
    lobby.refused("login.refused", lobby.login, key=key, header={"kid": "other"})


def test_a_key_that_is_too_short(lobby):
    short = rsa.generate_private_key(65537, 1024)
    numbers = short.public_key().public_numbers()
    modulus, exponent = (
        encoded(number.to_bytes((number.bit_length() + 7) // 8, "big")) for number in (numbers.n, numbers.e)
    )
    lobby.provider.extra = [{"kty": "RSA", "kid": "short", "use": "sig", "n": modulus, "e": exponent}]
    key = lobby.signer()
    _, payload, _ = lobby.provider.token(nonce=key_name(lobby.vault.id, key.public_key)).split(".")
    header = encoded(b'{"alg":"RS256","kid":"short"}')
    said = f"{header}.{payload}"
    signature = short.sign(said.encode(), PKCS1v15(), SHA256())
    lobby.refused("login.refused", lobby.login, token=f"{said}.{encoded(signature)}", signer=key)


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_two_members_of_one_name(lobby):
    key = lobby.signer()
    nonce = key_name(lobby.vault.id, key.public_key)
    head, payload, end = lobby.provider.token(nonce=nonce).split(".")
    text = base64.urlsafe_b64decode(payload + "==").decode()
    twice = base64.urlsafe_b64encode((text[:-1] + ',"sub":"x"}').encode()).rstrip(b"=").decode()
    lobby.refused("login.refused", lobby.login, token=f"{head}.{twice}.{end}", signer=key)


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b", "a.b.c.d", "é.b.c", "." * 20_000, "e30.e30.e30", "W10.W10.W10"]
)
def test_what_is_no_token(lobby, token):
    lobby.refused("login.refused", lobby.login, token=token)


class TestWhomATokenIsFor:
    def test_not_for_another_key(self, lobby):
        """Stolen on the way: the thief has the token, and not the key that it names."""
        lobby.refused("login.refused", lobby.login, named=lobby.signer())

    def test_not_for_another_room(self, lobby):
        key = lobby.signer()
        token = lobby.provider.token(nonce=key_name(bytes(16), key.public_key))
        lobby.refused("login.refused", lobby.login, token=token, signer=key)

    def test_not_for_another_principal(self, lobby):
        for path in ("user/ben", "user/ann", "workload/ci", "user/nobody"):
            assert lobby.refused("auth.refused", lobby.login, path).hint

    def test_not_for_another_subject(self, lobby):
        lobby.refused("auth.refused", lobby.login, sub="eve@example.com")

    def test_not_twice(self, lobby):
        key = lobby.signer()
        token = lobby.provider.token(nonce=key_name(lobby.vault.id, key.public_key))
        lobby.login(token=token, signer=key)
        with pytest.raises(Conflict) as caught:
            lobby.login(token=token, signer=key)
        assert caught.value.code == "login.replayed"

    def test_the_same_statement_not_twice(self, lobby):
        key = lobby.signer()
        nonce = key_name(lobby.vault.id, key.public_key)
        body = {
            "method": OIDC,
            "authority": lobby.provider.issuer,
            "public_key": key.public_key.hex(),
            "duration": HOUR,
        }
        said = lobby.say("login", "user/ana", body, key)
        first = lobby.custodian.login(said, {"token": lobby.provider.token(nonce=nonce)})
        before = lobby.entries()
        # Whoever lost the answer with the connection says it again; whatever comes with it, nothing more is recorded.
        for proof in ({"token": lobby.provider.token(nonce=nonce, jti="x")}, {}):
            assert lobby.custodian.login(said, proof) == first
        assert lobby.entries() == before
        lobby.offset = 400
        with pytest.raises(AuthRequired):
            lobby.custodian.login(said, {})

    def test_the_statement_is_made_with_the_key(self, lobby):
        key, other = lobby.signer(), lobby.signer()
        body = {
            "method": OIDC,
            "authority": lobby.provider.issuer,
            "public_key": key.public_key.hex(),
            "duration": HOUR,
        }
        said = lobby.say("login", "user/ana", body, other)
        token = lobby.provider.token(nonce=key_name(lobby.vault.id, key.public_key))
        lobby.refused("auth.refused", lobby.custodian.login, said, {"token": token})

    def test_a_statement_for_another_room_or_time(self, lobby):
        lobby.refused("auth.refused", lobby.login, how={"room": "00" * 16})
        lobby.refused("statement.stale", lobby.login, how={"at": unix() - 600})

    def test_not_a_key_that_is_somebodys(self, lobby):
        lobby.refused("login.key", lobby.login, signer=lobby.vault.identities.signer("user/ben"))


def test_nothing_is_asked_of_the_issuer_before_the_statement_is_right(lobby):
    before = len(lobby.provider.asked)
    lobby.refused("auth.refused", lobby.login, how={"room": "00" * 16})
    lobby.refused("statement.stale", lobby.login, how={"at": unix() - 600})
    assert len(lobby.provider.asked) == before


def test_strangers_do_not_make_the_custodian_ask_again_and_again(lobby):
    lobby.login()
    before = len(lobby.provider.asked)
    with lobby.custodian.ledger.view() as state:
        sessions = dict(state.sessions)
    for number in range(20):
        with pytest.raises(AuthRequired):
            lobby.login(header={"kid": f"unknown-{number}"})
    assert len(lobby.provider.asked) == before
    with lobby.custodian.ledger.view() as state:
        assert state.sessions == sessions


class TestAnIssuerThatIsDown:
    def test_is_to_be_asked_again_and_there_is_no_fallback(self, lobby):
        lobby.provider.redirect = "https://127.0.0.1:1/elsewhere"
        error = lobby.refused("issuer.unreachable", lobby.login)
        assert isinstance(error, BackendError)
        assert error.retryable

    @pytest.mark.parametrize(
        "body",
        [b"", b"x", b"[]", b"7", b'"x"', b"{" * 100_000, b" " * 300_000 + b"{}", b"\xff"],
        ids=lambda each: each[:4],
    )
    def test_that_answers_with_something_else(self, lobby, body):
        lobby.provider.body = body
        lobby.refused("issuer.unreachable", lobby.login)

    def test_that_answers_without_end(self, lobby, monkeypatch):
        monkeypatch.setattr("strongroom.storage.fetch._TIME", 0.3)
        ended = threading.Event()

        def drip(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{")
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    connection.sendall(b" ")

        with secure(lobby.provider, drip) as address:
            with pytest.raises(BackendError) as caught:
                fetch(f"{address}/x", lobby.provider.ca)
            ended.set()
        assert caught.value.code == "issuer.unreachable"

    def test_that_says_it_is_another(self, lobby):
        lobby.provider.claims = {"issuer": "https://elsewhere.example"}
        lobby.refused("issuer.unreachable", lobby.login)

    @pytest.mark.parametrize("where", ["http://127.0.0.1:1/jwks", "file:///etc/passwd", "", None, 7])
    def test_that_has_its_keys_elsewhere(self, lobby, where):
        lobby.provider.claims = {"jwks_uri": where}
        lobby.refused("issuer.address", lobby.login)

    def test_whose_certificate_is_anothers(self, lobby, tmp_path):
        other = Provider(tmp_path / "other")
        try:
            lobby.authority(lobby.provider.issuer, "")
            changed = dataclasses.replace(oidc(lobby.provider), ca=other.ca)
            asked = lobby.authority(lobby.provider.issuer, changed.encode())
            lobby.approve("user/eva", Statement.decode(lobby.entries()[asked["entry"]].body["statement"]))
            lobby.refused("issuer.unreachable", lobby.login)
        finally:
            other.stop()


class Watch:
    """A clock for how old an issuer's keys are."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class TestAnIssuersKeys:
    """Asked for by need, and not by whoever shows whatever."""

    @pytest.fixture
    def issuer(self, monkeypatch, provider):
        watch, asked = Watch(), []
        monkeypatch.setattr("strongroom.vault.logins.time", watch)

        def get(url, _):
            asked.append(url)
            return {"issuer": provider.issuer, "jwks_uri": f"{provider.issuer}/jwks"} | provider.jwks()

        return watch, asked, Logins(get)

    def login(self, lobby, logins, **options):
        key = lobby.signer()
        authority = oidc(lobby.provider)
        body = {"method": OIDC, "authority": authority.name, "public_key": key.public_key.hex(), "duration": HOUR}
        said = Statement.decode(lobby.say("login", "user/ana", body, key))
        token = lobby.provider.token(nonce=key_name(lobby.vault.id, key.public_key), **options)
        return logins.verify(authority, said, {"token": token}, unix())

    def test_are_kept_for_an_hour(self, lobby, issuer):
        watch, asked, logins = issuer
        for _ in range(5):
            self.login(lobby, logins)
        assert len(asked) == 2
        watch.now += 3601
        self.login(lobby, logins)
        assert len(asked) == 4

    def test_are_asked_for_again_when_they_change(self, lobby, issuer):
        watch, asked, logins = issuer
        self.login(lobby, logins)
        lobby.provider.keys["two"] = jwk.RSAKey.generate_key(2048, private=True)
        with pytest.raises(AuthRequired):
            self.login(lobby, logins)
        watch.now += 31
        self.login(lobby, logins)
        assert len(asked) == 4

    def test_are_asked_for_once_in_a_while_whatever_strangers_show(self, lobby, issuer):
        watch, asked, logins = issuer
        self.login(lobby, logins)
        for _ in range(10):
            watch.now += 10
            with pytest.raises(AuthRequired):
                self.login(lobby, logins, header={"kid": "unknown"})
        assert len(asked) <= 2 + 2 * 4

    def test_that_is_down_is_not_asked_by_everybody(self, lobby, monkeypatch):
        watch, asked = Watch(), []
        monkeypatch.setattr("strongroom.vault.logins.time", watch)

        def get(url, _):
            asked.append(url)
            raise BackendError("issuer.unreachable", "down")

        logins = Logins(get)
        for _ in range(10):
            with pytest.raises(BackendError):
                self.login(lobby, logins)
        assert len(asked) == 1
        watch.now += 31
        with pytest.raises(BackendError):
            self.login(lobby, logins)
        assert len(asked) == 2

    def test_are_asked_for_once_by_many(self, lobby, provider):
        asked, both = [], threading.Barrier(4)

        def get(url, _):
            asked.append(url)
            return {"issuer": provider.issuer, "jwks_uri": f"{provider.issuer}/jwks"} | provider.jwks()

        logins = Logins(get)

        def attempt(_):
            both.wait(60)
            return self.login(lobby, logins)

        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(attempt, range(4)))) == 4
        assert len(asked) == 2


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # the provider of the tests signs with it
@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        ("RS256", lambda: jwk.RSAKey.generate_key(2048, private=True)),
        ("PS256", lambda: jwk.RSAKey.generate_key(2048, private=True)),
        ("ES256", lambda: jwk.ECKey.generate_key("P-256", private=True)),
        ("EdDSA", lambda: jwk.OKPKey.generate_key("Ed25519", private=True)),
    ],
)
def test_every_algorithm_that_may_be_pinned(lobby, algorithm, key):
    made, speaker = key(), lobby.signer()
    jwks = json.dumps({"keys": [{**made.as_dict(private=False), "kid": "k"}]})
    authority = oidc(lobby.provider, algorithms=(algorithm,), jwks=jwks)
    body = {"method": OIDC, "authority": authority.name, "public_key": speaker.public_key.hex(), "duration": HOUR}
    said = Statement.decode(lobby.say("login", "user/ana", body, speaker))
    nonce = key_name(lobby.vault.id, speaker.public_key)
    token = lobby.provider.token(header={"alg": algorithm, "kid": "k"}, key=made, nonce=nonce)
    assert Logins().verify(authority, said, {"token": token}, unix()).subject
    others = dataclasses.replace(authority, algorithms=tuple(sorted({"RS256", "ES256"} - {algorithm})))
    with pytest.raises(AuthRequired):
        Logins().verify(others, said, {"token": token}, unix())


@contextlib.contextmanager
def secure(provider, answer):
    """A server under the provider's certificate that does `answer` with each connection, after its request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)  # for a client whose time is over before it has come

        def serve():
            with contextlib.suppress(OSError):
                plain, _ = listener.accept()
                with plain, provider.tls.wrap_socket(plain, server_side=True) as connection:
                    connection.recv(65536)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(30)


class TestWhenItEnds:
    def dead(self, lobby, key, by="user/ana"):
        with pytest.raises(AuthRequired) as caught:
            lobby.request(by, key)
        assert caught.value.code == "auth.refused"

    def test_after_its_time(self, lobby):
        lobby.still = unix()
        key = lobby.login(duration=HOUR)
        lobby.offset = HOUR - 1
        lobby.request("user/ana", key)
        lobby.offset = HOUR
        self.dead(lobby, key)

    def test_never_after_more_than_eight_hours(self, lobby):
        key = lobby.login(duration=30 * 24 * HOUR)
        lobby.offset = 8 * HOUR + 1
        self.dead(lobby, key)

    def test_with_the_certificate(self, lobby):
        key = lobby.arrive(made=lobby.domain.svid(CI, end=120))
        lobby.request("workload/ci", key)
        lobby.offset = 121
        self.dead(lobby, key, "workload/ci")

    def test_when_the_principal_is_suspended_and_it_does_not_come_back(self, lobby):
        key = lobby.login()
        lobby.revoke("user/ana")
        self.dead(lobby, key)
        lobby.principal("user/ana", state="active")
        self.dead(lobby, key)

    @pytest.mark.parametrize("changes", [{"roles": []}, {"state": "removed"}, {"subject": "ab" * 32}])
    def test_when_the_principal_is_changed(self, lobby, changes):
        key = lobby.login()
        lobby.principal("user/ana", **changes)
        self.dead(lobby, key)

    def test_when_the_issuer_is_removed(self, lobby):
        key = lobby.login()
        lobby.authority(lobby.provider.issuer, "")
        self.dead(lobby, key)
        lobby.refused("login.refused", lobby.login)

    def test_when_the_trust_domain_is_removed(self, lobby):
        key = lobby.arrive()
        lobby.authority("example.org", "")
        self.dead(lobby, key, "workload/ci")
        lobby.refused("login.refused", lobby.arrive)

    def test_when_the_clock_is_set_back(self, lobby):
        lobby.offset = 2 * HOUR
        lobby.provider.claims = {}
        now = unix() + lobby.offset
        key = lobby.login(iat=now, exp=now + 60)
        lobby.offset = 0
        note = Private.fresh("reason", "it was ahead")
        said = lobby.vault.voice("user/ben").say("clock", {"reason": note.commitment})
        lobby.custodian.acted(said.envelope, note)
        self.dead(lobby, key)

    def test_of_a_principal_that_was_suspended_before(self, lobby):
        lobby.revoke("user/ana")
        lobby.refused("auth.refused", lobby.login)


class TestWhatAProviderMayNot:
    def test_approve_what_the_same_person_asked_for(self, lobby):
        """Ana has a second identity, an officer, known by its subject at the provider."""
        said = lobby.request("user/ana", lobby.login())
        second = lobby.login("user/ann", sub="ann@example.com")
        with pytest.raises(Denied) as caught:
            lobby.approve("user/ann", said, second)
        assert caught.value.code == "approve.own"

    def test_approve_what_others_asked_for(self, lobby):
        said = lobby.request("workload/ci", lobby.arrive())
        second = lobby.login("user/ann", sub="ann@example.com")
        with pytest.raises(Denied) as caught:
            lobby.approve("user/ann", said, second)
        assert caught.value.evidence["rule"] == "own-key-to-decide"
        lobby.approve("user/ben", said)

    def test_break_the_glass(self, lobby):
        """An officer who is known by a subject only: else whoever runs the provider would have the weights."""
        second = lobby.login("user/ann", sub="ann@example.com")
        note = Private.fresh("reason", "it is urgent")
        body = {
            "action": "load",
            "ref": REF,
            "holder": "user/ann",
            "public_key": ReleaseKey().public_key.hex(),
            "challenge": lobby.custodian.challenge().hex(),
            "break_glass": True,
            "reason": note.commitment,
        }
        with pytest.raises(Denied) as caught:
            lobby.custodian.release(lobby.say("release", "user/ann", body, second), note)
        assert caught.value.evidence["rule"] == "own-key-in-emergencies"

    def test_grant_or_change_authorities(self, lobby):
        second = lobby.login("user/ann", sub="ann@example.com")
        with pytest.raises(Denied) as caught:
            lobby.principal("user/ben", "user/ann", second, roles=["auditor", "officer"])
        assert caught.value.evidence["rule"] == "own-key-to-decide"
        with pytest.raises(Denied):
            lobby.authority("example.org", "", "user/ann", second)


class TestAuthorities:
    def test_take_a_second_person(self, lobby):
        """Whoever names an identity provider speaks for everybody who is bound to it."""
        new = Authority(X509, "other.example", bundle=lobby.domain.bundle)
        asked = lobby.authority(new.name, new.encode(), "user/ben")
        assert asked["state"] == "pending"
        said = Statement.decode(lobby.entries()[asked["entry"]].body["statement"])
        with pytest.raises(Denied):
            lobby.approve("user/ben", said)
        assert new.name not in [each["name"] for each in lobby.custodian.authorities()]
        lobby.approve("user/eva", said)
        assert new.name in [each["name"] for each in lobby.custodian.authorities()]
        with Room(lobby.folder, "user/olga") as room:
            room.log.verify()

    def test_that_were_taken_away_do_not_come_back_by_what_was_asked_before(self, lobby):
        changed = oidc(lobby.provider, algorithms=("ES256", "RS256"))
        asked = lobby.authority(changed.name, changed.encode(), "user/ben")
        said = Statement.decode(lobby.entries()[asked["entry"]].body["statement"])
        lobby.authority(changed.name, "")
        with pytest.raises(Conflict) as caught:
            lobby.approve("user/eva", said)
        assert caught.value.code == "request.over"
        assert changed.name not in [each["name"] for each in lobby.custodian.authorities()]

    def test_are_not_for_everybody(self, lobby):
        key = lobby.login()
        new = Authority(X509, "other.example", bundle=lobby.domain.bundle)
        with pytest.raises(Denied):
            lobby.authority(new.name, new.encode(), "user/ana", key)

    def test_new_terms_take_a_second_person_and_end_what_the_old_ones_gave(self, lobby):
        key = lobby.login()
        changed = oidc(lobby.provider, algorithms=("ES256", "RS256"))
        asked = lobby.authority(changed.name, changed.encode(), "user/ben")
        lobby.request("user/ana", key)
        lobby.approve("user/eva", Statement.decode(lobby.entries()[asked["entry"]].body["statement"]))
        with pytest.raises(AuthRequired):
            lobby.request("user/ana", key)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{}",
            "[]",
            "x",
            Authority(X509, "a.example", bundle="x").encode(),
            Authority(X509, "b.example", bundle="x").encode(),
        ],
    )
    def test_that_are_none(self, lobby, text):
        with pytest.raises(StrongroomError):
            lobby.authority("a.example", text)

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "http://id.example"},
            {"name": "https://id.example?x"},
            {"name": "https://id.example#x"},
            {"name": "https://user@id.example"},
            {"name": "https://id.example:0"},
            {"name": "https://"},
            {"algorithms": ()},
            {"algorithms": ("none",)},
            {"algorithms": ("HS256",)},
            {"algorithms": ("RS256", "HS256")},
            {"algorithms": ("RS256", "ES256")},
            {"audience": ""},
            {"binding": ""},
            {"longest": 9 * HOUR},
            {"longest": True},
            {"kind": "saml"},
        ],
        ids=str,
    )
    def test_that_would_be_believed_too_much(self, provider, change):
        with pytest.raises(UsageError):
            dataclasses.replace(oidc(provider), **change)

    def test_of_one_person_only(self, lobby):
        """A subject is one person's: else one token would be two people's yes."""
        subject = lobby.custodian.known("user/ana").subject
        with pytest.raises(UsageError) as caught:
            lobby.principal("workload/ci", subject=subject)
        assert caught.value.code == "principal.subject"


class TestWhoIsBoundTakesTwo:
    def test_binding_somebody_who_approves(self, lobby):
        done = lobby.principal("user/ben", "user/eva", subject="ab" * 32)
        assert done["state"] == "pending"
        assert lobby.custodian.known("user/ben").subject == ""


class TestTheAudienceNamesTheKey:
    """As where a CI makes tokens: no nonce, and an audience that one may choose."""

    @pytest.fixture
    def ci(self, lobby):
        changed = oidc(lobby.provider, binding=AUDIENCE)
        asked = lobby.authority(changed.name, changed.encode(), "user/ben")
        lobby.approve("user/eva", Statement.decode(lobby.entries()[asked["entry"]].body["statement"]))
        return lobby

    def test_is_taken(self, ci):
        key = ci.signer()
        token = ci.provider.token(aud=audience_name(ci.vault.id, key.public_key))
        ci.request("user/ana", ci.login(token=token, signer=key))

    def test_is_taken_for_this_key_only(self, ci):
        key, other = ci.signer(), ci.signer()
        nonce = key_name(ci.vault.id, key.public_key)
        for audience in (CLIENT, nonce, audience_name(ci.vault.id, other.public_key), "strongroom:"):
            token = ci.provider.token(aud=audience, nonce=nonce)
            ci.refused("login.refused", ci.login, token=token, signer=key)


class TestCertificates:
    def test_introduce_a_key(self, lobby):
        lobby.request("workload/ci", lobby.arrive())

    @pytest.mark.parametrize(
        "made",
        [
            pytest.param(lambda domain: domain.svid(CI, begin=-7200, end=-60), id="expired"),
            pytest.param(lambda domain: domain.svid(CI, begin=600), id="not good yet"),
            pytest.param(lambda domain: domain.svid(CI, ca=True), id="an authority"),
            pytest.param(
                lambda domain: domain.svid(CI, ca=True, usage=usage(signs=True, certificates=True)),
                id="an authority that signs certificates",
            ),
            pytest.param(
                lambda domain: domain.svid(CI, usage=usage(signs=True, certificates=True)), id="may sign certificates"
            ),
            pytest.param(
                lambda domain: domain.svid(CI, usage=usage(signs=False, certificates=False)), id="may not sign"
            ),
            pytest.param(lambda domain: domain.svid(CI, f"{CI}2"), id="two names"),
            pytest.param(lambda domain: domain.svid(CI, CI), id="its name twice"),
            pytest.param(lambda domain: domain.svid(), id="no name"),
            pytest.param(
                lambda domain: domain.svid(names=[x509.UniformResourceIdentifier(CI), x509.DNSName("x.example")]),
                id="a name of a host, too",
            ),
            pytest.param(lambda domain: domain.svid(names=[x509.DNSName("x.example")]), id="a host"),
            pytest.param(lambda domain: domain.svid("spiffe://other.example/ci/eval-7"), id="another trust domain"),
            pytest.param(lambda domain: domain.svid("https://example.org/ci/eval-7"), id="no SPIFFE id"),
            pytest.param(lambda domain: domain.svid("spiffe://example.org"), id="the trust domain itself"),
            pytest.param(lambda domain: domain.svid(f"{CI}/../admin"), id="leads elsewhere"),
            pytest.param(lambda domain: domain.svid(f"{CI}%2f"), id="escaped"),
            pytest.param(lambda domain: domain.svid(f"{CI}?x"), id="with a query"),
            pytest.param(lambda domain: domain.svid(f"{CI}#x"), id="with a fragment"),
            pytest.param(lambda domain: domain.svid("spiffe://EXAMPLE.org/ci/eval-7"), id="in capitals"),
            pytest.param(lambda domain: domain.svid("spiffe://example.org:443/ci/eval-7"), id="with a port"),
            pytest.param(lambda domain: domain.svid("spiffe://x@example.org/ci/eval-7"), id="with a user"),
            pytest.param(lambda _: TrustDomain().svid(CI), id="by another authority of that name"),
            pytest.param(lambda domain: (domain.bundle, domain.svid(CI)[1]), id="the authority's own"),
            pytest.param(lambda domain: ("", domain.svid(CI)[1]), id="none"),
        ],
    )
    def test_that_are_refused(self, lobby, made):
        lobby.refused("login.refused", lobby.arrive, made=made(lobby.domain))

    def test_of_another_workload(self, lobby):
        lobby.refused("auth.refused", lobby.arrive, made=lobby.domain.svid(f"{CI}2"))
        lobby.refused("auth.refused", lobby.arrive, "user/ana")

    def test_without_the_key(self, lobby):
        lobby.refused("login.refused", lobby.arrive, key=lobby.domain.svid(CI)[1])

    def test_whose_signature_is_for_another_login(self, lobby):
        lobby.refused("login.refused", lobby.arrive, signs="00" * 32)

    def test_instead_of_a_token(self, lobby):
        lobby.refused("login.refused", lobby.arrive, domain=lobby.provider.issuer)

    def test_workloads_do_not_approve(self, lobby):
        said = lobby.request("user/ana", lobby.login())
        with pytest.raises(Denied):
            lobby.approve("workload/ci", said, lobby.arrive())


class TestVerifyingWhatIsRecorded:
    """Offline, a statement under a key that a login introduced counts exactly while that is good in the log's order."""

    def check(self, lobby, entries):
        statements = Statements(f"strongroom/{lobby.vault.id.hex()}", verify)
        for index, entry in enumerate(entries):
            statements.check(index, entry)

    @pytest.fixture
    def said(self, lobby):
        key = lobby.login()
        lobby.request("user/ana", key)
        entries = lobby.entries()
        self.check(lobby, entries)
        return lobby, entries

    def wrong(self, lobby, entries):
        with pytest.raises(Tampered):
            self.check(lobby, entries)

    def test_without_its_login(self, said):
        lobby, entries = said
        self.wrong(lobby, [*entries[:-2], entries[-1]])

    def test_after_its_end(self, said):
        lobby, entries = said
        late = dataclasses.replace(entries[-1], at=entries[-2].body["expires_at"])
        self.wrong(lobby, [*entries[:-1], late])

    def test_after_what_ends_it(self, said):
        lobby, entries = said
        lobby.revoke("user/ana")
        self.wrong(lobby, [*entries[:-1], lobby.entries()[-1], entries[-1]])

    def test_after_the_issuer_was_removed(self, said):
        lobby, entries = said
        lobby.authority(lobby.provider.issuer, "")
        self.wrong(lobby, [*entries[:-1], lobby.entries()[-1], entries[-1]])

    def test_a_login_that_says_something_else_than_was_signed(self, said):
        lobby, entries = said
        login = entries[-2]
        for change in ({"public_key": "ab" * 32}, {"method": "x509"}, {"authority": "example.org"}):
            self.wrong(lobby, [*entries[:-2], dataclasses.replace(login, body={**login.body, **change})])
        self.wrong(lobby, [*entries[:-2], dataclasses.replace(login, by="user/ben")])

    def test_a_binding_that_was_not_signed(self, lobby):
        entries = lobby.entries()
        at, first = next((at, each) for at, each in enumerate(entries) if each.body.get("subject"))
        without = {name: value for name, value in first.body.items() if name != "subject"}
        for body in (without, {**first.body, "subject": "ab" * 32}):
            self.wrong(lobby, [*entries[:at], dataclasses.replace(first, body=body)])


def verify(key, signature, message):
    from strongroom.crypto import signatures

    signatures.verify(key, signature, message)


def test_anything_for_a_token(lobby):
    with lobby.custodian.ledger.view() as state:
        authority = Authority.decode(state.authorities[lobby.provider.issuer])
    key = lobby.signer()
    body = {"method": OIDC, "authority": authority.name, "public_key": key.public_key.hex(), "duration": HOUR}
    said = Statement.decode(lobby.say("login", "user/ana", body, key))
    words = st.text(max_size=40) | st.sampled_from(
        ["kid", "alg", "RS256", "one", "RSA", "keys", "n", "e", "kty", "sig"]
    )
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | words,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=6),
        max_leaves=12,
    )
    keys = st.lists(
        st.dictionaries(st.sampled_from(["kty", "n", "e", "alg", "use", "key_ops", "x", "crv"]), value), max_size=3
    )

    @given(
        st.text(max_size=200)
        | st.tuples(value, value, words).map(lambda parts: ".".join(part(each) for each in parts)),
        keys,
    )
    @settings(max_examples=300)
    def refused(token, found):
        for each in found:
            each["kid"] = "one"
            each.setdefault("kty", "RSA")
        logins = Logins(lambda url, _: {"keys": found, "issuer": authority.name, "jwks_uri": url})
        header = part({"alg": "RS256", "kid": "one"})
        for shown in (token, f"{header}.{part({})}.c2ln"):
            with pytest.raises(StrongroomError):
                logins.verify(authority, said, {"token": shown}, unix())

    refused()


def part(value) -> str:
    return encoded(json.dumps(value).encode())


@given(st.text(max_size=300), st.text(max_size=300), st.binary(max_size=80))
def test_anything_for_a_certificate(chain, bundle, signature):
    pem = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
    for text in (chain, pem.format(chain), pem.format(base64.b64encode(signature).decode())):
        with pytest.raises(Tampered):
            svid.verify(text, signature, b"said", pem.format(bundle), unix())


class TestOnOnesOwnMachine:
    """`Room.login`, in an embedded room."""

    def test_a_login_is_used_without_being_told(self, lobby):
        with Room(lobby.folder, "user/ana") as room:
            with pytest.raises(AuthRequired):
                room.request(REF, reason="before")
            asked = room.login().prepare()
            room.login(HOUR).with_token(lobby.provider.token(nonce=asked["nonce"]))
            assert room.request(REF, reason="after")["by"] == "user/ana"
            with pytest.raises(Denied):
                room.thaw(REF, reason="by whose word?")
            assert room.login().end()
            with pytest.raises(AuthRequired):
                room.request(REF, reason="afterwards")

    def test_weights_are_loaded_under_a_lease_that_people_approved(self, lobby):
        with Room(lobby.folder, "user/ana") as room:
            asked = room.login().prepare()
            room.login().with_token(lobby.provider.token(nonce=asked["nonce"]))
            with pytest.raises(Denied):
                room.reader(REF)
            lease = room.request(REF, reason="evaluation")["id"]
            for approver in ("user/ben", "user/eva"):
                with Room(lobby.folder, approver) as other:
                    other.approve(lease)
            assert room.reader(REF)
            # At once, and not when the lease ends.
            lobby.authority(lobby.provider.issuer, "")
            with pytest.raises(AuthRequired):
                room.reader(REF)

    def test_a_key_of_ones_own_is_enough_after_a_login_has_ended(self, lobby):
        with Room(lobby.folder, "user/ben") as room:
            sessions, signer = room._vault.sessions, room._vault.identities.signer("user/ben")
            key = sessions.make("user/ben")
            sessions.keep("user/ben", key, unix() + 60)
            assert room._vault.voice("user/ben").signer.public_key == key.public_key
            key = sessions.make("user/ben")
            sessions.keep("user/ben", key, unix() - 1)
            assert room._vault.voice("user/ben").signer.public_key == signer.public_key

    def test_a_key_that_others_may_read_is_not_used(self, lobby):
        with Room(lobby.folder, "user/ana") as room:
            sessions = room._vault.sessions
            sessions.keep("user/ana", sessions.make("user/ana"), unix() + 60)
            (kept,) = sessions._folder.rglob("*.login")
            kept.chmod(0o640)
            with pytest.raises(UsageError) as caught:
                room.request(REF, reason="x")
            assert caught.value.code == "login.exposed"
            kept.chmod(0o600)
            kept.write_text("[]")
            with pytest.raises(Tampered):
                room.request(REF, reason="x")


def test_what_a_custodian_remembers_is_what_the_log_says(lobby):
    """A snapshot, and another process."""
    key = lobby.login()
    with lobby.custodian.ledger.view() as state:
        again = type(state).from_json(state.as_json())
        assert again == state
        assert len(state.sessions) == 1
    lobby.vault.close()
    other = Lobby(lobby.folder, lobby.provider, lobby.domain)
    other.count = 100
    other.request("user/ana", key)
    other.vault.close()
