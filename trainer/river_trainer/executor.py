"""Does operations on runs; knows nothing of NATS.

An operation either succeeds or leaves its run as it was; both are a `TrainResult`. Operations of one run must come in
order of their seq; whoever calls sees to that. Forward and forward_backward work is described as jobs and done by
`run_jobs`, which mixes the jobs of many runs in one pass.

Tokens: every token of every sequence of a forward, forward_backward or train_step counts as a training token, whether
or not the loss gives it a weight, because the model runs over it all the same. A failed operation counts none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from river_billing.events import CheckpointSaved
from river_trainer.base_model import BaseModel
from river_trainer.errors import (
    InvalidTaskError,
    MissingError,
    NoGradientsError,
    NonFiniteError,
    RunUnavailableError,
    TaskFailedError,
)
from river_trainer.losses import check_fields, find_loss
from river_trainer.optimizer import adam_step
from river_trainer.packing import decode_sequence
from river_trainer.passes import Job, JobOutput, run_jobs
from river_trainer.protocol import (
    Adam,
    AdapterShape,
    AnyTask,
    CreateRun,
    Forward,
    ForwardBackward,
    LoadWeights,
    OptimStep,
    SaveWeights,
    TaskError,
    TrainMessage,
    TrainResult,
    TrainStep,
    operation_id,
)
from river_trainer.runs import FailedRun, Run, load_files, new_run
from river_trainer.sites import trained_sites
from river_trainer.store import FileSets, read_location

logger = logging.getLogger("river.trainer")

ADVANCING = (CreateRun, OptimStep, TrainStep, LoadWeights)
"""Tasks that, when they succeed, make a new policy version."""
PURE = (Forward, SaveWeights)
"""Tasks that leave no trace in the run: replaying the journal may skip them."""
LOADING = (CreateRun, LoadWeights)
"""Tasks that may read a checkpoint, which may be gone when the journal is replayed."""


def reads_checkpoint(task: AnyTask) -> bool:
    return isinstance(task, LoadWeights) or (
        isinstance(task, CreateRun) and task.checkpoint is not None
    )


class Executor:
    """The runs of one base model. Blocking, and not thread-safe: one worker thread calls it."""

    def __init__(
        self,
        base: BaseModel,
        store: FileSets,
        *,
        base_model: str,
        context_length: int,
        max_lora_rank: int,
        micro_batch_tokens: int,
    ) -> None:
        self.runs: dict[str, Run | FailedRun] = {}
        self.base = base
        self.base_model = base_model
        self.context_length = context_length
        self._store = store
        self._max_lora_rank = max_lora_rank
        self._micro_batch_tokens = micro_batch_tokens

    def execute(self, message: TrainMessage) -> TrainResult:
        """Does one operation. Never raises for what the operation asks: that becomes the result's error."""
        operation = operation_id(message.run_id, message.seq)
        try:
            result = self._dispatch(message)
        except TaskFailedError as error:
            result = self._failure(message, error.as_task_error())
        except Exception as error:  # a supervisor: one bad operation must not stop all runs
            logger.exception("operation failed unexpectedly", extra={"operation": operation})
            reason = f"{type(error).__name__} in the trainer"
            result = self._failure(message, TaskError(type="internal", message=reason))
        self._pass(message)
        return result

    def skip(self, message: TrainMessage, stored: TrainResult) -> None:
        """Passes over an operation of a replayed journal that changed nothing."""
        if isinstance(message.task, CreateRun) and stored.error is not None:
            self.runs[message.run_id] = FailedRun(message.run_id, stored.error, message.seq)
        self._pass(message)

    def give_up(self, message: TrainMessage) -> None:
        """The run cannot be brought to where it was: it answers everything with a refusal from now on."""
        error = TaskError(
            type="internal", message="the trainer could not rebuild it after a restart"
        )
        self.runs[message.run_id] = FailedRun(message.run_id, error, message.seq)

    def _pass(self, message: TrainMessage) -> None:
        run = self.runs.get(message.run_id)
        if isinstance(run, Run):
            run.last_seq = message.seq
        elif isinstance(run, FailedRun):
            self.runs[message.run_id] = FailedRun(run.run_id, run.error, message.seq)

    def _dispatch(self, message: TrainMessage) -> TrainResult:  # noqa: PLR0911  # one return per task
        task = message.task
        if isinstance(task, CreateRun):
            return self._create(message, task)
        run = self.runs.get(message.run_id)
        assert run is not None, f"{message.run_id} was never created"
        if isinstance(run, FailedRun):
            raise RunUnavailableError(f"the run is not available: {run.error.message}")
        match task:
            case Forward():
                return self._compute(message, run, task, self._discard)
            case ForwardBackward():
                return self._compute(message, run, task, self._keep_gradients)
            case TrainStep():
                adam = task.adam
                return self._compute(
                    message, run, task, lambda run, output: self._step_at_once(run, output, adam)
                )
            case OptimStep():
                return self._optim_step(message, run, task)
            case SaveWeights():
                return self._save(message, run, task)
            case LoadWeights():
                return self._load(message, run, task)

    def _create(self, message: TrainMessage, task: CreateRun) -> TrainResult:
        assert message.run_id not in self.runs, f"{message.run_id} exists"
        assert message.seq == 0, "creating a run is operation 0"
        self._check_shape(task.shape)
        run = new_run(message.run_id, self.base.sites, task.shape)
        if task.checkpoint is not None:
            files = self._read(task.checkpoint, param="checkpoint")
            load_files(run, self.base.sites, files, optimizer=True)
        self.runs[message.run_id] = run
        return self._result(message, run)

    def _check_shape(self, shape: AdapterShape) -> None:
        if not 1 <= shape.rank <= self._max_lora_rank:
            raise InvalidTaskError(
                f"rank {shape.rank}; 1 to {self._max_lora_rank} are possible", param="lora.rank"
            )
        if not shape.alpha > 0:
            raise InvalidTaskError(f"alpha {shape.alpha} is not positive", param="lora.alpha")
        if not trained_sites(self.base.sites, shape):
            raise InvalidTaskError("the adapter would change nothing", param="lora")

    def _compute(
        self,
        message: TrainMessage,
        run: Run,
        task: Forward | ForwardBackward | TrainStep,
        conclude: Callable[[Run, JobOutput], dict[str, float]],
    ) -> TrainResult:
        job = self._job(run, task)
        (output,) = run_jobs(self.base, [job], tokens_max=self._micro_batch_tokens)
        if not output.finite:
            raise NonFiniteError(f"the {task.loss_fn} loss or its gradient is not finite")
        metrics = output.metrics(job.loss) | conclude(run, output)
        return TrainResult(
            operation_id=operation_id(message.run_id, message.seq),
            run_id=message.run_id,
            seq=message.seq,
            step=run.step,
            metrics=metrics,
            logprobs=[logprobs.numpy().astype("<f4").tobytes() for logprobs in output.logprobs],
            training_tokens=sum(sequence.tokens for sequence in job.sequences),
        )

    def _job(self, run: Run, task: Forward | ForwardBackward | TrainStep) -> Job:
        loss = find_loss(task.loss_fn, task.loss_config)
        if not task.data:
            raise InvalidTaskError("there is no data", param="data")
        sequences = [
            decode_sequence(
                sequence,
                index=index,
                vocab_size=self.base.vocab_size,
                context_length=self.context_length,
            )
            for index, sequence in enumerate(task.data)
        ]
        for index, sequence in enumerate(sequences):
            check_fields(loss, sequence, index)
        return Job(run.adapter, sequences, loss, backward=not isinstance(task, Forward))

    def _discard(self, run: Run, output: JobOutput) -> dict[str, float]:
        assert not output.gradients, f"a forward of {run.run_id} has no gradients"
        return {}

    def _keep_gradients(self, run: Run, output: JobOutput) -> dict[str, float]:
        run.add_gradients(output.gradients)
        return {}

    def _step_at_once(self, run: Run, output: JobOutput, adam: Adam) -> dict[str, float]:
        pending = run.gradients
        run.add_gradients(output.gradients)
        try:
            return self._apply(run, adam)
        except TaskFailedError:
            run.gradients = pending
            raise

    def _apply(self, run: Run, adam: Adam) -> dict[str, float]:
        """One optimizer step on the pending gradients; makes the next policy version."""
        if run.gradients is None:
            raise NoGradientsError("no forward_backward since the last optimizer step")
        norm = adam_step(run.adapter.tensors, run.gradients, run.optimizer, adam)
        run.gradients = None
        run.step += 1
        return {"grad_norm": norm}

    def _optim_step(self, message: TrainMessage, run: Run, task: OptimStep) -> TrainResult:
        metrics = self._apply(run, task.adam)
        return self._result(message, run, metrics=metrics)

    def _save(self, message: TrainMessage, run: Run, task: SaveWeights) -> TrainResult:
        training = task.mode == "training"
        if not training and task.mode != "inference":
            raise InvalidTaskError(f"no mode {task.mode!r}", param="mode")
        folder = f"checkpoints/{task.checkpoint_id}"
        files = run.files(base_model=self.base_model, optimizer=training)
        facts = {"run_id": run.run_id, "step": run.step, "base_model": self.base_model}
        size_bytes = self._store.write(folder, files, facts)
        saved = CheckpointSaved(
            checkpoint_id=task.checkpoint_id,
            run_id=run.run_id,
            tenant_id=message.tenant_id,
            base_model=self.base_model,
            name=task.name,
            mode=task.mode,
            step=run.step,
            location=self._store.location(folder),
            size_bytes=size_bytes,
            created_at=message.submitted_at,
            expires_at=None if task.ttl_s is None else message.submitted_at + task.ttl_s,
        )
        return self._result(message, run, checkpoint=saved)

    def _load(self, message: TrainMessage, run: Run, task: LoadWeights) -> TrainResult:
        files = self._read(task.location, param="location")
        load_files(run, self.base.sites, files, optimizer=task.optimizer)
        run.step += 1
        return self._result(message, run)

    def _read(self, location: str, *, param: str) -> dict[str, bytes]:
        found = read_location(location)
        if found is None:
            raise MissingError("the checkpoint is not there", param=param)
        return found[1]

    def _result(
        self,
        message: TrainMessage,
        run: Run,
        *,
        metrics: dict[str, float] | None = None,
        checkpoint: CheckpointSaved | None = None,
    ) -> TrainResult:
        return TrainResult(
            operation_id=operation_id(message.run_id, message.seq),
            run_id=message.run_id,
            seq=message.seq,
            step=run.step,
            metrics=metrics or {},
            checkpoint=checkpoint,
        )

    def _failure(self, message: TrainMessage, error: TaskError) -> TrainResult:
        run = self.runs.get(message.run_id)
        if run is None:
            run = self.runs[message.run_id] = FailedRun(message.run_id, error, message.seq)
        return TrainResult(
            operation_id=operation_id(message.run_id, message.seq),
            run_id=message.run_id,
            seq=message.seq,
            step=run.step if isinstance(run, Run) else 0,
            error=error,
        )


def configure_torch(threads: int) -> None:
    """Bounds torch's threads. Call it once, before the first pass."""
    assert threads > 0
    torch.set_num_threads(threads)
