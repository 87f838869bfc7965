"""A frozen causal language model that runs packed sequences with many adapters in one pass.

transformers owns the architecture; some of its seams are ours:

* attention: a registered function that runs each packed sequence alone (`packed_causal_attention`);
* experts: a registered function that runs `moe_lora`;
* the linear layers of attention and of dense MLPs are replaced by `LoraLinear`, and attention as a whole by
  `FusedAttention` where that computes the same;
* routers are called segment by segment on CPUs, as every matrix product is, and a sampler's choice can be put in the
  place of theirs (`routing.py`);
* norms that compute what `RmsNorm` does are replaced by it;
* lm_head is replaced by `LogprobHead`, which computes what a loss needs of it, chunk by chunk.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging as transformers_logging

from river_kernels import (
    NO_ADAPTER,
    FrozenWeight,
    LoraPair,
    Packing,
    RmsNorm,
    Segment,
    Segments,
    dense_weight,
    lora_linear,
    lora_logprobs,
    make_packing,
    matrices_of,
    moe_lora,
    packed_causal_attention,
    verify_rows,
)
from river_kernels.device import uses_triton
from river_trainer.attention import FusedAttention, fused
from river_trainer.devices import HOST, Home
from river_trainer.lanes import PerLane
from river_trainer.loading import StoredLinear, load_model, move_stored
from river_trainer.packing import PackedBatch
from river_trainer.routing import PassRouting, RoutedExperts, gate_renormalises
from river_trainer.sites import Factor, Group, Site

ATTENTION_NAME = "river_packed"
EXPERTS_NAME = "river_lora"
ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
PEFT_ROOT = "base_model.model."


SlotPairs = Mapping[str, LoraPair]
"""What the adapter in one slot does, by the name of the site; it leaves the others alone."""


class _Pass(PerLane):
    """What the modules need to know of the pass that is running in this lane."""

    def __init__(self) -> None:
        self.segments: Segments = ()
        self.slots: Sequence[SlotPairs] = ()
        self.packing: Packing | None = None
        self.routing: PassRouting | None = None

    def pairs(self, site_name: str) -> list[LoraPair | None]:
        """The adapters of a site, by slot."""
        return [pairs.get(site_name) for pairs in self.slots]


class LoraLinear(nn.Module):
    """A frozen linear layer that adds each segment's adapter."""

    def __init__(self, linear: nn.Linear | StoredLinear, name: str, running: _Pass) -> None:
        super().__init__()
        self.weight: FrozenWeight = linear.weight
        self.bias = linear.bias
        self._name, self._running = name, running

    def forward(self, hidden_1TI: torch.Tensor) -> torch.Tensor:
        running = self._running
        pairs = running.pairs(self._name)
        return lora_linear(
            hidden_1TI[0], self.weight, running.segments, pairs, self.bias
        ).unsqueeze(0)


class BySegment(nn.Module):
    """The router of MoE layer `layer`; a sampler's choice may replace its.

    On CPUs it is called for the tokens of each segment alone, where Triton computes for all at once. `renormalise` is
    the rule of its weights, None if it is none that could be replayed.
    """

    def __init__(
        self, router: nn.Module, running: _Pass, layer: int, *, renormalise: bool | None
    ) -> None:
        super().__init__()
        self.router, self._running = router, running
        self.layer, self.renormalise = layer, renormalise

    def forward(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        segments = self._running.segments
        if len(segments) == 1 or uses_triton(hidden_TH):
            return self._route(0, len(segments), hidden_TH)
        answers = [
            self._route(index, index + 1, hidden_TH[segment.start : segment.end])
            for index, segment in enumerate(segments)
            if segment.end > segment.start
        ]
        return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))

    def _route(self, first: int, last: int, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For segments `first` to `last` (exclusive)."""
        answer = self.router(hidden_TH)
        routing = self._running.routing
        if routing is None:
            return answer
        assert self.renormalise is not None, "such a model takes no routing"
        segments = self._running.segments[first:last]
        return routing.route(
            self.layer,
            slice(segments[0].start, segments[-1].end),
            routing.forced[first:last],
            answer,
            renormalise=self.renormalise,
        )


class LogprobHead(nn.Module):
    """The frozen lm_head; see `lora_logprobs`. On CPUs it is in float32 whatever the model's dtype."""

    def __init__(self, weight_VH: nn.Parameter, running: _Pass, dtype: torch.dtype) -> None:
        super().__init__()
        is_same = weight_VH.dtype is dtype
        self.weight = (
            weight_VH if is_same else nn.Parameter(weight_VH.to(dtype), requires_grad=False)
        )
        self._running = running

    def forward(
        self, hidden_TH: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        running = self._running
        logprobs, entropy_T = lora_logprobs(
            hidden_TH.to(self.weight.dtype),
            self.weight,
            targets,
            running.segments,
            running.pairs(HEAD),
        )
        # FSDP hooks into what a module returns, and views get lost.
        return logprobs.clone(), entropy_T


class Network(nn.Module):
    """A whole pass as one module: embedding, layers and head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding: Any = model.get_input_embeddings()
        self.body: Any = model.model
        self.head: Any = model.lm_head

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        embedded_1TH = self.embedding(batch.input_ids[None])
        # Adapters are no inputs of autograd; this makes the backward pass go through all layers.
        embedded_1TH.requires_grad_(torch.is_grad_enabled())
        hidden_1TH = self.body(
            inputs_embeds=embedded_1TH,
            position_ids=batch.positions[None],
            use_cache=False,
        ).last_hidden_state
        hidden_TH = hidden_1TH[0]
        if batch.logit_scale is not None:
            # The head is linear: so are its logits scaled, those of the adapter included.
            hidden_TH = hidden_TH * batch.logit_scale[:, None]
        return self.head(hidden_TH, batch.targets)


class BaseModel:
    """The frozen model, on one device. Every lane may run a pass at the same time.

    In bfloat16 weights and what flows between layers are of that type; everything of an adapter that is kept stays
    float32, and on CPUs attention inside and the head do too. `routed_experts` is None for a model whose routing cannot
    be replayed. `home` is where the adapters have to be that run through it.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device = HOST,
    ) -> None:
        """Loads and looks at it on the host, then moves it.

        Raises:
            OSError: it cannot be read.
            ModelFormatError: its weights are stored in a way that the trainer does not know.
        """
        self.home = Home(device, dtype)
        AttentionInterface.register(ATTENTION_NAME, _attention)
        ExpertsInterface.register(EXPERTS_NAME, _experts)
        transformers_logging.disable_progress_bar()
        self._model = load_model(
            path,
            dtype,
            attn_implementation=ATTENTION_NAME,
            experts_implementation=EXPERTS_NAME,
        )
        self._pass = _Pass()
        config: Any = self._model.config
        assert config.hidden_act == "silu", "moe_lora computes SwiGLU"
        assert getattr(config, "sliding_window", None) is None, "attention has no window here"
        self.vocab_size: int = config.vocab_size
        self.context_length: int = config.max_position_embeddings
        self.sites = tuple(self._instrument())
        self._fuse_attention()
        if self.home.is_host:
            verify_rows(self._frozen_weights())
        self.routed_experts = self._routed_experts()
        self._network = Network(self._model)
        self._settle()

    def _settle(self) -> None:
        """Brings the model to where it computes."""
        if not self.home.is_host:
            self._network.to(self.home.device)
            move_stored(self._network, self.home.device)
            self.make_room()

    def make_room(self) -> None:
        """Makes room behind dense weights for the adapters of a pass: Triton's path multiplies by both at once."""
        from river_kernels.gpu.augmented import PAD_STEP, augmented  # noqa: PLC0415  # CPUs need no Triton

        head, embedding = self._network.head, self._network.embedding
        is_tied = head.weight is embedding.weight
        for module in self._network.modules():
            if isinstance(module, LoraLinear | FusedAttention | LogprobHead) and isinstance(
                module.weight, torch.Tensor
            ):
                roomy = augmented(module.weight.detach(), PAD_STEP)
                module.weight = nn.Parameter(roomy, requires_grad=False)
        if is_tied:
            embedding.weight = head.weight

    def _instrument(self) -> list[Site]:
        """Puts our modules in place; returns every place an adapter may change, in the model's order."""
        sites: list[Site] = []
        named = list(self._model.named_modules())
        has_experts = any(hasattr(module, "gate_up_proj") for _, module in named)
        moe_layers = itertools.count()
        for name, module in named:
            kind = name.rpartition(".")[2]
            if isinstance(getattr(module, "gate_up_proj", None), FrozenWeight):
                sites += _expert_sites(name, module)
                module.river_name, module.river_pass = name, self._pass
                module.river_experts = moe_lora
            elif isinstance(getattr(module, "experts", None), nn.Module):
                module.gate = BySegment(
                    module.gate,
                    self._pass,
                    next(moe_layers),
                    renormalise=gate_renormalises(module.gate),
                )
            elif kind in ATTENTION_LINEARS or (kind in MLP_LINEARS and not has_experts):
                group = Group.ATTENTION if kind in ATTENTION_LINEARS else Group.MLP
                sites.append(_linear_site(name, module, group, kind))
                parent = self._model.get_submodule(name.rpartition(".")[0])
                setattr(parent, kind, LoraLinear(module, name, self._pass))
            elif _is_rms_norm(module):
                parent = self._model.get_submodule(name.rpartition(".")[0])
                setattr(parent, kind, RmsNorm(module.weight, module.variance_epsilon))
        dtype = torch.float32 if self.home.is_host else self.home.dtype
        head = _linear_site(HEAD, self._model.lm_head, Group.UNEMBED, HEAD)
        sites.append(replace(head, is_float32=dtype is torch.float32))
        self._model.lm_head = LogprobHead(self._model.lm_head.weight, self._pass, dtype)
        return sites

    def _frozen_weights(self) -> Iterator[torch.Tensor]:
        """Every matrix [O, I] that adapters go with; of experts the first, of which the others have the form.

        What is stored in fewer bits is only there until the next one.
        """
        for module in self._model.modules():
            if isinstance(module, LoraLinear | FusedAttention | LogprobHead):
                yield dense_weight(module.weight)
            elif hasattr(module, "river_experts"):
                for weight in (module.gate_up_proj, module.down_proj):
                    yield dense_weight(matrices_of(weight, 0, 1))[0]

    def _fuse_attention(self) -> None:
        """Puts one module in the place of each attention whose projections can be one product."""
        running, rotary = self._pass, getattr(self._model.model, "rotary_emb", None)
        if rotary is None:
            return
        running.segments, running.packing = (Segment(NO_ADAPTER, 0, 7),), make_packing([7])
        for name, module in list(self._model.named_modules()):
            ours = fused(module, name, running, rotary)
            if ours is not None:
                parent_name, _, kind = name.rpartition(".")
                setattr(self._model.get_submodule(parent_name), kind, ours)
        running.segments, running.packing = (), None

    def _routed_experts(self) -> RoutedExperts | None:
        modules = [module for module in self._model.modules() if isinstance(module, BySegment)]
        routers: list[Any] = [module.router for module in modules]
        shapes = {(len(router.weight), router.top_k) for router in routers}
        if len(shapes) != 1 or any(module.renormalise is None for module in modules):
            return None
        ((experts, per_token),) = shapes
        return RoutedExperts(experts, len(routers), per_token)

    def token_logprobs(
        self, batch: PackedBatch, slots: Sequence[SlotPairs]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets, in their shape, [T] or [T, K], and the entropy [T].

        `batch.segments` name `slots` by index. Backward adds to the gradients of their pairs, unless grad mode is off.
        """
        running = self._pass
        running.segments, running.slots = batch.segments, slots
        running.packing, running.routing = batch.packing, batch.routing
        try:
            return self._network(batch)
        finally:
            running.segments, running.slots = (), ()
            running.packing, running.routing = None, None


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
    return module.river_experts(
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
    kinds: tuple[tuple[str, str, Factor], ...] = (
        ("gate_up_proj", f"{name}.base_layer", "a"),
        ("down_proj", name, "b"),
    )
    for kind, prefix, outer in kinds:
        experts, outputs, inputs = getattr(module, kind).shape
        target = f"{'.'.join(name.split('.')[-2:])}.{kind}"
        sites.append(
            Site(
                f"{name}.{kind}",
                Group.MLP,
                inputs,
                outputs,
                PEFT_ROOT + prefix,
                target,
                experts,
                outer,
            )
        )
    return sites


def _linear_site(name: str, linear: nn.Linear | StoredLinear, group: Group, target: str) -> Site:
    prefix = PEFT_ROOT + name
    return Site(name, group, linear.in_features, linear.out_features, prefix, target)
