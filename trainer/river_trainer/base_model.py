"""A frozen causal language model that runs packed sequences with many adapters in one pass.

transformers owns the architecture; three of its seams are ours:

* attention: a registered function that runs each packed sequence alone (`packed_causal_attention`);
* experts: a registered function that runs `moe_lora`;
* the linear layers of attention and of dense MLPs are replaced by `LoraLinear`.

lm_head is never called: `token_logprobs` computes what a loss needs of it, chunk by chunk.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging as transformers_logging

from river_kernels import (
    LoraPair,
    Packing,
    Segments,
    lora_linear,
    lora_logprobs,
    moe_lora,
    packed_causal_attention,
)
from river_trainer.adapter import Adapter
from river_trainer.packing import PackedBatch
from river_trainer.sites import Group, Site

ATTENTION_NAME = "river_packed"
EXPERTS_NAME = "river_lora"
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
PEFT_ROOT = "base_model.model."


class _Pass:
    """What the modules need to know of the pass that is running."""

    def __init__(self) -> None:
        self.segments: Segments = ()
        self.adapters: Sequence[Adapter | None] = ()
        self.packing: Packing | None = None

    def pairs(self, site_name: str) -> list[LoraPair | None]:
        return [None if adapter is None else adapter.pair(site_name) for adapter in self.adapters]


class LoraLinear(nn.Module):
    """A frozen linear layer that adds each segment's adapter."""

    def __init__(self, linear: nn.Linear, name: str, running: _Pass) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._name, self._running = name, running

    def forward(self, hidden_1TI: torch.Tensor) -> torch.Tensor:
        running = self._running
        pairs = running.pairs(self._name)
        return lora_linear(
            hidden_1TI[0], self.weight, running.segments, pairs, self.bias
        ).unsqueeze(0)


class BaseModel:
    """The frozen model in float32. Not thread-safe: one pass at a time."""

    def __init__(self, path: str | Path) -> None:
        AttentionInterface.register(ATTENTION_NAME, _attention)
        ExpertsInterface.register(EXPERTS_NAME, _experts)
        transformers_logging.disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=EXPERTS_NAME,
        )
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._pass = _Pass()
        config: Any = self._model.config
        assert config.hidden_act == "silu", "moe_lora computes SwiGLU"
        assert getattr(config, "sliding_window", None) is None, "attention has no window here"
        self.vocab_size: int = config.vocab_size
        self.context_length: int = config.max_position_embeddings
        self.sites = tuple(self._instrument())

    def _instrument(self) -> list[Site]:
        """Puts our modules in place; returns every place an adapter may change, in the model's order."""
        sites: list[Site] = []
        named = list(self._model.named_modules())
        has_experts = any(hasattr(module, "gate_up_proj") for _, module in named)
        for name, module in named:
            kind = name.rpartition(".")[2]
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                sites += _expert_sites(name, module)
                module.river_name, module.river_pass = name, self._pass
            elif kind in ATTENTION_LINEARS or (kind in MLP_LINEARS and not has_experts):
                group = Group.ATTENTION if kind in ATTENTION_LINEARS else Group.MLP
                sites.append(_linear_site(name, module, group, kind))
                parent = self._model.get_submodule(name.rpartition(".")[0])
                setattr(parent, kind, LoraLinear(module, name, self._pass))
        sites.append(_linear_site("lm_head", self._model.lm_head, Group.UNEMBED, "lm_head"))
        return sites

    def token_logprobs(
        self, batch: PackedBatch, adapters: Sequence[Adapter | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every position's target, and the entropy there; two [T].

        `batch.segments` name `adapters` by index. Gradients reach the adapters' tensors unless grad mode is off.
        """
        running = self._pass
        running.segments, running.adapters = batch.segments, adapters
        running.packing = batch.packing
        try:
            hidden_1TH = self._model.model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
            ).last_hidden_state
            return lora_logprobs(
                hidden_1TH[0],
                self._model.lm_head.weight,
                batch.targets,
                batch.segments,
                running.pairs("lm_head"),
            )
        finally:
            running.segments, running.adapters, running.packing = (), (), None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function: (1, heads, T, D) in, (1, T, heads, D) out."""
    assert attention_mask is None
    running: _Pass = module.q_proj._running  # noqa: SLF001  # the layer's own linear knows the pass
    assert running.packing is not None, "the model only runs inside token_logprobs"
    query_THD, key_TGD, value_TGD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attended = packed_causal_attention(
        query_THD, key_TGD, value_TGD, running.packing, scale=scaling
    )
    return attended.unsqueeze(0), None


def _experts(
    module: Any, hidden_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Transformers' experts function."""
    running: _Pass = module.river_pass
    return moe_lora(
        hidden_TH,
        experts_TK,
        weights_TK,
        module.gate_up_proj,
        module.down_proj,
        running.segments,
        running.pairs(f"{module.river_name}.gate_up_proj"),
        running.pairs(f"{module.river_name}.down_proj"),
    )


def _expert_sites(name: str, module: Any) -> list[Site]:
    assert not module.is_transposed, "experts are stored (experts, out, in)"
    assert not module.has_bias
    sites: list[Site] = []
    for kind, prefix in (("gate_up_proj", f"{name}.base_layer"), ("down_proj", name)):
        experts, outputs, inputs = getattr(module, kind).shape
        target = f"{'.'.join(name.split('.')[-2:])}.{kind}"
        sites.append(
            Site(f"{name}.{kind}", Group.MLP, inputs, outputs, PEFT_ROOT + prefix, target, experts)
        )
    return sites


def _linear_site(name: str, linear: nn.Linear, group: Group, target: str) -> Site:
    prefix = PEFT_ROOT + name
    return Site(name, group, linear.in_features, linear.out_features, prefix, target)
