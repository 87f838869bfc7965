"""What an operation's result means to billing and to the catalog."""

from __future__ import annotations

from river_billing.events import AnyEvent, RunAdvanced, UsageEvent, UsageKind, training_event_id
from river_trainer.errors import RunLostError
from river_trainer.protocol import TrainMessage, TrainResult, policy_version


def events_of(message: TrainMessage, result: TrainResult, *, context_length: int) -> list[AnyEvent]:
    """Usage, if the operation used anything, and what the catalog has to know; the same ones every time."""
    events: list[AnyEvent] = [
        RunAdvanced(
            run_id=message.run_id,
            seq=message.seq,
            step=result.step,
            occurred_at=message.submitted_at,
            metrics=result.metrics,
            lost=result.error.message
            if result.error is not None and result.error.type == RunLostError.type
            else None,
        )
    ]
    if result.training_tokens:
        events.append(
            UsageEvent(
                event_id=training_event_id(result.operation_id),
                occurred_at=message.submitted_at,
                tenant_id=message.tenant_id,
                key_id=message.key_id,
                base_model=message.base_model,
                context_length=message.context_length or context_length,
                quantities={UsageKind.TRAINING: result.training_tokens},
                run_id=message.run_id,
                session_id=message.session_id,
                policy_version=policy_version(message.run_id, result.step),
            )
        )
    if result.checkpoint is not None:
        events.append(result.checkpoint)
    return events
