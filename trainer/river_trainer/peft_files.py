"""Adapters as the files that PEFT and vLLM load: `adapter_config.json` and `adapter_model.safetensors`.

Written by us and not through PEFT, which needs the whole model for it and saves lm_head's base matrix along.

The trap in PEFT's layout of expert parameters: A is stored as [E * r, in] with the expert slowest, B as [out, r * E]
with the expert *fastest*. The two parameters of one experts module nest, so `gate_up_proj` hides under `base_layer`.

PEFT has no layout in which experts share a factor. Such an adapter is written with a copy for every expert, which means
the same, and the file's metadata says that the copies are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from river_engine.protocol import EXPERT_LAYOUT_METADATA
from river_trainer.adapter import Adapter, Layout, a_name, b_name, new_adapter
from river_trainer.errors import InvalidTaskError
from river_trainer.protocol import AdapterShape, ExpertLayout
from river_trainer.sites import Factor, Group, Site, trained_sites

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_METADATA = "__metadata__"
_LENGTH_BYTES = 8


_FACTORS: dict[str, Factor] = {"lora_A": "a", "lora_B": "b"}
_NAMES = {"a": a_name, "b": b_name}


class _Metadata(msgspec.Struct, frozen=True):
    expert_layout: ExpertLayout = msgspec.field(name=EXPERT_LAYOUT_METADATA, default="per_expert")


class _Header(msgspec.Struct, frozen=True):
    """What of a safetensors file's header is not about tensors."""

    metadata: _Metadata = msgspec.field(name=_METADATA, default=_Metadata())


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What of PEFT's configuration decides about the tensors."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_dora: bool = False
    use_rslora: bool = False


def export_adapter(adapter: Adapter, *, base_model: str) -> dict[str, bytes]:
    """The files of `adapter`, which is on the host, by name. A function of it alone; several threads may call it."""
    adapter.weights.wait()
    config = msgspec.json.encode(_config(adapter, base_model))
    return {
        CONFIG_FILE: msgspec.json.format(config, indent=2),
        WEIGHTS_FILE: _weights_file(adapter),
    }


def _weights_file(adapter: Adapter) -> bytes:
    """The tensors as safetensors has them: a header of a length that comes first, and what it describes.

    Written here and not by the library, which copies everything three times and looks for shared memory: every step
    of every run is written, and engines wait for it.
    """
    parts: list[bytes | memoryview] = [_weights_header(adapter.layout)]
    for site in adapter.layout.sites:
        a, b = (adapter.tensors[name(site)] for name in (a_name, b_name))
        if site.experts is not None:
            a = a.expand(site.experts, -1, -1).contiguous()
            b = b.expand(site.experts, -1, -1).permute(1, 2, 0).contiguous()  # (out, r, E)
        parts += (tensor.numpy().data.cast("B") for tensor in (a, b))
    return b"".join(parts)


@lru_cache(maxsize=256)
def _weights_header(layout: Layout) -> bytes:
    header: dict[str, Any] = {_METADATA: {"format": "pt", EXPERT_LAYOUT_METADATA: layout.experts}}
    end = 0
    for site in layout.sites:
        experts = site.experts or 1
        shapes = {
            "A": (experts * layout.rank, site.inputs),
            "B": (site.outputs, layout.rank * experts),
        }
        for factor, shape in shapes.items():
            start, end = end, end + 4 * math.prod(shape)
            header[f"{site.peft_prefix}.lora_{factor}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": (start, end),
            }
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def import_adapter(
    files: Mapping[str, bytes], sites: tuple[Site, ...], *, seed: int, complete: bool = True
) -> tuple[AdapterShape, dict[str, torch.Tensor]]:
    """The shape and the tensors of an adapter in PEFT's layout; PEFT keeps no seed.

    An adapter made elsewhere may leave out some places of a group, the key projections for one. Unless it has to be
    `complete` they are as in a new adapter, which changes nothing there either. Thread-safe.

    Raises:
        InvalidTaskError: a file is missing or broken, or the adapter is none that this base model can train.
    """
    try:
        config = msgspec.json.decode(files[CONFIG_FILE], type=PeftConfig)
        stored = load(files[WEIGHTS_FILE])
        expert_layout = _expert_layout(files[WEIGHTS_FILE])
    except KeyError as error:
        raise InvalidTaskError(f"the checkpoint has no file {error}") from error
    except (msgspec.DecodeError, SafetensorError) as error:
        raise InvalidTaskError(f"the checkpoint's adapter cannot be read: {error}") from error
    if (
        config.peft_type != "LORA"
        or config.use_dora
        or config.use_rslora
        or config.rank_pattern
        or config.alpha_pattern
    ):
        raise InvalidTaskError("the checkpoint's adapter is not a plain LoRA of one rank and alpha")
    present = {site.group for site in sites if _is_changed(site, stored)}
    shape = AdapterShape(
        rank=config.r,
        alpha=config.lora_alpha,
        seed=seed,
        train_attn=Group.ATTENTION in present,
        train_mlp=Group.MLP in present,
        train_unembed=Group.UNEMBED in present,
        expert_layout=expert_layout,
    )
    absent = frozenset(
        site.name for site in trained_sites(sites, shape) if not _is_changed(site, stored)
    )
    if complete or not absent:
        return shape, _unpack(stored, trained_sites(sites, shape), shape)
    changed = tuple(site for site in trained_sites(sites, shape) if site.name not in absent)
    new = new_adapter(sites, shape).tensors
    tensors = {name: tensor.detach() for name, tensor in new.items()}
    return shape, tensors | _unpack(stored, changed, shape)


def _expert_layout(weights_file: bytes) -> ExpertLayout:
    """What the metadata of a readable file says; a file of PEFT's own says nothing."""
    length = int.from_bytes(weights_file[:_LENGTH_BYTES], "little")
    header = weights_file[_LENGTH_BYTES : _LENGTH_BYTES + length]
    return msgspec.json.decode(header, type=_Header).metadata.expert_layout


def _is_changed(site: Site, stored: Mapping[str, torch.Tensor]) -> bool:
    return any(f"{site.peft_prefix}.lora_{factor}.weight" in stored for factor in "AB")


def _unpack(
    stored: Mapping[str, torch.Tensor], sites: tuple[Site, ...], shape: AdapterShape
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    known: set[str] = set()
    for site in sites:
        for key, factor in _FACTORS.items():
            stored_name = f"{site.peft_prefix}.{key}.weight"
            known.add(stored_name)
            if stored_name not in stored:
                raise InvalidTaskError(f"the checkpoint's adapter lacks {stored_name}")
            tensor = stored[stored_name].float()
            flat = _flat_shape(site, factor, shape.rank)
            if tuple(tensor.shape) != flat:
                raise InvalidTaskError(
                    f"{stored_name} has the shape {tuple(tensor.shape)}, {flat} is this base model's"
                )
            if site.experts is not None:
                tensor = _by_expert(tensor, site.experts, factor)
                if site.shares(factor, shape.expert_layout):
                    tensor = _shared(tensor, stored_name)
            tensors[_NAMES[factor](site)] = tensor.contiguous()
    unknown = sorted(stored.keys() - known)
    if unknown:
        raise InvalidTaskError(
            f"the checkpoint's adapter changes {unknown[0]}, which is not trained here"
        )
    return tensors


def _flat_shape(site: Site, factor: Factor, rank: int) -> tuple[int, int]:
    """The shape in PEFT's file: the experts lie along the rank."""
    rows = rank * (site.experts or 1)
    return (rows, site.inputs) if factor == "a" else (site.outputs, rows)


def _by_expert(tensor: torch.Tensor, experts: int, factor: Factor) -> torch.Tensor:
    """PEFT's flat tensor as [E, r, in] or [E, out, r]."""
    if factor == "a":
        return tensor.unflatten(0, (experts, -1))
    return tensor.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _shared(tensor: torch.Tensor, stored_name: str) -> torch.Tensor:
    """The one that all experts have."""
    if not torch.equal(tensor, tensor[:1].expand_as(tensor)):
        raise InvalidTaskError(f"{stored_name} differs from expert to expert and should not")
    return tensor[:1]


def _config(adapter: Adapter, base_model: str) -> dict[str, Any]:
    modules = sorted({site.target for site in adapter.layout.sites if site.experts is None})
    parameters = sorted({site.target for site in adapter.layout.sites if site.experts is not None})
    alpha = adapter.shape.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.shape.rank,
        # PEFT takes any number; vLLM asks for an integer where it is one.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }
