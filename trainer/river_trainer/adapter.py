"""The float32 master weights of one run's LoRA adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from river_kernels import LoraPair
from river_trainer.protocol import AdapterShape
from river_trainer.sites import Site, trained_sites


class Adapter:
    """A and B of every trained site: `tensors["<site>.lora_A"]`, [r, in] or [E, r, in]; B [out, r] or [E, out, r].

    They are autograd leaves that the optimizer changes in place.
    """

    def __init__(
        self, sites: tuple[Site, ...], shape: AdapterShape, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.shape = shape
        self.sites = trained_sites(sites, shape)
        self.tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        assert self.tensors.keys() == tensor_shapes(self.sites, shape.rank).keys()
        scale = shape.alpha / shape.rank
        self._pairs = {
            site.name: LoraPair(self.tensors[a_name(site)], self.tensors[b_name(site)], scale)
            for site in self.sites
        }

    def pair(self, site_name: str) -> LoraPair | None:
        """What the adapter does at a site, None if it leaves it alone."""
        return self._pairs.get(site_name)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over other values for every tensor."""
        assert tensors.keys() == self.tensors.keys()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[name])


def new_adapter(sites: tuple[Site, ...], shape: AdapterShape) -> Adapter:
    """An adapter that changes nothing yet: A uniform as PEFT draws it, from the seed, and B zero."""
    generator = torch.Generator().manual_seed(shape.seed)
    tensors: dict[str, torch.Tensor] = {}
    for site in trained_sites(sites, shape):
        shapes = tensor_shapes((site,), shape.rank)
        bound = 1.0 / math.sqrt(site.inputs)  # Kaiming's with a = sqrt(5)
        a = torch.empty(shapes[a_name(site)]).uniform_(-bound, bound, generator=generator)
        tensors[a_name(site)] = a
        tensors[b_name(site)] = torch.zeros(shapes[b_name(site)])
    return Adapter(sites, shape, tensors)


def a_name(site: Site) -> str:
    return f"{site.name}.lora_A"


def b_name(site: Site) -> str:
    return f"{site.name}.lora_B"


def tensor_shapes(sites: tuple[Site, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an adapter of `rank` on `sites`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        lead = () if site.experts is None else (site.experts,)
        shapes[a_name(site)] = (*lead, rank, site.inputs)
        shapes[b_name(site)] = (*lead, site.outputs, rank)
    return shapes
