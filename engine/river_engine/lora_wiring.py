"""Three places where vLLM loses an adapter on the way to a model, on every platform.

* The logits of prompt tokens (`prompt_logprobs`) are computed with the adapters of the *sampled* rows: wrong
  numbers on a GPU, a crash of the engine on a CPU. Here one request at a time, with its own adapter for all of its
  rows.
* Some model classes forgot to say that their head can take an adapter.
* A router gate that its MoE runner holds stays the unwrapped layer, so an adapter on it is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA, LoRAMapping
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

_EMBEDDING_MODULES = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}


def prompt_logprobs_with_adapter() -> None:
    """Replaces the runner's prompt log-probabilities."""
    original = GPUModelRunner._get_prompt_logprobs_dict  # noqa: SLF001 - what is being replaced

    def get_prompt_logprobs_dict(
        self: GPUModelRunner, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        wanted = self.num_prompt_logprobs
        if not wanted or not self.lora_config:
            return original(self, hidden_states, num_scheduled_tokens)
        results: dict[str, Any] = {}
        try:
            for request_id, count in list(wanted.items()):
                if request_id not in num_scheduled_tokens:
                    continue
                use_adapter_of(self, request_id, num_scheduled_tokens[request_id])
                self.num_prompt_logprobs = {request_id: count}
                results.update(original(self, hidden_states, num_scheduled_tokens))
                if request_id not in self.num_prompt_logprobs:  # Its last prompt token is done.
                    del wanted[request_id]
        finally:
            self.num_prompt_logprobs = wanted
        return results

    GPUModelRunner._get_prompt_logprobs_dict = get_prompt_logprobs_dict  # noqa: SLF001


def use_adapter_of(runner: GPUModelRunner, request_id: str, rows: int) -> None:
    """Has the head compute so many rows of hidden states, all of one request, with its adapter."""
    if not runner.lora_config:
        return
    row = runner.input_batch.req_id_to_index[request_id]
    adapters = (int(runner.input_batch.request_lora_mapping[row]),) * rows
    mapping = LoRAMapping(adapters, adapters, is_prefill=True)
    runner.lora_manager._adapter_manager.set_adapter_mapping(mapping)  # noqa: SLF001 - no public way


def head_and_router_adapters() -> None:
    """Declares forgotten embedding modules before, and rewires router gates after a model gets its LoRA layers."""
    original = LoRAModelRunnerMixin.load_lora_model

    def load_lora_model(
        self: LoRAModelRunnerMixin, model: Any, vllm_config: VllmConfig, device: torch.device
    ) -> torch.nn.Module:
        forgotten = not getattr(model, "embedding_modules", None)
        if forgotten and hasattr(model, "lm_head") and hasattr(model, "logits_processor"):
            model.embedding_modules = dict(_EMBEDDING_MODULES)
        wrapped = original(self, model, vllm_config, device)
        for module in wrapped.modules():
            if isinstance(module, FusedMoEWithLoRA):
                gate = getattr(module, "gate", None)
                if isinstance(gate, BaseLayerWithLoRA):
                    module.base_layer.gate = gate
        return wrapped

    LoRAModelRunnerMixin.load_lora_model = load_lora_model
