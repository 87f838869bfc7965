"""Whole passes through Triton's kernels, in its interpreter, against the path for CPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.training import ADAM, VOCAB_SIZE, random_sequences, shape

from river_kernels.device import triton_on_cpu
from river_trainer.adapter import new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES
from river_trainer.optimizer import AdamState, AdamStep, adam_steps
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.passes import Passes, note
from river_trainer.protocol import ExpertLayout
from river_trainer.strands import Job, Strand

LAYOUTS: tuple[ExpertLayout, ...] = get_args(ExpertLayout)


@pytest.fixture(scope="module")
def one_layer(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of the tiny model, with its embedding and head: an interpreted program takes 10 ms."""
    folder = tmp_path_factory.mktemp("one_layer")
    for path in tiny_moe.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((tiny_moe / "config.json").read_bytes()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sequences(seed: int, lengths: list[int]) -> list[TrainingSequence]:
    return [
        decode_sequence(sequence, index=index, vocab_size=VOCAB_SIZE, context_length=64)
        for index, sequence in enumerate(random_sequences(seed, lengths))
    ]


def trained(base: BaseModel, layout: ExpertLayout) -> list[Strand]:
    """One pass of two runs, one optimizer step on what it left, and what came out."""
    jobs: list[Job] = []
    for rank, loss, lengths in ((3, "cross_entropy", [5, 2]), (8, "importance_sampling", [4])):
        adapter = new_adapter(base.sites, shape(rank=rank, seed=rank, expert_layout=layout))
        generator = torch.Generator().manual_seed(rank)
        noise = torch.randn(adapter.layout.size, generator=generator)
        adapter.weights.flat.add_(noise, alpha=0.02)
        jobs.append(Job(adapter, sequences(rank, lengths), LOSSES[loss], backward=True))
    lanes = Lanes(1)
    passes = Passes(base, lanes, GradientPool(), tokens_max=64, piece_tokens=64)
    lanes.close()
    strands = [strand for of_job in passes.strands(jobs) for strand in of_job]
    started = passes.start(strands)
    assert len(started) == 1
    note(started)
    return strands


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_room", [False, True], ids=["plain weights", "weights with room"])
def test_triton_trains_as_the_cpu_does(
    one_layer: Path, layout: ExpertLayout, *, has_room: bool
) -> None:
    """Log-probabilities, sums of losses, gradients and the step on them are those of the other path."""
    plain, roomy = BaseModel(one_layer), BaseModel(one_layer)
    expected = trained(plain, layout)
    if has_room:
        roomy.make_room()
    with triton_on_cpu():
        actual = trained(roomy, layout)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.gradient is not None
        assert theirs.gradient is not None
        for one, two in zip(ours.pieces, theirs.pieces, strict=True):
            assert one.sums == pytest.approx(two.sums, rel=1e-4, abs=1e-5)
            for logprobs, others in zip(one.logprobs, two.logprobs, strict=True):
                torch.testing.assert_close(logprobs, others, atol=2e-5, rtol=1e-5)
        for name, gradient in ours.gradient.tensors.items():
            other = theirs.gradient.tensors[name]
            assert other.any(), name
            scale = other.abs().max().item()
            torch.testing.assert_close(gradient, other, atol=1e-4 * scale, rtol=1e-3)
    norms = {id(strand): stepped(strand) for strand in expected}
    with triton_on_cpu():
        for ours, theirs in zip(actual, expected, strict=True):
            assert stepped(ours) == pytest.approx(norms[id(theirs)], rel=1e-4)


def stepped(strand: Strand) -> float:
    """The norm of a strand's gradient, once its adapter has stepped on it."""
    adapter, gradient = strand.job.adapter, strand.gradient
    assert gradient is not None
    before = adapter.weights.flat.clone()
    (norm,) = adam_steps([AdamStep(adapter.weights, gradient, AdamState.new(adapter.layout), ADAM)])
    assert isinstance(norm, float)
    assert not torch.equal(before, adapter.weights.flat)
    assert not gradient.flat.any()
    return norm
