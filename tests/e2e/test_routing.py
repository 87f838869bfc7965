"""Expert routing through the whole stack: out with the samples, back with the data, into the gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.platform_runs import fit, new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.tiny_moe.problems import make_prompt, problems

PROMPTS = [make_prompt(problem.question) for problem in problems("held_out", 6, seed=9)]


def test_routing_goes_round(client: river.Client, tokenizer: PreTrainedTokenizerBase) -> None:
    """The loop of the README with routing: nothing flips in float32, and replay gives the same log-probabilities."""
    with client.session() as session:
        model = new_model(session)
        fit(model, supervised_data(tokenizer), steps=3)
        groups = model.sample(
            prompts=PROMPTS, num_samples=2, max_tokens=24, return_expert_routing=True
        )
        data: list[dict[str, Any]] = []
        for sample in (sample for group in groups for sample in group):
            full_ids = sample.prompt_token_ids + sample.tokens
            assert sample.expert_routing is not None
            assert sample.expert_routing.shape == (len(full_ids), 4, 2)
            prompt = [0.0] * (len(sample.prompt_token_ids) - 1)
            data.append(
                {
                    "input_ids": full_ids,
                    "old_logprobs": [*prompt, *sample.logprobs, 0.0],
                    "advantages": [*prompt, *[1.0] * len(sample.tokens), 0.0],
                    "expert_routing": sample.expert_routing,
                }
            )
        plain = model.forward(data, loss_fn="importance_sampling")
        replayed = model.forward_backward(
            data, loss_fn="importance_sampling", force_routing_replay=True
        )
        stepped = model.optim_step(lr=1e-3)
        again = model.train_step(
            data, loss_fn="importance_sampling", lr=1e-3, force_routing_replay=True
        )
    assert plain.metrics["expert_flip"] < 1e-3
    assert replayed.metrics["expert_flip"] < 1e-3
    for metrics in (replayed.metrics, stepped.metrics, again.metrics):
        assert all(math.isfinite(value) for value in metrics.values())
    assert replayed.metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    for one, other in zip(plain.logprobs, replayed.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


def test_wrong_routing_is_named(client: river.Client) -> None:
    """Position, layer and limit of a wrong expert, a wrong shape, and what is missing for a replay."""
    routing = np.zeros((3, 4, 2), np.uint8)
    routing[..., 1] = 1
    good: dict[str, Any] = {"input_ids": [5, 6, 7], "expert_routing": routing}
    outside = routing.copy()
    outside[1, 2, 0] = 8
    with client.session() as session:
        model = new_model(session)
        for wrong, replay, param, words in (
            ({"expert_routing": outside}, True, "data[1].expert_routing[1][2][0]", "0 to 7"),
            ({"expert_routing": routing[:, :3]}, False, "data[1].expert_routing", "4 MoE layers"),
            ({"expert_routing": None}, True, "data[1].expert_routing", "missing"),
        ):
            with pytest.raises(river.InvalidRequestError, match=words) as refused:
                model.forward_backward([good, good | wrong], force_routing_replay=replay)
            assert refused.value.param == param
        result = model.forward_backward([good, {"input_ids": [5, 6]}])
    assert 0.0 < result.metrics["expert_flip"] <= 1.0
