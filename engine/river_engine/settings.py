"""What an engine can be told from outside, as `RIVER_*` variables. Imports nothing heavy."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from river_client.service import SettingsError, read_settings, variable
from river_engine.limits import ADAPTER_WAIT_S, LORA_RANKS

# Any of these files means a kernel driver for a GPU that vLLM can use.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`base_model` is the public name of the weights in the directory `model_path`.

    `url` is what others reach this engine by (default: its own host and port); `engine_id` is drawn at random when
    empty; `nats_url` empty means unregistered; `dtype` empty means float32 on a CPU and the model's own elsewhere.
    `max_loras` adapters can be in one batch, `max_cpu_loras` stay loaded. `cpu_threads` is for models that fill a
    machine: threads that share cores with other processes spend their time waiting for each other. `expert_routing`
    makes vLLM record on a GPU which experts each token goes to, for which it needs its second model runner; on a CPU,
    where that costs nothing until somebody asks, it is always possible. With the `expert_layout` `shared_outer` vLLM
    holds one copy of what the experts of an adapter share; adapters whose experts share nothing are refused then.
    `tool_parser` and `reasoning_parser` are vLLM's names: how the model writes tool calls (empty: by its `model_type`)
    and how it sets off its reasoning (empty: it does not).
    `max_num_seqs` sequences are inside vLLM at once (0: vLLM's own choice); `queue_max` prompts may wait for that, of
    one tenant `queue_tenant_max`. A request waits at most `adapter_wait_s` for its adapter to be fetched, and as long
    for it to be loaded when its turn has come. When told to stop, running and waiting requests have `drain_s` seconds
    to end.
    """

    base_model: str
    model_path: str
    engine_token: str
    host: str = "127.0.0.1"
    port: int = 8100
    url: str = ""
    nats_url: str = ""
    data_dir: str = ""
    engine_id: str = ""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: str = ""
    max_loras: int = 4
    max_cpu_loras: int = 16
    max_lora_rank: int = 32
    max_model_len: int = 0
    max_num_seqs: int = 0
    queue_max: int = 16384
    queue_tenant_max: int = 4096
    adapter_wait_s: float = ADAPTER_WAIT_S
    drain_s: float = 15.0
    kv_cache_mb: int = 256
    cpu_threads: int = 1
    expert_routing: bool = False
    expert_layout: Literal["per_expert", "shared_outer"] = "per_expert"
    tool_parser: str = ""
    reasoning_parser: str = ""

    @property
    def on_cpu(self) -> bool:
        if self.device == "auto":
            return not any(Path(driver).exists() for driver in _GPU_DRIVERS)
        return self.device == "cpu"

    @property
    def versions_dir(self) -> Path:
        """Where this engine keeps the adapters it serves, so that they outlive a restart of the server process."""
        root = (
            Path(self.data_dir) if self.data_dir else Path(tempfile.gettempdir()) / "river-engine"
        )
        return root / "engines" / self.engine_id

    @property
    def public_url(self) -> str:
        return self.url or f"http://{self.host}:{self.port}"


def read_engine_settings() -> EngineSettings:
    """The settings from the environment.

    Raises:
        SettingsError: one is missing, malformed or out of range; the message names it.
    """
    settings = read_settings(EngineSettings)
    if settings.max_lora_rank not in LORA_RANKS:
        raise SettingsError(
            f"RIVER_MAX_LORA_RANK={settings.max_lora_rank}: must be one of {sorted(LORA_RANKS)}"
        )
    if settings.max_loras < 1:
        raise SettingsError(f"RIVER_MAX_LORAS={settings.max_loras}: must be at least 1")
    if settings.max_cpu_loras < settings.max_loras:
        raise SettingsError(
            f"RIVER_MAX_CPU_LORAS={settings.max_cpu_loras}: must be at least RIVER_MAX_LORAS={settings.max_loras}"
        )
    for name in ("kv_cache_mb", "cpu_threads", "queue_max", "queue_tenant_max"):
        value: int = getattr(settings, name)
        if value < 1:
            raise SettingsError(f"{variable(name)}={value}: must be at least 1")
    if not 0 <= settings.drain_s < math.inf:
        raise SettingsError(f"RIVER_DRAIN_S={settings.drain_s}: must be 0 or more seconds")
    if not 0 < settings.adapter_wait_s < math.inf:
        raise SettingsError(
            f"RIVER_ADAPTER_WAIT_S={settings.adapter_wait_s}: must be more than 0 seconds"
        )
    if settings.max_num_seqs < 0:
        raise SettingsError(f"RIVER_MAX_NUM_SEQS={settings.max_num_seqs}: must not be negative")
    if not settings.engine_token:
        raise SettingsError("RIVER_ENGINE_TOKEN is not set")
    return settings
