"""The training API under `/river/v1`: rewards of stored completions, and the training data made of them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar import Response, post

from river_client import feedback_wire
from river_gateway.codec import WireRequest, reply
from river_gateway.feedback import rewards
from river_gateway.services import services_of
from river_gateway.tenancy.auth import principal_of, requires


@post("/feedback", guards=[requires("infer", "train")], status_code=HTTPStatus.NO_CONTENT)
async def give_feedback(request: WireRequest, data: feedback_wire.GiveFeedback) -> None:
    """Attaches rewards to stored completions: all or none of them; the newest of a choice counts."""
    await rewards.give(
        services_of(request).pool,
        tenant_id=principal_of(request).tenant_id,
        given=data.feedback,
    )


@post("/feedback/batches", guards=[requires("train")], status_code=HTTPStatus.OK)
async def claim_feedback(
    request: WireRequest, data: feedback_wire.ClaimFeedback
) -> Response[feedback_wire.FeedbackBatch]:
    """Training data of what a consumer has not had yet, claimed until it is acknowledged or the claim ends."""
    batch = await rewards.claim(
        services_of(request).pool, tenant_id=principal_of(request).tenant_id, asked=data
    )
    return reply(request, batch)


@post(
    "/feedback/batches/{batch_id:str}/ack",
    guards=[requires("train")],
    status_code=HTTPStatus.NO_CONTENT,
)
async def acknowledge_feedback(request: WireRequest, batch_id: str) -> None:
    """Says that a batch has been learnt from, so that it is never handed to the same consumer again."""
    await rewards.acknowledge(
        services_of(request).pool, tenant_id=principal_of(request).tenant_id, batch_id=batch_id
    )


FEEDBACK_HANDLERS: list[Any] = [give_feedback, claim_feedback, acknowledge_feedback]
