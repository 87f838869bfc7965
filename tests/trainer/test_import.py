"""Adapters that PEFT made, brought into our form: the trainer computes with them what PEFT does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.peft_adapters import (
    ATTENTION,
    CONFIG_FILE,
    EXPERTS,
    WEIGHTS_FILE,
    Tensors,
    change_files,
    logprobs_of,
    make_adapter,
    new_base,
    peft_logprobs,
)
from support.training import ADAM, BASE_NAME, RunScript, forward_backward, integers

from river_gateway.checkpoints.peft_import import ImportPlan, plan_import
from river_gateway.checkpoints.safetensors_file import read_header, write_tensors
from river_trainer.protocol import (
    AdapterShape,
    CreateRun,
    Forward,
    LoadWeights,
    OptimStep,
    Sequence,
    TrainResult,
)
from river_trainer.store import FileSets

TOKENS = [(7 * index) % 500 for index in range(60)]
TOLERANCE = 1e-4


def converted(directory: Path, target: Path) -> ImportPlan:
    """What the gateway makes of an upload, written to `target`."""
    path = directory / WEIGHTS_FILE
    target.mkdir()
    with path.open("rb") as file:
        places = read_header(file, path.stat().st_size, WEIGHTS_FILE)
        config = (directory / CONFIG_FILE).read_bytes()
        plan = plan_import(config, places, file, base_model=BASE_NAME)
        with (target / WEIGHTS_FILE).open("wb") as output:
            write_tensors(output, plan.tensors)
    (target / CONFIG_FILE).write_bytes(plan.config)
    return plan


def stored(directory: Path, store: FileSets) -> str:
    """The location of an adapter's files, put into a store."""
    files = {name: directory / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    store.write("checkpoints/imported", files, {})
    return store.location("checkpoints/imported")


def shape_of(plan: ImportPlan) -> AdapterShape:
    shape = plan.shape
    return AdapterShape(
        rank=shape.rank,
        alpha=shape.alpha,
        seed=1,
        train_attn=shape.train_attn,
        train_mlp=shape.train_mlp,
        train_unembed=shape.train_unembed,
        expert_layout="per_expert",
    )


def logprobs(result: TrainResult) -> torch.Tensor:
    """Of the one sequence, without the last position, which predicts nothing."""
    assert result.error is None, result.error
    assert result.logprobs is not None
    return torch.from_numpy(np.frombuffer(result.logprobs[0], "<f4")[:-1].copy())


def forward() -> Forward:
    return Forward(
        data=[Sequence(input_ids=integers(TOKENS))], loss_fn="cross_entropy", loss_config={}
    )


def half_precision(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "attention, experts and lm_head": (
        {"target_modules": [*ATTENTION, "lm_head"], "target_parameters": EXPERTS},
        {},
        4,
    ),
    "experts named as modules, which PEFT gives twice the rank": (
        {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
        {},
        8,
    ),
    "two projections": ({"target_modules": ["q_proj", "v_proj"]}, {}, 4),
    "one layer": ({"target_modules": ATTENTION, "layers_to_transform": [1]}, {}, 4),
    "rslora": ({"target_modules": ATTENTION, "use_rslora": True}, {}, 4),
    "rslora with other ranks": (
        {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 6}},
        {},
        6,
    ),
    "ranks and alphas by pattern": (
        {
            "target_modules": ATTENTION,
            "target_parameters": EXPERTS,
            "rank_pattern": {"layers.0.self_attn.q_proj": 3, ".*\\.gate_up_proj": 2},
            "alpha_pattern": {"^model.layers.1.self_attn.k_proj$": 5, "down_proj": 11},
        },
        {},
        4,
    ),
    "bfloat16": (
        {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
        {"tensors": half_precision},
        8,
    ),
    "bfloat16 with alphas by pattern": (
        {"target_modules": ATTENTION, "alpha_pattern": {"k_proj": 5}},
        {"tensors": half_precision},
        4,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_adapter_computes_as_in_peft(
    make_executor: Callable[[], Any], tmp_path: Path, layout: str
) -> None:
    """Log-probabilities equal PEFT's to 1e-4, in the trainer and by PEFT from our files; and it can be trained."""
    lora, changes, rank = LAYOUTS[layout]
    made = make_adapter(tmp_path / "made", **lora)
    change_files(made, **changes)
    expected = peft_logprobs(made, TOKENS)
    assert (expected - logprobs_of(new_base(), TOKENS)).abs().max() > 0.02

    plan = converted(made, tmp_path / "ours")
    assert plan.shape.rank == rank
    assert (peft_logprobs(tmp_path / "ours", TOKENS) - expected).abs().max() < TOLERANCE

    location = stored(tmp_path / "ours", FileSets((tmp_path / "store").as_uri()))
    executor, script = make_executor(), RunScript("run_imported")
    start = CreateRun(shape=shape_of(plan), checkpoint=location, optimizer=False)
    assert executor.execute(script.do(start)).error is None
    ours = logprobs(executor.execute(script.do(forward())))
    assert (ours - expected).abs().max() < TOLERANCE
    for task in (forward_backward(1, [20, 30]), OptimStep(adam=ADAM)):
        assert executor.execute(script.do(task)).error is None
    moved = logprobs(executor.execute(script.do(forward())))
    assert (moved - expected).abs().max() > TOLERANCE


def one_by_one(tensors: Tensors) -> Tensors:
    """An adapter of rank 4 on each expert's own gate, up and down, as PEFT stored them before transformers 5."""
    rank, experts, hidden, inner = 4, 8, 192, 128
    changed = dict(tensors)
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        for expert in range(experts):
            for part, inputs, outputs in (
                ("gate", hidden, inner),
                ("up", hidden, inner),
                ("down", inner, hidden),
            ):
                changed[f"{stem}.{expert}.{part}_proj.lora_A.weight"] = (
                    torch.randn(rank, inputs) * 0.1
                )
                changed[f"{stem}.{expert}.{part}_proj.lora_B.weight"] = (
                    torch.randn(outputs, rank) * 0.1
                )
    return changed


def test_experts_one_by_one_are_gathered_exactly(
    make_executor: Callable[[], Any], tmp_path: Path
) -> None:
    """Gate and up become a block of twice the rank; the result is what adding each expert's product gives."""
    made = make_adapter(tmp_path / "made", target_modules=ATTENTION)
    only_attention = peft_logprobs(made, TOKENS)
    tensors: Tensors = {}

    def remember(given: Tensors) -> Tensors:
        tensors.update(one_by_one(given))
        return tensors

    change_files(made, remember)
    scale = 8 / 4
    base = new_base()
    name = re.compile(r"base_model\.model\.(.+)\.experts\.(\d+)\.(gate|up|down)_proj\.lora_A.*")
    with torch.no_grad():
        for key, a in tensors.items():
            delta = tensors[key.replace("lora_A", "lora_B")] @ a * scale if "lora_A" in key else 0
            if match := name.fullmatch(key):
                experts = base.get_submodule(f"{match[1]}.experts")
                number, part = int(match[2]), match[3]
                weight = experts.down_proj if part == "down" else experts.gate_up_proj
                half = weight.shape[1] // 2
                rows = {"down": slice(None), "gate": slice(half), "up": slice(half, None)}[part]
                weight[number, rows] += delta
            elif "lora_A" in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                base.get_submodule(module).weight += delta
    expected = logprobs_of(base, TOKENS)
    assert (expected - only_attention).abs().max() > 0.02

    plan = converted(made, tmp_path / "ours")
    assert (plan.shape.rank, plan.shape.alpha) == (8, 16.0)
    assert (peft_logprobs(tmp_path / "ours", TOKENS) - expected).abs().max() < TOLERANCE
    location = stored(tmp_path / "ours", FileSets((tmp_path / "store").as_uri()))
    executor, script = make_executor(), RunScript("run_imported")
    executor.execute(script.do(CreateRun(shape=shape_of(plan))))
    loading = LoadWeights(location=location, optimizer=False)
    assert executor.execute(script.do(loading)).error is None
    assert (logprobs(executor.execute(script.do(forward()))) - expected).abs().max() < TOLERANCE


def test_a_wrong_shape_is_told_with_both_values(
    make_executor: Callable[[], Any], tmp_path: Path
) -> None:
    """Loading names what differs between the adapter and the run, and the sites that the base does not have."""
    made = make_adapter(tmp_path / "made", target_modules=ATTENTION)
    plan = converted(made, tmp_path / "ours")
    store = FileSets((tmp_path / "store").as_uri())
    location = stored(tmp_path / "ours", store)
    executor = make_executor()

    def refusal(run_id: str, shape: AdapterShape) -> str:
        task = CreateRun(shape=shape, checkpoint=location, optimizer=False)
        error = executor.execute(RunScript(run_id).do(task)).error
        assert error is not None
        assert error.type == "invalid_request"
        return error.message

    other = AdapterShape(
        rank=8,
        alpha=32.0,
        seed=5,
        train_attn=True,
        train_mlp=True,
        train_unembed=False,
        expert_layout="per_expert",
    )
    assert refusal("run_1", other) == (
        "the checkpoint has rank 4 instead of 8 and alpha 8.0 instead of 32.0 "
        "and train_mlp False instead of True"
    )

    def widen(tensors: Tensors) -> Tensors:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        return {**tensors, name: torch.zeros(4, 200)}

    change_files(tmp_path / "ours", widen)
    location = stored(tmp_path / "ours", store)
    assert "q_proj.lora_A.weight has the shape (4, 200), (4, 192) is" in refusal(
        "run_2", shape_of(plan)
    )
    change_files(
        tmp_path / "ours",
        lambda tensors: {
            name.replace("layers.0.", "layers.9."): tensor for name, tensor in tensors.items()
        },
    )
    location = stored(tmp_path / "ours", store)
    assert "layers.9.self_attn" in refusal("run_3", shape_of(plan))
    assert math.isclose(plan.shape.alpha, 8.0)
