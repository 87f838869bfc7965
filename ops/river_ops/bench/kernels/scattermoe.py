"""The peer whose Triton kernels take many adapters at once: axolotl's scattermoe_lora, from its package on PyPI.

It has one rank and one scale for all: factors are padded to the largest rank, with their scales in them, and ready in
its layout. Its package is loaded without what it needs around the kernels.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N806

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from river_ops.bench.kernels.contender import AbsentError, Contender, clear_gradients, gradient_of
from river_ops.bench.kernels.grouped import stack_factors, unstacked
from river_ops.bench.kernels.workload import Factors, Workload

PACKAGES = (
    "axolotl",
    "axolotl.integrations",
    "axolotl.integrations.kernels",
    "axolotl.integrations.kernels.libs",
)
KERNELS = "axolotl.integrations.kernels.libs.scattermoe_lora.multi_lora"
CONFIGURATIONS_MAX = 6
"""Of the shapes that the peer tries for each kind of product: all of them would take minutes."""


class ScatterMoe(Contender):
    """All adapters in one call for each projection."""

    name = "scattermoe"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        if workload.cell.layout != "per_expert":
            raise AbsentError("its experts share no factors; see per_expert")
        self._kernels = load_kernels()
        sizes = workload.base.sizes
        stacks = stack_factors(workload)
        # A [groups * r, in], B [out, groups * r].
        self._factors = [
            _leaf(stacks.a1.flatten(0, 1)),
            _leaf(stacks.b1.permute(1, 0, 2).flatten(1)),
            _leaf(stacks.a2.flatten(0, 1)),
            _leaf(stacks.b2.permute(1, 0, 2).flatten(1)),
        ]
        self._rank = max(workload.cell.adapter_ranks)
        self._gate_up = workload.base.gate_up.transpose(1, 2)
        self._down = workload.base.down.transpose(1, 2)
        share = workload.cell.tokens // workload.cell.adapters
        adapters = torch.arange(workload.cell.adapters, device=workload.x_TH.device)
        self._adapter_P = adapters.repeat_interleave(share * sizes.chosen)

    def forward(self, index: int) -> torch.Tensor:
        part, workload = self.parts[index], self.workload
        sizes, kernels = workload.base.sizes, self._kernels
        a1, b1, a2, b2 = self._factors
        routing = kernels.build_multilora_routing(
            part.experts_TK.reshape(-1), self._adapter_P, sizes.experts, workload.cell.adapters
        )
        project = kernels.scatter2scatter_multilora
        z_PF = project(part.x_TH, self._gate_up, sizes.chosen, *routing, a1, b1)
        gate_PI, up_PI = z_PF.chunk(2, dim=1)
        y_PH = project(functional.silu(gate_PI) * up_PI, self._down, 1, *routing, a2, b2)
        weighted_PH = y_PH * part.weights_TK.reshape(-1, 1)
        return weighted_PH.view(*part.weights_TK.shape, sizes.hidden).sum(1)

    def gradients(self) -> list[Factors]:
        a1, b1, a2, b2 = (gradient_of(factor) for factor in self._factors)
        rank = self._rank
        first, second = (grad.unflatten(0, (-1, rank)) for grad in (a1, a2))
        of_b1, of_b2 = (grad.unflatten(1, (-1, rank)).permute(1, 0, 2) for grad in (b1, b2))
        return unstacked(self.workload, Factors(first, of_b1, second, of_b2))

    def clear_factors(self) -> None:
        clear_gradients(*self._factors)


def load_kernels() -> Any:
    """The peer's module.

    Raises:
        AbsentError: its package is not installed, or does not load.
    """
    if PACKAGES[0] not in sys.modules and importlib.util.find_spec(PACKAGES[0]) is None:
        raise AbsentError("axolotl is not installed")
    for name in PACKAGES:
        _bare_package(name)
    try:
        kernels = importlib.import_module(KERNELS)
    except (ImportError, AttributeError) as error:
        raise AbsentError(f"axolotl's kernels do not load: {error}") from error
    tuned = kernels._grouped_gram_kernel  # noqa: SLF001  # it has no other door
    every = -(-len(tuned.configs) // CONFIGURATIONS_MAX)
    tuned.configs = tuned.configs[::every]
    return kernels


def _bare_package(name: str) -> None:
    """A package with nothing but its folder: what its own `__init__` loads is not needed, and not there."""
    if name in sys.modules:
        return
    parent, _, own = name.rpartition(".")
    if parent:
        folders = [str(Path(folder) / own) for folder in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        folders = list(spec.submodule_search_locations or [])
    module = ModuleType(name)
    module.__path__ = folders
    sys.modules[name] = module


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().requires_grad_()
