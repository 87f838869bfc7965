"""Rewards of stored completions, and the training data made of them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from river_client import feedback_wire, wire
from river_client.transport import Transport


async def give_feedback(transport: Transport, given: Sequence[feedback_wire.Feedback]) -> None:
    """Attaches rewards to stored completions: all or none of them."""
    await transport.tell("POST", "/feedback", body=feedback_wire.GiveFeedback(feedback=[*given]))


async def claim_feedback(
    transport: Transport, asked: feedback_wire.ClaimFeedback
) -> feedback_wire.FeedbackBatch:
    """Training data of what the consumer has not had yet."""
    return await transport.call(
        "POST", "/feedback/batches", feedback_wire.FeedbackBatch, body=asked
    )


async def acknowledge_feedback(transport: Transport, batch_id: str) -> None:
    """Says that a batch has been learnt from."""
    await transport.tell("POST", f"/feedback/batches/{quote(batch_id, safe='')}/ack")


def teaches(datum: wire.Datum) -> bool:
    """Whether a sequence was better or worse than what it is compared with; Adam would move without a gradient too."""
    assert not isinstance(datum.advantages, wire.Tensor)
    return any(datum.advantages or ())
