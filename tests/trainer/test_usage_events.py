"""What an operation is billed as."""

from __future__ import annotations

import pytest

from river_billing.events import UsageEvent
from river_trainer.events import events_of
from river_trainer.protocol import Forward, TrainMessage, TrainResult


@pytest.mark.parametrize(("opened_with", "tier"), [(32_768, 32_768), (0, 131_072)])
def test_an_operation_is_of_the_tier_that_its_run_was_opened_with(
    opened_with: int, tier: int
) -> None:
    """Whatever the trainer can do today; only a message that does not say so is of the trainer's own."""
    message = TrainMessage(
        run_id="run_1",
        seq=3,
        tenant_id="ten_a",
        key_id="key_1",
        session_id="ses_1",
        base_model="base",
        submitted_at=1.8e9,
        task=Forward(data=[], loss_fn="", loss_config={}),
        context_length=opened_with,
    )
    result = TrainResult(operation_id="run_1-3", run_id="run_1", seq=3, step=2, training_tokens=100)
    (usage,) = [
        event
        for event in events_of(message, result, context_length=131_072)
        if isinstance(event, UsageEvent)
    ]
    assert usage.context_length == tier
    assert (usage.run_id, usage.session_id, usage.key_id) == ("run_1", "ses_1", "key_1")
    assert usage.policy_version == "run_1@2"
