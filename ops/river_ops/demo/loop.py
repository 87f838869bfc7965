"""The README's loop with its blanks filled in: GRPO (Shao et al., 2024) on arithmetic word problems.

A completion earns 1 when its last box holds the answer within the token limit. Each problem is sampled several
times, and a sample's advantage is its reward less the mean of its group; groups of equal rewards teach nothing and are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.tiny_moe.problems import Problem, make_prompt, problems, reward

MAX_TOKENS = 32
PROBLEMS_PER_STEP = 32
SAMPLES_PER_PROBLEM = 4
LEARNING_RATE_FIRST = 1e-3
HELD_OUT_PROBLEMS = 96
HELD_OUT_SAMPLES = 2
EVALUATE_EVERY_STEPS = 4
STOP = ["<|im_end|>"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step done; `held_out_reward` is there after the steps that were followed by an evaluation."""

    step: int
    train_reward: float
    held_out_reward: float | None


def train(
    model: river.Model, tokenizer: PreTrainedTokenizerBase, *, steps: int
) -> Iterator[Progress]:
    """Trains `model` for `steps` steps; yields after each, and once before the first as step 0."""
    pool = problems("train", steps * PROBLEMS_PER_STEP, seed=1)
    held_out = problems("held_out", HELD_OUT_PROBLEMS)
    yield Progress(0, 0.0, evaluate(model, held_out))
    for step in range(1, steps + 1):
        rows = pool[(step - 1) * PROBLEMS_PER_STEP : step * PROBLEMS_PER_STEP]
        # Adam's steps do not shrink with the gradient: near the end few groups still differ, and a constant rate
        # would let their noise undo what has been learnt.
        learning_rate = LEARNING_RATE_FIRST * (1 - (step - 1) / steps)
        mean_reward = train_step(model, tokenizer, rows, learning_rate)
        evaluated = step % EVALUATE_EVERY_STEPS == 0 or step == steps
        yield Progress(step, mean_reward, evaluate(model, held_out) if evaluated else None)


def train_step(
    model: river.Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Problem],
    learning_rate: float,
) -> float:
    """Samples, rewards and learns from one batch of problems; returns the mean reward."""
    prompts = [make_prompt(row.question) for row in rows]
    groups = model.sample(
        prompts=prompts, num_samples=SAMPLES_PER_PROBLEM, max_tokens=MAX_TOKENS, stop=STOP
    )
    all_rewards = [
        [reward(sample.text, row.answer) for sample in samples]
        for samples, row in zip(groups, rows, strict=True)
    ]
    train_data: list[dict[str, Any]] = []
    for prompt, samples, rewards in zip(prompts, groups, all_rewards, strict=True):
        baseline = sum(rewards) / len(rewards)
        if all(value == baseline for value in rewards):
            continue
        prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
        for sample, value in zip(samples, rewards, strict=True):
            train_data.append(datum(prompt_tokens, sample, value - baseline))
    if train_data:
        model.forward_backward(data=train_data, loss_fn="importance_sampling")
        model.optim_step(lr=learning_rate)
    mean_reward = sum(map(sum, all_rewards)) / sum(map(len, all_rewards))
    # For whoever watches the run on the dashboard.
    model.log({"reward": mean_reward})
    model.log_samples(prompts, groups, all_rewards)
    return mean_reward


def datum(prompt_tokens: list[int], sample: river.Sample, advantage: float) -> dict[str, Any]:
    """One sample as training data; index i describes the prediction made from position i."""
    before = [0.0] * (len(prompt_tokens) - 1)
    return {
        "input_ids": prompt_tokens + sample.tokens,
        "old_logprobs": [*before, *sample.logprobs, 0.0],
        "advantages": [*before, *[advantage] * len(sample.tokens), 0.0],
    }


def evaluate(model: river.Model, held_out: list[Problem]) -> float:
    """The mean reward on problems that were never trained on, sampled as in training."""
    groups = model.sample(
        prompts=[make_prompt(problem.question) for problem in held_out],
        num_samples=HELD_OUT_SAMPLES,
        max_tokens=MAX_TOKENS,
        stop=STOP,
    )
    rewards = [
        reward(sample.text, problem.answer)
        for samples, problem in zip(groups, held_out, strict=True)
        for sample in samples
    ]
    return sum(rewards) / len(rewards)
