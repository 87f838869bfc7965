"""The trainer's settings, `RIVER_*` in the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from river_engine.protocol import subject_token
from river_trainer import limits


class TrainerSettings(Struct, frozen=True, kw_only=True):
    """Where things are, and how much to do at once. An empty directory or URL lies under `data_dir`.

    `trainer_dtype` is that of the frozen model; adapters and all that is kept of them are float32 always.
    """

    nats_url: str
    base_model: str
    model_path: str
    trainer_dtype: Literal["float32", "bfloat16"] = "float32"
    data_dir: str
    store_url: str = ""
    adapter_dir: str = ""
    host: str = "127.0.0.1"
    port: int = 8720
    torch_threads: int = 2
    """Lanes, each of one thread."""
    micro_batch_tokens: int = limits.MICRO_BATCH_TOKENS
    """Tokens in one packed pass of a lane."""
    piece_tokens: int = limits.PIECE_TOKENS
    batch_tokens: int = limits.BATCH_TOKENS
    """About how many tokens are taken from the queue at once."""
    runs_memory_mb: int = limits.RUNS_MEMORY_MB
    gap_max_s: float = limits.GAP_MAX_S
    max_lora_rank: int = limits.LORA_RANK_MAX
    context_length: int = 0
    """Longest sequence in tokens; 0 means what the base model was made for."""
    snapshot_every_steps: int = limits.SNAPSHOT_EVERY_STEPS
    snapshot_interval_s: float = limits.SNAPSHOT_INTERVAL_S
    """A run is snapshotted after so many steps and not before so much time, or when idle."""
    snapshot_idle_s: float = limits.SNAPSHOT_IDLE_S

    def checkpoint_store_url(self) -> str:
        return self.store_url or (Path(self.data_dir).resolve() / "store").as_uri()

    def spill_directory(self) -> Path:
        """Where runs wait that do not fit into memory."""
        return Path(self.data_dir).resolve() / "spill" / subject_token(self.base_model)

    def adapter_directory(self) -> Path:
        return (
            Path(self.adapter_dir) if self.adapter_dir else Path(self.data_dir) / "adapters"
        ).resolve()
