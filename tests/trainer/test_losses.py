"""Losses and optimizer against plain formulas in float64."""

from __future__ import annotations

import msgspec
import pytest
import torch

from river_trainer.errors import InvalidTaskError, NonFiniteError
from river_trainer.losses import LOSSES, LossInput, find_loss, metrics_of
from river_trainer.optimizer import AdamState, adam_step
from river_trainer.protocol import Adam


def loss_input(seed: int) -> LossInput:
    generator = torch.Generator().manual_seed(seed)

    def numbers() -> torch.Tensor:
        return torch.randn(20, generator=generator)

    weights = numbers().abs()
    weights[[3, 19]] = 0.0
    advantages = numbers()
    advantages[:5] = 0.0
    return LossInput(
        (-numbers().abs()).requires_grad_(), numbers().abs(), weights, -numbers().abs(), advantages
    )


def test_cross_entropy_is_the_weighted_sum() -> None:
    """Value, metrics and gradient are those of -sum w lp."""
    data = loss_input(1)
    loss, sums = LOSSES["cross_entropy"].function(data)
    (gradient,) = torch.autograd.grad(loss, data.logprobs)
    expected = -(data.weights.double() * data.logprobs.detach().double()).sum().item()
    metrics = metrics_of(
        LOSSES["cross_entropy"], {name: float(value) for name, value in sums.items()}
    )
    assert metrics["loss_sum"] == pytest.approx(expected, rel=1e-6)
    assert metrics["loss_mean"] == pytest.approx(
        expected / data.weights.double().sum().item(), rel=1e-6
    )
    assert metrics["num_tokens"] == 18
    assert metrics["entropy"] == pytest.approx(
        data.entropy[data.weights != 0].mean().item(), rel=1e-6
    )
    torch.testing.assert_close(gradient, -data.weights)


def test_importance_sampling_is_the_ratio_times_the_advantage() -> None:
    """Value, metrics and gradient are those of -sum w exp(lp - old) A."""
    data = loss_input(2)
    loss, sums = LOSSES["importance_sampling"].function(data)
    (gradient,) = torch.autograd.grad(loss, data.logprobs)
    logprobs, old = data.logprobs.detach().double(), data.old_logprobs.double()
    ratio = (logprobs - old).exp()
    gain = data.weights.double() * data.advantages.double()
    counted = gain != 0
    metrics = metrics_of(
        LOSSES["importance_sampling"], {name: float(value) for name, value in sums.items()}
    )
    expected = -(ratio * gain).sum().item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["num_tokens"] == counted.sum().item() == 14
    assert metrics["mean_ratio"] == pytest.approx(ratio[counted].mean().item(), rel=1e-6)
    k3 = (ratio - 1 - ratio.log())[counted].mean().item()
    assert metrics["kl"] == pytest.approx(k3, rel=1e-5)
    assert metrics["kl_k1"] == pytest.approx((old - logprobs)[counted].mean().item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), -ratio * gain, rtol=1e-5, atol=1e-7)


def test_filler_does_not_spoil_importance_sampling() -> None:
    """Where nothing counts, an overflowing ratio does no harm."""
    data = loss_input(3)
    data.old_logprobs[0] = -1e30
    loss, _ = LOSSES["importance_sampling"].function(data)
    (gradient,) = torch.autograd.grad(loss, data.logprobs)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "config", "param"),
    [("nonsense", {}, "loss_fn"), ("cross_entropy", {"beta": 1.0}, "loss_config.beta")],
    ids=["unknown loss", "unknown parameter"],
)
def test_unknown_losses_are_refused(name: str, config: dict[str, float], param: str) -> None:
    """The refusal names the field."""
    with pytest.raises(InvalidTaskError) as caught:
        find_loss(name, config)
    assert caught.value.param == param


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
def test_adam_equals_torch(clip: float | None) -> None:
    """Three steps with changing hyper-parameters are those of torch's AdamW and clipping."""
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.randn(4, 3, generator=generator).requires_grad_() for name in "ab"}
    theirs = {name: tensor.detach().double().requires_grad_() for name, tensor in ours.items()}
    state = AdamState(ours)
    optimizer = torch.optim.AdamW(theirs.values(), lr=1.0)
    for lr, weight_decay in ((1e-2, 0.0), (3e-3, 0.1), (2e-2, 0.01)):
        gradients = {name: torch.randn(4, 3, generator=generator) for name in ours}
        adam = Adam(
            lr=lr, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=weight_decay, grad_clip_norm=clip
        )
        norm = adam_step(ours, gradients, state, adam)
        for name, tensor in theirs.items():
            tensor.grad = gradients[name].double()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), clip or 1e30)
        optimizer.param_groups[0].update(
            lr=lr, betas=(0.8, 0.9), eps=1e-6, weight_decay=weight_decay
        )
        optimizer.step()
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        for name, tensor in ours.items():
            torch.testing.assert_close(
                tensor.detach().double(), theirs[name].detach(), rtol=1e-5, atol=1e-6
            )


def test_optimizer_state_round_trips() -> None:
    """A restored state goes on exactly where the stored one was."""
    tensors = {"a": torch.ones(2, 2)}
    state = AdamState(tensors)
    adam = Adam(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, grad_clip_norm=None)
    adam_step(tensors, {"a": torch.full((2, 2), 3.0)}, state, adam)
    again = AdamState(tensors)
    again.restore(state.to_bytes())
    assert again.steps == 1
    assert torch.equal(again.first["a"], state.first["a"])
    assert torch.equal(again.second["a"], state.second["a"])
    with pytest.raises(InvalidTaskError):
        AdamState({"a": torch.ones(3)}).restore(state.to_bytes())
    with pytest.raises(InvalidTaskError):
        again.restore(b"nonsense")


def test_a_non_finite_norm_changes_nothing() -> None:
    """An infinite gradient is refused before anything is touched."""
    tensors = {"a": torch.ones(2)}
    state = AdamState(tensors)
    adam = Adam(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, grad_clip_norm=None)
    with pytest.raises(NonFiniteError):
        adam_step(tensors, {"a": torch.tensor([float("inf"), 0.0])}, state, adam)
    assert tensors["a"].tolist() == [1.0, 1.0]
    assert state.steps == 0


@pytest.mark.parametrize(
    ("gradient", "lr"), [(1e20, 0.1), (1.0, 1e39)], ids=["second moment", "weights"]
)
def test_a_step_out_of_range_changes_nothing(gradient: float, lr: float) -> None:
    """A finite gradient whose step is not is refused whole, and the next good one is a first step."""
    tensors = {"fine": torch.ones(2), "huge": torch.ones(2)}
    state = AdamState(tensors)
    adam = Adam(lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=None)
    with pytest.raises(NonFiniteError):
        adam_step(tensors, {"fine": torch.ones(2), "huge": torch.full((2,), gradient)}, state, adam)
    assert [tensor.tolist() for tensor in tensors.values()] == [[1.0, 1.0]] * 2
    assert state.steps == 0
    good = msgspec.structs.replace(adam, lr=0.1)
    adam_step(tensors, {name: torch.ones(2) for name in tensors}, state, good)
    assert tensors["huge"].tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("eps", [1e-46, 5e-324], ids=["below float32", "below float64"])
def test_a_tiny_eps_divides_by_something(eps: float) -> None:
    """A weight without a gradient stays as it is, however small eps is."""
    tensors = {"a": torch.ones(2)}
    adam = Adam(lr=0.1, beta1=0.9, beta2=0.95, eps=eps, weight_decay=0.0, grad_clip_norm=None)
    adam_step(tensors, {"a": torch.tensor([0.0, 1.0])}, AdamState(tensors), adam)
    assert tensors["a"].tolist() == pytest.approx([1.0, 0.9])
