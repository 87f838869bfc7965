"""Training through the River dialect: what reaches the trainer, and what comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from support.gateway import Rig, eventually
from support.river_dialect import (
    TEXT,
    Refused,
    RiverDialect,
    datum,
    gradients,
    new_model,
    result,
)
from support.stand_ins import BASE

from river_client.wire import Tensor
from river_gateway.dialects.river_grpc import nest
from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc.data import client_metrics, read_loss_config
from river_gateway.dialects.river_grpc.routing_handle import make_handle, read_handle
from river_gateway.errors import InvalidFieldError
from river_trainer import protocol


async def task_of(rig: Rig, model_id: str, seq: int) -> protocol.AnyTask:
    """What the trainer was given."""

    def found() -> list[protocol.AnyTask]:
        return [
            message.task
            for message in rig.trainer.messages
            if (message.run_id, message.seq) == (model_id, seq)
        ]

    return (await eventually(found))[0]


async def test_the_same_model_seq_is_the_same_model(rig: Rig, river: RiverDialect) -> None:
    """CreateModel sent again makes no second run, and says what it made."""
    session = await river.call("CreateSession", pb.CreateSessionRequest())
    asked = pb.CreateModelRequest(
        session_id=session.session_id,
        model_seq_id=1,
        base_model=BASE,
        lora_config=pb.LoraConfig(rank=4, seed=7, train_mlp=True),
    )
    first = await river.call("CreateModel", asked)
    assert await river.call("CreateModel", asked) == first
    asked.model_seq_id = 2
    assert await river.call("CreateModel", asked) != first
    run_id = first.request_id.partition(".")[2].rpartition("-")[0]
    task = await task_of(rig, run_id, 0)
    assert isinstance(task, protocol.CreateRun)
    assert (task.shape.rank, task.shape.seed, task.shape.train_attn) == (4, 7, False)
    info = await river.call("GetInfo", pb.GetInfoRequest(model_id=run_id))
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == (BASE, 4, True)
    assert info.policy_version.id == f"{run_id}@0"
    assert info.policy_version.parent_id == ""


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"base_model": "nobody/none"}, "NOT_FOUND", "there is no base model 'nobody/none'"),
        ({"lora_config": pb.LoraConfig(rank=64, train_attn=True)}, "INVALID_ARGUMENT", "lora.rank"),
        ({"lora_config": None}, "INVALID_ARGUMENT", "lora_config: missing"),
        ({"full_weight": True}, "UNIMPLEMENTED", "only LoRA adapters are trained here"),
        ({"training_data_attestation_id": "x"}, "UNIMPLEMENTED", "attesting training data"),
        ({"session_id": "ses_none"}, "NOT_FOUND", "there is no open session 'ses_none'"),
    ],
    ids=["base", "rank", "no lora", "full weight", "attestation", "session"],
)
async def test_a_wrong_model_is_named(
    river: RiverDialect, changes: dict[str, Any], code: str, sentence: str
) -> None:
    """Each way in which a model cannot be made has its status and sentence."""
    with pytest.raises(Refused, match=sentence) as refused:
        await new_model(river, **changes)
    assert refused.value.code == code


async def test_data_reach_the_trainer_as_numbers(rig: Rig, river: RiverDialect) -> None:
    """NEST arrays of any type become the trainer's, settings are turned into River's, log-probabilities come back."""
    model_id = await new_model(river)
    given = datum(
        input_ids=np.array([5, 6, 7, 8], "<i2"),
        attention_mask=np.array([1, 1, 1, 0], "?"),
        old_logprobs=np.array([-1.0, -2.0, 0, 0], "<f8"),
        advantages=np.array([0.5, 1.0, 0, 0], "<f4"),
    )
    asked = gradients(
        model_id,
        1,
        data=[given],
        loss_fn="ppo",
        loss_fn_config={"clip_low": 0.1, "logprob_temperature": 1.0},
    )
    accepted = await river.call("ForwardBackward", asked)
    task = await task_of(rig, model_id, 1)
    assert isinstance(task, protocol.ForwardBackward)
    (sequence,) = task.data
    assert np.frombuffer(sequence.input_ids, "<i4").tolist() == [5, 6, 7]
    assert np.frombuffer(sequence.old_logprobs or b"", "<f4").tolist() == [-1.0, -2.0, 0.0]
    assert task.loss_config == pytest.approx(
        {"clip_low": 0.9, "clip_high": 1.2, "logprob_temperature": 1.0}
    )
    done = (await result(river, accepted.request_id)).forward_backward
    (logprobs,) = nest.decode(done.loss_fn_outputs["logprobs"].data)
    assert isinstance(logprobs, np.ndarray)
    assert logprobs.dtype == np.float32
    assert logprobs.tolist() == [0.0, 0.0, 0.0]
    assert done.metrics["loss"] == done.metrics["loss_sum"] == 1.5
    assert done.usage.training_tokens == 3


async def test_chunks_of_text_are_one_sequence(rig: Rig, river: RiverDialect) -> None:
    """`model_input` of text is joined; an image in it is UNIMPLEMENTED."""
    model_id = await new_model(river)
    chunk = {"type": "text", "tokens": np.array([1, 2])}
    body = nest.encode({"model_input": [chunk, chunk], "weights": np.ones(4, "<f4")})
    await river.call("ForwardBackward", gradients(model_id, 1, data=[pb.Datum(data=body)]))
    task = await task_of(rig, model_id, 1)
    assert isinstance(task, protocol.ForwardBackward)
    assert np.frombuffer(task.data[0].input_ids, "<i4").tolist() == [1, 2, 1, 2]
    image = {"type": "image", "data": np.zeros(3, "u1"), "expected_tokens": np.array(4)}
    body = nest.encode({"model_input": [chunk, image]})
    with pytest.raises(Refused, match=r"data\[0\].model_input\[1\]: images") as refused:
        await river.call("ForwardBackward", gradients(model_id, 2, data=[pb.Datum(data=body)]))
    assert refused.value.code == "UNIMPLEMENTED"


WRONG = {
    "nest": ({"data": [TEXT, pb.Datum(data=b"JSON")]}, r"data\[1\]: the header: 8 bytes"),
    "no ids": ({"data": [datum(weights=[1.0])]}, r"data\[0\].input_ids: missing"),
    "unknown": (
        {"data": [datum(input_ids=[1, 2], sampler_topk_ids=[[1]])]},
        r"data\[0\].sampler_topk_ids: unknown, a datum has input_ids",
    ),
    "vocabulary": (
        {"data": [TEXT, datum(input_ids=[1, 9999])]},
        r"data\[1\].input_ids\[1\]: 9999 is outside the vocabulary of 512",
    ),
    "nan": (
        {"data": [datum(input_ids=[1, 2], weights=[float("nan"), 0])]},
        r"data\[0\].weights\[0\]: NaN is not a number",
    ),
    "loss": ({"loss_fn": "hinge"}, "loss_fn: 'hinge' is not offered"),
    "setting": ({"loss_fn_config": {"eps_max": 3.0}}, "eps_max: unknown"),
    "temperature": (
        {"loss_fn_config": {"logprob_temperature": 0.0}},
        "loss_config.logprob_temperature: 0, must be 0.01 to 100",
    ),
    "replay": ({"force_routing_replay": "weights"}, "force_routing_replay: 'weights', must be"),
    "no routing": (
        {"force_routing_replay": "ids"},
        r"data\[0\].expert_routing: missing, force_routing_replay needs it",
    ),
    "handle": (
        {"data": [datum(input_ids=[1, 2], expert_routing_handle=np.frombuffer(b"x", "u1"))]},
        r"data\[0\].expert_routing_handle: not a routing handle of this server",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), WRONG.values(), ids=WRONG.keys())
async def test_wrong_data_are_named_and_hold_nothing_up(
    river: RiverDialect, changes: dict[str, Any], sentence: str
) -> None:
    """INVALID_ARGUMENT with field, index and limit; what was sent behind it is done all the same."""
    model_id = await new_model(river)
    with pytest.raises(Refused, match=sentence) as refused:
        await river.call("ForwardBackward", gradients(model_id, 1, **changes))
    assert refused.value.code == "INVALID_ARGUMENT"
    behind = await river.call("ForwardBackward", gradients(model_id, 2))
    assert (await result(river, behind.request_id)).HasField("forward_backward")
    failed = (await result(river, f"forward_backward.{model_id}-1")).failed
    assert failed.error_category == "invalid_request"


async def test_the_same_seq_is_the_same_operation(rig: Rig, river: RiverDialect) -> None:
    """A step that is sent again, since its answer was lost, is one step; without a seq nothing is accepted."""
    model_id = await new_model(river)
    step = pb.OptimStepRequest(
        model_id=model_id,
        seq_id=1,
        adam_params=pb.AdamParams(learning_rate=1e-3, grad_clip_norm=0.5, gradient_scale=0.25),
        idempotency_key="once",
    )
    first = await river.call("OptimStep", step)
    assert await river.call("OptimStep", step) == first
    task = await task_of(rig, model_id, 1)
    assert isinstance(task, protocol.OptimStep)
    assert (task.adam.lr, task.adam.beta2, task.adam.grad_clip_norm) == (1e-3, 0.999, 0.5)
    journal = await rig.nats.jetstream().stream_info(protocol.TRAIN_STREAM)
    assert journal.state.messages == 2  # the making of the run, and the step
    step.ClearField("seq_id")
    with pytest.raises(Refused, match="seq_id: missing"):
        await river.call("OptimStep", step)


async def test_checkpoints_get_paths_and_times(rig: Rig, river: RiverDialect) -> None:
    """The client's name comes with its run; each immutable save has a path of its own, temporary ones a day."""
    model_id = await new_model(river)

    async def save(seq: int, **changes: Any) -> tuple[str, int | None]:
        asked: dict[str, Any] = {"path": f"{model_id}/final", "mode": "training", "durable": True}
        request = pb.SaveWeightsRequest(model_id=model_id, seq_id=seq, **asked | changes)
        accepted = await river.call("SaveWeights", request)
        saved = (await result(river, accepted.request_id)).save_weights
        assert saved.policy_version.lineage_id == model_id
        task = await task_of(rig, model_id, seq)
        assert isinstance(task, protocol.SaveWeights)
        return saved.path, task.ttl_s

    assert await save(1) == (f"river://{model_id}/weights/final", None)
    assert await save(2, mode="inference", durable=False) == (
        f"river://{model_id}/sampler_weights/final",
        24 * 3600,
    )
    assert await save(3, immutable=True, durable=False, ttl_seconds=60) == (
        f"river://{model_id}/weights/final.3",
        60,
    )
    for changes, sentence in (({"mode": "publish"}, "'publish' is for"), ({"path": "a b"}, "name")):
        with pytest.raises(Refused, match=sentence):
            await save(4, **changes)
    loading = pb.LoadWeightsRequest(
        model_id=model_id, seq_id=5, path=f"river://{model_id}/weights/final", optimizer=True
    )
    accepted = await river.call("LoadWeights", loading)
    assert (await result(river, accepted.request_id)).HasField("load_weights")
    loading.seq_id, loading.path = 6, f"river://{model_id}/weights/none"
    with pytest.raises(Refused, match="there is no checkpoint") as refused:
        await river.call("LoadWeights", loading)
    assert refused.value.code == "NOT_FOUND"


async def test_a_poll_waits_and_says_what_for(rig: Rig, river: RiverDialect) -> None:
    """A poll is held until the deadline is near, and answered as soon as there is a result."""
    model_id = await new_model(river)
    rig.trainer.answering = False
    accepted = await river.call("ForwardBackward", gradients(model_id, 1))
    poll = pb.RetrieveFutureRequest(request_id=accepted.request_id)
    answer = await river.call("RetrieveFuture", poll, timeout_s=1.0)
    assert answer.try_again.request_id == accepted.request_id
    waiting = asyncio.create_task(river.call("RetrieveFuture", poll))
    unloading = await river.call("UnloadModel", pb.UnloadModelRequest(model_id=model_id))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    (message,) = [message for message in rig.trainer.messages if message.seq == 1]
    await rig.trainer.answer(message, error=protocol.TaskError(type="non_finite", message="NaN"))
    failed = (await waiting).failed
    assert (failed.error_category, failed.message) == ("non_finite", "NaN")
    assert (await result(river, unloading.request_id)).HasField("unload_model")


async def test_other_tenants_models_are_unknown(rig: Rig, river: RiverDialect) -> None:
    """NOT_FOUND for everything of another tenant's, whatever is asked of it."""
    model_id = await new_model(river)
    stranger = RiverDialect(river.channel, rig.stranger.secret)
    for name, request in (
        ("GetInfo", pb.GetInfoRequest(model_id=model_id)),
        ("UnloadModel", pb.UnloadModelRequest(model_id=model_id)),
        ("ForwardBackward", gradients(model_id, 1)),
        ("Forward", pb.ForwardRequest(model_id=model_id, seq_id=1)),
        ("OptimStep", pb.OptimStepRequest(model_id=model_id, seq_id=1)),
        ("SaveWeights", pb.SaveWeightsRequest(model_id=model_id, seq_id=1)),
        ("LoadWeights", pb.LoadWeightsRequest(model_id=model_id, seq_id=1)),
        ("CreateUpload", pb.CreateUploadRequest(model_id=model_id, total_size=1, chunk_count=1)),
        ("RetrieveFuture", pb.RetrieveFutureRequest(request_id=f"optim_step.{model_id}-0")),
        ("SampleFromTraining", pb.SampleFromTrainingRequest(model_id=model_id)),
        ("ChatCompleteFromTraining", pb.ChatCompleteFromTrainingRequest(model_id=model_id)),
    ):
        with pytest.raises(Refused) as refused:
            await stranger.call(name, request)
        assert refused.value.code == "NOT_FOUND", name


# ---- Uploads ---------------------------------------------------------------------------------------------------------


async def test_a_body_in_parts_is_the_body(rig: Rig, river: RiverDialect) -> None:
    """Parts in any order make the request; sent again after it was accepted, it is the same operation."""
    model_id, other = await new_model(river), await new_model(river)
    body = gradients(model_id, 1, data=[TEXT] * 20).SerializeToString()
    opened = await river.call(
        "CreateUpload",
        pb.CreateUploadRequest(model_id=model_id, total_size=len(body), chunk_count=3),
    )
    size = -(-len(body) // 3)
    thin = pb.ForwardBackwardRequest(model_id=model_id, seq_id=1, upload_id=opened.upload_id)
    for index in (2, 0):
        part = body[index * size : (index + 1) * size]
        await river.call(
            "UploadChunk",
            pb.UploadChunkRequest(upload_id=opened.upload_id, chunk_index=index, data=part),
        )
    early = pb.ForwardBackwardRequest(model_id=other, seq_id=1, upload_id=opened.upload_id)
    with pytest.raises(Refused, match=f"it is for the model {model_id}"):
        await river.call("ForwardBackward", early)
    middle = pb.UploadChunkRequest(
        upload_id=opened.upload_id, chunk_index=1, data=body[size : 2 * size]
    )
    stranger = RiverDialect(river.channel, rig.stranger.secret)
    with pytest.raises(Refused, match="there is no upload"):
        await stranger.call("UploadChunk", middle)
    await river.call("UploadChunk", middle)
    accepted = await river.call("ForwardBackward", thin)
    task = await task_of(rig, model_id, 1)
    assert isinstance(task, protocol.ForwardBackward)
    assert len(task.data) == 20
    assert await river.call("ForwardBackward", thin) == accepted
    with pytest.raises(Refused, match=f"it has been used for {model_id}-1"):
        await river.call("UploadChunk", middle)
    thin.seq_id = 2
    with pytest.raises(Refused, match=f"it has been used for {model_id}-1"):
        await river.call("ForwardBackward", thin)
    behind = await river.call("ForwardBackward", gradients(model_id, 3))
    assert (await result(river, behind.request_id)).HasField("forward_backward")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chunk_count": 0}, "chunk_count: 0, must be 1 to 64"),
        ({"total_size": 2**40}, "total_size: 1099511627776 bytes"),
        ({"total_size": 1}, "total_size: 1 bytes"),
    ],
)
async def test_uploads_are_bounded(
    river: RiverDialect, changes: dict[str, int], sentence: str
) -> None:
    """An upload that is too large or in too many parts is refused before anything is sent."""
    model_id = await new_model(river)
    asked = {"total_size": 100, "chunk_count": 2} | changes
    with pytest.raises(Refused, match=sentence):
        await river.call("CreateUpload", pb.CreateUploadRequest(model_id=model_id, **asked))


async def test_a_tenants_unused_uploads_are_bounded(river: RiverDialect) -> None:
    """Half a GiB twice, and no more until one of them is used or its time is over."""
    model_id = await new_model(river)
    asked = pb.CreateUploadRequest(model_id=model_id, total_size=512 * 1024**2, chunk_count=16)
    await river.call("CreateUpload", asked)
    await river.call("CreateUpload", asked)
    with pytest.raises(Refused, match="bytes of uploads are not used yet") as refused:
        await river.call("CreateUpload", asked)
    assert refused.value.code == "RESOURCE_EXHAUSTED"


# ---- Pieces ----------------------------------------------------------------------------------------------------------


def test_metrics_can_be_joined() -> None:
    """The client joins results by sums; its `loss` is a mean over datums."""
    told = client_metrics(
        {"loss_sum": 6.0, "loss": 6.0, "num_tokens": 4.0, "mean_ratio": 0.5, "kl": 0.25}, 3
    )
    assert told["loss"] == 2.0
    assert (told["ratio_sum"], told["log_ratio_sum"], told["num_response"]) == (2.0, 1.0, 4.0)


def test_settings_get_rivers_names_and_meaning() -> None:
    """The client's `clip_low` 0.2 is River's 0.8; a temperature of 1 is none, also for losses that know none."""
    assert read_loss_config("ppo", {}) == pytest.approx({"clip_low": 0.8, "clip_high": 1.2})
    assert read_loss_config("echo_cispo", {"logprob_temperature": 1.0}) == {}
    assert read_loss_config("cispo", {"use_perfect_ratio": 1.0, "logprob_temperature": 0.7}) == {
        "unit_ratio": 1.0,
        "logprob_temperature": 0.7,
    }
    with pytest.raises(InvalidFieldError, match="must be a distance from the ratio 1"):
        read_loss_config("ppo", {"clip_low": 1.5})


def test_a_handle_carries_its_routing() -> None:
    """What a sample carried comes back bit by bit; a broken handle is refused."""
    for dtype, array in (("uint8", np.arange(24, dtype="u1")), ("uint16", np.arange(24) * 9)):
        packed = array.astype(dtype).reshape(3, 4, 2)
        tensor = Tensor(dtype=dtype, shape=packed.shape, data=packed.tobytes())  # type: ignore[arg-type]
        handle = make_handle(tensor)
        for tokens in (3, 4):  # a row for the last token, or none
            assert read(handle, tokens=tokens) == tensor
        for broken in (handle[:-4], handle[:20] + "AAAA" + handle[24:], "!" + handle[1:], ""):
            with pytest.raises(InvalidFieldError, match=r"^x: not a routing handle"):
                read(broken)


def test_a_handle_is_never_unpacked_beyond_its_sequence() -> None:
    """A small handle that would be large, or is of another sequence, is refused by what it says of itself."""
    zeros = Tensor(dtype="uint8", shape=(1000, 100, 100), data=bytes(10**7))
    handle = make_handle(zeros)
    assert len(handle) < 10**5
    with pytest.raises(InvalidFieldError, match="of a sequence of 1000 tokens, this one has 3"):
        read(handle)
    with pytest.raises(InvalidFieldError, match="10000000 bytes of experts, 1000000 are left"):
        read(handle, tokens=1000)


def read(handle: str, tokens: int = 3) -> Tensor:
    return read_handle(handle.encode(), "x", tokens=tokens, size_max_bytes=10**6)
