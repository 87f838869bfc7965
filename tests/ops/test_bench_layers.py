"""The slice of a large model that the benchmark of layers trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from river_ops.bench.layers.frozen import FrozenPasses
from river_ops.bench.layers.slice_model import fill, slice_config, write_slice
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes


def test_a_slice_has_the_dimensions_of_the_model() -> None:
    """Per layer, experts and attention are those of Qwen3.6-35B-A3B."""
    config = slice_config(3, reduced=False)
    assert (config.hidden_size, config.num_experts, config.num_experts_per_tok) == (2048, 256, 8)
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (512, 512)
    assert (config.num_attention_heads, config.num_key_value_heads) == (16, 2)
    assert (config.head_dim, config.vocab_size) == (256, 248_320)
    assert config.layer_types == ["full_attention"] * 3


def test_the_pattern_goes_on() -> None:
    """A weight begins where the one before ended, so that equal shapes get different numbers."""
    pattern = torch.arange(5.0)
    first, second = torch.zeros(2, 4), torch.zeros(7)
    start = fill(first, pattern, 0)
    assert first.flatten().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert fill(second, pattern, start) == 0
    assert second.tolist() == [3, 4, 0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small slice on disk."""
    folder = tmp_path_factory.mktemp("slice")
    write_slice(slice_config(2, reduced=True), folder, torch.float32)
    return folder


def test_the_trainer_runs_it_as_transformers_does(folder: Path) -> None:
    """Attention with a gate and half-rotated heads, and a shared expert: the loss is that of transformers."""
    tokens = torch.randint(4096, (3, 20), generator=torch.Generator().manual_seed(3))
    lanes = Lanes(2)
    try:
        ours = FrozenPasses(BaseModel(folder), lanes, pass_tokens=64).step([tokens])
    finally:
        lanes.close()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = theirs(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    expected = -logprobs.gather(2, tokens[:, 1:, None]).sum()
    assert ours == pytest.approx(float(expected), rel=1e-5)


def test_frozen_passes_wait_for_no_device(folder: Path) -> None:
    """The step without adapters is planned on memory without storage, where whoever looks at a number fails."""
    base = BaseModel(folder, torch.bfloat16, torch.device("meta"))
    lanes = Lanes(1)
    try:
        passes = FrozenPasses(base, lanes, pass_tokens=64)
        tokens = torch.zeros(3, 20, dtype=torch.int64)
        (loss,) = lanes.map(passes.run_pass, passes.passes(passes.decoded([tokens])))
    finally:
        lanes.close()
    assert loss.is_meta
    assert loss.shape == ()
