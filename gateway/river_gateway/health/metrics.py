"""What Prometheus sees of requests by base model, made of the same counts as the dashboard's numbers."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from river_gateway.health.slots import BOUNDS_S, outcomes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client import Metric

    from river_gateway.health.window import Window

_EVERY = 6
"""So many buckets of ours are one of Prometheus's, of which a series has to have few."""


class HealthMetrics(Collector):
    """Of slots that have ended: at most ten seconds late."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def collect(self) -> Iterable[Metric]:
        """By base model, or API where no model is known."""
        ended = CounterMetricFamily(
            "river_gateway_ended_requests",
            "Requests by base model and by how they ended.",
            labels=("model", "outcome"),
        )
        first_s = HistogramMetricFamily(
            "river_gateway_first_token_seconds",
            "From the arrival of a request for a stream until its first token leaves.",
            labels=("model",),
        )
        for name, tally in self._window.totals.items():
            for outcome, count in outcomes(tally.statuses).items():
                ended.add_metric((name, outcome.value), count)
            if tally.first:
                first_s.add_metric((name,), _buckets(tally.first), _about_sum_s(tally.first))
        yield ended
        yield first_s


def _buckets(counts: Mapping[int, int]) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as the text format wants them."""
    totals = list(accumulate(counts.get(number, 0) for number in range(len(BOUNDS_S) + 1)))
    found = [
        (f"{BOUNDS_S[number]:.4g}", float(totals[number]))
        for number in range(_EVERY - 1, len(BOUNDS_S), _EVERY)
    ]
    return [*found, ("+Inf", float(totals[-1]))]


def _about_sum_s(counts: Mapping[int, int]) -> float:
    """The sum of all times, each taken for its bucket's bound."""
    return sum(count * BOUNDS_S[min(number, len(BOUNDS_S) - 1)] for number, count in counts.items())
