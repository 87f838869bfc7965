"""Adapters whose experts share the factors of the model's width, as vLLM holds them: once, not once for each expert.

Checkpoints have PEFT's layout, with a copy for every expert, and say in the metadata of the weights' file that the
copies are one (`EXPERT_LAYOUT_METADATA`). An engine that is told to (`RIVER_EXPERT_LAYOUT=shared_outer`) hands vLLM its
own:

    …layers.N.mlp.experts.w1.lora_A [1, R, H], lora_B [E, I, R]: gate; w3 the same: up
    …layers.N.mlp.experts.w2.lora_A [E, R, I], lora_B [1, H, R]: down

On a GPU a slot then takes a fraction of the memory, and a load a fraction of the time; vLLM can hold adapters of one of
the layouts only.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from river_engine.adapter_files import CONFIG_FILE, WEIGHTS_FILE, Target
from river_engine.errors import InvalidAdapter
from river_engine.protocol import EXPERT_LAYOUT_METADATA, SHARED_OUTER

_PREFIX = "base_model.model."
_DIRECTORY = "shared"


def shared_directory(directory: Path) -> Path:
    """Where `write_shared` puts what it makes of the adapter in `directory`."""
    return directory / _DIRECTORY


def write_shared(directory: Path, targets: Mapping[str, Target]) -> None:
    """Writes the adapter in `directory`, which `check_adapter` has found to be one, in vLLM's layout beside it.

    Raises:
        InvalidAdapter: its experts do not share what they would have to.
    """
    destination = shared_directory(directory)
    temporary = directory / f"{_DIRECTORY}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
        metadata = file.metadata() or {}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in stored}
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        a, b = (stored[f"{_PREFIX}{module}.lora_{factor}.weight"] for factor in "AB")
        target = targets[module]
        if target.outer is None:
            parts = {module: (a, b)}
        elif metadata.get(EXPERT_LAYOUT_METADATA) != SHARED_OUTER:
            raise InvalidAdapter(
                "its experts share no factor, and this engine holds only adapters whose experts do"
            )
        else:
            parts = _of_experts(module, target, a, b)
        for name, factors in parts.items():
            for factor, tensor in zip("AB", factors, strict=True):
                tensors[f"{_PREFIX}{name}.lora_{factor}.weight"] = tensor.contiguous()
    save_file(tensors, temporary / WEIGHTS_FILE)
    shutil.copyfile(directory / CONFIG_FILE, temporary / CONFIG_FILE)
    shutil.rmtree(destination, ignore_errors=True)
    temporary.replace(destination)


def _of_experts(
    module: str, target: Target, a: torch.Tensor, b: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors that vLLM has in the place of one of PEFT's two modules of a layer's experts."""
    experts = target.experts
    a_ERI = a.unflatten(0, (experts, -1))  # noqa: N806  # the shape, in capitals
    b_EOR = b.unflatten(1, (-1, experts)).permute(2, 0, 1)  # noqa: N806
    if target.outer == "A":
        layer = module.removesuffix(".base_layer")
        gate, up = b_EOR.chunk(2, dim=1)
        shared = _one(a_ERI, module)
        return {f"{layer}.w1": (shared, gate), f"{layer}.w3": (shared.clone(), up)}
    return {f"{module}.w2": (a_ERI, _one(b_EOR, module))}


def _one(copies: torch.Tensor, module: str) -> torch.Tensor:
    if not torch.equal(copies, copies[:1].expand_as(copies)):
        raise InvalidAdapter(f"module {module}: differs from expert to expert and should not")
    return copies[:1]
