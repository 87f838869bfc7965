"""What Prometheus sees of the engines as one gateway sees them, read when it scrapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from river_gateway.engines.fleet import Fleet


class FleetMetrics(Collector):
    """By engine: tokens outstanding, and whether it is left alone; adapters given a place, over all."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """Engines that have gone are gone from here as well, so that labels stay few."""
        outstanding = GaugeMetricFamily(
            "river_gateway_engine_outstanding_tokens",
            "Tokens asked of an engine and not answered yet: its own word, or what this gateway has there if more.",
            labels=("engine",),
        )
        failing = GaugeMetricFamily(
            "river_gateway_engine_failing",
            "1 while an engine is left alone because it failed.",
            labels=("engine",),
        )
        for engine in self._fleet.everybody():
            outstanding.add_metric((engine.engine_id,), engine.outstanding_tokens)
            failing.add_metric((engine.engine_id,), engine.failing)
        yield outstanding
        yield failing
        yield CounterMetricFamily(
            "river_gateway_adapters_placed",
            "Times an engine was chosen to load an adapter that it did not hold.",
            value=self._fleet.placed,
        )
