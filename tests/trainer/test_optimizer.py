"""AdamW over many runs against torch's own, and what it refuses."""

from __future__ import annotations

import msgspec
import pytest
import torch
from support.training import shape

from river_trainer.adapter import FlatTensors, Layout, layout_of
from river_trainer.errors import InvalidTaskError, NonFiniteError
from river_trainer.optimizer import AdamState, AdamStep, adam_steps
from river_trainer.protocol import Adam
from river_trainer.sites import Group, Site

SITE = Site("lm_head", Group.UNEMBED, inputs=2, outputs=2, peft_prefix="lm_head", target="lm_head")


def layout(rank: int) -> Layout:
    return layout_of((SITE,), shape(rank=rank))


def weights_of(values: list[float]) -> FlatTensors:
    """The four weights of an adapter of rank one."""
    return FlatTensors(layout(1), torch.tensor(values))


def random_weights(generator: torch.Generator, rank: int) -> FlatTensors:
    return FlatTensors(layout(rank), torch.randn(layout(rank).size, generator=generator))


@pytest.mark.parametrize("scale", [1.0, 0.125], ids=["whole", "scaled"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
def test_adam_equals_torch(clip: float | None, scale: float) -> None:
    """Three steps of two runs with changing hyper-parameters are those of torch's AdamW, scaling before clipping."""
    generator = torch.Generator().manual_seed(0)
    ours = [random_weights(generator, rank) for rank in (1, 3)]
    states = [AdamState.new(weights.layout) for weights in ours]
    theirs = [weights.flat.double().requires_grad_() for weights in ours]
    optimizers = [torch.optim.AdamW([tensor], lr=1.0) for tensor in theirs]
    for lr, weight_decay in ((1e-2, 0.0), (3e-3, 0.1), (2e-2, 0.01)):
        gradients = [random_weights(generator, weights.layout.rank) for weights in ours]
        for tensor, gradient in zip(theirs, gradients, strict=True):
            tensor.grad = gradient.flat.double() * scale
        adam = Adam(
            lr=lr,
            beta1=0.8,
            beta2=0.9,
            eps=1e-6,
            weight_decay=weight_decay,
            grad_clip_norm=clip,
            gradient_scale=scale,
        )
        norms = adam_steps(
            [
                AdamStep(weights, gradient, state, adam)
                for weights, gradient, state in zip(ours, gradients, states, strict=True)
            ]
        )
        for weights, tensor, optimizer, norm in zip(ours, theirs, optimizers, norms, strict=True):
            expected = torch.nn.utils.clip_grad_norm_([tensor], clip or 1e30)
            optimizer.param_groups[0].update(
                lr=lr, betas=(0.8, 0.9), eps=1e-6, weight_decay=weight_decay
            )
            optimizer.step()
            assert norm == pytest.approx(expected.item(), rel=1e-6)
            torch.testing.assert_close(weights.flat.double(), tensor.detach(), rtol=1e-5, atol=1e-6)


def test_optimizer_state_round_trips() -> None:
    """A restored state goes on exactly where the stored one was."""
    weights = weights_of([1.0] * 4)
    state = AdamState.new(weights.layout)
    adam = Adam(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, grad_clip_norm=None)
    adam_steps([AdamStep(weights, weights_of([3.0] * 4), state, adam)])
    again = AdamState.new(weights.layout)
    again.restore(state.to_bytes())
    assert again.steps == 1
    assert torch.equal(again.first.flat, state.first.flat)
    assert torch.equal(again.second.flat, state.second.flat)
    with pytest.raises(InvalidTaskError):
        AdamState.new(layout(3)).restore(state.to_bytes())
    with pytest.raises(InvalidTaskError):
        again.restore(b"nonsense")


def test_a_non_finite_norm_changes_nothing() -> None:
    """An infinite gradient is refused before anything is touched, and spoils no other run's step."""
    weights, other = weights_of([1.0] * 4), weights_of([1.0] * 4)
    state = AdamState.new(weights.layout)
    adam = Adam(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, grad_clip_norm=None)
    bad = AdamStep(weights, weights_of([float("inf"), 0.0, 0.0, 0.0]), state, adam)
    good = AdamStep(other, weights_of([1.0] * 4), AdamState.new(other.layout), adam)
    norms = adam_steps([bad, good])
    assert isinstance(norms[0], NonFiniteError)
    assert norms[1] == pytest.approx(2.0)
    assert weights.flat.tolist() == [1.0] * 4
    assert state.steps == 0
    assert other.flat.tolist() == pytest.approx([0.9] * 4)


@pytest.mark.parametrize(
    ("gradient", "lr"), [(1e20, 0.1), (1.0, 1e39)], ids=["second moment", "weights"]
)
def test_a_step_out_of_range_changes_nothing(gradient: float, lr: float) -> None:
    """A finite gradient whose step is not is refused whole, and the next good one is a first step."""
    weights = weights_of([1.0] * 4)
    state = AdamState.new(weights.layout)
    adam = Adam(lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=None)
    given = weights_of([1.0, gradient, 1.0, 1.0])
    (error,) = adam_steps([AdamStep(weights, given, state, adam)])
    assert isinstance(error, NonFiniteError)
    assert weights.flat.tolist() == [1.0] * 4
    assert given.flat.tolist() == pytest.approx([1.0, gradient, 1.0, 1.0])
    assert state.steps == 0
    assert not state.first.flat.any()
    good = msgspec.structs.replace(adam, lr=0.1)
    adam_steps([AdamStep(weights, weights_of([1.0] * 4), state, good)])
    assert weights.flat.tolist() == pytest.approx([0.9] * 4)


@pytest.mark.parametrize("eps", [1e-46, 5e-324], ids=["below float32", "below float64"])
def test_a_tiny_eps_divides_by_something(eps: float) -> None:
    """A weight without a gradient stays as it is, however small eps is."""
    weights = weights_of([1.0] * 4)
    adam = Adam(lr=0.1, beta1=0.9, beta2=0.95, eps=eps, weight_decay=0.0, grad_clip_norm=None)
    gradient = weights_of([0.0, 1.0, 0.0, 1.0])
    adam_steps([AdamStep(weights, gradient, AdamState.new(weights.layout), adam)])
    assert weights.flat.tolist() == pytest.approx([1.0, 0.9, 1.0, 0.9])
