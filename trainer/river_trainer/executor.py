"""Does batches of operations on runs; knows nothing of NATS.

An operation either succeeds or leaves its run as it was; both are a `TrainResult`. Operations of one run must come in
order of their seq; whoever calls sees to that. The operations of a batch are done in rounds, each of which takes from
every run what can be done at once:

1. create and load: what was read from a checkpoint is put in place;
2. forward, forward_backward and the first half of train_step: the jobs of all runs, in shared passes;
3. optim_step and the second half of train_step: one fused update;
4. save: a copy is taken, to be written by somebody else.

Tokens: every token of every sequence of a forward, forward_backward or train_step counts as a training token, whether
or not the loss gives it a weight, because the model runs over it all the same. A failed operation counts none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from river_trainer.adapter import FlatTensors
from river_trainer.base_model import BaseModel
from river_trainer.errors import (
    GroupBrokenError,
    InvalidTaskError,
    NoGradientsError,
    NonFiniteError,
    PolicyConflictError,
    RunLostError,
    RunUnavailableError,
    TaskFailedError,
)
from river_trainer.gradients import GradientPool
from river_trainer.jobs import make_job
from river_trainer.lanes import Lanes
from river_trainer.optimizer import AdamStep, adam_steps
from river_trainer.passes import JobOutput, Passes
from river_trainer.protocol import (
    Adam,
    AdapterShape,
    CreateRun,
    Forward,
    ForwardBackward,
    LoadWeights,
    OptimStep,
    Refused,
    SaveWeights,
    TaskError,
    TrainMessage,
    TrainResult,
    TrainStep,
    Unload,
    operation_id,
    policy_version,
)
from river_trainer.runs import FailedRun, Run, load_files, new_run, together
from river_trainer.sites import trained_sites
from river_trainer.strands import Job
from river_trainer.work import LOADING, Batch, Outcome, Report, Work

logger = logging.getLogger("river.trainer")

Answer = TypeVar("Answer")

_INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class _Computed:
    """A finished job of a task, and what its result says."""

    work: Work
    run: Run
    job: Job
    output: JobOutput
    milliseconds: float


@dataclass(frozen=True, slots=True)
class _Step:
    """An optimizer step to be done on `gradient`; `computed` is the first half of a train_step."""

    work: Work
    run: Run
    gradient: FlatTensors
    adam: Adam
    computed: _Computed | None = None


class Executor:
    """The runs of one base model. Blocking, and not thread-safe: one worker thread calls it."""

    def __init__(
        self,
        base: BaseModel,
        lanes: Lanes,
        *,
        base_model: str,
        context_length: int,
        max_lora_rank: int,
        pass_tokens: int,
        piece_tokens: int,
        make_passes: Callable[..., Passes] = Passes,
    ) -> None:
        self.runs: dict[str, Run | FailedRun] = {}
        self.base = base
        self.base_model = base_model
        self.context_length = context_length
        self._lanes = lanes
        self._max_lora_rank = max_lora_rank
        self._pool = GradientPool(base.home.device)
        self._passes = make_passes(
            base, lanes, self._pool, tokens_max=pass_tokens, piece_tokens=piece_tokens
        )
        self._report = Report()
        self._frozen: dict[tuple[str, int], Run] = {}

    def execute(self, works: Sequence[Work]) -> tuple[list[Outcome], Report]:
        """Does a batch. Never raises for what an operation asks: that becomes its result's error.

        Raises:
            GroupBrokenError: the model is shared with other processes, and they are out of step or gone.
        """
        self._report = report = Report()
        self._frozen.clear()
        batch = Batch(works)
        for message in batch.first_messages():
            run = self.runs.get(message.run_id)
            assert run is None or message.seq > run.last_seq, "nothing is done twice"
        while batch:
            for work in batch.take(*LOADING, over=True):
                if work.is_over:
                    self._pass_over(batch, work)
                elif work.gone is not None:
                    self._fail(batch, work, work.gone)
                else:
                    self._guard(batch, work, lambda work=work: self._load(work))
            computed = self._compute(batch)
            # A run whose train_step has only been computed has to wait with what comes after it.
            stepping = {done.run.run_id for done in computed}
            self._optimize(batch, computed, stepping)
            for work in batch.take(SaveWeights, Unload, Refused, waiting=stepping):
                task = work.message.task
                if isinstance(task, Refused):
                    self._fail(batch, work, task.error)
                elif isinstance(task, Unload):
                    self._guard(batch, work, lambda work=work: self._let_go(work))
                else:
                    self._guard(batch, work, lambda work=work: self._save(work))
        return batch.outcomes(), report

    def _pass_over(self, batch: Batch, work: Work) -> None:
        """An operation of a replayed journal that changed nothing."""
        assert work.told is not None
        message, error = work.message, work.told.error
        if isinstance(message.task, CreateRun) and error is not None:
            self.give_up(message.run_id, error, message.seq)
        self._finish(batch, Outcome(work, work.told))

    def give_up(
        self, run_id: str, error: TaskError, last_seq: int, *, durable: bool = True
    ) -> None:
        """The run cannot be brought to where it was: it answers everything with this from now on."""
        self.runs[run_id] = FailedRun(run_id, error, last_seq, durable)

    def pass_seq(self, run_id: str, seq: int) -> None:
        """Operation `seq` of a run counts as done, whatever became of it."""
        run = self.runs.get(run_id)
        if isinstance(run, Run):
            run.last_seq = max(run.last_seq, seq)
        elif isinstance(run, FailedRun):
            self.runs[run_id] = replace(run, last_seq=max(run.last_seq, seq))

    # ---- Create and load -----------------------------------------------------------------------

    def _load(self, work: Work) -> Outcome:
        message, task = work.message, work.message.task
        if isinstance(work.files, TaskFailedError):
            raise work.files
        if isinstance(task, CreateRun):
            assert message.run_id not in self.runs, f"{message.run_id} exists"
            assert message.seq == 0, "creating a run is operation 0"
            self._check_shape(task.shape)
            run = new_run(message.run_id, self.base.sites, task.shape)
            if work.files is None:
                run.move(self.base.home)
            else:
                load_files(
                    run, self.base.sites, work.files, self.base.home, optimizer=task.optimizer
                )
            self.runs[message.run_id] = run
        else:
            assert isinstance(task, LoadWeights)
            assert work.files is not None
            run = self._expected_run(work)
            was_new = run.step == 0 and run.adapter.changes_nothing
            load_files(run, self.base.sites, work.files, self.base.home, optimizer=task.optimizer)
            # A version's name is never used again for other weights; those of new adapters are all the base model.
            if task.step > 0 or not was_new or not run.adapter.changes_nothing:
                run.step = max(run.step + 1, task.step)
            # A load that leaves the step as it was brings other factors all the same.
            self._frozen.pop((run.run_id, run.step), None)
        # The snapshot that is made of it says that this operation is done.
        self.pass_seq(message.run_id, message.seq)
        frozen = None if work.files is None else run.frozen()
        return Outcome(work, _result(message, run), run.adapter.host_copy(), frozen)

    def _check_shape(self, shape: AdapterShape) -> None:
        if not 1 <= shape.rank <= self._max_lora_rank:
            raise InvalidTaskError(
                f"rank {shape.rank}; 1 to {self._max_lora_rank} are possible", param="lora.rank"
            )
        if not shape.alpha > 0:
            raise InvalidTaskError(f"alpha {shape.alpha} is not positive", param="lora.alpha")
        if not trained_sites(self.base.sites, shape):
            raise InvalidTaskError("the adapter would change nothing", param="lora")

    # ---- Forward and backward ------------------------------------------------------------------

    def _compute(self, batch: Batch) -> list[_Computed]:
        """Runs the data of all runs; returns the train_steps that now want their optimizer step."""
        jobs: list[tuple[Work, Run, Job]] = []
        stepping: set[str] = set()
        for work in batch.take(Forward, ForwardBackward, TrainStep, waiting=stepping):
            task = work.message.task
            if isinstance(task, TrainStep):
                stepping.add(work.message.run_id)
            made = self._guarded(work, lambda work=work: self._make_job(work))
            if isinstance(made, TaskError):
                self._fail(batch, work, made)
            else:
                jobs.append((work, *made))
        if not jobs:
            return []
        started = time.perf_counter()
        outputs = self._run_jobs([job for _, _, job in jobs])
        seconds = time.perf_counter() - started
        backward_s = seconds * self._passes.times.take().backward_share
        self._report.add("forward", seconds - backward_s)
        self._report.add("backward", backward_s)
        train_steps: list[_Computed] = []
        for (work, run, job), output in zip(jobs, outputs, strict=True):
            if isinstance(output, TaskError):
                self._fail(batch, work, output)
                continue
            self._report.tokens += job.tokens
            computed = _Computed(work, run, job, output, 1000.0 * seconds)
            if isinstance(work.message.task, TrainStep):
                train_steps.append(computed)
            else:
                self._guard(batch, work, lambda computed=computed: self._keep(computed))
        return train_steps

    def _make_job(self, work: Work) -> tuple[Run, Job]:
        run, task = self._expected_run(work), work.message.task
        assert isinstance(task, Forward | ForwardBackward | TrainStep)
        return run, make_job(task, run.adapter, self.base, context_length=self.context_length)

    def _run_jobs(self, jobs: Sequence[Job]) -> list[JobOutput | TaskError]:
        """The outputs of all jobs; if the shared passes fail, each is tried alone, so that only the culprit fails."""
        try:
            return [
                _checked(job, output)
                for job, output in zip(jobs, self._passes.run(jobs), strict=True)
            ]
        except GroupBrokenError:
            raise
        except Exception as error:  # a supervisor: one bad operation must not stop all runs
            logger.exception("a batch of %d jobs failed", len(jobs))
            if len(jobs) == 1:
                return [_internal(error)]
        return [output for job in jobs for output in self._run_jobs([job])]

    def _keep(self, computed: _Computed) -> Outcome:
        run, gradient = computed.run, computed.output.gradient
        if gradient is not None:
            total = together(_pending(computed), gradient)
            before, run.gradient = run.gradient, total
            if before is not None:
                self._pool.give(before)
        return Outcome(computed.work, _compute_result(computed))

    # ---- Optimizer -----------------------------------------------------------------------------

    def _optimize(self, batch: Batch, computed: Sequence[_Computed], stepping: set[str]) -> None:
        """One step of every run that asks for one; a run's second has to wait, so it becomes one of `stepping`."""
        asked: list[tuple[Work, Callable[[], _Step]]] = [
            (done.work, lambda done=done: self._second_half(done)) for done in computed
        ]
        for work in batch.take(OptimStep, waiting=stepping):
            stepping.add(work.message.run_id)
            asked.append((work, lambda work=work: self._own_step(work)))
        steps: list[_Step] = []
        for work, make in asked:
            step = self._guarded(work, make)
            if isinstance(step, TaskError):
                self._fail(batch, work, step)
            else:
                steps.append(step)
        if not steps:
            return
        started = time.perf_counter()
        shares = [steps[lane :: self._lanes.count] for lane in range(self._lanes.count)]
        self._lanes.map(lambda share: self._step_all(batch, share), shares)
        self._report.add("optimizer", time.perf_counter() - started)

    def _second_half(self, computed: _Computed) -> _Step:
        task, gradient = computed.work.message.task, computed.output.gradient
        assert isinstance(task, TrainStep)
        assert gradient is not None
        total = together(_pending(computed), gradient)
        return _Step(computed.work, computed.run, total, task.adam, computed)

    def _own_step(self, work: Work) -> _Step:
        run, task = self._expected_run(work), work.message.task
        assert isinstance(task, OptimStep)
        if run.gradient is None:
            raise NoGradientsError("no forward_backward since the last optimizer step")
        return _Step(work, run, run.gradient, task.adam)

    def _step_all(self, batch: Batch, steps: Sequence[_Step]) -> None:
        asked = [
            AdamStep(
                step.run.adapter.weights,
                step.gradient,
                step.run.optimizer,
                step.adam,
                step.run.adapter.copy,
            )
            for step in steps
        ]
        for step, norm in zip(steps, adam_steps(asked), strict=True):
            if isinstance(norm, NonFiniteError):
                self._fail(batch, step.work, norm.as_task_error())
                continue
            run = step.run
            for used in {id(g): g for g in (run.gradient, step.gradient) if g is not None}.values():
                self._pool.give(used)
            run.gradient = None
            run.step += 1
            metrics = {"grad_norm": norm}
            if step.computed is None:
                result = _result(step.work.message, run, metrics=metrics)
            else:
                result = _compute_result(step.computed, metrics)
            self._finish(batch, Outcome(step.work, result, version=run.adapter.host_copy()))

    # ---- Save ----------------------------------------------------------------------------------

    def _save(self, work: Work) -> Outcome:
        message, task, run = work.message, work.message.task, self._expected_run(work)
        assert isinstance(task, SaveWeights)
        if task.mode not in ("training", "inference", "external"):
            raise InvalidTaskError(f"no mode {task.mode!r}", param="mode")
        # However often it is saved, one copy of a version will do.
        version = (run.run_id, run.step)
        if version not in self._frozen:
            self._frozen[version] = run.frozen()
        return Outcome(work, _result(message, run), frozen=self._frozen[version])

    def _let_go(self, work: Work) -> Outcome:
        """Only says that it may go; the service sees to it once a snapshot is stored."""
        return Outcome(work, _result(work.message, self._expected_run(work)))

    # ---- Outcomes ------------------------------------------------------------------------------

    def _run_of(self, work: Work) -> Run:
        run = self.runs.get(work.message.run_id)
        assert run is not None, f"{work.message.run_id} was never created"
        if isinstance(run, FailedRun):
            lost = run.error.type == RunLostError.type
            kind = RunLostError if lost else RunUnavailableError
            raise kind(f"the run is not available: {run.error.message}")
        return run

    def _expected_run(self, work: Work) -> Run:
        """The run, if it is at the policy version that the operation is meant for."""
        run, expected = self._run_of(work), work.message.task.expected_policy
        here = policy_version(run.run_id, run.step)
        if expected is not None and expected != here:
            raise PolicyConflictError(
                f"expected_policy: {expected}, but the run is at {here}", param="expected_policy"
            )
        return run

    def _guard(self, batch: Batch, work: Work, function: Callable[[], Outcome]) -> None:
        outcome = self._guarded(work, function)
        if isinstance(outcome, TaskError):
            self._fail(batch, work, outcome)
        else:
            self._finish(batch, outcome)

    def _guarded(self, work: Work, function: Callable[[], Answer]) -> Answer | TaskError:
        """What `function` gives, or the error that becomes the operation's."""
        try:
            return function()
        except TaskFailedError as error:
            return error.as_task_error()
        except Exception as error:  # a supervisor: one bad operation must not stop all runs
            message = work.message
            operation = operation_id(message.run_id, message.seq)
            logger.exception("operation failed unexpectedly", extra={"operation": operation})
            return _internal(error)

    def _finish(self, batch: Batch, outcome: Outcome) -> None:
        message, told = outcome.message, outcome.work.told
        self.pass_seq(message.run_id, message.seq)
        batch.finish(outcome)
        if told is not None and not outcome.work.is_over and not _agree(outcome.result, told):
            # At once, before anything that comes after it is done on the wrong weights.
            self._lose(outcome, told)

    def _lose(self, outcome: Outcome, told: TrainResult) -> None:
        """What was told to have succeeded cannot be done again: the run is not what its owner knows."""
        result = outcome.result
        if isinstance(self.runs.get(told.run_id), FailedRun) and told.seq > 0:
            return
        reason = result.error.message if result.error else f"step {result.step}, not {told.step}"
        extra = {"operation": told.operation_id, "told_step": told.step}
        logger.critical("cannot rebuild a run: %s", reason, extra=extra)
        # Where memory was short, or we are at fault, the next process may do better with the same journal.
        durable = result.error is None or result.error.type != _INTERNAL
        kind = RunLostError if durable else RunUnavailableError
        error = kind(f"it could not be rebuilt after a restart: {reason}")
        self.give_up(told.run_id, error.as_task_error(), told.seq, durable=durable)

    def _fail(self, batch: Batch, work: Work, error: TaskError) -> None:
        message = work.message
        run = self.runs.get(message.run_id)
        if run is None:
            self.give_up(message.run_id, error, message.seq)
        result = TrainResult(
            operation_id=operation_id(message.run_id, message.seq),
            run_id=message.run_id,
            seq=message.seq,
            step=run.step if isinstance(run, Run) else 0,
            error=error,
        )
        self._finish(batch, Outcome(work, result))


def _pending(computed: _Computed) -> FlatTensors | None:
    """The gradient that a job's own is added to."""
    task = computed.work.message.task
    assert isinstance(task, ForwardBackward | TrainStep)
    return None if task.zero_gradients else computed.run.gradient


def _checked(job: Job, output: JobOutput) -> JobOutput | TaskError:
    if output.finite:
        return output
    error = NonFiniteError(f"the {job.loss.name} loss or its gradient is not finite")
    return error.as_task_error()


def _agree(result: TrainResult, told: TrainResult) -> bool:
    return result.error is None and result.step == told.step


def _internal(error: Exception) -> TaskError:
    return TaskError(type=_INTERNAL, message=f"{type(error).__name__} in the trainer")


def _result(
    message: TrainMessage, run: Run, *, metrics: Mapping[str, float] | None = None
) -> TrainResult:
    return TrainResult(
        operation_id=operation_id(message.run_id, message.seq),
        run_id=message.run_id,
        seq=message.seq,
        step=run.step,
        metrics=dict(metrics or {}),
    )


def _compute_result(computed: _Computed, metrics: Mapping[str, float] | None = None) -> TrainResult:
    job, output = computed.job, computed.output
    of_job = output.metrics(job.loss) | {
        "tokens": float(job.tokens),
        "milliseconds": computed.milliseconds,
    }
    widths = [sequence.targets_per_token for sequence in job.sequences]
    return msgspec.structs.replace(
        _result(computed.work.message, computed.run, metrics=of_job | dict(metrics or {})),
        logprobs=[logprobs.numpy().astype("<f4").tobytes() for logprobs in output.logprobs],
        targets_per_token=widths if max(widths) > 1 else None,
        training_tokens=job.tokens,
    )
