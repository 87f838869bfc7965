"""Losses against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch

from river_trainer.errors import InvalidTaskError
from river_trainer.losses import LOSSES, LossInput, find_loss, metrics_of


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
