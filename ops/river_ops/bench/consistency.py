"""`river bench consistency`: what the sampler says of its tokens against what the trainer says of the same ones.

The peer here is ourselves: importance ratios are right only as far as the two agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec import Struct

import river_client as river
from river_ops.bench.measure import Machine, machine, significant
from river_ops.bench.stack_clients import VOCABULARY, batch
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackOptions
from river_ops.stack import running_stack

RANK, SEQUENCES, TOKENS = 16, 8, 64
LEARNING_RATE = 3e-3
STEPS = 4
"""Enough to move the adapter far from zero."""
PROMPTS, PROMPTS_QUICK = 64, 8
SAMPLES = 4
PROMPT_TOKENS, SAMPLED_TOKENS = 24, 64


class ConsistencyReport(Struct, frozen=True, kw_only=True):
    """Over all sampled tokens; `kl` is the k3 estimate of KL(sampler | trainer) in nats per token.

    `moved_abs_logprob_mean` is how far training has moved the same log-probabilities from the base model's: unless it
    is far more than the differences, those say nothing.
    """

    name: str = "consistency"
    mean_abs_logprob_diff: float
    max_abs_logprob_diff: float
    kl: float
    tokens: int
    moved_abs_logprob_mean: float
    settings: dict[str, int | float | str]
    machine: Machine


def run(*, quick: bool, say: Callable[[str], None]) -> ConsistencyReport:
    """Trains an adapter, samples from it, and has the trainer judge the samples."""
    here = machine()
    count = PROMPTS_QUICK if quick else PROMPTS
    say("starting the stack…")
    with tempfile.TemporaryDirectory(prefix="river-bench-") as name:
        options = StackOptions(data_directory=Path(name), port=0)
        with running_stack(options) as info:
            key = new_tenant_key(info)
            with (
                river.Client(api_key=key, base_url=info.base_url) as client,
                client.session(bench="consistency") as session,
            ):
                lora = river.LoraConfig(
                    rank=RANK, seed=0, train_attn=True, train_mlp=True, train_unembed=True
                )
                model = session.create_model(TINY_MOE_NAME, lora=lora)
                fresh = session.create_model(TINY_MOE_NAME, lora=lora)
                data = batch(0, SEQUENCES, TOKENS)
                for _ in range(STEPS):
                    model.train_step(data, lr=LEARNING_RATE)
                say("sampling and judging…")
                samples = sampled(model, count)
                sampler = np.concatenate([np.asarray(sample.logprobs) for sample in samples])
                trainer, base = judged(model, samples), judged(fresh, samples)
    difference = trainer - sampler
    return ConsistencyReport(
        mean_abs_logprob_diff=significant(float(np.abs(difference).mean()), 3),
        max_abs_logprob_diff=significant(float(np.abs(difference).max()), 3),
        kl=significant(k3(difference), 3),
        tokens=len(sampler),
        moved_abs_logprob_mean=significant(float(np.abs(trainer - base).mean()), 3),
        settings={
            "rank": RANK,
            "targets": "attention, experts, lm_head",
            "dtype": "float32",
            "steps": STEPS,
            "lr": LEARNING_RATE,
            "prompts": count,
            "samples": SAMPLES,
        },
        machine=here,
    )


def sampled(model: river.Model, count: int) -> list[river.Sample]:
    """Samples of the newest version, from random prompts."""
    prompts = np.random.default_rng(3).integers(3, VOCABULARY, (count, PROMPT_TOKENS)).tolist()
    groups = model.sample(
        prompt_token_ids=prompts, num_samples=SAMPLES, max_tokens=SAMPLED_TOKENS, seed=1
    )
    samples = [sample for group in groups for sample in group]
    assert {sample.policy_version for sample in samples} == {model.policy_version}
    return samples


def judged(model: river.Model, samples: list[river.Sample]) -> npt.NDArray[np.float64]:
    """The trainer's log-probabilities of all sampled tokens."""
    data = [{"input_ids": sample.prompt_token_ids + sample.tokens} for sample in samples]
    found = model.forward(data, loss_fn="cross_entropy").logprobs
    pieces = [
        logprobs[len(sample.prompt_token_ids) - 1 :][: len(sample.tokens)]
        for sample, logprobs in zip(samples, found, strict=True)
    ]
    return np.concatenate(pieces).astype(np.float64)


def k3(difference: npt.NDArray[np.float64]) -> float:
    """Schulman's estimate (2020) of KL(sampler | trainer): unbiased, never negative, of low variance."""
    return float((np.expm1(difference) - difference).mean())


def table(report: ConsistencyReport) -> list[str]:
    """The report for people."""
    return [
        f"{report.tokens:,} sampled tokens, log-probabilities of the sampler against the trainer's:",
        f"  mean difference    {report.mean_abs_logprob_diff:.2e}",
        f"  largest difference {report.max_abs_logprob_diff:.2e}",
        f"  KL (k3)            {report.kl:.2e} nats per token",
        f"  moved by training  {report.moved_abs_logprob_mean:.2e} on average",
    ]
