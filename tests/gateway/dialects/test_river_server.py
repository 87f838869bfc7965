"""The River dialect's server: keys, statuses, ids, and what a session is told."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

import grpc
import grpc.aio
import httpx
import msgspec
import pytest
from support.gateway import Rig
from support.river_dialect import RPCS, Refused, RiverDialect
from support.stand_ins import BASE

from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.methods import METHODS
from river_gateway.dialects.river_grpc.server import RiverServerError, listening, river_server
from river_ops.children import free_port


def test_every_rpc_is_there() -> None:
    """There is a handler for each method of the service, of the type that the wire says, and none besides."""
    assert METHODS.keys() == set(RPCS)
    for name, method in METHODS.items():
        assert method.request.DESCRIPTOR.name == RPCS[name].input_type.name


async def test_health_needs_no_key(river: RiverDialect) -> None:
    """`ok` once requests can be answered, whoever asks."""
    stranger = RiverDialect(river.channel, None)
    assert (await stranger.call("HealthCheck", pb.HealthCheckRequest())).status == "ok"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (None, "no API key: send `Authorization: Bearer <key>` or `x-api-key: <key>`"),
        ("rv-none", "the API key is not valid"),
    ],
)
async def test_a_bad_key_is_unauthenticated(
    river: RiverDialect, key: str | None, sentence: str
) -> None:
    """Without a valid key every call but the health check is UNAUTHENTICATED, with our sentence."""
    with pytest.raises(Refused) as refused:
        await RiverDialect(river.channel, key).call("CreateSession", pb.CreateSessionRequest())
    assert (refused.value.code, refused.value.details) == ("UNAUTHENTICATED", sentence)
    assert refused.value.trailers["river-error-code"] == "invalid_api_key"


async def test_a_key_without_the_scope_is_denied(rig: Rig, river: RiverDialect) -> None:
    """An administrator's key can neither train nor sample."""
    admin = RiverDialect(river.channel, rig.admin.secret)
    with pytest.raises(Refused, match="lacks the scope `train`") as refused:
        await admin.call("CreateModel", pb.CreateModelRequest())
    assert refused.value.code == "PERMISSION_DENIED"


async def test_a_body_that_is_no_message_is_refused(river: RiverDialect) -> None:
    """Bytes that cannot be parsed are INVALID_ARGUMENT, named by what they should be, also when there are many."""
    for body in (b"\xff\xff", b"\xff" * 100_000):
        with pytest.raises(Refused, match="the body is not a CreateSessionRequest") as refused:
            await river.call("CreateSession", body)
        assert refused.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("name", "request_", "sentence"),
    [
        ("PrepareLoss", pb.PrepareLossRequest(), "custom losses are not supported"),
        ("UploadImage", pb.UploadImageRequest(), "images are not supported"),
        ("ReleaseImage", pb.ReleaseImageRequest(), "images are not supported"),
        (
            "CreateTrainingDataAttestation",
            pb.CreateTrainingDataAttestationRequest(),
            "attesting training data is not supported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
async def test_what_is_not_built_says_so(
    river: RiverDialect, name: str, request_: object, sentence: str
) -> None:
    """UNIMPLEMENTED with a sentence, which is what makes the client go without."""
    with pytest.raises(Refused, match=sentence) as refused:
        await river.call(name, request_)  # type: ignore[arg-type]
    assert refused.value.code == "UNIMPLEMENTED"


async def test_capabilities_name_the_models(river: RiverDialect) -> None:
    """All base models, or the one asked for; one that is unknown is NOT_FOUND."""
    answer = await river.call("GetServerCapabilities", pb.GetServerCapabilitiesRequest())
    assert [model.model_name for model in answer.supported_models] == [BASE]
    assert "sampling_batch_v1" in answer.features
    asked = pb.GetServerCapabilitiesRequest(model_name="nobody/nothing")
    with pytest.raises(Refused, match="there is no base model 'nobody/nothing'") as refused:
        await river.call("GetServerCapabilities", asked)
    assert refused.value.code == "NOT_FOUND"


async def test_heartbeats_keep_a_session_and_tell_how_its_runs_fare(
    rig: Rig, river: RiverDialect
) -> None:
    """A session's tags are kept, its heartbeat says who works for each run, and a stranger's beat is NOT_FOUND."""
    opened = await river.call("CreateSession", pb.CreateSessionRequest(tags={"who": "me"}))
    run = await rig.tenant.new_run(session_id=opened.session_id)
    assert run.tags == {"who": "me"}
    beat = pb.SessionHeartbeatRequest(session_id=opened.session_id)
    answer = await river.call("SessionHeartbeat", beat)
    assert answer.success
    told = {
        (status.training_run_id, status.workload): (status.state, status.capacity_wait)
        for status in answer.capacity_status
    }
    assert told == {
        (run.run_id, "training"): ("ready", False),
        (run.run_id, "inference"): ("ready", False),
    }
    assert abs(answer.capacity_status[0].observed_at.ToNanoseconds() / 1e9 - time.time()) < 30
    stranger = RiverDialect(river.channel, rig.stranger.secret)
    with pytest.raises(Refused, match="there is no open session") as refused:
        await stranger.call("SessionHeartbeat", beat)
    assert refused.value.code == "NOT_FOUND"


async def test_calls_have_ids_and_are_counted(rig: Rig, river: RiverDialect) -> None:
    """A call carries `x-request-id` and is in the metrics under its method, with the HTTP status of its error."""
    with pytest.raises(Refused) as refused:
        await RiverDialect(river.channel, None).call("PrepareLoss", pb.PrepareLossRequest())
    assert len(str(refused.value.trailers["x-request-id"])) == 36
    metrics = (await rig.tenant.http.get("/metrics")).text
    route = 'route="/river.api.v1.RiverService/PrepareLoss"'
    assert f'river_gateway_requests_total{{method="GRPC",{route},status="401"}} 1.0' in metrics


async def test_the_web_server_stays_quick_while_large_bodies_come(
    rig: Rig, river: RiverDialect
) -> None:
    """Bodies of 32 MiB are parsed beside the event loop: `/healthz` answers as if nobody else was there."""
    fields = [pb.Datum(data=bytes(1024 * 1024)) for _ in range(32)]
    body = pb.ForwardBackwardRequest(
        model_id="run_none", seq_id=1, forward_backward_input=pb.ForwardBackwardInput(data=fields)
    ).SerializeToString()

    async def flood() -> None:
        for _ in range(4):
            with pytest.raises(Refused):
                await river.call("ForwardBackward", body)

    worst_s = 0.0
    flooding = asyncio.create_task(flood())
    async with httpx.AsyncClient(base_url=rig.url) as http:
        while not flooding.done():
            began = time.perf_counter()
            assert (await http.get("/healthz")).text == "ok\n"
            worst_s = max(worst_s, time.perf_counter() - began)
            await asyncio.sleep(0.01)
    await flooding
    assert worst_s < 0.5


def certificate_files(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate of its own for `localhost`."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


async def test_tls_if_a_certificate_is_named(rig: Rig, tmp_path: Path) -> None:
    """With a certificate only clients that trust it are served; one that cannot be read is an error in a line."""
    key, certificate = certificate_files(tmp_path)
    settings = msgspec.structs.replace(
        rig.services.settings,
        host="localhost",
        grpc_port=free_port(),
        grpc_certificate=str(certificate),
        grpc_key=str(key),
    )
    async with river_server(rig.services, settings) as port:
        trusting = grpc.ssl_channel_credentials(certificate.read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{port}", trusting) as channel:
            client = RiverDialect(channel, rig.tenant.secret)
            assert (await client.call("HealthCheck", pb.HealthCheckRequest())).status == "ok"
        async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
            plain = RiverDialect(channel, rig.tenant.secret)
            with pytest.raises(Refused):
                await plain.call("HealthCheck", pb.HealthCheckRequest(), timeout_s=2)
    certificate.unlink()
    with pytest.raises(RiverServerError, match="the certificate or its key cannot be read"):
        async with river_server(rig.services, settings):
            pass


async def test_a_port_that_is_taken_is_an_error_in_a_line(rig: Rig) -> None:
    """Two servers on one port are told apart at the start, not by their clients."""
    async with listening(rig.services, "127.0.0.1:0") as port:
        with pytest.raises(RiverServerError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with listening(rig.services, f"127.0.0.1:{port}"):
                pass


async def test_stopping_ends_calls_and_takes_no_more(rig: Rig) -> None:
    """Once the process is to end, waiting calls are answered and new ones are UNAVAILABLE."""
    async with (
        listening(rig.services, "127.0.0.1:0") as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        client = RiverDialect(channel, rig.tenant.secret)
        await client.call("HealthCheck", pb.HealthCheckRequest())
        rig.services.stopping.set()
        await asyncio.sleep(0.1)
        with pytest.raises(Refused) as refused:
            await client.call("HealthCheck", pb.HealthCheckRequest())
        assert refused.value.code == "UNAVAILABLE"
