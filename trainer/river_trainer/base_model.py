"""A frozen causal language model that runs packed sequences with many adapters in one pass.

transformers owns the architecture; some of its seams are ours:

* attention: a registered function that runs each packed sequence alone (`packed_causal_attention`);
* experts: a registered function that runs `moe_lora`;
* the linear layers of attention and of dense MLPs are replaced by `LoraLinear`;
* routers are called segment by segment, as every matrix product is;
* norms that compute what `RmsNorm` does are replaced by it.

lm_head is never called: `token_logprobs` computes what a loss needs of it, chunk by chunk.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    RmsNorm,
    Segments,
    lora_linear,
    lora_logprobs,
    moe_lora,
    packed_causal_attention,
)
from river_trainer.lanes import PerLane
from river_trainer.packing import PackedBatch
from river_trainer.sites import Group, Site

ATTENTION_NAME = "river_packed"
EXPERTS_NAME = "river_lora"
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
PEFT_ROOT = "base_model.model."


SlotPairs = Mapping[str, LoraPair]
"""What the adapter in one slot does, by the name of the site; it leaves the others alone."""


class _Pass(PerLane):
    """What the modules need to know of the pass that is running in this lane."""

    def __init__(self) -> None:
        self.segments: Segments = ()
        self.slots: Sequence[SlotPairs] = ()
        self.packing: Packing | None = None

    def pairs(self, site_name: str) -> list[LoraPair | None]:
        return [pairs.get(site_name) for pairs in self.slots]


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


class BySegment(nn.Module):
    """A router that is called for the tokens of each segment alone."""

    def __init__(self, router: nn.Module, running: _Pass) -> None:
        super().__init__()
        self.router, self._running = router, running

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        segments = self._running.segments
        if len(segments) == 1:
            return self.router(hidden_TH)
        lengths = [segment.end - segment.start for segment in segments]
        answers = [self.router(rows) for rows in hidden_TH.split(lengths) if rows.shape[0]]
        return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


class BaseModel:
    """The frozen model in float32. Every lane may run a pass at the same time."""

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
        self._embed = model.get_input_embeddings()
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
            elif isinstance(getattr(module, "experts", None), nn.Module):
                module.gate = BySegment(module.gate, self._pass)
            elif kind in ATTENTION_LINEARS or (kind in MLP_LINEARS and not has_experts):
                group = Group.ATTENTION if kind in ATTENTION_LINEARS else Group.MLP
                sites.append(_linear_site(name, module, group, kind))
                parent = self._model.get_submodule(name.rpartition(".")[0])
                setattr(parent, kind, LoraLinear(module, name, self._pass))
            elif _is_rms_norm(module):
                parent = self._model.get_submodule(name.rpartition(".")[0])
                setattr(parent, kind, RmsNorm(module.weight, module.variance_epsilon))
        sites.append(_linear_site("lm_head", self._model.lm_head, Group.UNEMBED, "lm_head"))
        return sites

    def token_logprobs(
        self, batch: PackedBatch, slots: Sequence[SlotPairs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every position's target, and the entropy there; two [T].

        `batch.segments` name `slots` by index. Backward adds to the gradients of their pairs, unless grad mode is off.
        """
        running = self._pass
        running.segments, running.slots = batch.segments, slots
        running.packing = batch.packing
        try:
            embedded_1TH = self._embed(batch.input_ids[None])
            # Adapters are no inputs of autograd; this makes the backward pass go through all layers.
            embedded_1TH.requires_grad_(torch.is_grad_enabled())
            hidden_1TH = self._model.model(
                inputs_embeds=embedded_1TH,
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
            running.segments, running.slots, running.packing = (), (), None


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


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    """Whether a module is a norm that `RmsNorm` can stand for: other families scale by `1 + weight`."""
    if not hasattr(module, "variance_epsilon") or not hasattr(module, "weight"):
        return False
    probe = torch.linspace(-2.0, 3.0, module.weight.numel(), dtype=module.weight.dtype)[None]
    ours = RmsNorm(module.weight, module.variance_epsilon)(probe)
    return torch.allclose(ours, module(probe), rtol=1e-5, atol=1e-6)


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
