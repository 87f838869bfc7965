"""Small pieces that several end-to-end tests need."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.tiny_moe.problems import make_prompt, problems

EVERYTHING = river.LoraConfig(rank=8, seed=1, train_attn=True, train_mlp=True, train_unembed=True)
SHORT_ANSWER = "The answer is \\boxed{7}<|im_end|>"


def new_model(session: river.Session, lora: river.LoraConfig = EVERYTHING) -> river.Model:
    return session.create_model(base_model=TINY_MOE_NAME, lora=lora)


def supervised_data(
    tokenizer: PreTrainedTokenizerBase, count: int = 4, answer: str = SHORT_ANSWER
) -> list[dict[str, Any]]:
    """Prompts that are all to be answered alike; the loss is on the answer alone."""
    return [
        answered(tokenizer, problem.question, answer)
        for problem in problems("train", count, seed=5)
    ]


def answered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> dict[str, Any]:
    """A question with the answer it is to have."""
    prompt = tokenizer.encode(make_prompt(question), add_special_tokens=False)
    full = prompt + tokenizer.encode(answer, add_special_tokens=False)
    weights = [0.0] * (len(prompt) - 1) + [1.0] * (len(full) - len(prompt)) + [0.0]
    return {"input_ids": full, "weights": weights}


def fit(model: river.Model, data: list[dict[str, Any]], *, steps: int, lr: float = 3e-3) -> None:
    """Moves the adapter well away from zero."""
    for _ in range(steps):
        model.train_step(data, loss_fn="cross_entropy", lr=lr)
