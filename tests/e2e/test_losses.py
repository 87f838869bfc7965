"""Losses through the whole stack: those of the server, and one of the client's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.platform_runs import EVERYTHING, fit, new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_client.wire import LossName


def policy_data(model: river.Model, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Answers with old log-probabilities near the model's own, advantages of both signs, and echo weights."""
    data = supervised_data(tokenizer)
    logprobs = model.forward(data).logprobs
    source = np.random.default_rng(1)
    for sign, datum, known in zip((1, -1, 1, -1), data, logprobs, strict=True):
        answer = np.array(datum.pop("weights"), np.float32)
        datum["old_logprobs"] = known + source.normal(0, 0.2, known.shape) * answer
        datum["advantages"] = sign * answer
        datum["echo_weights"] = 1 - answer
    return data


def importance_sampling(
    logprobs: list[Any], data: Sequence[Mapping[str, Any]]
) -> tuple[float, list[Any], Mapping[str, float]]:
    """The server's loss of that name, in numpy."""
    gradients = [
        -np.exp(new - datum["old_logprobs"]) * datum["advantages"]
        for new, datum in zip(logprobs, data, strict=True)
    ]
    return sum(float(gradient.sum()) for gradient in gradients), gradients, {"pieces": len(data)}


def test_a_custom_loss_is_the_built_in_one(
    client: river.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Importance sampling computed by the client moves the model as the trainer's own does."""
    moved: list[list[Any]] = []
    losses: list[float] = []
    with client.session() as session:
        for custom in (False, True):
            model = new_model(session, EVERYTHING)
            fit(model, supervised_data(tokenizer), steps=2)
            data = policy_data(model, tokenizer)
            before = model.forward(data).logprobs
            for _ in range(2):
                if custom:
                    result = model.forward_backward_custom(data, importance_sampling)
                    assert result.metrics["pieces"] == 4
                else:
                    result = model.forward_backward(data, loss_fn="importance_sampling")
                step = model.optim_step(lr=1e-3)
                losses += [result.metrics["loss"], step.metrics["grad_norm"]]
            after = model.forward(data).logprobs
            moved.append([new - old for new, old in zip(after, before, strict=True)])
    built_in, own = moved
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)
    assert max(np.abs(change).max() for change in built_in) > 1e-2, "the step has to matter"
    for mine, theirs in zip(own, built_in, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("loss_fn", "metrics"),
    [
        ("cross_entropy", {"loss_sum", "loss_mean", "num_tokens", "weight_sum"}),
        ("ppo", {"loss_mean", "mean_ratio", "kl", "kl_k1", "entropy", "clip_frac"}),
        ("cispo", {"truncation_frac"}),
        ("echo_cispo", {"truncation_frac", "echo_loss_sum"}),
        ("dro", {"mean_ratio", "kl"}),
        ("gspo", {"mean_ratio", "clip_frac"}),
        ("dpo", {"accuracy", "margin", "chosen_reward", "rejected_reward"}),
    ],
)
def test_every_loss_moves_the_model_its_way(
    client: river.Client,
    tokenizer: PreTrainedTokenizerBase,
    loss_fn: LossName,
    metrics: set[str],
) -> None:
    """After a step the good answers are likelier, the bad ones less so, and the loss's metrics come back."""
    with client.session() as session:
        model = new_model(session)
        data = policy_data(model, tokenizer)
        first = model.train_step(data, loss_fn=loss_fn, lr=1e-4)
        second = model.forward(data, loss_fn=loss_fn)
    assert metrics <= first.metrics.keys()
    gained = [
        ((new - old) * datum["advantages"]).sum()
        for new, old, datum in zip(second.logprobs, first.logprobs, data, strict=True)
    ]
    if loss_fn == "cross_entropy":
        assert second.metrics["loss"] < first.metrics["loss"]
    else:
        assert sum(gained) > 0.01


def test_soft_targets_teach_a_distribution(
    client: river.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Two targets a token come back as two log-probabilities, the first that of the hard target."""
    data = supervised_data(tokenizer)
    with client.session() as session:
        model = new_model(session)
        plain = model.forward(data).logprobs
        soft: list[dict[str, Any]] = []
        for datum in data:
            targets = np.array([*datum["input_ids"][1:], 0])
            soft.append(
                {
                    "input_ids": datum["input_ids"],
                    "target_tokens": np.stack([targets, (targets + 1) % 512], axis=1),
                    "weights": np.array(datum["weights"])[:, None] * [0.75, 0.25],
                }
            )
        first = model.train_step(soft, lr=1e-3)
        second = model.forward(soft)
    for one, both in zip(plain, first.logprobs, strict=True):
        assert both.shape == (len(one), 2)
        np.testing.assert_allclose(both[:, 0], one, atol=1e-5, rtol=0)
    assert second.metrics["loss"] < first.metrics["loss"]
    assert first.metrics["weight_sum"] == pytest.approx(first.metrics["num_tokens"])
