"""Puts a trainer together from its settings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nats.aio.client import Client

from river_trainer.base_model import BaseModel
from river_trainer.executor import Executor, configure_torch
from river_trainer.service import Service
from river_trainer.settings import TrainerSettings
from river_trainer.snapshots import Snapshots
from river_trainer.store import FileSets
from river_trainer.versions import Versions


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything of a trainer that does not need NATS."""

    executor: Executor
    snapshots: Snapshots
    versions: Versions


def load(settings: TrainerSettings) -> Parts:
    """Loads the model and opens the store. Blocking; for the thread that will do the work.

    Raises:
        OSError: the model or a directory cannot be read.
        StoreError: the store cannot be opened.
    """
    configure_torch(settings.torch_threads)
    base = BaseModel(settings.model_path)
    store = FileSets(settings.checkpoint_store_url())
    executor = Executor(
        base,
        store,
        base_model=settings.base_model,
        context_length=settings.context_length or base.context_length,
        max_lora_rank=settings.max_lora_rank,
        micro_batch_tokens=settings.micro_batch_tokens,
    )
    return Parts(
        executor,
        Snapshots(store, settings.base_model),
        Versions(settings.adapter_directory(), base_model=settings.base_model),
    )


def make_service(
    settings: TrainerSettings, parts: Parts, client: Client, worker: ThreadPoolExecutor
) -> Service:
    """The service over a connection; `worker` has one thread."""
    return Service(settings, client, parts.executor, parts.snapshots, parts.versions, worker)
