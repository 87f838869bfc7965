"""What a trainer counts, for Prometheus.

`river_trainer_tokens_total` is the sum of `training_tokens` over the results that this process was the first to
publish: an operation that a replay of the journal does again has a result already, and is not counted again.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from river_trainer.protocol import TrainMessage, TrainResult


class TrainerMetrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._tokens = Counter(
            "river_trainer_tokens", "Training tokens of published results.", registry=self._registry
        )
        self._operations = Counter(
            "river_trainer_operations",
            "Operations whose result was published.",
            ("kind", "outcome"),
            registry=self._registry,
        )
        self._seconds = Counter(
            "river_trainer_busy_seconds",
            "Time spent executing operations.",
            ("kind",),
            registry=self._registry,
        )
        self._waiting = Gauge(
            "river_trainer_waiting_operations",
            "Operations known and not executed.",
            registry=self._registry,
        )

    def count(self, message: TrainMessage, result: TrainResult, *, busy_s: float) -> None:
        kind = str(type(message.task).__struct_config__.tag)
        outcome = "done" if result.error is None else "failed"
        self._tokens.inc(result.training_tokens)
        self._operations.labels(kind, outcome).inc()
        self._seconds.labels(kind).inc(busy_s)

    def waiting(self, operations: int) -> None:
        self._waiting.set(operations)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
