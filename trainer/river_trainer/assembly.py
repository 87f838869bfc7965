"""Puts a trainer together from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from river_trainer.base_model import BaseModel
from river_trainer.checkpoints import Checkpoints
from river_trainer.executor import Executor
from river_trainer.lanes import Lanes, settle
from river_trainer.passes import Passes
from river_trainer.residency import Residency
from river_trainer.settings import TrainerSettings
from river_trainer.sharding.base_model import ShardedBaseModel
from river_trainer.sharding.group import Group
from river_trainer.sharding.leader import Leader
from river_trainer.sharding.passes import ShardedPasses
from river_trainer.sharding.place import find_place
from river_trainer.snapshots import Snapshots
from river_trainer.store import FileSets
from river_trainer.versions import Versions


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything of a trainer that does not need NATS."""

    executor: Executor
    residency: Residency
    snapshots: Snapshots
    checkpoints: Checkpoints
    versions: Versions
    leader: Leader | None = None
    """Of the processes that share the model, if there are others."""


def load(settings: TrainerSettings) -> Parts:
    """Loads the model and opens the store. Blocking; for the thread that will do the work.

    Where `torchrun` has started several processes, this one leads them.

    Raises:
        OSError: the model or a directory cannot be read.
        StoreError: the store cannot be opened.
        ModelFormatError: its weights are stored in a way that the trainer does not know.
        ShardingError: the model cannot be divided among so many processes.
        GroupBrokenError: another process has ended already.
    """
    lanes = Lanes(settings.torch_threads)
    dtype = getattr(torch, settings.trainer_dtype)
    if not find_place().is_shared:
        base = BaseModel(settings.model_path, dtype)
        settle()
        return parts_of(settings, base, lanes)
    group = Group()
    base = ShardedBaseModel(settings.model_path, group, dtype)
    settle()
    parts = parts_of(settings, base, lanes, make_passes=partial(ShardedPasses, group=group))
    return replace(parts, leader=Leader(group))


def parts_of(
    settings: TrainerSettings,
    base: BaseModel,
    lanes: Lanes,
    *,
    make_passes: Callable[..., Passes] = Passes,
) -> Parts:
    """The parts over a loaded model.

    Raises:
        OSError: a directory cannot be made.
        StoreError: the store cannot be opened.
    """
    store = FileSets(settings.checkpoint_store_url())
    executor = Executor(
        base,
        lanes,
        base_model=settings.base_model,
        context_length=settings.context_length or base.context_length,
        max_lora_rank=settings.max_lora_rank,
        pass_tokens=settings.micro_batch_tokens,
        piece_tokens=min(settings.piece_tokens, settings.micro_batch_tokens),
        make_passes=make_passes,
    )
    return Parts(
        executor,
        Residency(
            executor.runs,
            settings.spill_directory(),
            budget_bytes=settings.runs_memory_mb * 1024**2,
        ),
        Snapshots(store, settings.base_model),
        Checkpoints(store, base_model=settings.base_model),
        Versions(settings.adapter_directory(), base_model=settings.base_model),
    )
