"""What one worker of the gateway counts, in the text form of Prometheus. No label names a principal or weights."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from strongroom.gateway.generations import Generations

_BOUNDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Counts:
    """Plain numbers of one event loop: a counter of the library takes a lock and two look-ups a time."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], int] = {}
        self.tokens = self.bits = 0
        self.misspelled = self.captured = 0
        self._seconds = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def answered(self, route: str, code: str, tokens: int, bits: int, seconds: float) -> None:
        """A request has ended. `code`: of an error, or ok."""
        key = (route, code)
        self.answers[key] = self.answers.get(key, 0) + 1
        self.tokens += tokens
        self.bits += bits
        self._sum += seconds
        self._seconds[bisect_left(_BOUNDS, seconds)] += 1

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """The histogram of seconds, as the library takes it, and its sum."""
        found, total = [], 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._seconds, strict=True):
            total += count
            found.append((bound, float(total)))
        return found, self._sum


class GatewayMetrics:
    """Those of one worker."""

    def __init__(self, app: Generations) -> None:
        self._app = app
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """All of them, now."""
        counts = self._app.counts
        answers = CounterMetricFamily(
            "strongroom_gateway_requests", "Requests that have ended, by what they ended in", labels=("route", "code")
        )
        for (route, code), count in list(counts.answers.items()):
            answers.add_metric((route, code), count)
        yield answers
        yield CounterMetricFamily("strongroom_gateway_tokens", "Tokens that were given out", value=counts.tokens)
        yield CounterMetricFamily("strongroom_gateway_bits", "Bits that were charged", value=counts.bits)
        yield CounterMetricFamily(
            "strongroom_gateway_misspelled",
            "Answers that were not what their tokens spell",
            value=counts.misspelled,
        )
        yield CounterMetricFamily(
            "strongroom_gateway_captured", "Requests that were sealed with their answers", value=counts.captured
        )
        buckets, total = counts.buckets()
        seconds = HistogramMetricFamily("strongroom_gateway_seconds", "Until a request has ended")
        seconds.add_metric((), buckets, total)
        yield seconds
        yield from self._verified()
        ends = self._app.certificates.crl_end()
        if ends is not None:
            yield GaugeMetricFamily(
                "strongroom_gateway_crl_end",
                "Until when the revocation lists are good, in Unix seconds; nobody of a domain gets in after its own",
                value=ends,
            )
        settings = GaugeMetricFamily(
            "strongroom_gateway_settings", "The settings in force, by their digest", labels=("digest",)
        )
        settings.add_metric((self._app.settings.digest,), 1)
        yield settings
        yield GaugeMetricFamily("strongroom_gateway_under_way", "Requests under way", value=self._app.under_way)
        found = self._app.problems()
        yield GaugeMetricFamily("strongroom_gateway_ready", "Whether requests are answered", value=0 if found else 1)
        problems = GaugeMetricFamily(
            "strongroom_gateway_problem", "Why they are not; the log has what it is", labels=("problem",)
        )
        for word in found:
            problems.add_metric((word,), 1)
        yield problems

    def _verified(self) -> Iterator[Metric]:
        """Of answers that were run again, if any are."""
        verified = self._app.verified
        if verified is None:
            return
        yield CounterMetricFamily(
            "strongroom_gateway_not_verified", "Samples that could not be run again", value=verified.failed
        )
        verdicts = list(verified.verdicts.values())
        if not verdicts:
            return
        tokens = GaugeMetricFamily(
            "strongroom_gateway_verified_tokens", "Tokens that were run again, by their class", labels=("class",)
        )
        for name in ("good", "suspicious", "dangerous"):
            tokens.add_metric((name,), sum(getattr(each, name) for each in verdicts))
        yield tokens
        yield GaugeMetricFamily(
            "strongroom_gateway_smuggled_bits",
            "Bits a token that could still be smuggled out, of the version where it is most",
            value=max(each.bits for each in verdicts),
        )
        yield GaugeMetricFamily(
            "strongroom_gateway_verify_alarm",
            "Whether answers do not verify",
            value=1 if any(each.alarm for each in verdicts) else 0,
        )

    def exposition(self) -> bytes:
        """All of them, as text."""
        return generate_latest(self._registry)
