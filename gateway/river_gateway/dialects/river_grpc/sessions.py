"""Whether the server is there and what it can do; sessions and their heartbeats."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from river_gateway.database import POSTGRES_AWAY
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.call import EITHER, Methods, Unary
from river_gateway.errors import NotFoundError, UnavailableError
from river_gateway.training import sessions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from river_gateway.dialects.river_grpc.call import Call
    from river_gateway.services import Services

FEATURES = (
    "gradient_scale_v1",
    "policy_versions_v1",
    "prompt_token_echo_v1",
    "sampling_batch_v1",
    "sampling_latest_snapshot_v1",
    "sampling_policy_pinning_v1",
    "temporary_checkpoints_v1",
)
"""Only what works here is named: the client uses no feature that is not."""

# ---- The server ------------------------------------------------------------------------------------------------------


async def _health_check(call: Call, _asked: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
    """`ok` when requests can be answered."""
    try:
        missing = await call.services.ready()
    except POSTGRES_AWAY:
        missing = "Postgres is not reachable"
    if missing is not None:
        raise UnavailableError(missing)
    return pb.HealthCheckResponse(status="ok")


async def _capabilities(
    call: Call, asked: pb.GetServerCapabilitiesRequest
) -> pb.GetServerCapabilitiesResponse:
    """The base models and what they can do; of one model, if one is asked for."""
    services = call.services
    names = {record.base_model for record in services.engines.alive()}
    names |= {record.base_model for record in services.trainers.alive()}
    if asked.model_name:
        if not services.registered:
            raise UnavailableError("the registry of base models is being read; try again")
        if asked.model_name not in services.engines.bases() | services.trainers.bases():
            raise NotFoundError(f"there is no base model {asked.model_name!r}", param="model_name")
        names = {asked.model_name}
    models = [pb.SupportedModel(model_name=name, features=FEATURES) for name in sorted(names)]
    return pb.GetServerCapabilitiesResponse(supported_models=models, features=FEATURES)


# ---- Sessions --------------------------------------------------------------------------------------------------------


async def _create_session(call: Call, asked: pb.CreateSessionRequest) -> pb.CreateSessionResponse:
    """Opens a session. The client never sends this again, so it needs no identity."""
    tags = dict(asked.user_metadata) | dict(asked.tags)
    session_id = await sessions.open_session(
        call.services, call.principal, tags=tags, identity=None
    )
    return pb.CreateSessionResponse(session_id=session_id)


async def _heartbeat(call: Call, asked: pb.SessionHeartbeatRequest) -> pb.SessionHeartbeatResponse:
    """Notes that the client is there, and tells it how its runs' trainers and engines fare."""
    await sessions.beat_session(call.services, call.principal, asked.session_id)
    runs = await call.known_runs.of(asked.session_id, call.principal.tenant_id)
    now = Timestamp()
    now.FromNanoseconds(time.time_ns())
    return pb.SessionHeartbeatResponse(
        success=True,
        capacity_status=[
            pb.CapacityStatus(
                training_run_id=run_id,
                workload=workload,
                state="ready" if is_there else "waiting",
                capacity_wait=not is_there,
                observed_at=now,
            )
            for run_id, base_model in runs
            for workload, is_there in _workloads(call.services, base_model)
        ],
    )


def _workloads(services: Services, base_model: str) -> Iterator[tuple[str, bool]]:
    """Each kind of work on a base model, and whether there is anybody to do it."""
    yield "training", bool(services.trainers.alive(base_model))
    yield "inference", any(not engine.draining for engine in services.engines.alive(base_model))


SESSION_METHODS: Methods = {
    "HealthCheck": Unary(pb.HealthCheckRequest, (), _health_check),
    "GetServerCapabilities": Unary(pb.GetServerCapabilitiesRequest, EITHER, _capabilities),
    "CreateSession": Unary(pb.CreateSessionRequest, EITHER, _create_session),
    "SessionHeartbeat": Unary(pb.SessionHeartbeatRequest, EITHER, _heartbeat),
}
