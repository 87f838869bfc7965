"""Our vLLM plugin: any vLLM in this environment gets it (entry point group `vllm.general_plugins`), in every process.

It makes LoRA right where vLLM 0.32 is not, and possible on a CPU for the experts of a mixture; the modules it calls
say what is wrong and what they do about it. Nothing else of River is needed for it.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from river_engine.lifeline import LIFELINE_VARIABLE, die_with_parent

_MOE_METHOD = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
_state = {"registered": False}


def register() -> None:
    """Called by vLLM at the start of each of its processes, before a model is built."""
    if _state["registered"]:
        return
    _state["registered"] = True
    if os.environ.get(LIFELINE_VARIABLE):
        die_with_parent()

    # vLLM itself is only half imported when this module is; hence imports here and not above.
    from vllm.platforms import current_platform  # noqa: PLC0415

    from river_engine.lora_wiring import head_and_router_adapters, prompt_logprobs_with_adapter  # noqa: PLC0415
    from river_engine.prompt_targets import score_targets_on_cpu  # noqa: PLC0415
    from river_engine.routing import record_on_cpu, tell_shape  # noqa: PLC0415

    prompt_logprobs_with_adapter()
    head_and_router_adapters()
    tell_shape()
    if current_platform.is_cpu():
        _lora_on_cpu(current_platform)
        _rotary_on_cpu()
        _seeds_on_cpu()
        record_on_cpu()
        score_targets_on_cpu()


def _lora_on_cpu(platform: Any) -> None:
    """Puts our punica wrapper and our experts in the place of vLLM's."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend  # noqa: PLC0415

    from river_engine.cpu_experts import forget_on_reset, lora_experts_class  # noqa: PLC0415

    type(platform).get_punica_wrapper = classmethod(
        lambda _: "river_engine.cpu_punica.GroupedPunica"
    )
    forget_on_reset()
    method: Any = importlib.import_module(_MOE_METHOD)
    original = method.select_unquantized_moe_backend

    def select(moe_config: Any) -> tuple[Any, Any]:
        if moe_config.is_lora_enabled:
            return UnquantizedMoeBackend.CPU, lora_experts_class(moe_config)
        return original(moe_config)

    method.select_unquantized_moe_backend = select


def _seeds_on_cpu() -> None:
    """A seeded prompt longer than a step must not be the end of the engine."""
    from river_engine.cpu_seeds import keep_seeds_of_unfinished_prompts  # noqa: PLC0415

    keep_seeds_of_unfinished_prompts()


def _rotary_on_cpu() -> None:
    """The CPU kernel is right for contiguous 2-D queries and keys only; others (MLA) take the plain torch path."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # noqa: PLC0415

    original = RotaryEmbedding.forward_cpu

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> tuple[Any, Any]:
        plain = query.dim() == 2 and query.is_contiguous()  # noqa: PLR2004 - dimensions
        if plain and key is not None and key.is_contiguous():
            return original(self, positions, query, key)
        return self.forward_native(positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu
