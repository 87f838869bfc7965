"""Checkpoints of runs in the store: what a save writes, what creating or loading reads. For several threads at once."""

from __future__ import annotations

import msgspec

from river_billing.events import CheckpointSaved
from river_trainer.encryption import encrypted
from river_trainer.errors import MissingError, TaskFailedError
from river_trainer.protocol import (
    AnyTask,
    CreateRun,
    LoadWeights,
    SaveWeights,
    TrainMessage,
    TrainResult,
)
from river_trainer.runs import Run
from river_trainer.store import FileSets, read_location


class Checkpoints:
    """The checkpoints of one base model."""

    def __init__(self, store: FileSets, *, base_model: str) -> None:
        self._store = store
        self._base_model = base_model

    def read_for(self, task: AnyTask) -> dict[str, bytes] | TaskFailedError | None:
        """The files of the checkpoint that a task reads, or why they cannot be had; None if it reads none."""
        if isinstance(task, LoadWeights):
            location, field = task.location, "location"
        elif isinstance(task, CreateRun) and task.checkpoint is not None:
            location, field = task.checkpoint, "checkpoint"
        else:
            return None
        try:
            found = read_location(location)
        except TaskFailedError as error:
            return error
        if found is None:
            return MissingError("the checkpoint is not there", param=field)
        return found[1]

    def write(self, message: TrainMessage, run: Run, result: TrainResult) -> TrainResult:
        """Stores `run`, which nobody changes any more, as the checkpoint that `message` asks for."""
        task = message.task
        assert isinstance(task, SaveWeights)
        folder = f"checkpoints/{task.checkpoint_id}"
        facts = {"run_id": run.run_id, "step": run.step, "base_model": self._base_model}
        try:
            files = run.files(base_model=self._base_model, optimizer=task.mode == "training")
            if task.age_recipients:
                files = encrypted(files, task.age_recipients)
            size_bytes = self._store.write(folder, files, facts)
        except TaskFailedError as error:
            return msgspec.structs.replace(result, error=error.as_task_error())
        saved = CheckpointSaved(
            checkpoint_id=task.checkpoint_id,
            run_id=run.run_id,
            tenant_id=message.tenant_id,
            base_model=self._base_model,
            name=task.name,
            mode=task.mode,
            step=run.step,
            location=self._store.location(folder),
            size_bytes=size_bytes,
            created_at=message.submitted_at,
            expires_at=None if task.ttl_s is None else message.submitted_at + task.ttl_s,
            user_metadata=task.user_metadata,
        )
        return msgspec.structs.replace(result, checkpoint=saved)
