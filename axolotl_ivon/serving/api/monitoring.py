"""What Prometheus hears of the server."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_TIMES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
_SHARES = tuple(k / 10 for k in range(1, 11))
_RECENT = 1000  # answers
_NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """Counters of one server, in a registry of its own; `gauges` returns the current values to monitor, by name."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        self._registry, self._gauges = CollectorRegistry(), gauges
        own: Any = {"registry": self._registry}
        self._requests = Counter("ivon_requests", "Requests answered, by path and status.", ["path", "status"], **own)
        self._tokens = Counter("ivon_tokens", "Tokens, of prompts and generated.", ["kind"], **own)
        self._seconds = Histogram("ivon_request_seconds", "From request to end.", ["path"], buckets=_TIMES, **own)
        self.first_token = Histogram("ivon_first_token_seconds", "From request to first token.", buckets=_TIMES, **own)
        model = ["model"]
        self._confidence = Histogram("ivon_confidence", "Of answers.", model, buckets=_SHARES, **own)
        self._disagreement = Histogram("ivon_mutual_information", "Of answers, in nats.", model, buckets=_NATS, **own)
        self._abstained = Counter("ivon_abstained", "Answers below the threshold.", model, **own)
        self._mean = Gauge("ivon_confidence_recent", f"Mean of the last {_RECENT} answers.", model, **own)
        self._recent = defaultdict[str, deque[float]](partial(deque, maxlen=_RECENT))
        self._registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> list[GaugeMetricFamily]:
        """Return the gauges, as the registry asks for them."""
        return [
            GaugeMetricFamily(f"ivon_{name}", f"Now: {name.replace('_', ' ')}.", value=value)
            for name, value in self._gauges().items()
        ]

    def request(self, path: str, status: int, seconds: float) -> None:
        """Note a request that has ended."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def tokens(self, prompt: int, generated: int) -> None:
        """Note tokens."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("generated").inc(generated)

    def answer(self, model: str, ivon: Mapping[str, Any]) -> None:
        """Note how sure an answer of a model was."""
        for name, histogram in (("confidence", self._confidence), ("mutual_information", self._disagreement)):
            if ivon.get(name) is not None:
                histogram.labels(model).observe(ivon[name])
        if ivon.get("confidence") is not None:
            recent = self._recent[model]
            recent.append(ivon["confidence"])
            self._mean.labels(model).set(fmean(recent))
        if ivon.get("abstain"):
            self._abstained.labels(model).inc()

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._registry)
