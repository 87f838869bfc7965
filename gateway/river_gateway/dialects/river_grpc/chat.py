"""Chats, as the OpenAI API's own path completes them, in this process: the same limits, credit and metering.

What is wrong becomes the body and the status that the OpenAI API would answer; what is over a limit waits its turn.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

from river_gateway.checkpoints.catalog import SCHEME
from river_gateway.context import RequestContext
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import INFER, Methods, Unary
from river_gateway.dialects.river_grpc.models import model_of
from river_gateway.dialects.river_grpc.sampling import of_base, of_checkpoint
from river_gateway.errors import (
    GatewayError,
    InvalidFieldError,
    MalformedBodyError,
    NotSupportedError,
    RateLimitedError,
    UnavailableError,
    openai_body,
)
from river_gateway.inference.asked import read_fields
from river_gateway.inference.completions import Completions
from river_gateway.inference.openai_api import CHAT

if TYPE_CHECKING:
    from litestar.types import HTTPDisconnectEvent, Message

    from river_gateway.dialects.river_grpc.call import Call
    from river_gateway.services import Services
    from river_gateway.tenancy.auth import Principal

_FALSE = (b"false", b"null")


async def _of_base(call: Call, asked: pb.ChatCompleteFromBaseRequest) -> pb.AsyncResponse:
    source = await of_base(call, asked.base_model)
    return _submit(call, source.model, asked.request_json)


async def _of_checkpoint(
    call: Call, asked: pb.ChatCompleteFromCheckpointRequest
) -> pb.AsyncResponse:
    source = await of_checkpoint(call, asked.checkpoint_path, asked.base_model)
    return _submit(call, source.model, asked.request_json)


async def _of_training(call: Call, asked: pb.ChatCompleteFromTrainingRequest) -> pb.AsyncResponse:
    run = await model_of(call, asked.model_id)
    return _submit(call, f"{SCHEME}{run.run_id}", asked.request_json)


def _submit(call: Call, model: str, request_json: str) -> pb.AsyncResponse:
    """Begins a chat with `model`, whatever model the request itself names.

    Raises:
        MalformedBodyError: the request is no JSON object.
        NotSupportedError: it is to be streamed.
    """
    try:
        fields = read_fields(request_json.encode())
    except MalformedBodyError as error:
        raise InvalidFieldError(f"request_json: {error.message}", param="request_json") from None
    if bytes(fields.get("stream", msgspec.Raw(b"null"))) not in _FALSE:
        raise NotSupportedError(
            "request_json.stream: a chat that is collected later cannot be streamed; use the OpenAI API for that",
            param="request_json.stream",
        )
    body = msgspec.json.encode(fields | {"model": model})
    chat = _Chat(call.services, call.principal, body)
    request_id = call.services.futures.submit(call.principal.tenant_id, chat, asked_bytes=len(body))
    return pb.AsyncResponse(request_id=request_id, type="chat_complete")


@dataclass(frozen=True, slots=True)
class _Chat:
    """The work behind one request id."""

    services: Services
    principal: Principal
    body: bytes

    async def __call__(self) -> bytes:
        answer = _Answer()
        context = RequestContext(tenant_id=self.principal.tenant_id)
        app = Completions(self.services, CHAT)
        try:
            await app.complete(context, self.principal, self.body, _receive, answer.send)
        except (RateLimitedError, UnavailableError):
            raise  # Tried again until there is room.
        except GatewayError as error:
            answer = _Answer(_openai_status(error), msgspec.json.encode(openai_body(error)))
        usage = None if answer.status != HTTPStatus.OK else CHAT.usage_of(answer.body)
        response = pb.ChatCompleteResponse(
            response_json=answer.body.decode(), status_code=answer.status
        )
        if usage is not None:
            prompt, completion = usage.prompt_tokens, usage.completion_tokens or 0
            response.usage.CopyFrom(
                pb.Usage(
                    prompt_tokens=prompt,
                    completion_tokens=completion,
                    total_tokens=prompt + completion,
                )
            )
        return pb.RetrieveFutureResponse(chat_complete=response).SerializeToString()


@dataclass(slots=True)
class _Answer:
    """What is sent, put together."""

    status: int = 0
    body: bytes = field(default=b"")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.body += message["body"]


def _openai_status(error: GatewayError) -> int:
    if isinstance(error, InvalidFieldError):
        return int(HTTPStatus.BAD_REQUEST)
    return int(error.status)


async def _receive() -> HTTPDisconnectEvent:
    """Never: nobody can leave who only comes to collect."""
    await asyncio.get_running_loop().create_future()
    return {"type": "http.disconnect"}


CHAT_METHODS: Methods = {
    "ChatCompleteFromBase": Unary(pb.ChatCompleteFromBaseRequest, INFER, _of_base),
    "ChatCompleteFromCheckpoint": Unary(
        pb.ChatCompleteFromCheckpointRequest, INFER, _of_checkpoint
    ),
    "ChatCompleteFromTraining": Unary(pb.ChatCompleteFromTrainingRequest, INFER, _of_training),
}
