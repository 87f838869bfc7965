"""`river bench layers`: a slice of a large model through the trainer's own step, with and without adapters.

On a GPU the slice has the dimensions of Qwen3.6-35B-A3B; elsewhere its width is reduced. The same tokens go through it
frozen, and as a step of 1, 4 and 16 adapters: every rate counts all of them. A step is forward, backward, clipping and
AdamW, by the trainer's executor; the frozen slice has forward and backward.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import Struct

from river_ops.bench.layers.frozen import FrozenPasses
from river_ops.bench.layers.slice_model import slice_config, write_slice
from river_ops.bench.measure import Machine, alternating, machine, median, significant
from river_ops.bench.our_trainer import OurTrainer
from river_trainer import limits
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.protocol import Adam, AdapterShape

RUN_COUNTS = (1, 4, 16)
RANK = 16
ADAM = Adam(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0)
LOSS_DIFFERENCE_MAX = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Per token, between the frozen slice and new adapters, which change nothing yet."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured on a kind of machine; sequences times tokens go through every step."""

    device: torch.device
    dtype: torch.dtype
    reduced: bool
    layers: int
    sequences: int
    tokens: int
    rounds: int
    lanes: int
    pass_tokens: int
    piece_tokens: int


def plan_for(device: torch.device, *, quick: bool) -> Plan:
    """As much as fits into minutes, or one if `quick`."""
    if device.type == "cuda":
        layers, sequences, rounds = (1, 16, 5) if quick else (4, 16, 15)
        return Plan(
            device=device,
            dtype=torch.bfloat16,
            reduced=False,
            layers=layers,
            sequences=sequences,
            tokens=512 if quick else 2048,
            rounds=rounds,
            lanes=1,
            pass_tokens=limits.ACCELERATOR_MICRO_BATCH_TOKENS,
            piece_tokens=limits.ACCELERATOR_PIECE_TOKENS,
        )
    return Plan(
        device=device,
        dtype=torch.float32,
        reduced=True,
        layers=2,
        sequences=16,
        tokens=64,
        rounds=3 if quick else 15,
        lanes=torch.get_num_threads(),
        pass_tokens=limits.MICRO_BATCH_TOKENS,
        piece_tokens=limits.PIECE_TOKENS,
    )


class LayersReport(Struct, kw_only=True):
    """By the number of adapters, and "frozen" for none. Medians.

    `over_frozen_percent` is how much longer than the frozen slice forward and backward take; `optimizer_ms_per_adapter`
    is one adapter's share of an optimizer step of so many.
    """

    name: str = "layers"
    device: str
    tokens_per_s: dict[str, float]
    forward_backward_ms: dict[str, float]
    over_frozen_percent: dict[str, float]
    optimizer_ms_per_adapter: dict[str, float]
    adapter_weights: int
    loss_difference_per_token: float
    peak_gib: float | None
    settings: dict[str, int | float | str]
    machine: Machine


def run(*, quick: bool, say: Callable[[str], None]) -> LayersReport:
    """Measures everything; minutes, or about one if `quick`."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return run_plan(plan_for(device, quick=quick), say=say)


def run_plan(plan: Plan, *, say: Callable[[str], None]) -> LayersReport:
    """What `plan` asks for."""
    here = machine()
    config = slice_config(plan.layers, reduced=plan.reduced)
    with tempfile.TemporaryDirectory() as name:
        say(f"{plan.layers} layers of width {config.hidden_size}: writing…")
        write_slice(config, Path(name), plan.dtype)
        gc.collect()
        say("loading…")
        base = BaseModel(name, plan.dtype, plan.device)
    lanes = Lanes(plan.lanes, plan.device)
    shape = AdapterShape(
        rank=RANK,
        alpha=2.0 * RANK,
        seed=1,
        train_attn=True,
        train_mlp=True,
        train_unembed=True,
        expert_layout="shared_outer",
    )
    ours = OurTrainer(
        base,
        shape=shape,
        runs=max(RUN_COUNTS),
        adam=ADAM,
        lanes=lanes,
        pass_tokens=plan.pass_tokens,
        piece_tokens=plan.piece_tokens,
    )
    frozen = FrozenPasses(base, lanes, pass_tokens=plan.pass_tokens)
    try:
        return _measure(plan, base, ours, frozen, here, say)
    finally:
        lanes.close()


def _measure(
    plan: Plan,
    base: BaseModel,
    ours: OurTrainer,
    frozen: FrozenPasses,
    here: Machine,
    say: Callable[[str], None],
) -> LayersReport:
    tokens_ST = random_tokens(plan, base.vocab_size)  # noqa: N806
    difference = loss_difference(plan, ours, frozen, tokens_ST)
    optimizer_s: dict[str, list[float]] = {str(count): [] for count in RUN_COUNTS}

    def step(count: int) -> float:
        batches = list(tokens_ST.chunk(count))
        started = now(plan.device)
        ours.forward_backward(batches)
        between = now(plan.device)
        ours.optim_step(count)
        optimizer_s[str(count)].append(now(plan.device) - between)
        return between - started

    def frozen_step() -> float:
        started = now(plan.device)
        frozen.step([tokens_ST])
        return now(plan.device) - started

    cases = {"frozen": frozen_step} | {
        str(count): lambda count=count: step(count) for count in RUN_COUNTS
    }
    say("steps, in turns…")
    passes_s = {
        name: median(found[1:])
        for name, found in alternating(cases, rounds=plan.rounds + 1).items()
    }
    steps_s = {name: median(found[1:]) for name, found in optimizer_s.items()}
    total = tokens_ST.numel()
    return LayersReport(
        device=device_name(plan.device),
        tokens_per_s={
            name: significant(total / (seconds + steps_s.get(name, 0.0)))
            for name, seconds in passes_s.items()
        },
        forward_backward_ms={name: significant(1000 * value) for name, value in passes_s.items()},
        over_frozen_percent={
            str(count): significant(100 * (passes_s[str(count)] / passes_s["frozen"] - 1), 3)
            for count in RUN_COUNTS
        },
        optimizer_ms_per_adapter={
            str(count): significant(1000 * steps_s[str(count)] / count) for count in RUN_COUNTS
        },
        adapter_weights=ours.adapter_weights,
        loss_difference_per_token=significant(difference, 2),
        peak_gib=peak_gib(plan.device),
        settings={
            "layers": plan.layers,
            "attention": "full in all layers",
            "width": "reduced" if plan.reduced else "true",
            "sequences": plan.sequences,
            "tokens": plan.tokens,
            "rank": RANK,
            "expert_layout": "shared_outer",
            "targets": "attention, experts, lm_head",
            "dtype": str(plan.dtype).removeprefix("torch."),
            "lanes": plan.lanes,
            "rounds": plan.rounds,
        },
        machine=here,
    )


def loss_difference(
    plan: Plan,
    ours: OurTrainer,
    frozen: FrozenPasses,
    tokens_ST: torch.Tensor,  # noqa: N803
) -> float:
    """Per token, between the frozen slice and adapters that are new, whose B is zero.

    Raises:
        AssertionError: it is more than rounding.
    """
    losses = ours.forward_backward(list(tokens_ST.chunk(max(RUN_COUNTS))))
    difference = abs(sum(losses) - frozen.step([tokens_ST])) / tokens_ST.numel()
    assert difference <= LOSS_DIFFERENCE_MAX[plan.dtype], f"the losses differ by {difference}"
    return difference


def random_tokens(plan: Plan, vocabulary: int) -> torch.Tensor:
    """Token ids [S, T]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(vocabulary, (plan.sequences, plan.tokens), generator=generator)


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_gib(device: torch.device) -> float | None:
    """The most memory that was ever in use, the model and all runs included."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)


def table(report: LayersReport) -> list[str]:
    """The report for people."""
    lines = [
        f"{report.device}; {', '.join(f'{key} {value}' for key, value in report.settings.items())}",
        f"{'adapters':>10}{'tokens/s':>12}{'fwd+bwd ms':>12}{'% over frozen':>15}{'optimizer ms/adapter':>22}",
    ]
    for name, rate in report.tokens_per_s.items():
        line = f"{name:>10}{rate:>12,.0f}{report.forward_backward_ms[name]:>12.1f}"
        if name in report.over_frozen_percent:
            line += f"{report.over_frozen_percent[name]:>15.1f}"
            line += f"{report.optimizer_ms_per_adapter[name]:>22.2f}"
        lines.append(line)
    lines.append(f"{report.adapter_weights:,} weights in an adapter")
    if report.peak_gib is not None:
        lines.append(f"peak memory {report.peak_gib} GiB")
    return lines
