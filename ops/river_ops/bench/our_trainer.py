"""Our side of the training benchmark: what the trainer does for operations of several runs that are ready at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from river_trainer import limits
from river_trainer.base_model import BaseModel
from river_trainer.losses import find_loss
from river_trainer.optimizer import adam_step
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.passes import Job, run_jobs
from river_trainer.peft_files import export_adapter
from river_trainer.protocol import Adam, AdapterShape
from river_trainer.protocol import Sequence as SequenceBytes
from river_trainer.runs import Run, new_run


class OurTrainer:
    """As many runs as are asked for, on one base model."""

    def __init__(self, model_path: Path, *, shape: AdapterShape, runs: int, adam: Adam) -> None:
        self._base = BaseModel(model_path)
        self._loss = find_loss("cross_entropy", {})
        self._adam = adam
        self._runs: list[Run] = [
            new_run(f"run_{number}", self._base.sites, shape) for number in range(runs)
        ]

    def write_adapter(self, folder: Path) -> None:
        """The first run's adapter, as PEFT's files."""
        for name, data in export_adapter(self._runs[0].adapter, base_model="bench").items():
            (folder / name).write_bytes(data)

    def step(self, batches_NST: Sequence[torch.Tensor]) -> list[float]:  # noqa: N803
        """One whole step of as many runs as there are batches [S, T]; returns each run's loss summed over tokens."""
        runs = self._runs[: len(batches_NST)]
        assert len(runs) == len(batches_NST), "there are not as many runs"
        jobs = [
            Job(run.adapter, self._decoded(batch_ST), self._loss, backward=True)
            for run, batch_ST in zip(runs, batches_NST, strict=True)
        ]
        outputs = run_jobs(self._base, jobs, tokens_max=limits.MICRO_BATCH_TOKENS)
        for run, output in zip(runs, outputs, strict=True):
            assert output.finite
            run.add_gradients(output.gradients)
            assert run.gradients is not None
            adam_step(run.adapter.tensors, run.gradients, run.optimizer, self._adam)
            run.gradients = None
        return [output.sums["loss_sum"] for output in outputs]

    def _decoded(self, batch_ST: torch.Tensor) -> list[TrainingSequence]:  # noqa: N803
        """Sequences as they come out of an operation."""
        rows = [row.numpy().astype("<i4").tobytes() for row in batch_ST]
        return [
            decode_sequence(
                SequenceBytes(input_ids=row),
                index=index,
                vocab_size=self._base.vocab_size,
                context_length=self._base.context_length,
            )
            for index, row in enumerate(rows)
        ]
