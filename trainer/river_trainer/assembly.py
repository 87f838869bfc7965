"""Puts a trainer together from its settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from river_trainer.base_model import BaseModel
from river_trainer.checkpoints import Checkpoints
from river_trainer.executor import Executor
from river_trainer.lanes import Lanes, keep_memory
from river_trainer.residency import Residency
from river_trainer.settings import TrainerSettings
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


def load(settings: TrainerSettings) -> Parts:
    """Loads the model and opens the store. Blocking; for the thread that will do the work.

    Raises:
        OSError: the model or a directory cannot be read.
        StoreError: the store cannot be opened.
    """
    keep_memory()
    base = BaseModel(settings.model_path, getattr(torch, settings.trainer_dtype))
    return parts_of(settings, base, Lanes(settings.torch_threads))


def parts_of(settings: TrainerSettings, base: BaseModel, lanes: Lanes) -> Parts:
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
