"""Our side of the training benchmark: the trainer's executor with the operations of several runs ready at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from river_trainer import limits
from river_trainer.base_model import BaseModel
from river_trainer.executor import Executor
from river_trainer.lanes import Lanes, settle
from river_trainer.peft_files import export_adapter
from river_trainer.protocol import (
    Adam,
    AdapterShape,
    AnyTask,
    CreateRun,
    ForwardBackward,
    OptimStep,
    TrainMessage,
)
from river_trainer.protocol import Sequence as SequenceBytes
from river_trainer.runs import Run
from river_trainer.work import Work

BASE_NAME = "bench"


class OurTrainer:
    """As many runs as are asked for, on one base model."""

    def __init__(
        self, model_path: Path, *, shape: AdapterShape, runs: int, adam: Adam, lanes: int
    ) -> None:
        base = BaseModel(model_path)
        settle()  # For the peer in this process too.
        self._executor = Executor(
            base,
            Lanes(lanes),
            base_model=BASE_NAME,
            context_length=base.context_length,
            max_lora_rank=limits.LORA_RANK_MAX,
            pass_tokens=limits.MICRO_BATCH_TOKENS,
            piece_tokens=limits.PIECE_TOKENS,
        )
        self._adam = adam
        self._run_ids = [f"run_{number}" for number in range(runs)]
        self._next_seq = dict.fromkeys(self._run_ids, 0)
        self._executor.execute(
            [self._work(run_id, CreateRun(shape=shape)) for run_id in self._run_ids]
        )

    def write_adapter(self, folder: Path) -> None:
        """The first run's adapter, as PEFT's files."""
        run = self._executor.runs[self._run_ids[0]]
        assert isinstance(run, Run)
        for name, data in export_adapter(run.adapter, base_model=BASE_NAME).items():
            (folder / name).write_bytes(data)

    def step(self, batches_NST: Sequence[torch.Tensor]) -> list[float]:  # noqa: N803
        """One whole step of as many runs as there are batches [S, T]; returns each run's loss summed over tokens."""
        run_ids = self._run_ids[: len(batches_NST)]
        assert len(run_ids) == len(batches_NST), "there are not as many runs"
        works: list[Work] = []
        for run_id, batch_ST in zip(run_ids, batches_NST, strict=True):  # noqa: N806
            data = [
                SequenceBytes(input_ids=row.numpy().astype("<i4").tobytes()) for row in batch_ST
            ]
            task = ForwardBackward(data=data, loss_fn="cross_entropy", loss_config={})
            works += [self._work(run_id, task), self._work(run_id, OptimStep(adam=self._adam))]
        outcomes, _ = self._executor.execute(works)
        assert all(outcome.result.error is None for outcome in outcomes)
        return [outcome.result.metrics["loss_sum"] for outcome in outcomes[::2]]

    def _work(self, run_id: str, task: AnyTask) -> Work:
        seq = self._next_seq[run_id]
        self._next_seq[run_id] = seq + 1
        message = TrainMessage(
            run_id=run_id,
            seq=seq,
            tenant_id="ten_bench",
            key_id="key_bench",
            session_id="ses_bench",
            base_model=BASE_NAME,
            submitted_at=0.0,
            task=task,
        )
        return Work(message)
