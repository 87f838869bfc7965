"""What came of operations and samples, in the Tinker protocol's messages; and compressed bodies."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import zstandard

from river_client import wire
from river_gateway.decoding import beside_the_loop
from river_gateway.dialects.tinker import bodies, http, results, samples
from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.errors import (
    InvalidFieldError,
    MalformedBodyError,
    TooLargeError,
    UnavailableError,
    UnsupportedFieldError,
)
from river_gateway.limits import DECODE_INLINE_MAX_BYTES, UNPACKED_MAX_BYTES

# ---- Operations ------------------------------------------------------------------------------------------------------


def logprobs(*shape: int) -> wire.Tensor:
    """As many as there are places, counted from 0."""
    data = np.arange(np.prod(shape), dtype="<f4").tobytes()
    return wire.Tensor(dtype="float32", shape=shape, data=data)


def arrays_of(output: pb.ForwardBackwardOutput) -> list[np.ndarray]:
    """Each datum's array, as the client finds it."""
    found: list[np.ndarray] = []
    for record in output.loss_fn_outputs:
        batched = record.fields["logprobs"]
        offsets = np.frombuffer(batched.offsets, "<i8")
        assert len(offsets) == record.num_datums + 1
        for begin, end in pairwise(offsets):
            flat = np.frombuffer(batched.data[begin:end], "<f4")
            found.append(flat.reshape(-1, *batched.trailing_shape))
    return found


def test_log_probabilities_lose_the_place_that_was_added() -> None:
    """Each datum gets as many as it had tokens, in its own shape; data of one trailing shape stand in one record."""
    result = wire.OperationResult(
        operation_id="run_0-1",
        status="done",
        metrics={"loss": 2.0, "loss_sum": 2.0, "num_tokens": 5.0, "kl": 0.5, "milliseconds": 3.0},
        logprobs=[logprobs(4), logprobs(3), logprobs(3, 2), logprobs(2)],
    )
    output = pb.ForwardBackwardOutput.FromString(results.forward_backward_output(result))
    assert [record.num_datums for record in output.loss_fn_outputs] == [2, 1, 1]
    assert [array.tolist() for array in arrays_of(output)] == [
        [0, 1, 2],
        [0, 1],
        [[0, 1], [2, 3]],
        [0],
    ]
    assert dict(output.metrics) == {
        "loss:sum": 2.0,
        "num_tokens:sum": 5.0,
        "kl:mean": 0.5,
        "milliseconds:max": 3.0,
    }
    in_json = results.forward_backward_json(result)
    assert in_json["metrics"] == dict(output.metrics)
    first = in_json["loss_fn_outputs"][2]["logprobs"]  # pyright: ignore[reportIndexIssue]
    assert first == {"data": [0, 1, 2, 3], "dtype": "float32", "shape": [2, 2]}


# ---- Samples ---------------------------------------------------------------------------------------------------------


def asked(**changes: object) -> bodies.Sample:
    prompt = bodies.ModelInput(chunks=[bodies.Chunk(tokens=[1, 2]), bodies.Chunk(tokens=[3])])
    return bodies.Sample(prompt=prompt, **changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("stop", "texts", "tokens", "ignores_eos"),
    [
        (None, [], [], False),
        ("END", ["END"], [], False),
        (["a", "b"], ["a", "b"], [], False),
        ([7, 8], [], [7, 8], False),
        ([], [], [], True),
    ],
)
def test_what_ends_a_sample(
    stop: object, texts: list[str], tokens: list[int], ignores_eos: bool
) -> None:
    """Texts and tokens stop beside the model's own end; an empty list means that nothing does."""
    params = bodies.SamplingParams(stop=stop)  # pyright: ignore[reportArgumentType]
    request = samples.request_of(asked(sampling_params=params), "base").request
    assert (request.stop, request.stop_token_ids, request.ignore_eos) == (
        texts,
        tokens,
        ignores_eos,
    )
    assert request.prompt_token_ids == [[1, 2, 3]]


def test_what_is_asked_of_a_prompt() -> None:
    """Everything that is to be scored is passed on, sparse targets as dense ones with -1 where there is nothing."""
    sparse = bodies.TensorData(
        data=[5, 6, 7],
        dtype="int64",
        shape=[2, 3],
        sparse_crow_indices=[0, 1, 3],
        sparse_col_indices=[2, 0, 1],
    )
    wanted = samples.request_of(
        asked(
            prompt_logprobs=True,
            topk_prompt_logprobs=4,
            topk_sample_logprobs=2,
            prompt_logprobs_last_n=2,
            target_prompt_logprobs=sparse,
        ),
        "base",
    )
    request = wanted.request
    assert request.return_prompt_logprobs
    assert (request.prompt_top_logprobs, request.logprobs) == (4, 2)
    assert request.prompt_logprobs_last == 2
    assert request.prompt_targets is not None
    (targets,) = request.prompt_targets
    assert isinstance(targets, wire.Tensor)
    assert np.frombuffer(targets.data, "<i8").tolist() == [-1, -1, 5, 6, 7, -1]
    scored = wire.Tensor(
        dtype="float32",
        shape=(2, 3),
        data=np.array([[-np.inf, -np.inf, -1], [-2, -3, -np.inf]], "<f4").tobytes(),
    )
    message = decoded(wanted, prompt_target_logprobs=scored).target_prompt_logprobs
    assert np.frombuffer(message.sparse_csr.values, "<f4").tolist() == [-1, -2, -3]
    assert np.frombuffer(message.sparse_csr.crow_indices, "<i8").tolist() == [0, 1, 3]
    assert np.frombuffer(message.sparse_csr.col_indices, "<i8").tolist() == [2, 0, 1]


def decoded(wanted: samples.Wanted, **changes: object) -> pb.SampleResponse:
    """What the client reads of one sample of two tokens."""
    sequence = wire.SampleSequence(
        text="",
        tokens=[8, 9],
        logprobs=[-0.5, -0.25],
        stop_reason="stop",
        top_logprobs=[[wire.TopLogprob(token=8, logprob=-0.5)], []],
    )
    group = wire.SampleGroup(
        prompt_token_ids=[1, 2, 3],
        samples=[sequence],
        cached_prompt_tokens=2,
        **changes,  # pyright: ignore[reportArgumentType]
    )
    response = wire.SampleResponse(groups=[group], policy_version="base", usage=wire.TokenUsage())
    return pb.SampleResponse.FromString(samples.message_of(response, wanted))


def test_a_sample_s_message() -> None:
    """Absent log-probabilities are NaN, absent candidates token 0 at -99999, and the cached prompt is told."""
    wanted = samples.request_of(asked(topk_sample_logprobs=2, topk_prompt_logprobs=1), "base")
    top = wire.TopLogprobs(
        token_ids=wire.Tensor(
            dtype="int32", shape=(3, 1), data=np.array([-1, 4, 5], "<i4").tobytes()
        ),
        logprobs=wire.Tensor(
            dtype="float32", shape=(3, 1), data=np.array([-np.inf, -1, -2], "<f4").tobytes()
        ),
    )
    message = decoded(wanted, prompt_logprobs=[None, -1.0, -2.0], prompt_top_logprobs=top)
    (sequence,) = message.sequences
    assert sequence.stop_reason == pb.STOP_REASON_STOP
    assert np.frombuffer(sequence.tokens, "<i4").tolist() == [8, 9]
    assert np.frombuffer(sequence.logprobs, "<f4").tolist() == [-0.5, -0.25]
    sampled = sequence.topk_sampled_logprobs
    assert (sampled.k, sampled.length) == (2, 2)
    assert np.frombuffer(sampled.token_ids, "<i4").tolist() == [8, 0, 0, 0]
    assert np.frombuffer(sampled.logprobs, "<f4").tolist() == [-0.5, -99999, -99999, -99999]
    first, *rest = np.frombuffer(message.prompt_logprobs, "<f4").tolist()
    assert np.isnan(first)
    assert rest == [-1.0, -2.0]
    prompt = message.topk_prompt_logprobs
    assert np.frombuffer(prompt.token_ids, "<i4").tolist() == [0, 4, 5]
    assert np.frombuffer(prompt.logprobs, "<f4").tolist() == [-99999, -1, -2]
    assert message.prompt_cache_hit_tokens == 2


def test_a_sample_that_was_broken_off_is_tried_again() -> None:
    """What an engine broke off is no sample: the error is one after which futures try again."""
    broken = wire.SampleSequence(text="", tokens=[], logprobs=[], stop_reason="abort")
    group = wire.SampleGroup(prompt_token_ids=[1, 2, 3], samples=[broken])
    response = wire.SampleResponse(groups=[group], policy_version="", usage=wire.TokenUsage())
    with pytest.raises(UnavailableError):
        samples.message_of(response, samples.request_of(asked(), "base"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k: alternatives .* not offered"),
        ({"record_stability_info": True}, "record_stability_info: not offered"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n: is of prompt_logprobs"),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, "prompt_logprobs_last_n: 3, must"),
        ({"num_samples": 0}, "num_samples: 0, must be 1 to"),
        (
            {"target_prompt_logprobs": bodies.TensorData(data=[1, 2], dtype="int64", shape=[1, 2])},
            r"target_prompt_logprobs: shape \[1, 2\], must be \[2, K\]",
        ),
        (
            {"prompt": bodies.ModelInput(chunks=[bodies.Chunk(type="image")])},
            r"prompt.chunks\[0\]: image: images are not offered",
        ),
    ],
)
def test_what_cannot_be_sampled_is_named(changes: dict[str, object], sentence: str) -> None:
    """What is not offered, or does not fit, is refused by the client's own names."""
    given = {"prompt": bodies.ModelInput(chunks=[bodies.Chunk(tokens=[1, 2, 3])])} | changes
    with pytest.raises((InvalidFieldError, UnsupportedFieldError), match=sentence):
        samples.request_of(bodies.Sample(**given), "base")  # pyright: ignore[reportArgumentType]


# ---- Bodies ----------------------------------------------------------------------------------------------------------


def test_zstd_is_undone_within_bounds() -> None:
    """A compressed body is read; one that is none, or is larger than any may be whatever it says, is refused."""
    assert http.unpacked(zstandard.compress(b"abc" * 1000)) == b"abc" * 1000
    with pytest.raises(MalformedBodyError):
        http.unpacked(b"not compressed")
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(
        bytes(UNPACKED_MAX_BYTES + 1)
    )
    assert len(bomb) < 10_000
    with pytest.raises(TooLargeError):
        http.unpacked(bomb)


async def test_large_bodies_leave_the_event_loop_alone() -> None:
    """Work on more than 64 KiB is done by another thread, on less by this one."""
    here = threading.get_ident()
    assert await beside_the_loop(DECODE_INLINE_MAX_BYTES, threading.get_ident) == here
    assert await beside_the_loop(DECODE_INLINE_MAX_BYTES + 1, threading.get_ident) != here
