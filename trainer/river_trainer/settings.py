"""The trainer's settings, `RIVER_*` in the environment."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from river_trainer import limits


class TrainerSettings(Struct, frozen=True, kw_only=True):
    """Where things are, and how much to do at once. An empty directory or URL lies under `data_dir`."""

    nats_url: str
    base_model: str
    model_path: str
    data_dir: str
    store_url: str = ""
    adapter_dir: str = ""
    host: str = "127.0.0.1"
    port: int = 8720
    torch_threads: int = 2
    micro_batch_tokens: int = limits.MICRO_BATCH_TOKENS
    max_lora_rank: int = limits.LORA_RANK_MAX
    context_length: int = 0
    """Longest sequence in tokens; 0 means what the base model was made for."""
    snapshot_every_steps: int = limits.SNAPSHOT_EVERY_STEPS
    snapshot_idle_s: float = limits.SNAPSHOT_IDLE_S

    def checkpoint_store_url(self) -> str:
        return self.store_url or (Path(self.data_dir).resolve() / "store").as_uri()

    def adapter_directory(self) -> Path:
        return (
            Path(self.adapter_dir) if self.adapter_dir else Path(self.data_dir) / "adapters"
        ).resolve()
