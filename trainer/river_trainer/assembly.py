"""Puts a trainer together from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from river_trainer import limits
from river_trainer.base_model import BaseModel
from river_trainer.checkpoints import Checkpoints
from river_trainer.devices import Home, find_device, free_bytes
from river_trainer.executor import Executor
from river_trainer.lanes import Lanes, settle
from river_trainer.passes import Passes
from river_trainer.residency import Residency
from river_trainer.settings import TrainerSettings
from river_trainer.sharding.base_model import ShardedBaseModel
from river_trainer.sharding.group import Group
from river_trainer.sharding.leader import Leader
from river_trainer.sharding.passes import ShardedPasses
from river_trainer.sharding.place import Place, find_place
from river_trainer.snapshots import Snapshots
from river_trainer.store import FileSets
from river_trainer.versions import Versions

_MB = 1024**2


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything of a trainer that does not need NATS."""

    executor: Executor
    residency: Residency
    snapshots: Snapshots
    checkpoints: Checkpoints
    versions: Versions
    batch_tokens: int
    """About how many tokens are taken from the queue at once."""
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
        DeviceError: there is no such device.
    """
    place = find_place()
    home = home_of(settings, place)
    lanes = Lanes(settings.torch_threads if home.is_host else 1, home.device)
    if not place.is_shared:
        base = BaseModel(settings.model_path, home.dtype, home.device)
        settle()
        return parts_of(settings, base, lanes)
    group = Group(home.device)
    base = ShardedBaseModel(settings.model_path, group, home.dtype)
    settle()
    parts = parts_of(settings, base, lanes, make_passes=partial(ShardedPasses, group=group))
    return replace(parts, leader=Leader(group))


def home_of(settings: TrainerSettings, place: Place) -> Home:
    """Where the model of this process goes, and in which precision.

    Raises:
        DeviceError: there is no such device.
    """
    device = find_device(settings.device, place.local_rank)
    return Home(device, getattr(torch, settings.dtype_name(device.type)))


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
    sizes = settings.sizes(base.home.device.type)
    executor = Executor(
        base,
        lanes,
        base_model=settings.base_model,
        context_length=settings.context_length or base.context_length,
        max_lora_rank=settings.max_lora_rank,
        pass_tokens=sizes.pass_tokens,
        piece_tokens=sizes.piece_tokens,
        make_passes=make_passes,
    )
    return Parts(
        executor,
        Residency(
            executor.runs,
            settings.spill_directory(),
            budget_bytes=settings.runs_memory_mb * _MB,
            home=base.home,
            device_budget_bytes=_device_budget_bytes(settings, base.home),
        ),
        Snapshots(store, settings.base_model),
        Checkpoints(store, base_model=settings.base_model),
        Versions(settings.adapter_directory(), base_model=settings.base_model),
        sizes.batch_tokens,
    )


def _device_budget_bytes(settings: TrainerSettings, home: Home) -> int | None:
    """Memory for runs on the device, None where that is the host."""
    if home.is_host:
        return None
    if settings.device_runs_memory_mb:
        return settings.device_runs_memory_mb * _MB
    return int(limits.DEVICE_RUNS_SHARE * free_bytes(home.device))
