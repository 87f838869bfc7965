"""Executors over one base model, for tests that need no NATS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from river_trainer.base_model import BaseModel
from river_trainer.checkpoints import Checkpoints
from river_trainer.executor import Executor
from river_trainer.lanes import Lanes
from river_trainer.passes import Passes
from river_trainer.protocol import SaveWeights, TrainMessage, TrainResult
from river_trainer.runs import Run
from river_trainer.store import FileSets
from river_trainer.work import Outcome, Work


class Workbench:
    """An executor, and what the service does around it: reading checkpoints before and writing them after."""

    def __init__(
        self,
        base: BaseModel,
        lanes: Lanes,
        store: FileSets,
        *,
        base_model: str,
        pass_tokens: int = 512,
        piece_tokens: int = 512,
        make_passes: Callable[..., Passes] = Passes,
    ) -> None:
        self.executor = Executor(
            base,
            lanes,
            base_model=base_model,
            context_length=256,
            max_lora_rank=32,
            pass_tokens=pass_tokens,
            piece_tokens=piece_tokens,
            make_passes=make_passes,
        )
        self.base = base
        self.runs = self.executor.runs
        self._checkpoints = Checkpoints(store, base_model=base_model)

    def execute(self, message: TrainMessage) -> TrainResult:
        """One operation by itself."""
        return self.execute_together([message])[0]

    def execute_together(self, messages: Sequence[TrainMessage]) -> list[TrainResult]:
        """A batch."""
        works = [Work(message, self._checkpoints.read_for(message.task)) for message in messages]
        return [self._written(outcome) for outcome in self.executor.execute(works)[0]]

    def run(self, run_id: str) -> Run:
        """A run that has not failed."""
        run = self.runs[run_id]
        assert isinstance(run, Run)
        return run

    def _written(self, outcome: Outcome) -> TrainResult:
        message = outcome.message
        if outcome.frozen is not None and isinstance(message.task, SaveWeights):
            return self._checkpoints.write(message, outcome.frozen, outcome.result)
        return outcome.result
