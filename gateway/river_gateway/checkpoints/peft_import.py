"""Adapters that PEFT made elsewhere, brought into the one form that trainers, engines, PEFT and vLLM all load.

That form is a plain LoRA of one rank and one alpha, without anything of the base model. What is brought into it, with
every number as it was:

* a rank of its own per module (`rank_pattern`): smaller ones are filled up with zeros, which add nothing;
* a scale of its own per module (`alpha_pattern`, rslora): the most common one becomes alpha, the others go into B;
* experts one by one (`mlp.experts.7.gate_proj`): gathered into the two tensors of a layer; gate and up, which share
  one there, become a block of twice the rank;
* weights of the base beside the adapter (`lm_head.base_layer.weight`): left out.

With rank R and E experts the tensors of a layer's experts are A [E R, in], expert by expert, and B [out, R E], of which
the expert is the fastest index. Whether the names and sizes are those of the base is seen when it is loaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np

from river_gateway.checkpoints.safetensors_file import (
    DTYPES,
    NewTensor,
    TensorPlace,
    as_float32,
    read_tensor,
)
from river_gateway.errors import InvalidFieldError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from river_gateway.checkpoints.safetensors_file import Array

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_BASE_WEIGHT = re.compile(r"base_model\.model\..+\.base_layer\.(weight|bias)")
_MODULE = re.compile(r"(?:.+\.)?layers\.\d+\.(?P<part>\w*attn|mlp)\.[\w.]+|lm_head")
_EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj")
_LITERAL = re.compile(r"\.?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    """What of PEFT's configuration decides about the numbers."""

    peft_type: str
    r: int
    lora_alpha: float
    bias: str = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    trainable_token_indices: Any = None


@dataclass(frozen=True, slots=True)
class ImportedShape:
    """What an adapter changes; the update is scaled by `alpha / rank`."""

    rank: int
    alpha: float
    train_attn: bool
    train_mlp: bool
    train_unembed: bool


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """An adapter in our form: its shape, its configuration, and its tensors, which are made one by one."""

    shape: ImportedShape
    config: bytes
    tensors: dict[str, NewTensor]


@dataclass(frozen=True, slots=True)
class _Factors:
    """A module's tensors as stored: A [E r, in] and B [out, r E]; `experts` E is one without experts."""

    module: str
    rank: int
    scale: float
    a: TensorPlace
    b: TensorPlace
    experts: int = 1


@dataclass(frozen=True, slots=True)
class _Target:
    """A module of the result. Several `sources` are one per expert (of down), or a gate and an up per expert."""

    module: str
    sources: tuple[_Factors, ...]
    parts: int = 1

    @property
    def rank(self) -> int:
        """The least rank that holds all sources."""
        return self.parts * max(source.rank for source in self.sources)


def plan_import(
    encoded_config: bytes, places: Mapping[str, TensorPlace], file: IO[bytes], *, base_model: str
) -> ImportPlan:
    """How the adapter in `file` becomes one of ours; the file stays open until the tensors are made.

    Raises:
        InvalidFieldError: it is no LoRA that can be brought into our form without loss; says what is wrong.
    """
    config = _read_config(encoded_config)
    targets = _targets(config, places)
    rank = max(target.rank for target in targets)
    scales = Counter(source.scale for target in targets for source in target.sources)
    scale = scales.most_common(1)[0][0]
    tensors: dict[str, NewTensor] = {}
    for target in targets:
        stem = f"{_PREFIX}{target.module}.lora_"
        tensors[f"{stem}A.weight"] = _new_a(target, rank, file)
        tensors[f"{stem}B.weight"] = _new_b(target, rank, scale, file)
    modules = [target.module for target in targets]
    shape = ImportedShape(
        rank=rank,
        alpha=_tidy(scale * rank),
        train_attn=any("attn." in module for module in modules),
        train_mlp=any(".mlp." in module for module in modules),
        train_unembed="lm_head" in modules,
    )
    return ImportPlan(shape, _our_config(shape, modules, base_model), tensors)


# ---- What it is ------------------------------------------------------------------------------------------------------


def _read_config(encoded: bytes) -> _Config:
    try:
        raw = msgspec.json.decode(encoded, type=dict[str, Any])
        config = msgspec.convert(raw, _Config)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise _wrong(CONFIG_FILE, str(error)) from error
    init = config.init_lora_weights
    refused = {
        "peft_type": config.peft_type != "LORA",
        "bias": config.bias != "none",
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        # Other inits change the base too, which would have to come along.
        "init_lora_weights": isinstance(init, str) and init.lower() not in _HARMLESS_INITS,
        "modules_to_save": bool(config.modules_to_save),
        "layer_replication": bool(config.layer_replication),
        "alora_invocation_tokens": bool(config.alora_invocation_tokens),
        "trainable_token_indices": bool(config.trainable_token_indices),
    }
    # DoRA, QALoRA and whatever comes: variants of LoRA that the tensors alone do not describe.
    variants = {name for name in raw if name.startswith("use_")} - {"use_rslora"}
    refused |= {name: bool(raw[name]) for name in variants}
    for name, is_refused in refused.items():
        if is_refused:
            raise _wrong(CONFIG_FILE, f"{name} is {raw[name]!r}; only a plain LoRA can be imported")
    if config.r < 1 or not (config.lora_alpha > 0 and math.isfinite(config.lora_alpha)):
        message = f"r is {config.r} and lora_alpha {config.lora_alpha:g}; both must be positive"
        raise _wrong(CONFIG_FILE, message)
    return config


def _targets(config: _Config, places: Mapping[str, TensorPlace]) -> list[_Target]:
    """Every module that the adapter changes, in the order of its names."""
    whole: list[_Target] = []
    by_layer: dict[str, dict[tuple[str, int], _Factors]] = {}
    for module, factors in sorted(_pairs(places).items()):
        expert = _EXPERT.fullmatch(module)
        found = _factors(config, module, factors)
        if expert is None:
            whole.append(_Target(module, (found,)))
        else:
            key = expert["part"], int(expert["number"])
            by_layer.setdefault(expert["layer"], {})[key] = found
    for layer, experts in by_layer.items():
        whole += _gathered(layer, experts)
    _check_halves({target.module for target in whole})
    return whole


def _pairs(places: Mapping[str, TensorPlace]) -> dict[str, dict[str, TensorPlace]]:
    """A and B of each module."""
    pairs: dict[str, dict[str, TensorPlace]] = {}
    for name, place in places.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            if _BASE_WEIGHT.fullmatch(name):
                continue
            raise _wrong(WEIGHTS_FILE, f"tensor {name}: only lora_A and lora_B can be imported")
        if _MODULE.fullmatch(match["module"]) is None:
            raise _wrong(
                WEIGHTS_FILE,
                f"tensor {name}: only attention, MLPs, experts and lm_head can be changed",
            )
        if place.dtype not in DTYPES:
            raise _wrong(
                WEIGHTS_FILE, f"tensor {name}: is {place.dtype}, none of {', '.join(DTYPES)}"
            )
        if len(place.shape) != 2 or 0 in place.shape:  # noqa: PLR2004 - rows and columns
            raise _wrong(WEIGHTS_FILE, f"tensor {name}: the shape {place.shape} is no matrix")
        pairs.setdefault(match["module"], {})[match["factor"]] = place
    if not pairs:
        raise _wrong(WEIGHTS_FILE, "there is no lora_A or lora_B in it")
    for module, factors in pairs.items():
        if len(factors) == 1:
            raise _wrong(WEIGHTS_FILE, f"module {module}: has only lora_{factors.popitem()[0]}")
    return pairs


def _factors(config: _Config, module: str, factors: Mapping[str, TensorPlace]) -> _Factors:
    """A module's tensors, with their rank and scale as PEFT would find them."""
    a, b = factors["A"], factors["B"]
    # PEFT wraps the two parameters of an experts module one in the other, and matches their own names.
    name = module
    is_fused = module.endswith((".experts", ".experts.base_layer"))
    if is_fused:
        layer = module.removesuffix(".base_layer")
        name = f"{layer}.down_proj" if layer == module else f"{layer}.gate_up_proj"
    rank = _pattern(config.rank_pattern, "rank_pattern", name, config.r)
    alpha = _pattern(config.alpha_pattern, "alpha_pattern", name, config.lora_alpha)
    if rank < 1 or not (alpha > 0 and math.isfinite(alpha)):
        message = f"module {module}: rank {rank} and alpha {alpha:g} must be positive"
        raise _wrong(CONFIG_FILE, message)
    rows = a.shape[0]
    experts = rows // rank if is_fused else 1
    if rows != experts * rank or b.shape[1] != rows or experts < 1:
        raise _wrong(
            WEIGHTS_FILE,
            f"module {module}: lora_A {a.shape} and lora_B {b.shape} do not fit the rank {rank}",
        )
    scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return _Factors(module, rank, scale, a, b, experts)


def _pattern(patterns: Mapping[str, Any] | None, field: str, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that means a module.

    PEFT's patterns are regular expressions. A stranger's are not run here, which could take for ever: those that only
    name a module or the end of its name are understood, and PEFT writes no others.
    """
    found = None
    for pattern, value in (patterns or {}).items():
        literal = pattern.removeprefix("^").removesuffix("$").removeprefix(".*").replace("\\.", ".")
        if _LITERAL.fullmatch(literal) is None:
            raise _wrong(CONFIG_FILE, f"{field}: {pattern!r} is more than the end of a name")
        if found is None and f".{name}".endswith(f".{literal.removeprefix('.')}"):
            found = value
    return otherwise if found is None else found


def _gathered(layer: str, experts: Mapping[tuple[str, int], _Factors]) -> list[_Target]:
    """The two tensors' worth of a layer whose experts are stored one by one."""
    count = 1 + max(number for _, number in experts)
    for number in range(count):
        for part in ("gate", "up", "down"):
            if (part, number) not in experts:
                raise _wrong(WEIGHTS_FILE, f"module {layer}.{number}.{part}_proj: is missing")
    numbers = range(count)
    both = [experts[part, number] for number in numbers for part in ("gate", "up")]
    down = [experts["down", number] for number in numbers]
    for sources in (both, down):
        for source in sources:
            sizes = source.a.shape[1], source.b.shape[0], source.a.dtype, source.b.dtype
            first = sources[0]
            if sizes != (first.a.shape[1], first.b.shape[0], first.a.dtype, first.b.dtype):
                message = f"module {source.module}: is not like {first.module}"
                raise _wrong(WEIGHTS_FILE, message)
    return [_Target(f"{layer}.base_layer", tuple(both), parts=2), _Target(layer, tuple(down))]


def _check_halves(modules: set[str]) -> None:
    """Engines take the two tensors of a layer's experts together or not at all."""
    for module in sorted(modules):
        is_gate_up = module.endswith(".experts.base_layer")
        if not (is_gate_up or module.endswith(".experts")):
            continue
        other = module.removesuffix(".base_layer") if is_gate_up else f"{module}.base_layer"
        if other not in modules:
            missing = "down_proj is" if is_gate_up else "gate and up are"
            raise _wrong(WEIGHTS_FILE, f"module {module}: its experts' {missing} missing")


# ---- What it becomes -------------------------------------------------------------------------------------------------


def _new_a(target: _Target, rank: int, file: IO[bytes]) -> NewTensor:
    first = target.sources[0]
    experts = _experts(target)
    shape = experts * rank, first.a.shape[1]

    def make() -> Array:
        filled = np.zeros((experts, rank, shape[1]), DTYPES[first.a.dtype])
        for source, slots, place in _slots(target, rank):
            stored = read_tensor(file, source.a)
            filled[place, slots] = stored.reshape(source.experts, source.rank, -1)
        return filled.reshape(shape)

    return NewTensor(first.a.dtype, shape, make)


def _new_b(target: _Target, rank: int, scale: float, file: IO[bytes]) -> NewTensor:
    first = target.sources[0]
    experts = _experts(target)
    outputs = first.b.shape[0]
    shape = target.parts * outputs, rank * experts
    factors = {source.module: source.scale / scale for source in target.sources}
    # Moving numbers about keeps their type; multiplying them does not.
    is_scaled = any(factor != 1.0 for factor in factors.values())
    dtype = "F32" if is_scaled else first.b.dtype

    def make() -> Array:
        filled = np.zeros((target.parts, outputs, rank, experts), DTYPES[dtype])
        for index, (source, slots, place) in enumerate(_slots(target, rank)):
            stored = read_tensor(file, source.b)
            if is_scaled:
                stored = as_float32(stored, source.b.dtype) * np.float32(factors[source.module])
            part = index % target.parts
            filled[part, :, slots, place] = stored.reshape(outputs, source.rank, source.experts)
        return filled.reshape(shape)

    return NewTensor(dtype, shape, make)


def _experts(target: _Target) -> int:
    return sum(source.experts for source in target.sources) // target.parts


def _slots(target: _Target, rank: int) -> Sequence[tuple[_Factors, slice, slice]]:
    """Of each source, which ranks of which experts are its own."""
    share = rank // target.parts
    slots: list[tuple[_Factors, slice, slice]] = []
    for index, source in enumerate(target.sources):
        begin = (index % target.parts) * share
        expert = index // target.parts if len(target.sources) > 1 else 0
        slots.append(
            (source, slice(begin, begin + source.rank), slice(expert, expert + source.experts))
        )
    return slots


def _our_config(shape: ImportedShape, modules: Sequence[str], base_model: str) -> bytes:
    has_experts = any(".experts" in module for module in modules)
    names = {module.rpartition(".")[2] for module in modules if ".experts" not in module}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": shape.rank,
        "lora_alpha": int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(names),
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
        if has_experts
        else None,
    }
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def _tidy(alpha: float) -> float:
    """Without the last bits that dividing and multiplying again leaves: 16.000000000000004 is 16."""
    return float(f"{alpha:.12g}")


def _wrong(field: str, what: str) -> InvalidFieldError:
    return InvalidFieldError(f"{field}: {what}", param=field)
