"""The peer that most people have: transformers' grouped experts under PEFT's adapter on their parameters.

PEFT has one adapter in a pass, so a batch of many is a micro-batch of each. Every adapter is a module of its own around
the same frozen parameters: that adapters would have to be switched is left out, in the peer's favour. Loaded only when
asked for, so that nobody else needs transformers.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N806

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

from river_kernels import LoraPair
from river_ops.bench.kernels.contender import AbsentError, Contender, clear_gradients
from river_ops.bench.kernels.workload import ALPHA, Adapter, Base, Factors, Workload


class Peft(Contender):
    """One micro-batch of each adapter."""

    name = "peft"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        if workload.cell.layout != "per_expert":
            raise AbsentError("PEFT's experts share no factors; see per_expert")
        self.parts = [workload.part(segment.start, segment.end) for segment in workload.segments]
        self._layers = [_layer(adapter, workload.base) for adapter in workload.adapters]

    def forward(self, index: int) -> torch.Tensor:
        part = self.parts[index]
        return self._layers[index](part.x_TH, part.experts_TK, part.weights_TK)

    def gradients(self) -> list[Factors]:
        found: list[Factors] = []
        for layer, adapter in zip(self._layers, self.workload.adapters, strict=True):
            wrappers = _wrappers(layer)
            first = _gradients(wrappers["gate_up_proj"], adapter.gate_up)
            second = _gradients(wrappers["down_proj"], adapter.down)
            found.append(Factors(*first, *second))
        return found

    def clear_factors(self) -> None:
        for layer in self._layers:
            clear_gradients(*layer.parameters())


class _Layer(nn.Module):
    """What PEFT looks for: a module that has experts."""

    def __init__(self, experts: Qwen3_5MoeExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.experts(*arguments)


def _layer(adapter: Adapter, base: Base) -> nn.Module:
    sizes = base.sizes
    config = Qwen3_5MoeTextConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.inner,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen,
    )
    config._experts_implementation = "grouped_mm"  # noqa: SLF001  # where the model would put its choice
    with torch.device("meta"):
        experts = Qwen3_5MoeExperts(config)
    experts.gate_up_proj = nn.Parameter(base.gate_up, requires_grad=False)
    experts.down_proj = nn.Parameter(base.down, requires_grad=False)
    rank = adapter.gate_up.rank
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=int(ALPHA),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    layer = peft.inject_adapter_in_model(lora, _Layer(experts))
    wrappers = _wrappers(layer)
    _fill(wrappers["gate_up_proj"], adapter.gate_up)
    _fill(wrappers["down_proj"], adapter.down)
    return layer


def _wrappers(layer: nn.Module) -> dict[str, Any]:
    return {
        module.parameter_name: module
        for module in layer.modules()
        if isinstance(module, ParamWrapper)
    }


def _fill(wrapper: Any, pair: LoraPair) -> None:
    """PEFT stores A with the expert slowest and B with the expert fastest."""
    a_RI, b_OR = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    if a_RI.shape[1] != pair.a.shape[2]:
        raise AbsentError(f"PEFT {peft.__version__} has inputs and outputs of experts interchanged")
    with torch.no_grad():
        a_RI.copy_(pair.a.flatten(0, 1))
        b_OR.copy_(pair.b.permute(1, 2, 0).flatten(1))


def _gradients(wrapper: Any, pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
    a_RI, b_OR = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
    experts, rank = len(pair.a), pair.rank
    return a_RI.unflatten(0, (experts, rank)), b_OR.unflatten(1, (rank, experts)).permute(2, 0, 1)
