"""The same training in one process and in a group of them, for tests that compare the two."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from support.training import (
    ADAM,
    BASE_NAME,
    RunScript,
    forward_backward,
    random_sequences,
    shape,
    timeless,
)
from support.workbench import Workbench
from torch import nn

from river_kernels import QuantizedWeight
from river_trainer import limits
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES, Loss, LossInput, Sums
from river_trainer.passes import Passes
from river_trainer.protocol import CreateRun, Forward, OptimStep, TrainMessage, TrainStep
from river_trainer.runs import Run
from river_trainer.settings import TrainerSettings
from river_trainer.sharding.base_model import ShardedBaseModel
from river_trainer.sharding.group import Group
from river_trainer.sharding.leader import Leader
from river_trainer.sharding.member import take_part
from river_trainer.sharding.passes import ShardedPasses
from river_trainer.store import FileSets

PASS_TOKENS = 96
PIECE_TOKENS = 48
STEPS = 3
MOE_LAYERS = 4
FRAGILE = "dro"
FRAGILE_TOKENS_MIN = 10


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out of a training: metrics and log-probabilities by operation, tensors by run, errors by operation."""

    metrics: dict[str, dict[str, float]]
    logprobs: dict[str, list[bytes]]
    states: dict[str, torch.Tensor]
    errors: dict[str, str]


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a process of the group saw.

    `frozen_bytes` is what the parameters of the base model take in it, `tensor_bytes` what all its tensors do.
    """

    trained: Trained | None
    frozen_bytes: int
    tensor_bytes: int


def train(bench: Workbench) -> Trained:
    """Several runs that have little in common, all in the same batches, for some steps.

    The first has enough data for many passes; the second one sequence of two tokens, less than there are processes,
    which leaves most experts without a row; the third only evaluates, by experts of its own or by those of a sampler.
    """
    long, short, reader = RunScript("run_long"), RunScript("run_short"), RunScript("run_reader")
    created = [
        long.do(CreateRun(shape=shape(rank=8))),
        short.do(CreateRun(shape=shape(rank=3, seed=2, unembed=False))),
        reader.do(CreateRun(shape=shape(rank=16, seed=3))),
    ]
    batches = [created]
    for step in range(STEPS):
        data = forward_backward(step, [2], "importance_sampling")
        batches += [
            [
                long.do(forward_backward(10 + step, [12, 40, 7, 25, 33, 48, 5])),
                short.do(data),
                reader.do(_forward(20 + step, [30, 9, 21], replay=step == 0)),
            ],
            [short.do(forward_backward(30 + step, [2]))],
            [
                long.do(OptimStep(adam=ADAM)),
                short.do(
                    TrainStep(data=data.data, loss_fn="cross_entropy", loss_config={}, adam=ADAM)
                ),
            ],
        ]
    # The second piece fails, which another process computes than the first.
    batches.append(
        [long.do(forward_backward(40, [48, 5], FRAGILE)), short.do(forward_backward(41, [2]))]
    )
    batches.append([long.do(forward_backward(50, [31, 22])), reader.do(_forward(51, [2]))])
    return _do(bench, batches)


def fragile_loss() -> Loss:
    """A loss in the place of another one that does not take pieces of less than `FRAGILE_TOKENS_MIN` tokens."""
    return replace(LOSSES[FRAGILE], function=_fragile)


def _fragile(data: LossInput) -> tuple[torch.Tensor, Sums]:
    if data.logprobs.numel() < FRAGILE_TOKENS_MIN:
        raise RuntimeError("a loss with a bug")
    return LOSSES["cross_entropy"].function(data)


def _forward(seed: int, lengths: list[int], *, replay: bool = False) -> Forward:
    data = [
        msgspec.structs.replace(sequence, expert_routing=_routing(len(sequence.input_ids) // 4))
        for sequence in random_sequences(seed, lengths)
    ]
    return Forward(data=data, loss_fn="cross_entropy", loss_config={}, force_routing_replay=replay)


def _routing(tokens: int) -> bytes:
    """The same two experts for every token and layer, both of the first half."""
    return bytes([0, 2] * tokens * MOE_LAYERS)


def _do(bench: Workbench, batches: list[list[TrainMessage]]) -> Trained:
    trained = Trained({}, {}, {}, {})
    for batch in batches:
        for result in bench.execute_together(batch):
            operation = result.operation_id
            if result.error is not None:
                trained.errors[operation] = result.error.message
            trained.metrics[operation] = timeless(result.metrics)
            trained.logprobs[operation] = result.logprobs or []
    for run_id, run in bench.runs.items():
        assert isinstance(run, Run)
        buffers = {"weights": run.adapter.weights, "first": run.optimizer.first}
        buffers |= {"second": run.optimizer.second}
        if run.gradient is not None:
            buffers["gradient"] = run.gradient
        for name, buffer in buffers.items():
            trained.states[f"{run_id} {name}"] = buffer.flat
    return trained


def workbench(
    base: BaseModel, lanes: Lanes, directory: Path, make_passes: Callable[..., Passes] = Passes
) -> Workbench:
    """An executor whose passes are small, so that a job takes several."""
    return Workbench(
        base,
        lanes,
        FileSets((directory / "store").as_uri()),
        base_model=BASE_NAME,
        pass_tokens=PASS_TOKENS,
        piece_tokens=PIECE_TOKENS,
        make_passes=make_passes,
    )


# ---- In a process of the group -------------------------------------------------------------------


def run_rank(
    rank: int,
    size: int,
    port: int,
    model_path: Path,
    directory: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Joins the group and trains in it; leaves a `RankReport` in `directory`. The target of a spawned process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    limits.GROUP_TIMEOUT_S, limits.GROUP_PULSE_INTERVAL_S = 60.0, 0.2
    LOSSES[FRAGILE] = fragile_loss()
    group = Group()
    base = ShardedBaseModel(model_path, group, dtype)
    trained = None
    if rank == 0:
        leader = Leader(group)
        bench = workbench(base, Lanes(2), directory, partial(ShardedPasses, group=group))
        trained = train(bench)
        leader.end()
    else:
        settings = TrainerSettings(
            nats_url="",
            base_model=BASE_NAME,
            model_path=str(model_path),
            data_dir=str(directory),
            micro_batch_tokens=PASS_TOKENS,
            piece_tokens=PIECE_TOKENS,
            context_length=256,
        )
        take_part(group, base, settings)
        group.leave()
    report = RankReport(trained, frozen_bytes(base), tensor_bytes())
    torch.save(report, directory / f"rank_{rank}.pt")


def frozen_bytes(base: BaseModel) -> int:
    """Memory of the base model's weights in this process."""
    # Of a parameter that FSDP has sharded there is a local part.
    weights = [getattr(weight, "_local_tensor", weight) for weight in base._network.parameters()]
    stored = [tensor for weight in stored_weights(base) for tensor in weight.tensors]
    return _bytes([*weights, *stored])


def stored_weights(base: BaseModel) -> list[QuantizedWeight]:
    """All weights of a model that are not numbers."""
    values = [value for module in base._network.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, QuantizedWeight)]


def tensor_bytes() -> int:
    """Memory of all tensors in this process; a gathered weight that was let go has none."""
    gc.collect()
    return _bytes([item for item in gc.get_objects() if type(item) in {torch.Tensor, nn.Parameter}])


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    storages = {item.untyped_storage().data_ptr(): item.untyped_storage() for item in tensors}
    return sum(storage.nbytes() for storage in storages.values())
