"""The files of one adapter: which tensors a model can take, fetching them, checking them, making a random one.

PEFT's layout, loaded unchanged by PEFT and by vLLM. With rank R and E experts:

    …layers.N.self_attn.{q,k,v,o}_proj.lora_A [R, in], lora_B [out, R]
    …layers.N.mlp.experts.base_layer.lora_A [E R, H] (expert-major), lora_B [2 I, R E] (as [out, R, E]): gate and up
    …layers.N.mlp.experts.lora_A [E R, I], lora_B [H, R E]: down
    …lm_head.lora_A [R, H], lora_B [V, R]

Anything else is refused: vLLM would skip a tensor it does not know without a word, and answer from the base model.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
import obstore.exceptions
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from river_engine.errors import AdapterNotFound, InvalidAdapter
from river_engine.limits import ADAPTER_CONFIG_MAX_BYTES
from river_engine.protocol import EXPERT_LAYOUT_METADATA, SHARED_OUTER
from river_engine.stores import open_store

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
_EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Target:
    """A module an adapter may change: inputs, outputs, and how many experts its two tensors hold.

    `outer` is the factor of the model's width, which experts may share.
    """

    inputs: int
    outputs: int
    experts: int = 1
    outer: Literal["A", "B"] | None = None

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B."""
        return (self.experts * rank, self.inputs), (self.outputs, self.experts * rank)


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What of PEFT's `adapter_config.json` decides whether the adapter means what its tensors say."""

    peft_type: str
    r: int
    lora_alpha: float
    bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None


def model_targets(config: Any) -> dict[str, Target]:
    """Modules by name, for a transformers config of a model with plain attention, dense or with routed experts."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head, config.num_key_value_heads * head
    experts = next(
        (count for name in _EXPERT_COUNT_NAMES if (count := getattr(config, name, None))), 0
    )
    targets = {"lm_head": Target(hidden, config.vocab_size)}
    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn."
        targets[attention + "q_proj"] = Target(hidden, queries)
        targets[attention + "k_proj"] = Target(hidden, keys)
        targets[attention + "v_proj"] = Target(hidden, keys)
        targets[attention + "o_proj"] = Target(queries, hidden)
        if experts:
            inner, name = config.moe_intermediate_size, f"model.layers.{layer}.mlp.experts"
            targets[name + ".base_layer"] = Target(hidden, 2 * inner, experts, "A")
            targets[name] = Target(inner, hidden, experts, "B")
    return targets


async def fetch_adapter(location: str, directory: Path) -> None:
    """Puts the two files of the adapter at the URL `location` into `directory`, which must not exist.

    Files of this machine are linked where possible: the bytes stay when their owner deletes its name for them. What is
    raised goes to clients and names no location; the cause does.

    Raises:
        AdapterNotFound: there is no such adapter.
        InvalidAdapter: `location` is not a URL of a store.
    """
    directory.mkdir(parents=True)
    url = urlsplit(location)
    if url.scheme == "file":
        source = Path(unquote(url.path))
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            await asyncio.to_thread(_link_or_copy, source / name, directory / name)
        return
    try:
        store = open_store(location)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            answer = await obstore.get_async(store, name)
            with (directory / name).open("wb") as file:
                async for chunk in answer.stream():
                    await asyncio.to_thread(file.write, chunk)
    except (FileNotFoundError, obstore.exceptions.NotFoundError) as error:
        raise AdapterNotFound("its files are not there") from error
    except (ValueError, obstore.exceptions.BaseError) as error:
        raise InvalidAdapter(f"its files cannot be read: {type(error).__name__}") from error


def check_adapter(directory: Path, targets: dict[str, Target], *, rank_max: int) -> None:
    """Everything that can be known about an adapter before its weights are read.

    Raises:
        InvalidAdapter: it is not a plain LoRA of rank at most `rank_max` on `targets`; the message says what is wrong.
    """
    config = _read_config(directory / CONFIG_FILE)
    if not 1 <= config.r <= rank_max:
        raise InvalidAdapter(f"rank {config.r} is not between 1 and {rank_max}")
    modules: dict[str, set[str]] = {}
    for name, shape in _tensor_shapes(directory / WEIGHTS_FILE).items():
        match = _TENSOR_NAME.match(name)
        target = targets.get(match["module"]) if match else None
        if match is None or target is None:
            raise InvalidAdapter(
                f"tensor {name}: not something an adapter of this model can change"
            )
        expected = target.shapes(config.r)[0 if match["factor"] == "A" else 1]
        if shape != expected:
            raise InvalidAdapter(f"tensor {name}: shape {shape}, expected {expected}")
        modules.setdefault(match["module"], set()).add(match["factor"])
    _check_complete(modules)


def write_random_adapter(
    directory: Path,
    targets: dict[str, Target],
    *,
    rank: int,
    seed: int,
    std: float,
    shared_experts: bool = False,
) -> None:
    """An adapter with both factors random, so that it moves every target by about `rank * std**2` per unit of input."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, target in targets.items():
        for factor, shape in zip("AB", target.shapes(rank), strict=True):
            tensor = torch.randn(shape, generator=generator) * std
            if shared_experts and factor == target.outer:
                # Of A the expert is the slowest index, of B the fastest.
                one = tensor[:rank] if factor == "A" else tensor[:, :: target.experts]
                tensor = (
                    one.repeat(target.experts, 1)
                    if factor == "A"
                    else one.repeat_interleave(target.experts, 1)
                )
            tensors[f"{_PREFIX}{module}.lora_{factor}.weight"] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {EXPERT_LAYOUT_METADATA: SHARED_OUTER} if shared_experts else None
    save_file(tensors, directory / WEIGHTS_FILE, metadata)
    names = {module.rpartition(".")[2] for module in targets} - {"experts", "base_layer"}
    has_experts = any(target.experts > 1 for target in targets.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(names),
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        if has_experts
        else None,
    }
    (directory / CONFIG_FILE).write_bytes(msgspec.json.encode(config))


def _read_config(path: Path) -> AdapterConfig:
    try:
        if path.stat().st_size > ADAPTER_CONFIG_MAX_BYTES:
            raise InvalidAdapter(f"{CONFIG_FILE} is over {ADAPTER_CONFIG_MAX_BYTES} bytes")
        config = msgspec.json.decode(path.read_bytes(), type=AdapterConfig)
    except OSError as error:
        raise InvalidAdapter(f"{CONFIG_FILE}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InvalidAdapter(f"{CONFIG_FILE}: {error}") from error
    refused = {
        "peft_type": config.peft_type.upper() != "LORA",
        "bias": config.bias != "none",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "rank_pattern": bool(config.rank_pattern),
        "alpha_pattern": bool(config.alpha_pattern),
        "modules_to_save": bool(config.modules_to_save),
    }
    for name, wrong in refused.items():
        if wrong:
            raise InvalidAdapter(f"{CONFIG_FILE}: {name} is not supported")
    return config


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the file's header, of at least one tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except OSError as error:
        raise InvalidAdapter(f"{WEIGHTS_FILE}: {error.strerror or 'not there'}") from error
    except SafetensorError as error:
        raise InvalidAdapter(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error
    if not shapes:
        raise InvalidAdapter(f"{WEIGHTS_FILE} holds no tensors")
    return shapes


def _check_complete(modules: dict[str, set[str]]) -> None:
    """Both factors of each module, and of each layer's experts both halves: vLLM cannot take one alone."""
    for module, factors in modules.items():
        if factors != {"A", "B"}:
            raise InvalidAdapter(f"module {module}: has only lora_{factors.pop()}")
        if module.endswith(".experts") and f"{module}.base_layer" not in modules:
            raise InvalidAdapter(f"module {module}: gate and up are missing")
        if (
            module.endswith(".experts.base_layer")
            and module.removesuffix(".base_layer") not in modules
        ):
            raise InvalidAdapter(f"module {module}: down is missing")


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except FileNotFoundError as error:
        raise AdapterNotFound(f"{source.name} is not there") from error
    except OSError:  # Another file system, or one without links.
        try:
            shutil.copyfile(source, destination)
        except FileNotFoundError as error:
            raise AdapterNotFound(f"{source.name} is not there") from error
        except OSError as error:
            raise InvalidAdapter(f"{source.name} cannot be read: {error.strerror}") from error
