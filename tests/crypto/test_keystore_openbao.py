from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strongroom.crypto.keystores import create_keystore, open_keystore, transit_http
from strongroom.crypto.keystores.openbao import OpenBaoKeystore
from strongroom.errors import IntegrityError, Sealed, StrongroomError, Tampered, Truncated, UsageError

pytestmark = pytest.mark.server

ROOM = "0123456789abcdef0123456789abcdef"
KEY = bytes(range(32))
CONTEXT = "room key of 0123"


def with_checksum(inner: bytes, context: str = CONTEXT) -> bytes:
    return inner + hashlib.sha256(len(inner).to_bytes(8, "big") + inner + context.encode()).digest()[:8]


@pytest.fixture
def store(bao, root_token, tmp_path):
    return create_keystore(bao.uri(), ROOM, tmp_path)


@pytest.fixture
def new_key(bao):
    """A transit key of the test's own."""
    made = []

    def make(**options):
        name = f"key-{len(made)}-{os.urandom(4).hex()}"
        bao.api("POST", f"transit/keys/{name}", {"type": "aes256-gcm96", **options})
        made.append(name)
        return name

    return make


class TestRealServer:
    @pytest.mark.parametrize("scheme", ["openbao", "vault"])
    def test_round_trip(self, bao, root_token, tmp_path, scheme):
        store = create_keystore(bao.uri(scheme=scheme), ROOM, tmp_path)
        wrapped = store.wrap(KEY, CONTEXT)
        assert KEY not in wrapped
        assert base64.b64encode(KEY) not in wrapped
        assert open_keystore(store.uri, ROOM, tmp_path).unwrap(wrapped, CONTEXT) == KEY
        assert store.wrap(KEY, CONTEXT) != wrapped

    def test_the_server_itself_opens_what_we_wrapped(self, store, bao):
        wrapped = store.wrap(KEY, CONTEXT)
        assert wrapped[:8] == b"SRTW\x01\x00\x00\x00"
        asked = {
            "ciphertext": wrapped[40:-8].decode(),
            "associated_data": base64.b64encode(CONTEXT.encode()).decode(),
        }
        answer = bao.api("POST", "transit/decrypt/room", asked)
        assert base64.b64decode(answer["data"]["plaintext"]) == KEY

    def test_wrong_context(self, store):
        wrapped = store.wrap(KEY, CONTEXT)
        with pytest.raises(Tampered) as caught:
            store.unwrap(wrapped, "another")
        assert caught.value.code == "keystore.wrapped_damaged"
        with pytest.raises(Tampered) as caught:  # with the checksum put right the server refuses
            store.unwrap(with_checksum(wrapped[:-8], "another"), "another")
        assert caught.value.code == "keystore.wrapped_tampered"

    def test_every_bit_flip_and_truncation_is_found_without_the_server(self, store, monkeypatch):
        wrapped = store.wrap(KEY, CONTEXT)
        monkeypatch.delenv("BAO_TOKEN")  # whoever asks the server now fails with Sealed
        for bit in range(8 * len(wrapped)):
            altered = bytearray(wrapped)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(Tampered):
                store.unwrap(bytes(altered), CONTEXT)
        for size in range(len(wrapped)):
            with pytest.raises((Truncated, Tampered)):
                store.unwrap(wrapped[:size], CONTEXT)

    def test_every_flipped_bit_with_a_new_checksum_is_found_with_the_server(self, store):
        wrapped = store.wrap(KEY, CONTEXT)
        for bit in range(64, 8 * (len(wrapped) - 8)):
            altered = bytearray(wrapped[:-8])
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises((IntegrityError, Sealed)) as caught:
                store.unwrap(with_checksum(bytes(altered)), CONTEXT)
            assert isinstance(caught.value, IntegrityError) or caught.value.code == "keystore.key_version"

    def test_the_ciphertext_of_another_key_with_our_commitment(self, store, bao):
        # Somebody who may encrypt, but not read the room's key, puts a key of their own in its place.
        wrapped = store.wrap(KEY, CONTEXT)
        asked = {
            "plaintext": base64.b64encode(bytes(32)).decode(),
            "associated_data": base64.b64encode(CONTEXT.encode()).decode(),
        }
        other = bao.api("POST", "transit/encrypt/room", asked)["data"]["ciphertext"]
        with pytest.raises(Tampered) as caught:
            store.unwrap(with_checksum(wrapped[:40] + other.encode()), CONTEXT)
        assert caught.value.code == "key.wrong"

    def test_token_with_the_documented_policy_is_enough(self, bao, no_environment, monkeypatch, tmp_path):
        policy = (
            'path "transit/keys/room" { capabilities = ["read"] }\n'
            'path "transit/encrypt/room" { capabilities = ["update"] }\n'
            'path "transit/decrypt/room" { capabilities = ["update"] }\n'
        )
        monkeypatch.setenv("BAO_TOKEN", bao.token(policy, name="room"))
        store = create_keystore(bao.uri(), ROOM, tmp_path)
        assert store.unwrap(store.wrap(KEY, CONTEXT), CONTEXT) == KEY
        report = store.check()
        assert report["reachable"] is True
        assert report["permissions"] == "decrypt, encrypt"
        with pytest.raises(Sealed) as caught:
            store.rotate()
        assert caught.value.code == "keystore.refused"

    def test_token_that_may_only_encrypt(self, store, bao, monkeypatch):
        wrapped = store.wrap(KEY, CONTEXT)
        token = bao.token('path "transit/encrypt/room" { capabilities = ["update"] }', name="encrypt-only")
        monkeypatch.setenv("BAO_TOKEN", token)
        for use in (lambda: store.unwrap(wrapped, CONTEXT), lambda: store.wrap(KEY, CONTEXT)):
            with pytest.raises(Sealed) as caught:
                use()
            assert caught.value.code == "keystore.refused"
            assert caught.value.retryable
            assert token not in str(caught.value) + str(caught.value.as_json())
        assert store.check()["reachable"] is False

    def test_a_revoked_token_and_its_successor(self, store, bao, monkeypatch):
        wrapped = store.wrap(KEY, CONTEXT)
        monkeypatch.setenv("BAO_TOKEN", "s.thistokenwasrevoked")
        with pytest.raises(Sealed) as caught:
            store.unwrap(wrapped, CONTEXT)
        assert caught.value.code == "keystore.refused"
        assert "thistokenwasrevoked" not in str(caught.value) + str(caught.value.as_json())
        monkeypatch.setenv("BAO_TOKEN", bao.token('path "transit/*" { capabilities = ["update"] }', name="renewed"))
        assert store.unwrap(wrapped, CONTEXT) == KEY  # the same object: the token is read at every use

    def test_tokens_from_files_and_the_other_name(self, bao, root_token, monkeypatch, tmp_path):
        store = open_keystore(bao.uri(), ROOM, tmp_path)
        monkeypatch.delenv("BAO_TOKEN")
        with pytest.raises(Sealed) as caught:
            store.wrap(KEY, CONTEXT)
        assert caught.value.code == "keystore.no_token"
        (tmp_path / ".vault-token").write_text(root_token + "\n")
        store.wrap(KEY, CONTEXT)
        (tmp_path / ".vault-token").write_text("stale")
        (tmp_path / "agent").write_text(root_token)
        monkeypatch.setenv("BAO_TOKEN_PATH", str(tmp_path / "agent"))
        store.wrap(KEY, CONTEXT)
        monkeypatch.setenv("BAO_TOKEN_PATH", str(tmp_path))
        with pytest.raises(Sealed):
            store.wrap(KEY, CONTEXT)
        monkeypatch.setenv("VAULT_TOKEN", root_token)
        store.wrap(KEY, CONTEXT)

    def test_a_token_with_a_line_feed_is_not_sent(self, store, monkeypatch):
        for token in ("secret\r\nX-Other: 1", "sécret", "a b"):
            monkeypatch.setenv("BAO_TOKEN", token)
            with pytest.raises(Sealed) as caught:
                store.wrap(KEY, CONTEXT)
            assert caught.value.code == "keystore.no_token"
            assert token[:6] not in str(caught.value)

    def test_namespaces(self, bao, root_token, monkeypatch, tmp_path):
        bao.api("POST", "sys/namespaces/team", {})
        bao.api("POST", "team/sys/mounts/deep/transit", {"type": "transit"})
        bao.api("POST", "team/deep/transit/keys/room", {"type": "aes256-gcm96"})
        by_path = create_keystore(f"openbao:{bao.address}/team/deep/transit/room", ROOM, tmp_path)
        wrapped = by_path.wrap(KEY, CONTEXT)
        monkeypatch.setenv("BAO_NAMESPACE", "team")
        by_header = create_keystore(f"openbao:{bao.address}/deep/transit/room", ROOM, tmp_path)
        assert by_header.unwrap(wrapped, CONTEXT) == KEY
        monkeypatch.setenv("BAO_NAMESPACE", "team\r\nX-Other: 1")
        with pytest.raises(UsageError):
            by_header.unwrap(wrapped, CONTEXT)

    def test_a_key_or_engine_that_is_not_there(self, bao, root_token, tmp_path):
        for address in (bao.uri("absent"), f"openbao:{bao.address}/absent/room"):
            with pytest.raises(Sealed) as caught:
                create_keystore(address, ROOM, tmp_path)
            assert caught.value.code == "keystore.no_key"
            mount, name = address.rsplit("/", 2)[1:]
            assert f"bao write -f {mount}/keys/{name}" in caught.value.hint

    def test_wrapping_never_makes_a_key(self, bao, root_token, tmp_path):
        # A bare `encrypt` would: the engine makes a missing key on the way.
        store = open_keystore(bao.uri("not-made"), ROOM, tmp_path)
        with pytest.raises(Sealed) as caught:
            store.wrap(KEY, CONTEXT)
        assert caught.value.code == "keystore.no_key"
        assert "not-made" not in bao.api("LIST", "transit/keys")["data"]["keys"]

    def test_a_deleted_key(self, bao, root_token, new_key, tmp_path):
        name = new_key()
        store = create_keystore(bao.uri(name), ROOM, tmp_path)
        wrapped = store.wrap(KEY, CONTEXT)
        bao.api("POST", f"transit/keys/{name}/config", {"deletion_allowed": True})
        assert "deletion" in str(store.check()["notes"])
        bao.api("DELETE", f"transit/keys/{name}")
        with pytest.raises(Sealed) as caught:
            store.unwrap(wrapped, CONTEXT)
        assert caught.value.code == "keystore.no_key"
        bao.api("POST", f"transit/keys/{name}", {"type": "aes256-gcm96"})
        with pytest.raises(Tampered) as caught:  # the name is back, the key is not
            store.unwrap(wrapped, CONTEXT)
        assert caught.value.code == "keystore.wrapped_tampered"

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"exportable": True}, "exportable"),
            ({"allow_plaintext_backup": True}, "plaintext backup"),
            ({"type": "aes128-gcm96"}, "type"),
            ({"type": "ed25519"}, "type"),
            ({"derived": True}, "derived"),
        ],
    )
    def test_keys_that_do_not_do(self, bao, root_token, new_key, tmp_path, options, problem):
        address = bao.uri(new_key(**options))
        with pytest.raises(UsageError, match=problem) as caught:
            create_keystore(address, ROOM, tmp_path)
        assert caught.value.code == "keystore.unfit_key"
        assert problem in str(open_keystore(address, ROOM, tmp_path).check()["notes"])

    def test_a_key_that_becomes_exportable_takes_no_more_keys_but_still_gives(self, bao, root_token, new_key, tmp_path):
        name = new_key()
        store = create_keystore(bao.uri(name), ROOM, tmp_path)
        wrapped = store.wrap(KEY, CONTEXT)
        bao.api("POST", f"transit/keys/{name}/config", {"exportable": True})
        with pytest.raises(UsageError):
            store.wrap(KEY, CONTEXT)
        assert store.unwrap(wrapped, CONTEXT) == KEY

    def test_rotation(self, bao, root_token, new_key, tmp_path):
        name = new_key()
        store = create_keystore(bao.uri(name), ROOM, tmp_path)
        wrapped = store.wrap(KEY, CONTEXT)
        assert b"vault:v1:" in wrapped
        second = store.rotate()
        assert second.uri == store.uri
        rewrapped = second.wrap(second.unwrap(wrapped, CONTEXT), CONTEXT)
        assert b"vault:v2:" in rewrapped
        store.retire()
        assert store.unwrap(wrapped, CONTEXT) == KEY
        report = store.check()
        assert report["key_type"] == "aes256-gcm96, version 2"
        assert report["permissions"] == "root"
        assert "min_decryption_version" in str(report["notes"])
        bao.api("POST", f"transit/keys/{name}/config", {"min_decryption_version": 2})
        with pytest.raises(Sealed) as caught:
            store.unwrap(wrapped, CONTEXT)
        assert caught.value.code == "keystore.key_version"
        assert store.unwrap(rewrapped, CONTEXT) == KEY

    def test_only_keys_are_wrapped(self, store):
        with pytest.raises(UsageError):
            store.wrap(bytes(31), CONTEXT)

    def test_killed_and_back(self, mortal_bao, root_token, tmp_path):
        store = create_keystore(mortal_bao.uri(), ROOM, tmp_path)
        wrapped = store.wrap(KEY, CONTEXT)
        mortal_bao.kill()
        for use in (lambda: store.unwrap(wrapped, CONTEXT), lambda: store.wrap(KEY, CONTEXT)):
            with pytest.raises(Sealed) as caught:
                use()
            assert caught.value.code == "keystore.unreachable"
            assert caught.value.retryable
        assert store.check()["reachable"] is False

    def test_sealed(self, mortal_bao, root_token, tmp_path):
        store = create_keystore(mortal_bao.uri(), ROOM, tmp_path)
        wrapped = store.wrap(KEY, CONTEXT)
        mortal_bao.api("PUT", "sys/seal")
        with pytest.raises(Sealed) as caught:
            store.unwrap(wrapped, CONTEXT)
        assert caught.value.code == "keystore.server_sealed"
        assert caught.value.hint == "bao operator unseal"

    def test_https(self, tls_bao, root_token, monkeypatch, tmp_path):
        with pytest.raises(Sealed) as caught:
            create_keystore(tls_bao.uri(), ROOM, tmp_path)
        assert caught.value.code == "keystore.certificate"
        monkeypatch.setenv("BAO_CACERT", str(tmp_path / "absent.pem"))
        with pytest.raises(UsageError):
            create_keystore(tls_bao.uri(), ROOM, tmp_path)
        monkeypatch.setenv("BAO_CACERT", str(next(tmp_path.glob("*-ca.pem"))))
        with pytest.raises(Sealed) as caught:
            create_keystore(tls_bao.uri(), ROOM, tmp_path)
        assert caught.value.code == "keystore.no_key"
        with pytest.raises(Sealed) as caught:  # the certificate is for 127.0.0.1 and for no other name
            create_keystore(f"openbao:https://127.0.0.2:{tls_bao.port}/transit/room", ROOM, tmp_path)
        assert caught.value.code in ("keystore.certificate", "keystore.unreachable")
        with pytest.raises(Sealed):  # http to a port that speaks TLS
            create_keystore(f"openbao:http://127.0.0.1:{tls_bao.port}/transit/room", ROOM, tmp_path)


class HostileServer:
    """Answers every connection with the same bytes, or in the way that `behaviour(connection)` has it."""

    def __init__(self, behaviour) -> None:
        self._behaviour = behaviour
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.uri = f"openbao:http://127.0.0.1:{self._socket.getsockname()[1]}/transit/room"

    def _serve(self) -> None:
        self._socket.settimeout(0.05)
        while not self._stopped.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5)
                try:
                    self._behaviour(self, connection)
                except OSError:
                    continue  # the client hung up, as it should

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def hostile(root_token):
    servers = []

    def start(behaviour, timeout: float = 30.0) -> OpenBaoKeystore:
        if isinstance(behaviour, bytes):
            answer = behaviour

            def behaviour(_, connection):
                connection.recv(65536)
                connection.sendall(answer)

        servers.append(HostileServer(behaviour))
        return OpenBaoKeystore(servers[-1].uri, timeout=timeout)

    yield start
    for server in servers:
        server.stop()


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


def wrapped_by_hand() -> bytes:
    """Bytes that get as far as the server."""
    return with_checksum(b"SRTW\x01\x00\x00\x00" + bytes(32) + b"vault:v1:" + base64.b64encode(bytes(60)))


ANSWERS = {
    "nothing": b"",
    "no http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "zeros": bytes(5000),
    "head only": b"HTTP/1.1 200 OK\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "too short a body": b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"data":{"plain',
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "huge header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n{}",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n{}",
    "html": http(b"<html>It works!</html>"),
    "array": http(b"[1, 2]"),
    "deep": http(b"[" * 100_000),
    "bad utf-8": http(b'{"data": "\xff\xfe"}'),
    "nan": http(b'{"data": NaN}'),
    "huge integer": http(b'{"data": ' + b"9" * 10_000 + b"}"),
    "no data": http(b"{}"),
    "null data": http(b'{"data": null}'),
    "number for text": http(b'{"data": {"plaintext": 5, "ciphertext": 5, "type": 5}}'),
    "no base64": http(b'{"data": {"plaintext": "%%%%"}}'),
    "non-ascii base64": http('{"data": {"plaintext": "ÄÖÜ="}}'.encode()),
    "short key": http(b'{"data": {"plaintext": "AAAA"}}'),
    "another key": http(json.dumps({"data": {"plaintext": base64.b64encode(KEY).decode()}}).encode()),
    "no body": http(b"", "204 No Content"),
    "over the limit": http(b'{"data": "' + b"x" * 300_000 + b'"}'),
    "continue for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    "status 999": http(b"{}", "999 What"),
    "status 99999": http(b"{}", "99999 What"),
}


class TestHostileServer:
    @pytest.mark.parametrize("name", ANSWERS)
    def test_strange_answers_raise_only_our_errors(self, hostile, forbidden_words, name):
        store = hostile(ANSWERS[name])
        for use in (
            lambda: store.unwrap(wrapped_by_hand(), CONTEXT),
            lambda: store.wrap(KEY, CONTEXT),
            store.rotate,
        ):
            with pytest.raises((Sealed, Tampered, UsageError)) as caught:
                use()
            forbidden_words(str(caught.value) + str(caught.value.as_json()), KEY)
        assert isinstance(store.check()["reachable"], bool)

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            ("301 Moved", "keystore.redirected"),
            ("307 Temporary Redirect", "keystore.redirected"),
            ("400 Bad Request", "keystore.bad_answer"),
            ("401 Unauthorized", "keystore.refused"),
            ("403 Forbidden", "keystore.refused"),
            ("404 Not Found", "keystore.no_key"),
            ("412 Precondition Failed", "keystore.bad_answer"),
            ("429 Too Many Requests", "keystore.busy"),
            ("500 Internal Server Error", "keystore.unavailable"),
            ("502 Bad Gateway", "keystore.unavailable"),
            ("503 Service Unavailable", "keystore.unavailable"),
        ],
    )
    @pytest.mark.parametrize("body", [b'{"errors": ["words of the server"]}', b"<html>", b""])
    def test_every_status_has_its_error(self, hostile, status, code, body):
        store = hostile(http(body, status, "Location: http://127.0.0.1:1/elsewhere"))
        with pytest.raises(Sealed) as caught:
            store.unwrap(wrapped_by_hand(), CONTEXT)
        assert caught.value.code == code
        assert caught.value.retryable
        assert caught.value.hint
        assert caught.value.evidence["status"] == int(status[:3])

    def test_a_redirect_is_not_followed(self, hostile):
        reached = []
        other = hostile(lambda _, connection: reached.append(connection.recv(65536)))
        target = other.uri.removeprefix("openbao:")
        store = hostile(http(b"", "307 Temporary Redirect", f"Location: {target}"))
        with pytest.raises(Sealed):
            store.unwrap(wrapped_by_hand(), CONTEXT)
        assert reached == []

    def test_a_server_that_sends_our_secrets_back(self, hostile, root_token, forbidden_words):
        def echo(_, connection):
            asked = connection.recv(65536)
            body = json.dumps({"errors": [asked.decode("latin-1"), root_token, "permission denied\x1b[31m"]}).encode()
            connection.sendall(http(body, "403 Forbidden"))

        with pytest.raises(Sealed) as caught:
            hostile(echo).wrap(KEY, CONTEXT)
        text = str(caught.value) + str(caught.value.as_json())
        forbidden_words(text, KEY)
        assert "\x1b" not in text

    def test_a_server_that_gives_another_key(self, hostile):
        # It has no key of ours, and makes one up that it knows.
        store = hostile(http(json.dumps({"data": {"plaintext": base64.b64encode(KEY).decode()}}).encode()))
        with pytest.raises(Tampered) as caught:
            store.unwrap(wrapped_by_hand(), CONTEXT)
        assert caught.value.code == "key.wrong"

    def test_a_server_that_loses_what_it_encrypted(self, hostile):
        fit = {"type": "aes256-gcm96", "exportable": False, "allow_plaintext_backup": False}
        lost = {"ciphertext": "vault:v1:" + base64.b64encode(bytes(60)).decode()}

        def forget(_, connection):
            asked = connection.recv(65536)
            if b"/decrypt/" in asked:
                connection.sendall(http(b'{"errors": ["cipher: message authentication failed"]}', "400 Bad Request"))
            else:
                connection.sendall(http(json.dumps({"data": {**fit, **lost}}).encode()))

        with pytest.raises(Tampered):  # and not stored, so nothing is lost
            hostile(forget).wrap(KEY, CONTEXT)

    @pytest.mark.parametrize(
        "head", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"]
    )
    def test_a_byte_now_and_then_ends_at_the_deadline(self, hostile, monkeypatch, head):
        """Each byte takes a minute, and no time goes by else: a timeout for each read alone would never come."""
        sent = []

        class Clock:
            @staticmethod
            def monotonic():
                return 60.0 * len(sent)

        monkeypatch.setattr(transit_http, "time", Clock)

        def drip(server, connection):
            connection.recv(65536)
            connection.sendall(head)
            while not server.stopped:
                connection.sendall(b"x")
                sent.append(1)
                time.sleep(0.02)

        with pytest.raises(Sealed) as caught:
            hostile(drip, 20 * 60.0).unwrap(wrapped_by_hand(), CONTEXT)
        assert caught.value.code == "keystore.timeout"
        assert len(sent) >= 20

    def test_silence_ends_at_the_deadline(self, hostile):
        def silent(server, connection):
            while not server.stopped:
                time.sleep(0.02)

        with pytest.raises(Sealed) as caught:
            hostile(silent, 1.0).unwrap(wrapped_by_hand(), CONTEXT)
        assert caught.value.code == "keystore.timeout"

    def test_an_endless_answer_is_cut_off(self, hostile):
        sent = []

        def endless(server, connection):
            connection.recv(65536)
            connection.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"data": "')
            while not server.stopped:
                connection.sendall(b"x" * 65536)
                sent.append(65536)

        with pytest.raises(Sealed) as caught:
            hostile(endless).unwrap(wrapped_by_hand(), CONTEXT)
        assert caught.value.code == "keystore.bad_answer"
        assert sum(sent) < 64 * 1024 * 1024

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(body=st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(http)))
    def test_any_bytes_from_the_server(self, reusable_hostile, body):
        store = reusable_hostile(body)
        with pytest.raises((Sealed, Tampered)):
            store.unwrap(wrapped_by_hand(), CONTEXT)

    @given(junk=st.binary(max_size=300))
    def test_any_wrapped_bytes_before_the_server(self, junk):
        store = OpenBaoKeystore("openbao:https://bao.invalid/transit/room")
        for candidate in (junk, b"SRTW\x01\x00\x00\x00" + junk, with_checksum(b"SRTW\x01\x00\x00\x00" + junk)):
            with pytest.raises((Tampered, Truncated)):
                store.unwrap(candidate, CONTEXT)


@pytest.fixture
def reusable_hostile(hostile):
    current = [b""]

    def answer(_, connection):
        connection.recv(65536)
        connection.sendall(current[0])

    store = hostile(answer)

    def set_answer(body):
        current[0] = body
        return store

    return set_answer


class TestUri:
    @pytest.mark.parametrize(
        "uri",
        [
            "openbao:",
            "openbao:bao.example/transit/room",
            "openbao:ftp://bao.example/transit/room",
            "openbao:https:///transit/room",
            "openbao:https://bao.example",
            "openbao:https://bao.example/room",
            "openbao:https://bao.example/transit//room",
            "openbao:https://bao.example/transit/../room",
            "openbao:https://bao.example/transit/ro%2fom",
            "openbao:https://bao.example/transit/room?token=hvs.SECRETSECRET",
            "openbao:https://bao.example/transit/room#hvs.SECRETSECRET",
            "openbao:https://token:hvs.SECRETSECRET@bao.example/transit/room",
            "openbao:https://bao.example:99999/transit/room",
            "openbao:https://bao.example:0/transit/room",
            "openbao:https://bao.example:port/transit/room",
            "openbao:https://[::1/transit/room",
            "openbao:https://bäo.example/transit/room",
        ],
    )
    def test_malformed(self, uri):
        with pytest.raises(UsageError) as caught:
            open_keystore(uri, ROOM, Path())
        assert caught.value.code == "keystore.bad_uri"
        assert "SECRETSECRET" not in str(caught.value) + str(caught.value.as_json())

    @pytest.mark.parametrize(
        "host", ["bao.example", "10.0.0.1", "[2001:db8::1]", "localhost.example", "127.0.0.1.example"]
    )
    def test_plain_http_leaves_this_machine_never(self, host):
        with pytest.raises(UsageError) as caught:
            open_keystore(f"openbao:http://{host}:8200/transit/room", ROOM, Path())
        assert caught.value.code == "keystore.plain_http"

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
    def test_plain_http_on_loopback(self, host):
        uri = f"openbao:http://{host}:8200/transit/room"
        assert open_keystore(uri, ROOM, Path()).uri == uri

    @settings(max_examples=300)
    @given(text=st.one_of(st.text(), st.text().map("https://".__add__), st.text().map("http://127.0.0.1:1/".__add__)))
    def test_any_text_raises_only_our_errors(self, text):
        try:
            store = open_keystore("openbao:" + text, ROOM, Path())
        except StrongroomError:
            return
        assert store.uri == "openbao:" + text
