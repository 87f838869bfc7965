"""LoRA on the routed experts of a mixture, on the CPU.

vLLM asks for its Triton experts whenever LoRA is on, also on a machine that has no Triton, and the first request
then kills the engine. These experts answer instead:

* rows without an adapter take the platform's own grouped GEMM, untouched;
* rows of an adapter take the same grouped GEMM over that adapter's merged weights `W + B A`, kept in float32 so that a
  small update is not rounded away. They are made when an adapter is first used after it entered its slot, so a decode
  step with adapters costs what one without costs.

The price is memory: one unpacked copy of the expert weights and one packed copy per slot in use, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
    ArmCPUUnquantizedExperts,
    CPUUnquantizedExperts,
    PowerCPUUnquantizedExperts,
    X86CPUUnquantizedExperts,
)
from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from river_engine.cpu_punica import RowGroup, row_groups

# The portable grouped GEMM takes float32; its columns come in blocks of 32.
_ISA = "vec"
_BLOCK = 32
# Those whose gate and up are the two halves of one tensor.
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
_CPU_EXPERTS = (X86CPUUnquantizedExperts, ArmCPUUnquantizedExperts, PowerCPUUnquantizedExperts)


@dataclass(frozen=True, slots=True)
class _Merged:
    """The experts of one adapter, packed for the grouped GEMM; `w13` [E, 2I, H], `w2` [E, H, I], I padded."""

    w13: torch.Tensor
    w2: torch.Tensor


class MergedLoRAExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """The portable experts, or with another CPU's class after it that one's, taking over the rows with an adapter."""

    _lora_context: MoELoRAContext | None

    def process_weights_after_loading(self, layer: Any) -> None:
        # The packing below overwrites these, and merging needs them as they were.
        self._w13_EGH = layer.w13_weight.detach().to(torch.float32, copy=True)
        self._w2_EHI = layer.w2_weight.detach().to(torch.float32, copy=True)
        self._merged: dict[int, _Merged] = {}
        super().process_weights_after_loading(layer)

    def forget(self, slot: int) -> None:
        """The adapter in `slot` has changed."""
        self._merged.pop(slot, None)

    def apply(  # pyright: ignore[reportIncompatibleMethodOverride] - vLLM passes the rest by keyword
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        **rest: Any,
    ) -> None:
        """Writes the experts' output [M, H] for `hidden_states` [M, H], routed by `topk_weights`, `topk_ids` [M, K]."""
        skip_weights: bool = rest["apply_router_weight_on_input"]
        for slot, rows in self._groups(hidden_states.shape[0]):
            x, weights, ids = hidden_states, topk_weights, topk_ids
            if rows is not None:
                x, weights, ids = (tensor.index_select(0, rows) for tensor in (x, weights, ids))
            dtype = torch.float32 if slot >= 0 else output.dtype
            direct = rows is None and output.dtype == dtype
            part = output if direct else torch.empty(x.shape, dtype=dtype)
            if slot >= 0:
                self._apply_adapter(
                    slot, part, x, weights, ids, activation, skip_weights=skip_weights
                )
            else:
                super().apply(
                    output=part,
                    hidden_states=x,
                    w1=w1,
                    w2=w2,
                    topk_weights=weights,
                    topk_ids=ids,
                    activation=activation,
                    **rest,
                )
            if rows is not None:
                output.index_copy_(0, rows, part.to(output.dtype))
            elif not direct:
                output.copy_(part)

    def _groups(self, row_count: int) -> list[RowGroup]:
        """Rows by slot; adapters that leave the experts alone count as none."""
        context = self._lora_context
        if context is None:
            return [(-1, None)]
        wrapper = context.punica_wrapper
        groups: list[RowGroup] = getattr(wrapper, "token_groups", [])
        if not groups:
            return [(-1, None)]
        slots = wrapper.token_lora_indices
        if slots.numel() != row_count:
            # A padded batch: the rows beyond the mapping belong to nobody.
            known = slots[:row_count]
            groups = row_groups(F.pad(known, (0, row_count - known.numel()), value=-1))
        return [
            (slot if slot >= 0 and self._merge(context, slot) else -1, rows)
            for slot, rows in groups
        ]

    def _merge(self, context: MoELoRAContext, slot: int) -> bool:
        """Makes sure that the weights of `slot` are merged; False if its adapter has none for these experts."""
        if slot in self._merged:
            return True
        if not context.adapter_enabled[slot]:
            return False
        w13, w2 = self._w13_EGH.clone(), self._w2_EHI.clone()
        column = 0
        for a, b in zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True):
            width = b.shape[2]
            _add_product(w13[:, column : column + width], a[slot], b[slot])
            column += width
        _add_product(w2, context.w2_lora_a_stacked[0][slot], context.w2_lora_b_stacked[0][slot])
        intermediate = w2.shape[2]
        padding = -intermediate % _BLOCK
        gate, up = w13[:, :intermediate], w13[:, intermediate:]
        w13 = torch.cat([F.pad(half, (0, 0, 0, padding)) for half in (gate, up)], dim=1)
        w2 = F.pad(w2, (0, padding)).contiguous()
        self._merged[slot] = _Merged(
            w13=cpu_prepack_moe_weight(w13, _ISA), w2=cpu_prepack_moe_weight(w2, _ISA)
        )
        return True

    def _apply_adapter(
        self,
        slot: int,
        output: torch.Tensor,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        *,
        skip_weights: bool,
    ) -> None:
        """Writes the experts' output for rows of one adapter, float32."""
        merged = self._merged[slot]
        cpu_fused_moe(
            output,
            x.float(),
            merged.w13,
            merged.w2,
            _float_or_none(self.w1_bias),
            _float_or_none(self.w2_bias),
            topk_weights,
            topk_ids,
            activation.value,
            _ISA,
            skip_weights,
        )


def lora_experts_class(config: FusedMoEConfig) -> type[CPUUnquantizedExperts]:
    """The experts class for this CPU and model.

    Raises:
        ValueError: none fits; the message says why.
    """
    if config.activation not in _ACTIVATIONS:
        raise ValueError(f"no LoRA on experts with activation {config.activation} on a CPU")
    candidates: list[type[CPUUnquantizedExperts]] = [
        type(f"{own.__name__}WithLoRA", (MergedLoRAExperts, own), {}) for own in _CPU_EXPERTS
    ]
    reason: str | None = None
    for candidate in (*candidates, MergedLoRAExperts):
        supported, reason = candidate.is_supported_config(
            candidate, config, None, None, mk.FusedMoEActivationFormat.Standard
        )
        if supported:
            return candidate
    raise ValueError(f"no LoRA on these experts on a CPU: {reason}")


def forget_on_reset() -> None:
    """Makes vLLM's layer tell the experts when a slot changes; setting one begins with `reset_lora` too."""
    original = FusedMoEWithLoRA.reset_lora

    def reset_lora(self: FusedMoEWithLoRA, index: int) -> None:
        original(self, index)
        experts = self._moe_kernel.fused_experts
        if isinstance(experts, MergedLoRAExperts):
            experts.forget(index)

    FusedMoEWithLoRA.reset_lora = reset_lora


def _add_product(weight_EOI: torch.Tensor, a_ERI: torch.Tensor, b_EOR: torch.Tensor) -> None:  # noqa: N803
    """Adds `B A` to the weights in place; a factor shared by all experts has an expert dimension of one."""
    experts = weight_EOI.shape[0]
    a, b = a_ERI.float().expand(experts, -1, -1), b_EOR.float().expand(experts, -1, -1)
    weight_EOI.baddbmm_(b, a[:, :, : weight_EOI.shape[2]])


def _float_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
