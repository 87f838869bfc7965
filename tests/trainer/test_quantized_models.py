"""Base models whose weights are stored in 8 or 4 bits, against plain ones that have the same numbers."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantized_checkpoints import FORMS, write_twins
from support.sharded import stored_weights
from support.training import (
    BASE_NAME,
    forward_backward,
    random_sequences,
    timeless,
    training_script,
)
from support.workbench import Workbench
from torch import nn

from river_trainer.base_model import BaseModel
from river_trainer.errors import ModelFormatError
from river_trainer.lanes import Lanes
from river_trainer.loading import MODELOPT_FILE
from river_trainer.protocol import Forward, TrainResult
from river_trainer.store import FileSets

LAYERS = 4
DTYPES = [torch.float32, torch.bfloat16]


def trained(
    base: BaseModel, lanes: Lanes, directory: Path
) -> tuple[list[TrainResult], torch.Tensor, torch.Tensor]:
    """The results of some steps, of another gradient and of an evaluation; the weights and the gradient in the end."""
    store = FileSets(directory.as_uri())
    bench = Workbench(base, lanes, store, base_model=BASE_NAME, piece_tokens=24)
    script = training_script("run_1", steps=3)
    script.do(forward_backward(7, [30, 11]))
    script.do(Forward(data=random_sequences(8, [40, 3]), loss_fn="cross_entropy", loss_config={}))
    results = [bench.execute(message) for message in script.messages]
    run = bench.run("run_1")
    assert run.gradient is not None
    return results, run.adapter.weights.flat.clone(), run.gradient.flat.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_training_is_that_of_the_same_numbers(
    form: str, dtype: torch.dtype, lanes: Lanes, tiny_moe: Path, tmp_path: Path
) -> None:
    """Losses, log-probabilities, gradients and new weights have the same bits, over several steps and passes."""
    stored, plain = write_twins(tiny_moe, tmp_path, FORMS[form])
    one, other = (BaseModel(path, dtype) for path in (stored, plain))
    assert len(stored_weights(one)) >= 2 * (LAYERS - 1)
    assert not stored_weights(other)
    results, weights, gradient = trained(one, lanes, tmp_path / "one")
    expected, expected_weights, expected_gradient = trained(other, lanes, tmp_path / "other")
    for result, same in zip(results, expected, strict=True):
        assert result.error is None
        assert timeless(result.metrics) == timeless(same.metrics)
        assert result.logprobs == same.logprobs
    assert torch.equal(weights, expected_weights)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.abs().sum() > 0


def numbers_alive(shapes: set[torch.Size]) -> set[int]:
    """Addresses of all tensors in this process, of 16 bits or more, that have one of `shapes`."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in {torch.Tensor, nn.Parameter}]
    return {
        tensor.data_ptr()
        for tensor in tensors
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.shape in shapes
    }


def test_no_numbers_are_kept(lanes: Lanes, tiny_moe: Path, tmp_path: Path) -> None:
    """After training no tensor has the numbers of a layer, but the one buffer of each thread that computed."""
    stored, _ = write_twins(tiny_moe, tmp_path, FORMS["compressed nvfp4"], left_out=())
    experts, attention = (8, 256, 192), (320, 192)
    shapes = {torch.Size(shape) for shape in (experts, (8, 192, 128), attention, (192, 192))}
    before = numbers_alive(shapes)
    base = BaseModel(stored)
    trained(base, lanes, tmp_path / "store")
    assert numbers_alive(shapes) <= before
    weights = stored_weights(base)
    assert {weight.shape for weight in weights} == shapes
    assert {id(weight.scratch) for weight in weights} == {id(weights[0].scratch)}
    largest = max(weights, key=lambda weight: weight.shape.numel())
    assert largest.shape == experts
    largest.dense()
    for weight in weights:
        weight.dense()
    buffers = list(weights[0].scratch._of_thread.buffers.values())
    assert [buffer.nbytes for buffer in buffers] == [4 * largest.shape.numel()]
    held = sum(tensor.nbytes for weight in weights for tensor in weight.tensors)
    # Half a byte a number, a byte for 16 of them, four for a matrix.
    assert held < 0.57 * sum(weight.shape.numel() for weight in weights)


def test_projections_of_which_one_is_left_out(lanes: Lanes, tiny_moe: Path, tmp_path: Path) -> None:
    """Attention that cannot be one product any more computes the same, with other rounding."""
    left_out = ("layers.0.self_attn.k_proj",)
    stored, plain = write_twins(tiny_moe, tmp_path, FORMS["fp8"], left_out)
    results, _, gradient = trained(BaseModel(stored), lanes, tmp_path / "one")
    expected, _, expected_gradient = trained(BaseModel(plain), lanes, tmp_path / "other")
    assert results[-1].metrics["loss"] == pytest.approx(expected[-1].metrics["loss"], rel=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is not supported"),
        ({"quant_method": "fp8"}, "weight_block_size None is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo 'FP8' is not supported"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32},
            "group_size 32 is not supported",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
            },
            "format 'pack-quantized' is not supported",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"strategy": "channel"}}},
            },
            "block_structure",
        ),
    ],
)
def test_other_forms_are_refused(
    config: dict[str, Any], message: str, tiny_moe: Path, tmp_path: Path
) -> None:
    """A model that is stored in a form that the trainer does not know says in which, and which it knows."""
    stored, _ = write_twins(tiny_moe, tmp_path, FORMS["fp8"])
    path = stored / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"quantization_config": config}))
    with pytest.raises(ModelFormatError, match=message):
        BaseModel(stored)


LAYER = "model.layers.2.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda tensors: tensors.pop(f"{LAYER}.weight"), f"no tensor {LAYER}.weight"),
        (lambda tensors: tensors.pop(f"{LAYER}.weight_scale_inv"), "only some of"),
        (
            lambda tensors: tensors.update({f"{LAYER}.weight_scale_inv": torch.ones(2, 2)}),
            r"experts.0.up_proj.weight_scale_inv and others differ: \[\(1, 2\), \(2, 2\)\]",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.2.self_attn.o_proj.weight_scale_inv": torch.ones(1, 2)}
            ),
            r"o_proj: scales have the shape \(1, 2\), not \(2, 2\)",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.2.self_attn.o_proj.weight": torch.ones(192, 192)}
            ),
            "o_proj: values are torch.float32, not torch.float8_e4m3fn",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight has the shape \(3,\), not \(192,\)",
        ),
    ],
    ids=["plain", "values", "scales", "one expert's", "blocks", "type", "plain shape"],
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    tiny_moe: Path,
    tmp_path: Path,
) -> None:
    """What is missing, or does not fit, is named."""
    stored, _ = write_twins(tiny_moe, tmp_path, FORMS["fp8"])
    tensors = load_file(stored / "model.safetensors")
    damage(tensors)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        BaseModel(stored)


def test_modelopt_may_say_it_in_a_file_of_its_own(tiny_moe: Path, tmp_path: Path) -> None:
    """What config.json does not say, hf_quant_config.json does; and many files are as good as one."""
    stored, _ = write_twins(tiny_moe, tmp_path, FORMS["modelopt nvfp4"])
    config = json.loads((stored / "config.json").read_bytes())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (stored / MODELOPT_FILE).write_text(json.dumps(said))
    whole = load_file(stored / "model.safetensors")
    (stored / "model.safetensors").unlink()
    names = sorted(whole)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: whole[name] for name in part}, stored / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (stored / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(stored_weights(BaseModel(stored))) == 2 * (LAYERS - 1)
