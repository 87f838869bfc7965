"""The places of a base model that an adapter changes, and what PEFT calls them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from river_trainer.protocol import AdapterShape


class Group(Enum):
    """The three switches of a LoRA configuration."""

    ATTENTION = "attn"
    MLP = "mlp"
    UNEMBED = "unembed"


@dataclass(frozen=True, slots=True)
class Site:
    """One frozen matrix [outputs, inputs], or `experts` of them in one parameter [experts, outputs, inputs].

    `name` is its path in the model, `peft_prefix` what its two tensors are called in PEFT's file, `target` how
    PEFT's configuration refers to it.
    """

    name: str
    group: Group
    inputs: int
    outputs: int
    peft_prefix: str
    target: str
    experts: int | None = None


def trained_sites(sites: tuple[Site, ...], shape: AdapterShape) -> tuple[Site, ...]:
    """Those of `sites` that an adapter of this shape changes."""
    trained = {
        Group.ATTENTION: shape.train_attn,
        Group.MLP: shape.train_mlp,
        Group.UNEMBED: shape.train_unembed,
    }
    return tuple(site for site in sites if trained[site.group])
