"""What the custodian counts, in the text form of Prometheus. No label names a principal or weights: whoever watches a
machine is not told who uses what."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.server.bounded import BoundedServer

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ROUTE = ("route", "method", "status")


class Metrics:
    """The counts of one server, and what it reads of the room when it is asked."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._registry = CollectorRegistry()
        self._requests = Counter("strongroom_requests", "Requests that were answered", _ROUTE, registry=self._registry)
        self._seconds = Histogram(
            "strongroom_request_seconds", "Until an answer began", ("route", "method"), registry=self._registry
        )
        self._releases = Counter("strongroom_releases", "Key bundles that were handed out", registry=self._registry)
        self._refusals = Counter(
            "strongroom_refusals", "Requests that ended in an error, by its code", ("code",), registry=self._registry
        )
        self._registry.register(self)

    @contextlib.contextmanager
    def timed(self, route: str, method: str) -> Iterator[None]:
        """The time of the block is how long `route` took."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds.labels(route, method).observe(time.perf_counter() - begun)

    def answered(self, route: str, method: str, status: int) -> None:
        """A request got its answer. `route` as it is in the table: an address that anybody makes up is no label."""
        self._requests.labels(route, method, str(status)).inc()
        if route == "/v1/releases" and status == 200:
            self._releases.inc()

    def refused(self, code: str) -> None:
        """A request ended in an error of ours: there are as many codes as the program has."""
        self._refusals.labels(code).inc()

    def collect(self) -> Iterator[Metric]:
        """Of the room, now. Nothing of it while it can't be read: an old number would look like a good one."""
        now = self._vault.clock()
        try:
            size = self._vault.custodian.ledger.checkpoint()[0].size
            with self._vault.custodian.ledger.view() as state:
                age = max(0, now - state.latest)
                leases = sum(each.holds(now) for each in state.leases.values())
                emergencies = len(state.emergencies)
        except StrongroomError:
            yield GaugeMetricFamily("strongroom_log_readable", "Whether the log can be read", value=0)
            return
        yield GaugeMetricFamily("strongroom_log_readable", "Whether the log can be read", value=1)
        yield GaugeMetricFamily("strongroom_log_entries", "Entries of the log", value=size)
        yield GaugeMetricFamily("strongroom_checkpoint_age_seconds", "Since the newest entry and checkpoint", value=age)
        yield GaugeMetricFamily("strongroom_leases", "Leases that hold now", value=leases)
        yield GaugeMetricFamily("strongroom_emergencies", "Broken glass that nobody has reviewed", value=emergencies)

    def exposition(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self._registry)


class Exposed(Protocol):
    """What can be shown to Prometheus."""

    def exposition(self) -> bytes: ...


class MetricsServer(BoundedServer):
    """``GET /metrics`` for whoever is on this machine, without a signature: Prometheus makes none. Plain HTTP, so on a
    loopback address only: UsageError ``serve.metrics``; BackendError ``serve.listen``."""

    def __init__(self, metrics: Exposed, host: str, port: int) -> None:
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise UsageError(
                "serve.metrics",
                f"metrics are shown without a signature and without TLS, so on a loopback address only, not on {host}",
                hint="--metrics 127.0.0.1:9470, and something on this machine that passes them on",
            )
        self.metrics = metrics
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise BackendError(
                "serve.listen",
                f"can't listen on {host}, port {port}: {error.strerror or error}",
                hint="--metrics with another port, or stop what listens there",
            ) from None


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = 10.0
    server_version = "strongroom"
    sys_version = ""

    def do_GET(self) -> None:
        found = self.path == "/metrics"
        body = self.server.metrics.exposition() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Requests are not printed: only the command line prints."""
