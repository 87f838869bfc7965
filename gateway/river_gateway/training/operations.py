"""Training operations on their way: into the journal of their run, and their results back out.

An operation is accepted once JetStream has stored it under the message id `<run>:<seq>`; the same again is stored once
and answered by the first result.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from river_billing.catalog import record_checkpoint
from river_client import wire
from river_gateway.bus import BusError
from river_gateway.checkpoints import catalog
from river_gateway.database import POSTGRES_AWAY
from river_gateway.errors import (
    AheadError,
    ConflictError,
    InvalidFieldError,
    NotFoundError,
    UnavailableError,
)
from river_gateway.feedback import learning
from river_gateway.limits import (
    QUEUE_STATE_TIMEOUT_S,
    SEQ_AHEAD_MAX,
    SEQ_MAX,
)
from river_gateway.training import saving, validation
from river_gateway.training.expert_routing import RoutedExperts, check_replayable
from river_trainer import journal, protocol

logger = logging.getLogger("river.gateway")

if TYPE_CHECKING:
    from river_client.learning_wire import LearningState
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_OPERATION_ID = re.compile(r"(?P<run>run_[A-Za-z0-9]+)-(0|[1-9][0-9]{0,15})")

NO_TRAINER = wire.QueueState(
    state="no_trainer",
    reason="no trainer answers at the moment; the operation is kept safe and will be done by the next one",
)

# ---- Tasks -----------------------------------------------------------------------------------------------------------


async def make_task(
    services: Services, run: RunRow, tenant_id: str, submitted: wire.SubmitOperation
) -> protocol.AnyTask:
    """The trainer's task of a submitted operation, everything about it checked.

    Raises:
        InvalidFieldError: a field is wrong.
        ConflictError: as `check_seq`, or a name is taken.
        NotFoundError: a checkpoint is unknown.
        UnavailableError: no trainer of the base model was ever heard of.
    """
    await check_seq(services, run, tenant_id, submitted.seq)
    operation = submitted.operation
    expected = validation.expected_policy(operation.expected_policy, run.run_id)
    task = await _task(services, run, tenant_id, submitted.seq, operation)
    return task if expected is None else msgspec.structs.replace(task, expected_policy=expected)


async def _task(
    services: Services, run: RunRow, tenant_id: str, seq: int, operation: wire.AnyOperation
) -> protocol.AnyTask:
    match operation:
        case wire.SaveWeights() as save:
            return await saving.save_task(services, run, tenant_id, seq, save)
        case wire.Unload():
            return protocol.Unload()
        case wire.LoadWeights() as load:
            source = await find_source(services, load.path, tenant_id)
            check_source(
                source,
                field="path",
                base_model=run.base_model,
                lora=run.lora,
                with_optimizer=load.optimizer,
            )
            return protocol.LoadWeights(
                location=source.location, optimizer=load.optimizer, step=source.step
            )
        case _:
            limits = _limits(services, run)
            # Checking millions of numbers must not hold up everybody else's requests.
            return await asyncio.to_thread(_data_task, operation, limits)


async def check_seq(services: Services, run: RunRow, tenant_id: str, seq: int) -> None:
    """Makes sure that a run takes operations, and one of this seq.

    Raises:
        InvalidFieldError: `seq` is none.
        AheadError: it is too far ahead; later it may be not.
        ConflictError: the run is an imported adapter.
    """
    if run.imported:
        raise ConflictError(
            f"{run.run_id} is an imported adapter; start a run from its checkpoint", param="run_id"
        )
    validation.in_range(seq, "seq", 1, SEQ_MAX)
    # What lies behind a gap waits in the journal that all tenants share, maybe for ever.
    if seq > run.last_seq + SEQ_AHEAD_MAX:
        run = await services.runs.current(run.run_id, tenant_id)
    if seq > run.last_seq + SEQ_AHEAD_MAX:
        raise AheadError(
            f"seq: {seq}, at most {SEQ_AHEAD_MAX} more than the newest one done, "
            f"which is {run.last_seq}",
            param="seq",
        )


async def check_not_learning(services: Services, run: RunRow, tenant_id: str, seq: int) -> None:
    """Makes sure that an operation does not come between those of a run that learns, nor is taken for one of them.

    What was submitted before the learning began may be submitted again.

    Raises:
        ConflictError: the run is learning, or has used that seq while it was.
    """
    _refuse_if_learning(run, await services.names.learning(run.run_id, tenant_id), seq)


def _refuse_if_learning(run: RunRow, state: LearningState | None, seq: int) -> None:
    if state is None or seq < state.first_seq:
        return
    if state.active:
        raise ConflictError(
            f"{run.run_id} is learning from {state.alias!r}, so nobody else trains it; stop that first",
            param="run_id",
        )
    if seq < state.next_seq:
        raise ConflictError(
            f"seq: {seq} was used while the run was learning; the next is {state.next_seq}",
            param="seq",
        )


def _data_task(
    operation: wire.Forward | wire.ForwardBackward | wire.OptimStep | wire.TrainStep,
    limits: validation.Limits,
) -> protocol.AnyTask:
    if isinstance(operation, wire.OptimStep):
        return protocol.OptimStep(adam=validation.adam(operation.adam))
    loss_fn = operation.loss_fn
    config = validation.loss_config(loss_fn, operation.loss_config)
    replay = operation.force_routing_replay
    if replay:
        check_replayable(operation.data)
    match operation:
        case wire.TrainStep():
            adam = validation.adam(operation.adam)
            data = validation.sequences(operation.data, loss_fn, limits)
            return protocol.TrainStep(
                data=data,
                loss_fn=loss_fn,
                loss_config=config,
                adam=adam,
                force_routing_replay=replay,
                zero_gradients=operation.zero_gradients,
            )
        case wire.ForwardBackward():
            data = validation.sequences(operation.data, loss_fn, limits)
            return protocol.ForwardBackward(
                data=data,
                loss_fn=loss_fn,
                loss_config=config,
                force_routing_replay=replay,
                zero_gradients=operation.zero_gradients,
            )
        case wire.Forward():
            data = validation.sequences(operation.data, loss_fn, limits)
            return protocol.Forward(
                data=data, loss_fn=loss_fn, loss_config=config, force_routing_replay=replay
            )


def _limits(services: Services, run: RunRow) -> validation.Limits:
    """The limits of a run's data. A trainer that has died keeps its limits: its successor will be like it."""
    trainer = services.trainers.last_of(run.base_model)
    if trainer is None:
        raise UnavailableError(f"no trainer of {run.base_model!r} has registered yet; try again")
    routed_experts = None
    if trainer.moe_layers:
        routed_experts = RoutedExperts(
            experts=trainer.num_experts,
            layers=trainer.moe_layers,
            per_token=trainer.experts_per_token,
        )
    return validation.Limits(
        context_length=run.context_length,
        vocab_size=trainer.vocab_size,
        routed_experts=routed_experts,
    )


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that a run may start from or load: where it is, and what it is of."""

    path: str
    location: str
    base_model: str
    lora: wire.LoraConfig
    has_optimizer: bool
    step: int


async def find_source(services: Services, path: str, tenant_id: str) -> Source:
    """The checkpoint of a path, of one's own or shown to all.

    Raises:
        NotFoundError: there is none.
        InvalidFieldError: it is for use elsewhere.
    """
    row = await catalog.find_checkpoint(services.pool, path=path, tenant_id=tenant_id, public=True)
    if row.checkpoint.mode == "external":
        raise InvalidFieldError(
            f"path: {path} is for use elsewhere and cannot be loaded; checkpoints under weights/ and "
            "sampler_weights/ can",
            param="path",
        )
    run = await services.runs.find(row.checkpoint.run_id, row.tenant_id)
    has_optimizer = row.checkpoint.mode == "training"
    step = int(row.checkpoint.policy_version.rpartition("@")[2])
    return Source(path, row.location, run.base_model, run.lora, has_optimizer, step)


def check_source(
    source: Source, *, field: str, base_model: str, lora: wire.LoraConfig, with_optimizer: bool
) -> None:
    """Makes sure that a checkpoint fits a run.

    Raises:
        InvalidFieldError: it is of another base model or shape, or holds no optimizer though one is wanted.
    """
    if with_optimizer and not source.has_optimizer:
        raise InvalidFieldError(
            f"{field}: {source.path} holds no optimizer state, only checkpoints under weights/ do; "
            "optimizer=False starts without",
            param=field,
        )
    have, want = _facts(source.base_model, source.lora), _facts(base_model, lora)
    different = [
        f"{name} {have[name]} instead of {want[name]}" for name in have if have[name] != want[name]
    ]
    if different:
        raise InvalidFieldError(
            f"{field}: {source.path} has {' and '.join(different)}", param=field
        )


def _facts(base_model: str, lora: wire.LoraConfig) -> dict[str, str]:
    """What has to be equal, as it is told; the seed need not be."""
    facts = {"base model": base_model}
    for name in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed", "expert_layout"):
        value = getattr(lora, name)
        facts[name] = f"{value:g}" if isinstance(value, float) else str(value)
    return facts


# ---- In --------------------------------------------------------------------------------------------------------------


async def publish_task(
    services: Services, run: RunRow, principal: Principal, seq: int, task: protocol.AnyTask
) -> str:
    """Stores a task in its run's journal and returns the operation's id.

    Raises:
        ConflictError: the gateways have used its seq, in training the run on feedback.
        UnavailableError: the connection is down.
        nats.errors.Error: JetStream did not store it.
    """
    message = message_of(run, principal, seq, task, time.time())
    if not await publish_new(services, message):
        # Mostly it has only been sent again. But who did not know yet that the run learns may have come too late.
        state = await learning.find(services.pool, run_id=run.run_id, tenant_id=principal.tenant_id)
        _refuse_if_learning(run, state, seq)
    return protocol.operation_id(run.run_id, seq)


def message_of(
    run: RunRow, principal: Principal, seq: int, task: protocol.AnyTask, submitted_at: float
) -> protocol.TrainMessage:
    """A task as the journal holds it; `submitted_at` is Unix time."""
    return protocol.TrainMessage(
        run_id=run.run_id,
        seq=seq,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        session_id=run.session_id,
        base_model=run.base_model,
        submitted_at=submitted_at,
        task=task,
        context_length=run.context_length,
    )


async def publish_new(services: Services, message: protocol.TrainMessage) -> bool:
    """Stores a message in the journal; False when it, or another of its seq, has been stored before.

    Raises:
        UnavailableError: the connection is down.
        nats.errors.Error: JetStream did not store it.
    """
    services.bus.require()
    ack = await journal.submit(services.bus.jetstream, message)
    if not ack.duplicate:
        services.results.watch(protocol.operation_id(message.run_id, message.seq))
    return not ack.duplicate


async def next_seq(services: Services, run: RunRow, *, at_least: int = 1) -> int:
    """The seq after every operation of a run that was ever accepted, which is known to be no lower than `at_least`.

    What Postgres knows lags behind the results, and these behind the journal, which forgets what has been done.
    """
    services.bus.require()
    jetstream = services.bus.jetstream
    newest = await journal.newest_seq(jetstream, run.base_model, run.run_id)
    seq = max(at_least, run.last_seq + 1, 1 if newest is None else newest + 1)
    while await journal.find_result(jetstream, protocol.operation_id(run.run_id, seq)) is not None:
        seq += 1
    return seq


# ---- Out -------------------------------------------------------------------------------------------------------------


def run_of_operation(operation: str) -> str:
    """The run that an operation id is of.

    Raises:
        NotFoundError: it is no operation id.
    """
    match = _OPERATION_ID.fullmatch(operation)
    if match is None:
        raise NotFoundError(f"there is no operation {operation!r}")
    return match["run"]


async def await_result(
    services: Services, run: RunRow, operation: str, timeout_s: float
) -> wire.OperationResult:
    """The result of an operation of `run`, waiting up to `timeout_s` for it; else what it is waiting for.

    A checkpoint that the operation made is in the catalog when this returns.
    """
    result = await services.results.result(operation, timeout_s)
    if result is None:
        queue = await queue_state(services, run.base_model, operation)
        return wire.OperationResult(operation_id=operation, status="pending", queue=queue)
    if result.checkpoint is not None:
        async with services.pool.acquire() as connection:
            await record_checkpoint(connection, result.checkpoint)
        saved = catalog.saved_checkpoint(result.checkpoint)
        await services.names.changed(result.checkpoint.tenant_id, saved.path)
    return to_wire(result)


async def result_if_any(
    services: Services, run: RunRow, operation: str, timeout_s: float
) -> wire.OperationResult | None:
    """The same where an error can no longer be told, since the answer has begun: then there is no result."""
    try:
        return await await_result(services, run, operation, timeout_s)
    except (UnavailableError, BusError, *POSTGRES_AWAY) as error:
        logger.warning("the result of %s is not at hand: %r", operation, error)
        return None


async def queue_state(services: Services, base_model: str, operation: str) -> wire.QueueState:
    """What an operation without a result is waiting for, by the trainer's own account."""
    answer = await services.bus.ask(
        protocol.queue_subject(base_model), operation.encode(), timeout_s=QUEUE_STATE_TIMEOUT_S
    )
    if answer is None:
        return NO_TRAINER
    state = msgspec.msgpack.decode(answer, type=protocol.QueueState)
    return wire.QueueState(state=state.state, reason=state.reason, ahead=state.ahead)


def to_wire(result: protocol.TrainResult) -> wire.OperationResult:
    """A trainer's result as clients see it."""
    error, saved = result.error, result.checkpoint
    return wire.OperationResult(
        operation_id=result.operation_id,
        status="failed" if error else "done",
        policy_version=protocol.policy_version(result.run_id, result.step),
        metrics=result.metrics,
        logprobs=_tensors(result),
        checkpoint=catalog.saved_checkpoint(saved) if saved else None,
        training_tokens=result.training_tokens,
        error=wire.OperationError(type=error.type, message=error.message, param=error.param)
        if error
        else None,
    )


def _tensors(result: protocol.TrainResult) -> list[wire.Tensor] | None:
    """The log-probabilities of each sequence: [T], with soft targets [T, K]."""
    if result.logprobs is None:
        return None
    widths = result.targets_per_token or [1] * len(result.logprobs)
    return [
        wire.Tensor(dtype="float32", shape=_shape_of(len(data) // 4, per_token), data=data)
        for data, per_token in zip(result.logprobs, widths, strict=True)
    ]


def _shape_of(values: int, per_token: int) -> tuple[int, ...]:
    return (values,) if per_token == 1 else (values // per_token, per_token)
