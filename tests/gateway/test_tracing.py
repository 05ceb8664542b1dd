"""What a trace of a request has, and what never is in one."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import StatusCode

from gateway.places import PIA, REF, chat, ended, token, whole
from gateway.test_gateway import eventually
from strongroom.gateway import tracing
from strongroom.gateway.settings import Traces
from strongroom.gateway.tracing import Tracing

THEIRS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


class Traced:
    """A gateway whose spans are kept in memory."""

    def __init__(self, place, **settings) -> None:
        self.gateway = place.gateway()
        self._exporter = InMemorySpanExporter()
        self._app = place.newest._newest
        self._app.tracing = Tracing(Traces(**settings), self._exporter)

    def spans(self, least: int = 6):
        """Those that have ended, by name; of the newest request alone."""
        tracing = self._app.tracing

        def ended():
            tracing.flush()
            return len(self._exporter.get_finished_spans()) >= least

        eventually(ended)
        found = {each.name: each for each in self._exporter.get_finished_spans()}
        self._exporter.clear()
        return found


def test_a_span_for_each_part_of_a_request_and_no_word_of_it(place):
    traced = Traced(place)
    place.inference.script = lambda _: [whole("Marmalade.")]
    body = chat("Raspberry", temperature=0.5, stop=["quince"], seed=4711, user="somebody")
    status, headers, _ = traced.gateway.post(body, **{"x-secret": "pear"})
    assert status == 200
    spans = traced.spans()
    assert set(spans) == {"POST /v1/chat/completions", "policy", "limits", "budget", f"chat {REF}", "answer"}
    root, upstream = spans["POST /v1/chat/completions"], spans[f"chat {REF}"]
    assert (root.kind, root.parent, root.links) == (SpanKind.SERVER, None, ())
    assert all(spans[each].parent.span_id == root.context.span_id for each in ("policy", "limits", "budget"))
    assert (upstream.kind, upstream.parent.span_id) == (SpanKind.CLIENT, root.context.span_id)
    assert spans["answer"].parent.span_id == upstream.context.span_id
    assert root.attributes["strongroom.request"] == headers["x-request-id"]
    assert root.attributes["http.response.status_code"] == 200
    assert dict(upstream.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "strongroom",
        "gen_ai.request.model": REF,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": REF,
        "gen_ai.response.id": headers["x-request-id"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "strongroom.reserved_bits": upstream.attributes["strongroom.reserved_bits"],
        "strongroom.stream": False,
    }
    # Upstream is told of the span that is its own, and of no other trace.
    context = upstream.context
    told = f"traceparent: 00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}".encode()
    assert told in place.inference.heads[-1]
    written = "".join(each.to_json() for each in spans.values())
    for secret in ("Marmalade", "Raspberry", "quince", "4711", "somebody", "pear", "sr-", "user/"):
        assert secret not in written


def test_a_stream_and_what_is_refused(place):
    traced = Traced(place)
    place.inference.script = lambda _: [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        token("Hi"),
        ended(1),
    ]
    assert "[DONE]" in traced.gateway.post(chat(stream=True))[2]
    assert traced.spans()[f"chat {REF}"].attributes["strongroom.stream"]
    assert traced.gateway.post(chat(logprobs=True), as_=PIA)[0] == 403
    refused = traced.spans(2)
    assert set(refused) == {"POST /v1/chat/completions", "policy"}
    root = refused["POST /v1/chat/completions"]
    assert (root.attributes["error.type"], root.status.status_code) == ("permission_denied", StatusCode.UNSET)
    place.inference.script = lambda _: [b"no HTTP"]
    assert traced.gateway.post(chat())[0] == 502
    failed = traced.spans(5)
    assert failed[f"chat {REF}"].status.status_code is StatusCode.ERROR
    assert failed[f"chat {REF}"].attributes["error.type"] == "upstream_malformed"
    # Whoever is nobody makes no spans.
    assert traced.gateway.post(chat(), key="sr-" + "A" * 43)[0] == 401
    assert traced.gateway.post(chat(logprobs=True), as_=PIA)[0] == 403
    assert len(traced.spans(2)) == 2


@pytest.mark.parametrize(
    ("parent", "said", "kept"),
    [
        ("link", THEIRS, "link"),
        ("trust", THEIRS, "parent"),
        ("ignore", THEIRS, ""),
        ("trust", THEIRS.replace("00-", "ff-", 1), ""),
        ("trust", f"00-{'0' * 32}-b7ad6b7169203331-01", ""),
        ("link", f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01", ""),
        ("link", THEIRS.upper(), ""),
        ("link", THEIRS + "-x", ""),
    ],
)
def test_a_callers_trace_is_linked_to_and_no_more_unless_the_settings_trust_it(place, parent, said, kept):
    traced = Traced(place, parent=parent)
    assert traced.gateway.post(chat(), traceparent=said, tracestate="vendor=anything")[0] == 200
    root = traced.spans()["POST /v1/chat/completions"]
    assert [(each.context.trace_id, each.context.span_id) for each in root.links] == [(TRACE, SPAN)] * (kept == "link")
    assert (root.context.trace_id == TRACE) == (kept == "parent")
    assert (root.parent is not None and root.parent.span_id == SPAN) == (kept == "parent")
    assert "tracestate" not in place.inference.heads[-1].decode()
    assert THEIRS.encode() not in place.inference.heads[-1]


def test_of_no_share_nothing_is_kept_and_upstream_is_told_so(place):
    traced = Traced(place, share=0.0)
    assert traced.gateway.post(chat(), traceparent=THEIRS)[0] == 200
    traced._app.tracing.flush()
    assert traced._exporter.get_finished_spans() == ()
    flags = place.inference.heads[-1].partition(b"traceparent: ")[2].partition(b"\r\n")[0][-2:]
    assert int(flags, 16) & 1 == 0


def test_a_real_receiver_is_sent_them(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "_TIMEOUT", 60)
    taken: list[tuple[str, str, ExportTraceServiceRequest]] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            taken.append((self.path, self.headers["authorization"], ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    (tmp_path / "key").write_text("receivers-own")
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        gateway = place.gateway(f'[traces]\nendpoint = "{endpoint}"\nkey = "{tmp_path}/key"\nservice = "door-1"\n')
        assert gateway.post(chat("Raspberry"))[0] == 200
        place.stop_gateways()  # what has ended is sent before it ends
    finally:
        server.shutdown()
        thread.join(60)
        server.server_close()
    (path, authorization, sent), *_ = taken
    assert (path, authorization) == ("/v1/traces", "Bearer receivers-own")
    (resource,) = sent.resource_spans
    named = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert named["service.name"] == "door-1"
    assert {each.name for each in resource.scope_spans[0].spans} >= {f"chat {REF}", "policy", "answer"}
    assert "Raspberry" not in json.dumps(str(sent))
