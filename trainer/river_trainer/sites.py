"""The places of a base model that an adapter changes, and what PEFT calls them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from river_trainer.protocol import AdapterShape, ExpertLayout

Factor = Literal["a", "b"]
"""Of the update B A."""


class Group(Enum):
    """The three switches of a LoRA configuration."""

    ATTENTION = "attn"
    MLP = "mlp"
    UNEMBED = "unembed"


@dataclass(frozen=True, slots=True)
class Site:
    """One frozen matrix [outputs, inputs], or `experts` of them in one parameter [experts, outputs, inputs].

    `name` is its path in the model, `peft_prefix` what its two tensors are called in PEFT's file, `target` how
    PEFT's configuration refers to it. `outer` is the factor of the model's width, which experts may share. A site that
    `is_float32` computes in that precision whatever the model's dtype.
    """

    name: str
    group: Group
    inputs: int
    outputs: int
    peft_prefix: str
    target: str
    experts: int | None = None
    outer: Factor | None = None
    is_float32: bool = False

    def shares(self, factor: Factor, layout: ExpertLayout) -> bool:
        """Whether `factor` is one for all experts."""
        return self.outer == factor and layout == "shared_outer"


def trained_sites(sites: tuple[Site, ...], shape: AdapterShape) -> tuple[Site, ...]:
    """Those of `sites` that an adapter of this shape changes."""
    trained = {
        Group.ATTENTION: shape.train_attn,
        Group.MLP: shape.train_mlp,
        Group.UNEMBED: shape.train_unembed,
    }
    return tuple(site for site in sites if trained[site.group])
