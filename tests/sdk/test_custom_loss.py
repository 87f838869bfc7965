"""Losses computed by the client: what is asked of the server, and what it is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.stub_gateway import KEY, StubGateway

import river_client as river
from river_client import wire
from river_client.arrays import unpack

DATA: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3], "reward": 2.0, "weights": [1.0, 1.0, 0.0]},
    {"input_ids": [4, 5, 0], "reward": -1.0, "attention_mask": [1, 1, 0]},
]


def rewarded(
    logprobs: list[Any], data: Sequence[Mapping[str, Any]]
) -> tuple[float, list[Any], Mapping[str, float]]:
    """The loss -sum reward lp^2."""
    rewards = [datum["reward"] for datum in data]
    loss = -sum(reward * (lp**2).sum() for reward, lp in zip(rewards, logprobs, strict=True))
    gradients = [-2 * reward * lp for reward, lp in zip(rewards, logprobs, strict=True)]
    return loss, gradients, {"best": max(rewards)}


@river.torch_loss
def rewarded_by_torch(logprobs: list[Any], data: Sequence[Any]) -> tuple[Any, Mapping[str, float]]:
    """The same with gradients by autograd."""
    assert all(isinstance(lp, torch.Tensor) for lp in logprobs)
    terms = [-datum["reward"] * lp.square().sum() for datum, lp in zip(data, logprobs, strict=True)]
    return torch.stack(terms).sum(), {"best": max(datum["reward"] for datum in data)}


def sent(gateway: StubGateway, seq: int) -> list[wire.Datum]:
    operation = gateway.operations[seq]
    assert isinstance(operation, wire.Forward | wire.ForwardBackward)
    assert operation.loss_fn == "cross_entropy"
    return operation.data


def weights_of(datum: wire.Datum) -> Any:
    assert isinstance(datum.weights, wire.Tensor)
    return unpack(datum.weights).tolist()


@pytest.mark.parametrize("fn", [rewarded, rewarded_by_torch], ids=["numpy", "torch"])
def test_gradients_go_back_as_weights(
    model: river.Model, gateway: StubGateway, fn: river.CustomLoss
) -> None:
    """A forward pass comes first; then a cross-entropy whose weights are the gradients, their sign turned."""
    result = model.forward_backward_custom(DATA, fn)
    assert [type(gateway.operations[seq]) for seq in (1, 2)] == [wire.Forward, wire.ForwardBackward]
    assert [datum.weights for datum in sent(gateway, 1)] == [None, None]
    assert [weights_of(datum) for datum in sent(gateway, 2)] == [
        [-4.0, -8.0, -12.0],
        [2.0, 4.0, 0.0],  # nothing where the mask cuts
    ]
    assert result.metrics == {"loss": -2.0 * 14 + 5, "best": 2.0}
    assert result.training_tokens == 2 * (3 + 2)
    assert result.logprobs[0].tolist() == [-1.0, -2.0, -3.0]


def test_soft_targets_in_a_custom_loss(model: river.Model, gateway: StubGateway) -> None:
    """With K targets a token there are K log-probabilities, K gradients and K weights."""
    soft = wire.Datum(input_ids=[1, 2], target_tokens=[[2, 3], [4, 5]], old_logprobs=[0.0, 0.0])
    seen: list[Any] = []

    def fn(logprobs: list[Any], data: Sequence[Any]) -> tuple[float, list[Any], dict[str, float]]:
        seen.append(logprobs[0].tolist())
        assert data[0] is soft
        return 0.0, [np.array([[1.0, 2.0], [3.0, 4.0]])], {}

    model.forward_backward_custom([soft], fn)
    assert seen == [[[-1.0, -2.0], [-3.0, -4.0]]]
    assert sent(gateway, 1)[0].old_logprobs is None
    assert weights_of(sent(gateway, 2)[0]) == [[-1.0, -2.0], [-3.0, -4.0]]


@pytest.mark.parametrize(
    ("gradients", "param"),
    [
        ([[0.0] * 3], "gradients"),
        ([[0.0] * 3, [0.0] * 3], "gradients[1]"),
        ([[0.0, float("nan"), 0.0], [0.0] * 2], "gradients[0][1]"),
    ],
    ids=["too few", "wrong shape", "not a number"],
)
def test_wrong_gradients_are_refused(
    model: river.Model, gateway: StubGateway, gradients: list[Any], param: str
) -> None:
    """What cannot be a gradient is named and not sent; the model can be used as before."""
    with pytest.raises(river.InvalidRequestError) as refused:
        model.forward_backward_custom(DATA, lambda _, __: (0.0, gradients, {}))
    assert refused.value.param == param
    model.optim_step(lr=1e-3)
    assert [type(gateway.operations[seq]) for seq in (1, 2)] == [wire.Forward, wire.OptimStep]


async def test_a_custom_loss_that_fails(gateway: StubGateway) -> None:
    """An error of the function is the caller's, and leaves no gradient and no gap; the event loop goes on meanwhile."""

    def fn(logprobs: list[Any], data: Sequence[Any]) -> Any:
        raise KeyError("no such column")

    async with (
        river.AsyncClient(api_key=KEY, base_url=gateway.base_url) as client,
        client.session() as session,
    ):
        model = await session.create_model("base")
        with pytest.raises(KeyError, match="no such column"):
            await model.forward_backward_custom(DATA, fn)
        await model.forward_backward_custom(DATA, rewarded)
    kinds = [type(operation) for operation in gateway.operations.values()]
    assert kinds == [wire.Forward, wire.Forward, wire.ForwardBackward]
