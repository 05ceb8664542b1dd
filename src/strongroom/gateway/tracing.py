"""Traces of requests, for OpenTelemetry (spec/gateway.md, section 8): how long each part of one took, and what became
of it. Never a prompt, an answer, a key or a token: what is sent leaves this machine.

Loaded only where the settings ask for traces; the SDK is an extra.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.trace.status import Status, StatusCode

from strongroom.gateway.routes import PATHS

if TYPE_CHECKING:
    from strongroom.gateway.flight import Flight
    from strongroom.gateway.settings import Traces

_PARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_OPERATIONS = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}
# Numbers alone: `stop` is a text of the caller's, and the seed is between gateway and upstream.
_ASKED = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_VERSION = version("strongroom")
_TIMEOUT = 5  # seconds until a receiver counts as down; what it was sent is lost then

Headers = Iterable[tuple[bytes, bytes]]


class Tracing:
    """Makes the traces of one worker. `exporter` takes spans as they end, in a thread."""

    def __init__(self, settings: Traces, exporter: SpanExporter) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.share)),
            resource=Resource({"service.name": settings.service, "service.version": _VERSION}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("strongroom.gateway", _VERSION)
        self._parent = settings.parent

    def begin(self, flight: Flight, headers: Headers) -> Trace:
        """The trace of a request that has just come in."""
        context, links = None, []
        theirs = _said(headers) if self._parent != "ignore" else None
        if theirs is not None and self._parent == "trust":
            context = set_span_in_context(NonRecordingSpan(theirs))
        elif theirs is not None:  # whoever calls must not say which trace this is part of, nor that it is kept
            links = [Link(theirs)]
        attributes = {
            "http.request.method": "POST",
            "http.route": PATHS[flight.route],
            "strongroom.request": flight.identifier,
        }
        name = f"POST {PATHS[flight.route]}"
        root = self._tracer.start_span(name, context, SpanKind.SERVER, attributes, links)
        return Trace(self._tracer, root)

    def flush(self) -> None:
        """Send what has ended."""
        self._provider.force_flush()

    def close(self) -> None:
        self._provider.shutdown()


class Trace:
    """Of one request: a span for each part, one after the other. `header` is for upstream."""

    def __init__(self, tracer: Any, root: Span) -> None:
        self._tracer, self._root = tracer, root
        self._upstream: Span | None = None
        self._part: Span | None = None
        self.header = b""
        self.part("policy")

    def part(self, name: str) -> None:
        """The next part has begun, and so the one before has ended."""
        if self._part is not None:
            self._part.end()
        inside = set_span_in_context(self._upstream or self._root)
        self._part = self._tracer.start_span(name, inside, SpanKind.INTERNAL)

    def upstream(self, flight: Flight) -> None:
        """It goes to an inference server, which gets a `traceparent` of ours and nobody else's."""
        if self._part is not None:
            self._part.end()
            self._part = None
        asked, operation = flight.asked, _OPERATIONS[flight.route]
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "strongroom",
            "gen_ai.request.model": flight.ref,
            "strongroom.reserved_bits": flight.reserved,
            "strongroom.stream": asked.stream,
        }
        if flight.route != "embeddings":
            attributes["gen_ai.request.max_tokens"] = flight.most
            attributes |= {f"gen_ai.request.{each}": asked.upstream[each] for each in _ASKED if each in asked.upstream}
            if asked.n > 1:
                attributes["gen_ai.request.choice.count"] = asked.n
        span = self._tracer.start_span(
            f"{operation} {flight.ref}", set_span_in_context(self._root), SpanKind.CLIENT, attributes
        )
        self._upstream, context = span, span.get_span_context()
        told = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        self.header = f"\r\ntraceparent: {told}".encode()

    def end(self, flight: Flight, status: int, code: str, tokens: int) -> None:
        """It has become `status`, with the error's `code`, or none."""
        if self._part is not None:
            self._part.end()
        ended = {"http.response.status_code": status, "strongroom.bits": flight.bits}
        if flight.ref:
            ended["strongroom.ref"] = flight.ref  # type: ignore[assignment]  # attributes are of several kinds
        if self._upstream is not None:
            self._upstream.set_attribute("gen_ai.response.model", flight.ref)
            self._upstream.set_attribute("gen_ai.response.id", flight.identifier)
            self._upstream.set_attribute("gen_ai.usage.input_tokens", flight.meter.prompt)
            if flight.route != "embeddings":
                self._upstream.set_attribute("gen_ai.usage.output_tokens", tokens)
        self._root.set_attributes(ended)
        for span in (self._upstream, self._root):
            if span is None:
                continue
            if code:
                span.set_attribute("error.type", code)
                # A caller that is told no is no fault of the gateway's (HTTP's own conventions).
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR, code))
            span.end()


def _said(headers: Headers) -> SpanContext | None:
    """A caller's own `traceparent`; none where there are two, or one that is none. Its `tracestate` is not looked at:
    it is any text, and would go on to whoever reads traces."""
    found = [value for name, value in headers if name == b"traceparent"]
    read = _PARENT.fullmatch(found[0]) if len(found) == 1 else None
    if read is None:
        return None
    trace, span, flags = (int(each, 16) for each in read.groups())
    return SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(flags & 1))


def sending(settings: Traces, secret: str) -> Tracing:
    """Traces that go to the receiver of the settings, as OTLP over HTTP; `secret`: a bearer token for it, or none."""
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint,
        certificate_file=str(Path(settings.ca)) if settings.ca else None,
        headers={"authorization": f"Bearer {secret}"} if secret else {},
        timeout=_TIMEOUT,
        compression=Compression.NoCompression,
    )
    return Tracing(settings, exporter)
