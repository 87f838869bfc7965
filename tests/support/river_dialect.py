"""A client of the River dialect as small as can be: any RPC by its name, each failure as its status and sentence."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message
from support.gateway import Rig
from support.stand_ins import BASE

from river_gateway.dialects.river_grpc import nest
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.server import SERVICE, listening

RPCS = pb.DESCRIPTOR.services_by_name["RiverService"].methods_by_name


class Refused(Exception):  # noqa: N818 - what it says of the call
    """A call that ended with another status than OK."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"{error.code().name}: {error.details()}")
        self.code = error.code().name
        self.details = error.details() or ""
        self.trailers = dict(error.trailing_metadata() or ())


class RiverDialect:
    """Calls with one key."""

    def __init__(self, channel: grpc.aio.Channel, key: str | None) -> None:
        self.channel = channel
        self.metadata = (("x-api-key", key),) if key is not None else ()

    async def call(self, name: str, request: Message | bytes, timeout_s: float = 20.0) -> Any:
        """The answer to a unary RPC."""
        call = self.channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=_bytes_of,
            response_deserializer=_answer_type(name).FromString,
        )
        try:
            return await call(request, metadata=self.metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise Refused(error) from error

    async def stream(self, name: str, request: Message, timeout_s: float = 20.0) -> list[Any]:
        """Everything that a streaming RPC answers."""
        call = self.channel.unary_stream(
            f"/{SERVICE}/{name}",
            request_serializer=_bytes_of,
            response_deserializer=_answer_type(name).FromString,
        )
        try:
            return [item async for item in call(request, metadata=self.metadata, timeout=timeout_s)]
        except grpc.aio.AioRpcError as error:
            raise Refused(error) from error


def _bytes_of(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def _answer_type(name: str) -> Any:
    return getattr(pb, RPCS[name].output_type.name)


@asynccontextmanager
async def dialect_of(rig: Rig) -> AsyncGenerator[RiverDialect]:
    """The rig's gateway serving the dialect, and its first tenant as a client."""
    async with (
        listening(rig.services, "127.0.0.1:0") as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield RiverDialect(channel, rig.tenant.secret)


# ---- Requests --------------------------------------------------------------------------------------------------------


def datum(**fields: Any) -> pb.Datum:
    return pb.Datum(data=nest.encode({name: np.asarray(value) for name, value in fields.items()}))


TEXT = datum(input_ids=[1, 2, 3])


def gradients(model_id: str, seq: int, **changes: Any) -> pb.ForwardBackwardRequest:
    given: dict[str, Any] = {
        "data": [TEXT],
        "loss_fn": "cross_entropy",
        "gradient_accumulation": True,
        "init_gradients": True,
    }
    return pb.ForwardBackwardRequest(
        model_id=model_id,
        seq_id=seq,
        forward_backward_input=pb.ForwardBackwardInput(**given | changes),
    )


async def new_model(river: RiverDialect, **changes: Any) -> str:
    session = await river.call("CreateSession", pb.CreateSessionRequest())
    asked: dict[str, Any] = {
        "session_id": session.session_id,
        "model_seq_id": 1,
        "base_model": BASE,
        "lora_config": pb.LoraConfig(rank=8, train_attn=True),
    }
    accepted = await river.call("CreateModel", pb.CreateModelRequest(**asked | changes))
    made = await result(river, accepted.request_id)
    assert made.create_model.model_id == made.create_model.training_run_id
    return made.create_model.model_id


async def result(river: RiverDialect, request_id: str) -> pb.RetrieveFutureResponse:
    answer = await river.call("RetrieveFuture", pb.RetrieveFutureRequest(request_id=request_id))
    assert isinstance(answer, pb.RetrieveFutureResponse)
    return answer
