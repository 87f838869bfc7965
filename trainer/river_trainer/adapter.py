"""One run's LoRA adapter as flat float32 memory: weights, moments and gradients lie each in one buffer of one layout.

A whole adapter is then copied, moved, added, measured or stepped by one call, whatever its rank and however many sites
it has. Where the model computes in another precision, a copy of the weights in that lies beside them: whoever changes
the weights writes it, and passes read nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from river_kernels import LoraPair
from river_trainer.devices import HOST, Arrival, Home, leaving
from river_trainer.protocol import AdapterShape, ExpertLayout
from river_trainer.sites import Factor, Site, trained_sites


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of `shape` at `offset`, in elements, of a flat buffer."""

    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where A and B of every trained site lie: `<site>.lora_A` [r, in] or [E, r, in]; B [out, r] or [E, out, r].

    What the experts share has a one in the place of E.
    """

    sites: tuple[Site, ...]
    rank: int
    experts: ExpertLayout
    places: Mapping[str, Place]
    size: int
    """Elements of a whole buffer."""


@lru_cache(maxsize=1024)
def layout_of(sites: tuple[Site, ...], shape: AdapterShape) -> Layout:
    """The layout of an adapter of `shape` on a base model with `sites`; A and B of a site are neighbours."""
    trained = trained_sites(sites, shape)
    places: dict[str, Place] = {}
    offset = 0
    for name, dimensions in tensor_shapes(trained, shape).items():
        places[name] = Place(offset, dimensions)
        offset += math.prod(dimensions)
    return Layout(trained, shape.rank, shape.expert_layout, places, offset)


class FlatTensors:
    """A flat buffer [N], float32 but for copies of weights, and its tensors by name, which are views of it.

    A buffer that has come from a device may still be on its way: `wait` before reading it on the host.
    """

    def __init__(self, layout: Layout, flat: torch.Tensor, arrival: Arrival | None = None) -> None:
        assert flat.shape == (layout.size,)
        self.layout = layout
        self.flat = flat
        self._arrival = arrival
        pieces = flat.split([math.prod(place.shape) for place in layout.places.values()])
        self.tensors = {
            name: piece.view(place.shape)
            for (name, place), piece in zip(layout.places.items(), pieces, strict=True)
        }

    @classmethod
    def zeros(cls, layout: Layout, device: torch.device = HOST) -> FlatTensors:
        return cls(layout, torch.zeros(layout.size, device=device))

    def clone(self) -> FlatTensors:
        return FlatTensors(self.layout, self.flat.clone())

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over other values for every tensor."""
        assert tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def on(self, device: torch.device) -> FlatTensors:
        """The same values there: these very ones if they are there already, which nobody uses here any more if not."""
        if self.flat.device == device:
            return self
        if device.type == "cpu":
            return FlatTensors(self.layout, *leaving(self.flat))
        self.wait()
        return FlatTensors(self.layout, self.flat.to(device, non_blocking=True))

    def host_copy(self) -> FlatTensors:
        """The values as they are now, on the host, for whoever reads them while these change."""
        self.wait()
        flat = self.flat if self.flat.is_cpu else self.flat.clone()
        return FlatTensors(self.layout, *leaving(flat))

    def wait(self) -> None:
        """Blocks until the values are here."""
        if self._arrival is not None:
            self._arrival.synchronize()
            self._arrival = None


class Adapter:
    """The weights of one adapter and what they mean; `copy` has them in the precision that passes read, if another."""

    def __init__(
        self, shape: AdapterShape, weights: FlatTensors, copy: FlatTensors | None = None
    ) -> None:
        self.shape = shape
        self.weights = weights
        self.copy = copy
        self.scale = shape.alpha / shape.rank

    @property
    def layout(self) -> Layout:
        return self.weights.layout

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weights.tensors

    @property
    def changes_nothing(self) -> bool:
        """Whether the base model computes with it what it computes without, as with a new one."""
        outer = (tensor for name, tensor in self.tensors.items() if name.endswith("lora_B"))
        return not any(bool(tensor.any()) for tensor in outer)

    def at(self, home: Home) -> Adapter:
        """The adapter where passes can read it."""
        weights = self.weights.on(home.device)
        copy = FlatTensors(self.layout, weights.flat.to(home.dtype)) if home.has_copies else None
        return Adapter(self.shape, weights, copy)

    def pairs(self, gradient: FlatTensors | None) -> dict[str, LoraPair]:
        """What the adapter does at each of its sites, by name; backward passes add to `gradient`."""
        grads = {} if gradient is None else gradient.tensors
        experts = self.layout.experts
        pairs: dict[str, LoraPair] = {}
        for site in self.layout.sites:
            a, b = a_name(site), b_name(site)
            read = self.weights if self.copy is None or site.is_float32 else self.copy
            pairs[site.name] = LoraPair(
                read.tensors[a],
                read.tensors[b],
                self.scale,
                grads.get(a),
                grads.get(b),
                shares_a=site.shares("a", experts),
                shares_b=site.shares("b", experts),
            )
        return pairs

    def host_copy(self) -> Adapter:
        """The adapter as it is now, on the host, for whoever reads it while the run goes on."""
        return Adapter(self.shape, self.weights.host_copy())


def adapter_from(
    sites: tuple[Site, ...], shape: AdapterShape, tensors: Mapping[str, torch.Tensor]
) -> Adapter:
    """An adapter with these values, by name."""
    weights = FlatTensors.zeros(layout_of(sites, shape))
    weights.fill(tensors)
    return Adapter(shape, weights)


def new_adapter(sites: tuple[Site, ...], shape: AdapterShape) -> Adapter:
    """An adapter that changes nothing yet: A uniform as PEFT draws it, from the seed, and B zero."""
    generator = torch.Generator().manual_seed(shape.seed)
    weights = FlatTensors.zeros(layout_of(sites, shape))
    for site in weights.layout.sites:
        bound = 1.0 / math.sqrt(site.inputs)  # Kaiming's with a = sqrt(5)
        weights.tensors[a_name(site)].uniform_(-bound, bound, generator=generator)
    return Adapter(shape, weights)


def a_name(site: Site) -> str:
    return f"{site.name}.lora_A"


def b_name(site: Site) -> str:
    return f"{site.name}.lora_B"


def tensor_shapes(sites: tuple[Site, ...], shape: AdapterShape) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an adapter on `sites`, whatever else `shape` says it changes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        of_a, of_b = (_experts_of(site, factor, shape.expert_layout) for factor in ("a", "b"))
        shapes[a_name(site)] = (*of_a, shape.rank, site.inputs)
        shapes[b_name(site)] = (*of_b, site.outputs, shape.rank)
    return shapes


def _experts_of(site: Site, factor: Factor, layout: ExpertLayout) -> tuple[()] | tuple[int]:
    if site.experts is None:
        return ()
    return (1,) if site.shares(factor, layout) else (site.experts,)
