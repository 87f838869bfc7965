"""What a trainer counts, for Prometheus.

`river_trainer_tokens_total` is the sum of `training_tokens` over the results that this process was the first to
publish: an operation that a replay of the journal does again has a result already, and is not counted again.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from river_trainer.pace import Totals
from river_trainer.protocol import OptimStep, TrainMessage, TrainResult, TrainStep
from river_trainer.work import Report

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.5)


class TrainerMetrics:
    """The counters of one process. Tokens per second are the rate of `river_trainer_computed_tokens_total`."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.tokens = 0
        self.totals = Totals()
        self._tokens = Counter(
            "river_trainer_tokens", "Training tokens of published results.", registry=registry
        )
        self._operations = Counter(
            "river_trainer_operations",
            "Operations whose result was published.",
            ("kind", "outcome"),
            registry=registry,
        )
        self._waiting = Gauge(
            "river_trainer_waiting_operations", "Operations known and not done.", registry=registry
        )
        self._waiting_tokens = Gauge(
            "river_trainer_waiting_tokens", "Tokens of operations not done.", registry=registry
        )
        self._computed = Counter(
            "river_trainer_computed_tokens",
            "Tokens that went through the model, replays included.",
            registry=registry,
        )
        self._batch_operations = Counter(
            "river_trainer_batched_operations", "Operations in all batches.", registry=registry
        )
        self._batch_seconds = Histogram(
            "river_trainer_batch_seconds", "Time of a batch.", buckets=_SECONDS, registry=registry
        )
        self._batch_fill = Histogram(
            "river_trainer_batch_fill",
            "Tokens of a batch as a share of what it may take.",
            buckets=_SHARES,
            registry=registry,
        )
        self._phase_seconds = Counter(
            "river_trainer_phase_seconds",
            "Time of training by phase: load, forward, backward, optimizer; publish, beside the next batch.",
            ("phase",),
            registry=registry,
        )
        self._steps = Counter(
            "river_trainer_steps", "Optimizer steps of all runs.", registry=registry
        )
        self._snapshot_age = Gauge(
            "river_trainer_snapshot_age_seconds",
            "Age of the oldest newest snapshot of a run with operations that only the journal holds.",
            registry=registry,
        )
        self._runs = Gauge("river_trainer_runs", "Runs by place.", ("place",), registry=registry)
        self._resident = Gauge(
            "river_trainer_resident_bytes",
            "Memory of the runs that are not on disk.",
            registry=registry,
        )

    def count(self, message: TrainMessage, result: TrainResult) -> None:
        """A result has been published."""
        kind = str(type(message.task).__struct_config__.tag)
        outcome = "done" if result.error is None else "failed"
        self._tokens.inc(result.training_tokens)
        self.tokens += result.training_tokens
        self._operations.labels(kind, outcome).inc()
        if result.error is None and isinstance(message.task, OptimStep | TrainStep):
            self._steps.inc()
            self.totals.steps += 1

    def batch(self, report: Report, *, operations: int, budget: int, seconds: float) -> None:
        """A batch has been done."""
        self._computed.inc(report.tokens)
        self._batch_operations.inc(operations)
        self._batch_seconds.observe(seconds)
        if report.tokens:
            self._batch_fill.observe(report.tokens / budget)
        self.totals.batches += 1
        self.totals.tokens += report.tokens
        for phase, spent in report.seconds.items():
            self.spent(phase, spent)

    def spent(self, phase: str, seconds: float) -> None:
        """Time has gone into a phase."""
        self._phase_seconds.labels(phase).inc(seconds)
        self.totals.seconds[phase] = self.totals.seconds.get(phase, 0.0) + seconds

    def snapshot_age(self, seconds: float) -> None:
        """0 while everything is in snapshots."""
        self._snapshot_age.set(seconds)

    def waiting(self, operations: int, tokens: int) -> None:
        self._waiting.set(operations)
        self._waiting_tokens.set(tokens)

    def runs(self, *, device: int, memory: int, spilled: int, resident_bytes: int) -> None:
        self._runs.labels("device").set(device)
        self._runs.labels("memory").set(memory)
        self._runs.labels("disk").set(spilled)
        self._resident.set(resident_bytes)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
