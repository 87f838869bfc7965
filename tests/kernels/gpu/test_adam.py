"""The kernels of the optimizer against torch's own, in float64 and as the CPU path has it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from river_kernels.adam import AdamRule, AdamUpdate, gradient_norms, multi_adam
from river_kernels.device import triton_on_cpu
from river_kernels.gpu.adam import BLOCK, CHUNK, norms, step_all
from river_kernels.gpu.launch import Launch, recorded

SIZES = (1, BLOCK, CHUNK + BLOCK + 5, 700)
RULES = (
    AdamRule(1e-2, 0.9, 0.95, 1e-8, 0.0),
    AdamRule(3e-3, 0.8, 0.999, 1e-6, 0.1),
    AdamRule(0.5, 0.0, 0.9, 1e-12, 0.0),
    AdamRule(1e-4, 0.99, 0.5, 1e-3, 1.0),
)
MULTIPLIERS = (1.0, 0.25, 1.0, 0.1)
FIRST_STEPS = (1, 7, 1, 100)


def make_updates(seed: int = 0) -> list[AdamUpdate]:
    """Runs of all sizes; those that have stepped before have moments, and every second one a copy."""
    generator = torch.Generator().manual_seed(seed)
    updates: list[AdamUpdate] = []
    for index, (size, rule, multiplier, step) in enumerate(
        zip(SIZES, RULES, MULTIPLIERS, FIRST_STEPS, strict=True)
    ):
        weights, gradient, first, second = torch.randn(4, size, generator=generator).unbind()
        old = step > 1
        updates.append(
            AdamUpdate(
                weights.clone(),
                gradient.clone(),
                first * 0.1 * old,
                second.square() * old,
                step,
                rule,
                multiplier,
                torch.zeros(size, dtype=torch.bfloat16) if index % 2 else None,
            )
        )
    return updates


def cloned(updates: list[AdamUpdate]) -> list[AdamUpdate]:
    return [
        replace(
            update,
            weights=update.weights.clone(),
            gradient=update.gradient.clone(),
            first=update.first.clone(),
            second=update.second.clone(),
            copy=None if update.copy is None else update.copy.clone(),
        )
        for update in updates
    ]


def torch_weights(update: AdamUpdate) -> torch.Tensor:
    """What torch's optimizer makes of the weights, in float64."""
    weights = update.weights.double().requires_grad_()
    weights.grad = update.gradient.double() * update.multiplier
    rule = update.rule
    optimizer = torch.optim.AdamW(
        [weights],
        lr=rule.lr,
        betas=(rule.beta1, rule.beta2),
        eps=rule.eps,
        weight_decay=rule.weight_decay,
    )
    optimizer.state[weights] = {
        "step": torch.tensor(float(update.step - 1)),
        "exp_avg": update.first.double(),
        "exp_avg_sq": update.second.double(),
    }
    optimizer.step()
    return weights.detach()


def test_every_run_steps_as_torch_would() -> None:
    """Runs of other sizes, hyper-parameters, step counts and clipping step in one launch as alone in torch."""
    updates = make_updates()
    expected = [torch_weights(update) for update in updates]
    launches: list[Launch] = []
    with triton_on_cpu(), recorded(launches.append):
        multi_adam(updates)
    assert len(launches) == 1
    for update, weights in zip(updates, expected, strict=True):
        torch.testing.assert_close(update.weights.double(), weights, rtol=2e-6, atol=2e-7)
        assert not update.gradient.any()


def test_both_paths_agree() -> None:
    """Weights, moments and copies are those of the CPU path, over two steps."""
    here, there = make_updates(), make_updates()
    for seed in (1, 2):
        for ours, theirs, new in zip(here, there, make_updates(seed), strict=True):
            ours.gradient.copy_(new.gradient)
            theirs.gradient.copy_(new.gradient)
        with triton_on_cpu():
            multi_adam(here)
        multi_adam(there)
        here = [replace(update, step=update.step + 1) for update in here]
        there = [replace(update, step=update.step + 1) for update in there]
    for ours, theirs in zip(here, there, strict=True):
        for name in ("weights", "first", "second", "gradient"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name), rtol=2e-6, atol=1e-6
            )
        if theirs.copy is not None:
            assert ours.copy is not None
            torch.testing.assert_close(ours.copy, theirs.copy, rtol=1e-2, atol=0)
            assert torch.equal(theirs.copy, theirs.weights.bfloat16())


def test_a_run_has_the_same_bits_in_any_company() -> None:
    """Stepping alone, together with others, and a second time gives every run the same bits."""
    together, again = make_updates(), make_updates()
    with triton_on_cpu():
        multi_adam(together)
        multi_adam(again)
        for index, alone in enumerate(make_updates()):
            multi_adam([alone])
            for name in ("weights", "first", "second"):
                bits = getattr(together[index], name)
                assert torch.equal(getattr(alone, name), bits)
                assert torch.equal(getattr(again[index], name), bits)


def test_norms_are_those_of_each_gradient() -> None:
    """Every run's norm is its own, exact to the last bits, and the same when it is alone."""
    gradients = [update.gradient for update in make_updates()]
    with triton_on_cpu():
        found = gradient_norms(gradients)
        assert [gradient_norms([gradient])[0] for gradient in gradients] == found
    for norm, gradient in zip(found, gradients, strict=True):
        assert norm == pytest.approx(float(gradient.double().norm()), rel=1e-12)
    assert gradient_norms(gradients) == pytest.approx(found, rel=1e-6)
    assert gradient_norms([]) == []


def test_norms_tell_large_gradients_from_infinite_ones() -> None:
    """Squares out of float32's range have a norm, and what is not finite has none, in both paths."""
    large, infinite = torch.full((3,), 1e30), torch.tensor([1.0, float("inf")])
    undefined = torch.tensor([float("nan"), 1.0])
    with triton_on_cpu():
        here = gradient_norms([large, infinite, undefined])
    for found in (here, gradient_norms([large, infinite, undefined])):
        assert found[0] == pytest.approx(3**0.5 * 1e30)
        assert found[1] == float("inf")
        assert math.isnan(found[2])


def test_steps_are_planned_without_waiting() -> None:
    """Norms and steps of tensors without storage launch what those with storage launch."""
    planned: list[Launch] = []
    updates = [
        replace(
            update,
            weights=update.weights.to("meta"),
            gradient=update.gradient.to("meta"),
            first=update.first.to("meta"),
            second=update.second.to("meta"),
            copy=None if update.copy is None else update.copy.to("meta"),
        )
        for update in make_updates()
    ]
    with recorded(planned.append):
        assert norms([update.gradient for update in updates]).shape == (len(SIZES),)
        step_all(updates)
    assert [launch.kernel.__name__ for launch in planned] == [
        "square_sums",
        "total_norms",
        "adam_chunks",
    ]
    assert planned[2].grid == (sum(-(-size // CHUNK) for size in SIZES),)
