"""Accepting operations: checked, admitted, paid for, and durably stored before anybody is told so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from river_gateway.training import operations
from river_trainer import protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_client import wire
    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.errors import GatewayError
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal


@dataclass(frozen=True, slots=True)
class Accepted:
    """`headers` say what is left of the key's and the tenant's limits."""

    operation_id: str
    headers: Sequence[tuple[bytes, bytes]]


async def submit(
    services: Services, principal: Principal, run: RunRow, asked: wire.SubmitOperation
) -> Accepted:
    """Stores an operation in its run's journal; the same seq again is answered by the first one's result.

    Raises:
        InvalidFieldError: a field is wrong.
        ConflictError: `seq` is too far ahead, or the run learns from feedback or was imported.
        NotFoundError: a checkpoint is unknown.
        OutOfCreditError, RateLimitedError: see `credit` and `quotas`.
        UnavailableError: the message bus is down, or no trainer of the base model was ever heard of.
        nats.errors.Error: JetStream did not store it.
    """
    await operations.check_not_learning(services, run, principal.tenant_id, asked.seq)
    task = await operations.make_task(services, run, principal.tenant_id, asked)
    tokens = protocol.task_tokens(task)
    services.bus.require()
    with services.quotas.admit(principal, tokens) as ticket:
        await services.credit.hold_operation(principal, run, asked.seq, tokens)
        operation = await operations.publish_task(services, run, principal, asked.seq, task)
        ticket.settle(tokens)
    return Accepted(operation, ticket.headers)


async def refuse(
    services: Services, principal: Principal, run: RunRow, seq: int, error: GatewayError
) -> None:
    """Accepts that an operation fails in its turn, so that those which have been sent behind it need not wait for it.

    Raises:
        InvalidFieldError, ConflictError, UnavailableError, nats.errors.Error: as `submit`.
    """
    await operations.check_not_learning(services, run, principal.tenant_id, seq)
    await operations.check_seq(services, run, principal.tenant_id, seq)
    reason = protocol.TaskError(type=error.type, message=error.message, param=error.param)
    await operations.publish_task(services, run, principal, seq, protocol.Refused(error=reason))
