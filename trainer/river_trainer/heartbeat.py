"""The record by which gateways find this trainer, and see how it is."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from nats.js import JetStreamContext

from river_engine.problems import RecentProblems
from river_trainer import journal
from river_trainer.controls import Controls
from river_trainer.executor import Executor
from river_trainer.metrics import TrainerMetrics
from river_trainer.pace import Pace
from river_trainer.protocol import HEARTBEAT_INTERVAL_S, TrainerHealth, TrainerRecord
from river_trainer.residency import Residency
from river_trainer.scheduling import Scheduler
from river_trainer.settings import TrainerSettings
from river_trainer.snapshotting import Snapshotting


class Heartbeat:
    """One life of a trainer."""

    def __init__(
        self,
        js: JetStreamContext,
        settings: TrainerSettings,
        trainer_id: str,
        executor: Executor,
        residency: Residency,
        scheduler: Scheduler,
        snapshotting: Snapshotting,
        metrics: TrainerMetrics,
        controls: Controls,
        problems: RecentProblems,
    ) -> None:
        self._js = js
        self._settings = settings
        self._trainer_id = trainer_id
        self._executor = executor
        self._residency = residency
        self._scheduler = scheduler
        self._snapshotting = snapshotting
        self._metrics = metrics
        self._controls = controls
        self._problems = problems
        self._pace = Pace(metrics.totals)
        self._started_at = time.time()

    async def keep(self) -> None:
        """Renews the record until cancelled, at once when an admin has told the trainer something."""
        # A cancellation that comes together with an answer of NATS is lost in the client's own waiting.
        while not (task := asyncio.current_task()) or not task.cancelling():
            self._controls.changed.clear()
            record = self.record()

            async def attempt(record: TrainerRecord = record) -> None:
                bucket = await journal.trainers_bucket(self._js)
                await bucket.put(record.trainer_id, journal.encode(record))

            await journal.retry(attempt, doing="renewing the trainer's record")
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._controls.changed.wait()

    def record(self) -> TrainerRecord:
        """As things are now."""
        base = self._executor.base
        routed = base.routed_experts
        return TrainerRecord(
            trainer_id=self._trainer_id,
            base_model=self._settings.base_model,
            context_length=self._executor.context_length,
            vocab_size=base.vocab_size,
            max_lora_rank=self._settings.max_lora_rank,
            heartbeat_at=time.time(),
            runs=len(self._snapshotting),
            num_experts=routed.experts if routed else 0,
            moe_layers=routed.layers if routed else 0,
            experts_per_token=routed.per_token if routed else 0,
            draining=self._controls.draining,
            health=self._health(),
        )

    def _health(self) -> TrainerHealth:
        window_s, lately = self._pace.look()
        unsaved_runs, snapshot_age_s = self._snapshotting.unsaved()
        self._metrics.snapshot_age(snapshot_age_s)
        device_runs = self._residency.device_runs
        return TrainerHealth(
            started_at=self._started_at,
            runs_device=device_runs,
            runs_memory=len(self._executor.runs) - device_runs,
            runs_disk=self._residency.spilled,
            waiting=len(self._scheduler),
            waiting_tokens=self._scheduler.tokens,
            window_s=window_s,
            batches=lately.batches,
            steps=lately.steps,
            tokens=lately.tokens,
            phase_s=lately.seconds,
            unsaved_runs=unsaved_runs,
            snapshot_age_s=snapshot_age_s,
            problems=self._problems.told(),
        )
