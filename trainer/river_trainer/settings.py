"""The trainer's settings, `RIVER_*` in the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec import Struct

from river_engine.protocol import subject_token
from river_trainer import limits


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens that are taken from the queue at once, that one pass has at most, and that one piece of a run has."""

    batch_tokens: int
    pass_tokens: int
    piece_tokens: int


ON_HOST = Sizes(limits.BATCH_TOKENS, limits.MICRO_BATCH_TOKENS, limits.PIECE_TOKENS)
ON_ACCELERATOR = Sizes(
    limits.ACCELERATOR_BATCH_TOKENS,
    limits.ACCELERATOR_MICRO_BATCH_TOKENS,
    limits.ACCELERATOR_PIECE_TOKENS,
)


class TrainerSettings(Struct, frozen=True, kw_only=True):
    """Where things are, and how much to do at once. An empty directory or URL lies under `data_dir`.

    `device` is that of the model, `auto` a GPU if there is one. `trainer_dtype` is that of the frozen model, `auto`
    bfloat16 on a GPU and float32 elsewhere; what is kept of adapters is float32 always. Numbers of tokens that are 0
    are as the device likes them (`Sizes`).
    """

    nats_url: str
    base_model: str
    model_path: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trainer_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    data_dir: str
    store_url: str = ""
    adapter_dir: str = ""
    host: str = "127.0.0.1"
    port: int = 8720
    torch_threads: int = 2
    """Lanes, each of one thread; a GPU has one."""
    micro_batch_tokens: int = 0
    """Tokens in one packed pass of a lane."""
    piece_tokens: int = 0
    batch_tokens: int = 0
    """About how many tokens are taken from the queue at once."""
    runs_memory_mb: int = limits.RUNS_MEMORY_MB
    device_runs_memory_mb: int = 0
    """On a GPU; 0 means a share of what the model leaves free."""
    gap_max_s: float = limits.GAP_MAX_S
    max_lora_rank: int = limits.LORA_RANK_MAX
    context_length: int = 0
    """Longest sequence in tokens; 0 means what the base model was made for."""
    snapshot_every_steps: int = limits.SNAPSHOT_EVERY_STEPS
    snapshot_interval_s: float = limits.SNAPSHOT_INTERVAL_S
    """A run is snapshotted after so many steps and not before so much time, or when idle."""
    snapshot_idle_s: float = limits.SNAPSHOT_IDLE_S

    def sizes(self, device_type: str) -> Sizes:
        """Tokens of batches, passes and pieces on a device of this type."""
        usual = ON_HOST if device_type == "cpu" else ON_ACCELERATOR
        pass_tokens = self.micro_batch_tokens or usual.pass_tokens
        return Sizes(
            self.batch_tokens or usual.batch_tokens,
            pass_tokens,
            min(self.piece_tokens or usual.piece_tokens, pass_tokens),
        )

    def dtype_name(self, device_type: str) -> str:
        """The dtype of the frozen model on a device of this type."""
        if self.trainer_dtype != "auto":
            return self.trainer_dtype
        return "float32" if device_type == "cpu" else "bfloat16"

    def checkpoint_store_url(self) -> str:
        return self.store_url or (Path(self.data_dir).resolve() / "store").as_uri()

    def spill_directory(self) -> Path:
        """Where runs wait that do not fit into memory."""
        return Path(self.data_dir).resolve() / "spill" / subject_token(self.base_model)

    def adapter_directory(self) -> Path:
        return (
            Path(self.adapter_dir) if self.adapter_dir else Path(self.data_dir) / "adapters"
        ).resolve()
