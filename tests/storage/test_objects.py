"""An object store under faults. What works is in test_blobs.py, on a real S3 server; here a server answers as one would
that is down, throttles, refuses, is full, stalls, or cuts its answers short."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from strongroom.errors import BackendError, Conflict, NotFound, StrongroomError, Truncated, UsageError
from strongroom.storage import objects
from strongroom.storage.objects import ObjectBlobs, _coalesced

SECRET = "a-very-secret-access-key"


# -- a real server ----------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_large_objects_go_up_in_parts_and_are_created_once(s3_url, monkeypatch):
    monkeypatch.setattr(objects, "WHOLE_PUT", 1 << 20)
    blobs = ObjectBlobs(s3_url)
    size = 2 * objects.PART + 12_345
    data = bytes(range(251)) * (size // 251 + 1)

    def chunks():
        scratch = bytearray(700_001)
        for at in range(0, size, len(scratch)):
            piece = data[at : min(size, at + len(scratch))]
            scratch[: len(piece)] = piece
            yield memoryview(scratch)[: len(piece)]

    assert blobs.write("big", chunks()) == size
    assert blobs.read("big", limit=size) == data[:size]
    assert blobs.write("big", chunks()) == size  # the same again
    for other in ([data[: size - 1], b"\xff"], [data[:size], b"x"]):
        with pytest.raises(Conflict):
            blobs.write("big", other)
    assert blobs.size("big") == size


@pytest.mark.server
def test_an_upload_cut_off_shows_nothing(s3_url, monkeypatch):
    monkeypatch.setattr(objects, "WHOLE_PUT", 1 << 20)
    blobs = ObjectBlobs(s3_url)

    def chunks():
        yield bytes(2 * objects.PART + 1)
        raise ConnectionResetError("mine")

    with pytest.raises(ConnectionResetError, match="mine"):
        blobs.write("big", chunks())
    assert list(blobs.list()) == []


@pytest.mark.server
def test_a_store_may_be_a_whole_bucket(s3_url):
    blobs = ObjectBlobs(s3_url + "/")
    blobs.write("packs/ab/1", [b"x"])
    assert dict(blobs.list()) == {"packs/ab/1": 1}
    assert dict(ObjectBlobs(s3_url + "/packs").list()) == {"ab/1": 1}


@pytest.mark.server
def test_rights_are_told_from_absence(s3, s3_url, monkeypatch):
    ObjectBlobs(s3_url).write("a", [b"x"])
    for name, value in s3.reader_env.items():
        monkeypatch.setenv(name, value)
    reader = ObjectBlobs(s3_url)
    assert reader.read("a", limit=1) == b"x"
    for call in (lambda: reader.write("b", [b"x"]), lambda: reader.delete("a"), reader.check):
        with pytest.raises(BackendError) as caught:
            call()
        assert caught.value.code == "store.refused"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for call in (lambda: ObjectBlobs(s3_url).read("a", limit=1), lambda: list(ObjectBlobs(s3_url).list())):
        with pytest.raises(BackendError) as caught:
            call()
        assert caught.value.code == "store.refused"
        assert SECRET not in str(caught.value) + json.dumps(caught.value.as_json())


@pytest.mark.server
def test_a_missing_bucket_is_not_a_missing_object(s3):
    blobs = ObjectBlobs("s3://no-such-bucket/prefix")
    for call in (
        lambda: blobs.read_into("a", 0, memoryview(bytearray(1))),
        lambda: list(blobs.list()),
    ):
        with pytest.raises(BackendError) as caught:
            call()
        assert caught.value.code == "store.not_there"


# -- a server with faults ---------------------------------------------------------------------------------------------


class FaultyServer(ThreadingHTTPServer):
    """Answers each request with the next of `answers`, the last one for ever: a function of the request's handler."""

    daemon_threads = True

    def __init__(self, *answers) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, address) -> None:
        """A client that gave up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    do_GET = do_PUT = do_POST = do_HEAD = _answer  # noqa: N815 - http.server's names

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "ETag": '"e"', **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _error(status: int, code: str = ""):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode() if code else b""
    return lambda handler: handler.reply(status, body)


@pytest.fixture
def faulty(monkeypatch):
    """A function that starts a server with the given answers and opens a store on it."""
    with contextlib.ExitStack() as stack:

        def start(*answers, retries: int = 1, timeout_s: float = 20.0, retry_s: float = 20.0):
            server = FaultyServer(*answers)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET + "-token")
            blobs = ObjectBlobs("s3://bucket", retries=retries, timeout_s=timeout_s, retry_s=retry_s)
            stack.callback(blobs.close)
            return server, blobs

        yield start


ANSWERS = [
    (_error(500), BackendError, "store.unreachable"),
    (_error(502), BackendError, "store.unreachable"),
    (_error(503, "SlowDown"), BackendError, "store.unreachable"),
    (_error(429, "TooManyRequests"), BackendError, "store.unreachable"),
    (_error(507), BackendError, "store.full"),
    (_error(400, "QuotaExceeded"), BackendError, "store.full"),
    (_error(401), BackendError, "store.refused"),
    (_error(403, "AccessDenied"), BackendError, "store.refused"),
    (_error(404, "NoSuchBucket"), BackendError, "store.not_there"),
    (_error(400, "InvalidRequest"), BackendError, "store.failed"),
]


@pytest.mark.parametrize(("answer", "kind", "code"), ANSWERS)
def test_every_answer_is_one_of_our_errors(faulty, answer, kind, code):
    _, blobs = faulty(answer)
    for call in (
        lambda: blobs.read_into("a", 0, memoryview(bytearray(1))),
        lambda: blobs.read_ranges_into("a", [(0, memoryview(bytearray(1))), (9 << 20, memoryview(bytearray(1)))]),
        lambda: list(blobs.list()),
        lambda: blobs.write("a", [b"x"]),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.code == code
        assert caught.value.retryable
        assert caught.value.hint
        told = str(caught.value) + json.dumps(caught.value.as_json())
        assert SECRET not in told
        assert len(told) < 2000


def test_what_is_not_there_is_not_found(faulty):
    _, blobs = faulty(_error(404, "NoSuchKey"))
    for call in (lambda: blobs.size("a"), lambda: blobs.read_into("a", 0, memoryview(bytearray(1)))):
        with pytest.raises(NotFound):
            call()
    blobs.delete("a")


def test_passing_trouble_is_waited_out(faulty):
    def serve(handler):
        handler.reply(206, b"1234", Content_Range="bytes 0-3/4")

    server, blobs = faulty(_error(503, "SlowDown"), _error(500), serve, retries=4)
    buffer = bytearray(4)
    blobs.read_into("a", 0, memoryview(buffer))
    assert buffer == b"1234"
    assert len(server.requests) == 3


def test_lasting_trouble_is_not_waited_out_for_ever(faulty):
    server, blobs = faulty(_error(503), retries=3)
    with pytest.raises(BackendError):
        blobs.read_into("a", 0, memoryview(bytearray(1)))
    assert len(server.requests) == 4


def test_a_server_that_does_not_answer_is_given_up(faulty):
    release = threading.Event()
    server, blobs = faulty(lambda handler: release.wait(60), retries=2, timeout_s=0.2)
    with pytest.raises(BackendError) as caught:
        blobs.read_into("a", 0, memoryview(bytearray(1)))
    release.set()
    assert caught.value.code == "store.unreachable"
    assert "after 2 retries" in caught.value.message
    assert len(server.requests) <= 3  # of a try that was late itself the server has not heard


def test_nobody_at_the_endpoint(faulty):
    server, blobs = faulty(_error(500))
    server.shutdown()
    server.server_close()
    with socket.socket() as kept:  # the port, which is nobody else's meanwhile
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(server.server_address)
        for call in (lambda: blobs.size("a"), lambda: blobs.write("a", [b"x"]), blobs.check):
            with pytest.raises(BackendError) as caught:
                call()
            assert caught.value.code == "store.unreachable"


def test_an_answer_shorter_than_asked_is_truncated(faulty):
    _, blobs = faulty(lambda handler: handler.reply(206, b"12345", Content_Range="bytes 10-14/15"))
    with pytest.raises(Truncated) as caught:
        blobs.read_into("a", 10, memoryview(bytearray(100)))
    assert caught.value.code == "store.short_read"
    assert (caught.value.evidence["expected"], caught.value.evidence["got"]) == (100, 5)


def test_an_answer_cut_off_is_not_taken_for_whole(faulty):
    def cut(handler):
        handler.reply(206, b"12345", length=100, Content_Range="bytes 0-99/100")
        handler.close_connection = True

    _, blobs = faulty(cut)
    buffer = bytearray(100)
    with pytest.raises((BackendError, Truncated)):
        blobs.read_into("a", 0, memoryview(buffer))


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: handler.reply(200, bytes(1000)),  # a server that ignores ranges
        lambda handler: handler.reply(206, bytes(10), Content_Range="bytes 0-9/1000"),  # of another place
        lambda handler: handler.reply(206, bytes(10), Content_Range="nonsense"),
        lambda handler: handler.reply(206, bytes(10)),
        lambda handler: handler.reply(304),
        lambda handler: handler.reply(418, b"\xff\xfe<Code>"),
    ],
)
def test_wrong_answers_are_our_errors(faulty, answer):
    _, blobs = faulty(answer)
    buffer = bytearray(b"\xee" * 10)
    with pytest.raises(StrongroomError):
        blobs.read_into("a", 100, memoryview(buffer))
    assert buffer == b"\xee" * 10


def test_after_a_failure_nobody_writes_to_the_buffers(faulty):
    """Requests still under way when one fails are waited for: what they bring is there, and nothing follows."""
    slow, entered = threading.Event(), threading.Event()

    def answer(handler):
        start, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        if start == 0:
            entered.wait(20)
            handler.reply(403)
            slow.set()
        else:
            entered.set()
            slow.wait(20)
            handler.reply(206, b"\1" * (end - start + 1), Content_Range=f"bytes {start}-{end}/99999999")

    _, blobs = faulty(answer)
    buffers = [bytearray(4), bytearray(4)]
    with pytest.raises(BackendError):
        blobs.read_ranges_into("a", [(0, memoryview(buffers[0])), (50 << 20, memoryview(buffers[1]))])
    assert buffers == [bytes(4), b"\1" * 4]


def test_a_server_without_conditional_writes_is_asked_first(faulty):
    held: dict[str, bytes] = {}

    def answer(handler):
        if handler.command == "PUT" and "If-None-Match" in handler.headers:
            handler.reply(501, b"<Error><Code>NotImplemented</Code></Error>")
        elif handler.command == "PUT":
            held[handler.path] = handler.body
            handler.reply(200)
        elif handler.command == "POST":
            name = re.search(rb"<Key>(.*)</Key>", handler.body)[1].decode()
            del held[f"/bucket/{name}"]
            handler.reply(200, f"<DeleteResult><Deleted><Key>{name}</Key></Deleted></DeleteResult>".encode())
        elif handler.path not in held:
            handler.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            body = held[handler.path]
            handler.reply(
                206 if "Range" in handler.headers else 200, body, Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}"
            )

    _, blobs = faulty(answer)
    assert blobs.write("a", [b"one"]) == 3
    assert blobs.write("a", [b"one"]) == 3
    with pytest.raises(Conflict):
        blobs.write("a", [b"two"])
    assert held == {"/bucket/a": b"one"}
    facts = blobs.check()
    assert facts["conditional_writes"] is False
    assert facts["problems"]
    assert held == {"/bucket/a": b"one"}


def test_a_write_whose_answer_was_lost_is_recognised_when_it_is_repeated(faulty):
    """The first try got through, the retry finds the object: that is no conflict."""
    body = b"content"
    _, blobs = faulty(
        lambda handler: handler.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>"),
        lambda handler: handler.reply(200, body),  # HEAD
        lambda handler: handler.reply(206, body, Content_Range="bytes 0-6/7"),
    )
    assert blobs.write("a", [body]) == 7


def test_a_writer_at_work_on_the_same_name_is_no_conflict_yet(faulty):
    _, blobs = faulty(_error(409, "ConditionalRequestConflict"), _error(404))
    with pytest.raises(BackendError) as caught:
        blobs.write("a", [b"x"])
    assert caught.value.code == "store.busy"


# -- endpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"])
@pytest.mark.parametrize(
    "host", ["192.0.2.1", "store.example", "localhost.example", "127.0.0.1.example", "[2001:db8::1]", "["]
)
def test_plain_http_stays_on_this_machine(monkeypatch, variable, host):
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv(variable, f"http://{host}:9000")
    with pytest.raises(UsageError) as caught:
        ObjectBlobs("s3://bucket")
    assert caught.value.code == "store.insecure_endpoint"


def test_the_environment_cannot_turn_tls_checks_off(monkeypatch, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "cert").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    server = FaultyServer(lambda handler: handler.reply(206, b"x", Content_Range="bytes 0-0/1"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        for variable, value in {
            "AWS_ENDPOINT_URL": server.url.replace("http:", "https:"),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ALLOW_INVALID_CERTIFICATES": "true",
        }.items():
            monkeypatch.setenv(variable, value)
        blobs = ObjectBlobs("s3://bucket", retries=0)
        with pytest.raises(BackendError) as caught:
            blobs.read_into("a", 0, memoryview(bytearray(1)))
        assert caught.value.code == "store.unreachable"
        assert server.requests == []
    finally:
        server.shutdown()
        server.server_close()


def test_opening_talks_to_nobody(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert ObjectBlobs("s3://bucket/prefix/").url == "s3://bucket/prefix"
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_other_providers(monkeypatch):
    assert ObjectBlobs("gs://bucket/prefix").url == "gs://bucket/prefix"
    with pytest.raises(UsageError) as caught:
        ObjectBlobs("az://container/prefix")
    assert caught.value.code == "store.misconfigured"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert ObjectBlobs("az://container/prefix").url == "az://container/prefix"
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://store.example")
    with pytest.raises(UsageError):
        ObjectBlobs("az://container/prefix")


# -- which requests ---------------------------------------------------------------------------------------------------


def test_ranges_become_few_requests_of_bounded_size():
    def requests(*ranges: tuple[int, int]) -> list[list[tuple[int, int]]]:
        found = _coalesced([(offset, memoryview(bytearray(size))) for offset, size in ranges])
        return [[(offset, len(view)) for offset, view in request] for request in found]

    size, gap = objects.REQUEST, objects.GAP
    assert requests() == []
    assert requests((5, 0)) == []
    assert requests((0, 10), (10, 10)) == [[(0, 10), (10, 10)]]
    assert requests((0, 10), (10 + gap, 10)) == [[(0, 10), (10 + gap, 10)]]
    assert requests((0, 10), (11 + gap, 10)) == [[(0, 10)], [(11 + gap, 10)]]
    assert requests((50, 10), (0, 10)) == [[(0, 10), (50, 10)]]
    assert requests((7, 2 * size + 1)) == [[(7, size)], [(7 + size, size)], [(7 + 2 * size, 1)]]
    assert requests((0, 100), (10, 10), (90, 20)) == [[(0, 100), (10, 10), (90, 20)]]
    every = [request for k in range(300) for request in requests((0, 1), (k * 99_991, 70_000), (k, size))]
    for request in every:
        assert max(offset + length for offset, length in request) - request[0][0] <= size


def test_no_credentials_of_the_machine_reach_the_tests():
    assert not [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]
