"""Training data of the Tinker protocol: read from protobuf and JSON, lengthened, and refused by the client's names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from support.tinker import chunk, datum, forward_backward, plain_datum, tensor

from river_client import wire
from river_gateway.dialects.tinker import bodies, datums
from river_gateway.dialects.tinker import messages_pb2 as pb
from river_gateway.dialects.tinker.errors import in_their_words
from river_gateway.dialects.tinker.tensors import Tensors
from river_gateway.errors import (
    GatewayError,
    InvalidFieldError,
    MalformedBodyError,
    UnsupportedFieldError,
)
from river_gateway.limits import SPARSE_CELLS_MAX
from river_gateway.training.arrays import unpacked

MODEL = "ses_0:train:0"


def operation(*data: pb.Datum, **changes: Any) -> wire.Forward | wire.ForwardBackward:
    asked = datums.of_protobuf(forward_backward(MODEL, 7, *data, **changes))
    assert (asked.model, asked.seq) == (MODEL, 7)
    assert not isinstance(asked.operation, GatewayError), asked.operation
    return asked.operation


def refusal(*data: pb.Datum, **changes: Any) -> GatewayError:
    """What is wrong with a body, told though it is wrong whose it is."""
    asked = datums.of_protobuf(forward_backward(MODEL, 7, *data, **changes))
    assert (asked.model, asked.seq) == (MODEL, 7)
    assert isinstance(asked.operation, InvalidFieldError)
    return asked.operation


def values(numbers: wire.Numbers | None) -> list[Any]:
    assert isinstance(numbers, wire.Tensor)
    return unpacked(numbers, "").tolist()


def test_a_datum_gets_a_place_of_which_nothing_is_predicted() -> None:
    """N tokens with N targets become N + 1, for River ignores the last place; the chunks of an input are joined."""
    made = operation(
        datum(
            chunk(1, 2),
            chunk(3),
            target_tokens=tensor([2, 3, 9], "int64"),
            weights=tensor([0.0, 1.0, 0.5]),
        )
    )
    assert isinstance(made, wire.ForwardBackward)
    assert (made.loss_fn, made.loss_config) == ("cross_entropy", {})
    (given,) = made.data
    assert values(given.input_ids) == [1, 2, 3, 3]
    assert values(given.target_tokens) == [2, 3, 9, 9]
    assert values(given.weights) == [0.0, 1.0, 0.5, 0.5]
    assert isinstance(operation(plain_datum(), forward_only=True), wire.Forward)


def test_both_encodings_mean_the_same() -> None:
    """What older clients send as JSON becomes the same operation as the protobuf of newer ones."""
    inputs = {
        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
        "logprobs": {"data": [-0.5, -1.25], "dtype": "float32", "shape": [2]},
        "advantages": {"data": [1.0, -1.0], "dtype": "float32"},
    }
    model_input = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    body = {
        "model_id": MODEL,
        "seq_id": 7,
        "forward_backward_input": {
            "data": [{"model_input": model_input, "loss_fn_inputs": inputs}],
            "loss_fn": "ppo",
            "loss_fn_config": {"clip_low_threshold": 0.5},
        },
    }
    asked = datums.of_json(json.dumps(body).encode())
    by_protobuf = operation(
        datum(
            chunk(1, 2),
            target_tokens=tensor([2, 3], "int64"),
            logprobs=tensor([-0.5, -1.25]),
            advantages=tensor([1.0, -1.0]),
        ),
        loss_fn="ppo",
        loss_fn_config_v2={"clip_low_threshold": pb.LossConfigValue(number=0.5)},
    )
    assert asked.operation == by_protobuf
    assert by_protobuf.loss_config == {"clip_low": 0.5, "clip_high": 1.2}


def test_sparse_arrays_are_spread_out() -> None:
    """Soft targets in the CSR layout are the dense ones: every cell that is not named is 0 and weighs nothing."""
    ids, weights = np.array([[5, 0, 6], [0, 7, 0]]), np.array([[0.5, 0, 0.5], [0, 1, 0]], "<f4")

    def sparse(array: np.ndarray[Any, Any], dtype: int, kind: str) -> pb.Tensor:
        rows, columns = np.nonzero(weights)
        crow = np.searchsorted(rows, np.arange(len(array) + 1)).astype("<i8")
        csr = pb.SparseCsr(
            values=array[rows, columns].astype(kind).tobytes(),
            crow_indices=crow.tobytes(),
            col_indices=columns.astype("<i8").tobytes(),
        )
        return pb.Tensor(sparse_csr=csr, dtype=dtype, shape=array.shape)  # pyright: ignore[reportArgumentType]

    made = operation(
        datum(
            chunk(1, 2),
            target_tokens=sparse(ids, pb.DTYPE_INT64, "<i8"),
            weights=sparse(weights, pb.DTYPE_FLOAT32, "<f4"),
        )
    )
    assert values(made.data[0].target_tokens) == [*ids.tolist(), ids[-1].tolist()]
    assert values(made.data[0].weights) == [*weights.tolist(), weights[-1].tolist()]


def test_each_loss_is_river_s_own_under_the_protocol_s_defaults() -> None:
    """Bounds per token and the mask of a sequence's ratio are passed on; a bound left out is what the protocol says."""
    bounds = {"clip_low_threshold": tensor([0.5, 0.6]), "clip_high_threshold": tensor([1.5, 1.6])}
    mask = {"sequence_ratio_mask": tensor([0.0, 1.0])}
    for loss, inputs, config in (
        ("importance_sampling", {}, {}),
        ("ppo", bounds, {"clip_low": 0.8, "clip_high": 1.2}),
        ("cispo", bounds, {"clip_low": 0.0, "eps_max": 4.0}),
        ("gspo", bounds | mask, {"clip_low": 0.8, "clip_high": 1.2}),
        ("dro", {}, {"beta": 0.05}),
    ):
        made = operation(datum(chunk(1, 2), **POLICY, **inputs), loss_fn=loss)
        assert (made.loss_fn, made.loss_config) == (loss, config)
        (given,) = made.data
        if inputs:
            assert values(given.clip_low) == pytest.approx([0.5, 0.6, 0.6])
            assert values(given.clip_high) == pytest.approx([1.5, 1.6, 1.6])
        if mask.keys() <= inputs.keys():
            assert values(given.sequence_mask) == [0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "numbers", "seen"),
    [
        (pb.DTYPE_INT32, np.array([2, 3], "<i4"), [2, 3]),
        (pb.DTYPE_BFLOAT16, np.array([0x4000, 0x4040], "<u2"), [2.0, 3.0]),
    ],
    ids=["int32", "bfloat16"],
)
def test_narrow_types_are_widened(kind: pb.DType, numbers: Any, seen: list[float]) -> None:
    """int32 and bfloat16 are read bit by bit."""
    narrow = pb.Tensor(dense=numbers.tobytes(), dtype=kind, shape=[2])
    made = operation(datum(chunk(1, 2), target_tokens=narrow))
    assert values(made.data[0].target_tokens)[:2] == seen


TWO = {"target_tokens": tensor([2, 3], "int64")}
POLICY = TWO | {"logprobs": tensor([0.0, 0.0]), "advantages": tensor([1.0, 1.0])}


@pytest.mark.parametrize(
    ("data", "changes", "sentence"),
    [
        (
            datum(chunk(1, 2)),
            {},
            "data[0].loss_fn_inputs.target_tokens: missing, the loss cross_entropy needs it",
        ),
        (datum(**TWO), {}, "data[0].model_input: empty"),
        (
            datum(chunk(1), **TWO),
            {},
            "data[0].loss_fn_inputs.target_tokens: 2 values for 1 tokens of model_input",
        ),
        (
            datum(chunk(1, 2), **POLICY, mask=tensor([1.0, 1.0])),
            {"loss_fn": "importance_sampling"},
            "data[0].loss_fn_inputs.mask: the loss importance_sampling takes target_tokens, logprobs, advantages",
        ),
        (
            datum(
                chunk(1, 2),
                target_tokens=pb.Tensor(dense=b"1234567", dtype=pb.DTYPE_INT64, shape=[1]),
            ),
            {},
            "data[0].loss_fn_inputs.target_tokens: 7 bytes are no whole number of 8-byte items",
        ),
        (
            datum(
                chunk(1, 2),
                target_tokens=pb.Tensor(dense=bytes(16), dtype=pb.DTYPE_INT64, shape=[3]),
            ),
            {},
            "data[0].loss_fn_inputs.target_tokens: 2 values, but shape [3] takes 3",
        ),
        (plain_datum(), {"loss_fn": "nll"}, "loss_fn: 'nll' is no loss; there are cross_entropy, "),
        (
            plain_datum(),
            {"loss_fn": "stable_reinforce"},
            "loss_fn: 'stable_reinforce' is not offered here",
        ),
        (plain_datum(), {"loss_fn": "custom"}, "loss_fn: 'custom' is not offered here"),
        (
            datum(chunk(1, 2), **POLICY),
            {"loss_fn": "ppo", "loss_fn_config": {"eps": 1.0}},
            "loss_fn_config.eps: unknown, the loss ppo has clip_low_threshold, clip_high_threshold",
        ),
        (
            datum(chunk(1, 2), **POLICY),
            {"loss_fn": "dro", "loss_fn_config_v2": {"beta": pb.LossConfigValue(text="x")}},
            "loss_fn_config.beta: 'x', must be a finite number",
        ),
        (
            datum(pb.Chunk(image=pb.ImageChunk(data=b"x", format="png")), **TWO),
            {},
            "data[0].model_input.chunks[0]: image: images are not offered by this server",
        ),
        (
            datum(pb.Chunk(dmel=pb.DmelChunk(dmel=b"x")), **TWO),
            {},
            "data[0].model_input.chunks[0]: dmel: audio is not offered",
        ),
    ],
)
def test_what_is_wrong_is_named(data: pb.Datum, changes: dict[str, Any], sentence: str) -> None:
    """Every way in which data can be wrong is told by the client's own names, index and limit."""
    assert refusal(data, **changes).message.startswith(sentence)


def test_a_nearly_empty_sparse_array_is_no_bomb() -> None:
    """A small body that says it is a huge sparse array is refused before anything of that size is made."""
    side = int(SPARSE_CELLS_MAX**0.5) + 1
    csr = pb.SparseCsr(crow_indices=bytes(8 * (side + 1)))
    array = pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_INT64, shape=[side, side])
    wrong = refusal(datum(chunk(1, 2), target_tokens=array))
    assert "have more than" in wrong.message


def test_a_body_that_is_no_message_is_refused_at_once() -> None:
    """Without a run and a seq there is no place that an operation could fail in."""
    with pytest.raises(MalformedBodyError, match="no ForwardBackwardRequest"):
        datums.of_protobuf(b"\xff\xff\xff")


def test_what_is_not_offered_is_said_to_be_so() -> None:
    """An unknown chunk of an input is named, and not left out."""
    wrong = refusal(datum(pb.Chunk(), **TWO))
    assert isinstance(wrong, UnsupportedFieldError)
    assert "a chunk without a type" in wrong.message


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "data[3].old_logprobs[2]: NaN is not a number",
            "data[3].loss_fn_inputs.logprobs[2]: NaN is not a number",
        ),
        ("adam.lr: 11, must be 0 to 10", "adam_params.learning_rate: 11, must be 0 to 10"),
        ("adam.beta1: 2, must be 0 to 1", "adam_params.beta1: 2, must be 0 to 1"),
        ("lora.rank: 99, must be 1 to 32", "lora_config.rank: 99, must be 1 to 32"),
        ("temperature: -1, must be 0 to 2", "sampling_params.temperature: -1, must be 0 to 2"),
        ("prompt_token_ids[0]: empty", "prompt: empty"),
        ("there is no run", "there is no run"),
    ],
)
def test_our_names_of_fields_become_theirs(ours: str, theirs: str) -> None:
    """A sentence about a field calls it as the client does."""
    assert in_their_words(ours) == theirs


def test_indices_that_are_too_large_are_named() -> None:
    """A number beyond 64 bits, or a shape of an empty array beyond any, is the field's fault and not ours."""
    huge = 10**30
    for array in (
        bodies.TensorData(
            data=[1.0],
            dtype="int64",
            shape=[1, 1],
            sparse_crow_indices=[0, huge],
            sparse_col_indices=[0],
        ),
        bodies.TensorData(data=[], dtype="float32", shape=[0, huge]),
    ):
        with pytest.raises(InvalidFieldError, match=r"^field: "):
            Tensors().of_json(array, "field")
