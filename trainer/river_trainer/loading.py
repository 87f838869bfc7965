"""Loads a base model. What a checkpoint stores in fewer bits stays so, and no whole copy of it is ever made.

transformers loads plain checkpoints. Of the others it makes the model without weights, and they are put in here: each
quantised layer as a `StoredLinear`, each mixture's experts as two `QuantizedWeight`s in the place of its parameters,
and everything else as it is. All of them become numbers in one `Scratch`, which every lane has a part of for itself.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from river_kernels import (
    NO_ADAPTER,
    FrozenWeight,
    QuantizedWeight,
    Scratch,
    Segment,
    dense_weight,
    lora_linear,
    rows_of,
)
from river_trainer.errors import ModelFormatError
from river_trainer.quantization import Kind, kind_of

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MODELOPT_FILE = "hf_quant_config.json"
"""Where ModelOpt says what it did, if not in config.json."""


def load_model(path: str | Path, dtype: torch.dtype, **implementations: str) -> Any:
    """The frozen model at `path`, a directory or a name, computing in `dtype`; `implementations` are transformers'.

    Raises:
        OSError: it cannot be read.
        ModelFormatError: its weights are stored in a way that the trainer does not know.
    """
    config: Any = AutoConfig.from_pretrained(path)
    kind = _stored_kind(config, path)
    if kind is None:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **implementations)
    else:
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **implementations)
        _Filler(model, Checkpoint(path, kind), dtype).fill()
    return model.eval().requires_grad_(requires_grad=False)


def _stored_kind(config: Any, path: str | Path) -> Kind | None:
    found: Any = getattr(config, "quantization_config", None)
    beside = Path(path) / MODELOPT_FILE
    if found is None and beside.is_file():
        found = config.quantization_config = json.loads(beside.read_bytes()) | {
            "quant_method": "modelopt"
        }
    return None if found is None else kind_of(found if isinstance(found, dict) else found.to_dict())


class Checkpoint:
    """The tensors of a checkpoint by name, of which some layers have those of `kind`."""

    def __init__(self, path: str | Path, kind: Kind) -> None:
        """Finds the files.

        Raises:
            OSError: they are not there.
        """
        self.kind = kind
        patterns = ["*.safetensors", "*.json"]
        directory = Path(path)
        if not directory.is_dir():
            directory = Path(snapshot_download(str(path), allow_patterns=patterns))
        index = directory / INDEX_FILE
        names = {SINGLE_FILE}
        if index.is_file():
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        self._files = [safe_open(directory / name, framework="pt") for name in sorted(names)]

    @cached_property
    def _file_of(self) -> dict[str, Any]:
        return {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  # no dict

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name.

        Raises:
            ModelFormatError: there is none.
        """
        file = self._file_of.get(name)
        if file is None:
            raise ModelFormatError(f"the checkpoint has no tensor {name}")
        return file.get_tensor(name)

    def is_stored(self, layer: str) -> bool:
        """Whether a layer's weight is quantised; a layer may be left out."""
        return any(f"{layer}.{name}" in self for name in self.kind.tensors if name != "weight")

    def weight(self, layers: Sequence[str], dtype: torch.dtype, scratch: Scratch) -> FrozenWeight:
        """The weights of `layers`, one matrix [N, K] each, as one [layers, N, K]; of a single one [N, K].

        Raises:
            ModelFormatError: a tensor is missing or of the wrong shape, or only some of the layers are quantised.
        """
        stored = {self.is_stored(layer) for layer in layers}
        if len(stored) != 1:
            raise ModelFormatError(f"only some of {layers[0]} to {layers[-1]} are quantised")
        names = self.kind.tensors if stored == {True} else ("weight",)
        tensors = [self._stacked(layers, name) for name in names]
        if stored == {False}:
            return tensors[0].to(dtype)
        try:
            return QuantizedWeight((self.kind.combine(tensors),), dtype, scratch)
        except ModelFormatError as error:
            raise ModelFormatError(f"{layers[0]}: {error}") from error

    def _stacked(self, layers: Sequence[str], name: str) -> torch.Tensor:
        tensors = [self.tensor(f"{layer}.{name}") for layer in layers]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) != 1:
            raise ModelFormatError(f"{layers[0]}.{name} and others differ: {sorted(shapes)}")
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


class StoredLinear(nn.Module):
    """A frozen linear layer whose weight stays as it is stored; for rows of no adapter."""

    def __init__(self, weight_OI: QuantizedWeight, bias_O: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight_OI, bias_O
        self.out_features, self.in_features = weight_OI.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, I] in, […, O] out."""
        rows_TI = hidden.flatten(0, -2)
        segments = (Segment(NO_ADAPTER, 0, len(rows_TI)),)
        rows_TO = lora_linear(rows_TI, self.weight, segments, [], self.bias)
        return rows_TO.unflatten(0, hidden.shape[:-1])


def move_stored(model: nn.Module, device: torch.device) -> None:
    """Brings weights that are kept as they are stored, which torch does not know as parameters, to `device`."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, QuantizedWeight):
                setattr(module, name, value.to(device))


class _Filler:
    """Puts the weights of a checkpoint into a model that has none yet."""

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._model, self._checkpoint, self._dtype = model, checkpoint, dtype
        self._scratch = Scratch()

    def fill(self) -> None:
        """Puts them all in.

        Raises:
            ModelFormatError: a weight is missing or does not fit.
        """
        model = self._model
        for name, module in list(model.named_modules()):
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                self._experts(name, module)
            elif isinstance(module, nn.Linear) and self._checkpoint.is_stored(name):
                self._linear(name, module)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta and name in self._checkpoint:
                self._plain(name, tensor)
        model.tie_weights()
        self._recompute_tables()
        left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
        if left:
            raise ModelFormatError(
                f"the checkpoint has no tensor {left[0]}, nor {len(left) - 1} more"
            )

    def _experts(self, name: str, module: Any) -> None:
        experts = module.gate_up_proj.shape[0]
        gate, up, down = (
            self._weight(*(f"{name}.{expert}.{kind}" for expert in range(experts)))
            for kind in ("gate_proj", "up_proj", "down_proj")
        )
        _put(module, "gate_up_proj", rows_of([gate, up]))
        _put(module, "down_proj", down)

    def _linear(self, name: str, module: nn.Linear) -> None:
        weight = self._weight(name)
        if weight.shape != module.weight.shape:
            raise ModelFormatError(
                f"{name} has the shape {tuple(weight.shape)}, not {tuple(module.weight.shape)}"
            )
        if module is self._model.get_output_embeddings():
            # The head is computed with in float32, where nothing would be saved.
            _put(module, "weight", dense_weight(weight).clone())
            return
        assert isinstance(weight, QuantizedWeight)
        bias = module.bias
        if bias is not None:
            loaded = self._checkpoint.tensor(f"{name}.bias").to(self._dtype)
            bias = nn.Parameter(loaded, requires_grad=False)
        parent, _, kind = name.rpartition(".")
        setattr(self._model.get_submodule(parent), kind, StoredLinear(weight, bias))

    def _plain(self, name: str, placeholder: torch.Tensor) -> None:
        tensor = self._checkpoint.tensor(name)
        if tensor.shape != placeholder.shape:
            raise ModelFormatError(
                f"{name} has the shape {tuple(tensor.shape)}, not {tuple(placeholder.shape)}"
            )
        parent, _, kind = name.rpartition(".")
        _put(self._model.get_submodule(parent), kind, tensor.to(placeholder.dtype))

    def _weight(self, *layers: str) -> FrozenWeight:
        return self._checkpoint.weight(layers, self._dtype, self._scratch)

    def _recompute_tables(self) -> None:
        """Makes again, outside of "meta", the modules whose tables follow from the configuration alone."""
        for name, module in list(self._model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and hasattr(
                module, "inv_freq"
            ):
                parent, _, kind = name.rpartition(".")
                made = type(module)(config=module.config)
                setattr(self._model.get_submodule(parent), kind, made)


def _put(module: Any, name: str, value: FrozenWeight) -> None:
    """Puts a weight in the place of a parameter or a buffer without storage."""
    if name in module._buffers:  # noqa: SLF001  # how torch keeps them apart
        module._buffers[name] = value  # noqa: SLF001
        return
    delattr(module, name)
    is_tensor = isinstance(value, torch.Tensor)
    setattr(module, name, nn.Parameter(value, requires_grad=False) if is_tensor else value)
