"""Our side of the benchmarks of training: the trainer's executor with the operations of several runs ready at once."""

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
        self,
        base: BaseModel,
        *,
        shape: AdapterShape,
        runs: int,
        adam: Adam,
        lanes: Lanes,
        pass_tokens: int = limits.MICRO_BATCH_TOKENS,
        piece_tokens: int = limits.PIECE_TOKENS,
    ) -> None:
        settle()  # For the peer in this process too.
        self._executor = Executor(
            base,
            lanes,
            base_model=BASE_NAME,
            context_length=base.context_length,
            max_lora_rank=limits.LORA_RANK_MAX,
            pass_tokens=pass_tokens,
            piece_tokens=piece_tokens,
        )
        self._adam = adam
        self._run_ids = [f"run_{number}" for number in range(runs)]
        self._next_seq = dict.fromkeys(self._run_ids, 0)
        self._executor.execute(
            [self._work(run_id, CreateRun(shape=shape)) for run_id in self._run_ids]
        )

    @property
    def adapter_weights(self) -> int:
        """How many weights an adapter has."""
        run = self._executor.runs[self._run_ids[0]]
        assert isinstance(run, Run)
        return run.adapter.layout.size

    def write_adapter(self, folder: Path) -> None:
        """The first run's adapter, as PEFT's files."""
        run = self._executor.runs[self._run_ids[0]]
        assert isinstance(run, Run)
        for name, data in export_adapter(run.adapter, base_model=BASE_NAME).items():
            (folder / name).write_bytes(data)

    def step(self, batches_NST: Sequence[torch.Tensor]) -> list[float]:  # noqa: N803
        """One whole step of as many runs as there are batches [S, T]; returns each run's loss summed over tokens."""
        works: list[Work] = []
        for run_id, batch_ST in self._of_runs(batches_NST):  # noqa: N806
            works += [self._forward_backward(run_id, batch_ST), self._optim_step(run_id)]
        return self._execute(works)[::2]

    def forward_backward(self, batches_NST: Sequence[torch.Tensor]) -> list[float]:  # noqa: N803
        """The first half of a step."""
        return self._execute(
            [self._forward_backward(run_id, batch) for run_id, batch in self._of_runs(batches_NST)]
        )

    def optim_step(self, runs: int) -> None:
        """The second half, of the first `runs` runs."""
        self._execute([self._optim_step(run_id) for run_id in self._run_ids[:runs]])

    def _of_runs(self, batches: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        run_ids = self._run_ids[: len(batches)]
        assert len(run_ids) == len(batches), "there are not as many runs"
        return list(zip(run_ids, batches, strict=True))

    def _forward_backward(self, run_id: str, batch_ST: torch.Tensor) -> Work:  # noqa: N803
        task = ForwardBackward(data=sequences_of(batch_ST), loss_fn="cross_entropy", loss_config={})
        return self._work(run_id, task)

    def _optim_step(self, run_id: str) -> Work:
        return self._work(run_id, OptimStep(adam=self._adam))

    def _execute(self, works: Sequence[Work]) -> list[float]:
        """Does all of `works`; the losses of those that have one, zero for the others."""
        outcomes, _ = self._executor.execute(works)
        assert all(outcome.result.error is None for outcome in outcomes)
        return [outcome.result.metrics.get("loss_sum", 0.0) for outcome in outcomes]

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


def sequences_of(batch_ST: torch.Tensor) -> list[SequenceBytes]:  # noqa: N803
    """Rows of token ids as clients send them."""
    return [SequenceBytes(input_ids=row.numpy().astype("<i4").tobytes()) for row in batch_ST]
