"""The gateway's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from river_billing.events import UsageEvent, UsageKind

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Telemetry:
    """Requests and their latency by route, tokens by model and kind, usage events waiting for NATS."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Finding a metric by its labels costs more than counting with it.
        self._route_children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._token_children: dict[tuple[str, UsageKind], Counter] = {}
        self._requests = Counter(
            "river_gateway_requests",
            "Requests answered.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._latency_s = Histogram(
            "river_gateway_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._tokens = Counter(
            "river_gateway_tokens",
            "Tokens metered.",
            ("base_model", "kind"),
            registry=self.registry,
        )
        self.usage_backlog = Gauge(
            "river_gateway_usage_backlog",
            "Usage events that NATS has not acknowledged yet.",
            registry=self.registry,
        )
        self.retries = Counter(
            "river_gateway_retries",
            "Requests sent to another engine because one did not answer.",
            registry=self.registry,
        )
        self.hedges = Counter(
            "river_gateway_hedges",
            "Requests sent to a second engine because the first took long.",
            registry=self.registry,
        )
        self.usage_dropped = Counter(
            "river_gateway_usage_dropped",
            "Usage events that NATS refused for good.",
            registry=self.registry,
        )

    def answered(self, route: str, method: str, status: int, elapsed_s: float) -> None:
        """Counts one answered request; `route` is a template, never a path, so that labels stay few."""
        children = self._route_children.get((route, method, status))
        if children is None:
            children = (
                self._requests.labels(route, method, str(status)),
                self._latency_s.labels(route),
            )
            self._route_children[route, method, status] = children
        requests, latency_s = children
        requests.inc()
        latency_s.observe(elapsed_s)

    def metered(self, event: UsageEvent) -> None:
        """Counts the tokens of one usage event."""
        for kind, quantity in event.quantities.items():
            child = self._token_children.get((event.base_model, kind))
            if child is None:
                child = self._tokens.labels(event.base_model, kind.value)
                self._token_children[event.base_model, kind] = child
            child.inc(quantity)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
