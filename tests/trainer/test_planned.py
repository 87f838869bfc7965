"""Passes and steps on device "meta", whose tensors have no numbers.

Whatever asks for one, which on a GPU would be waiting for it, raises there, and so does what mixes devices. Kernels are
planned and not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training import ADAM, VOCAB_SIZE, random_sequences, shape

from river_kernels import multi_adam
from river_kernels.gpu.launch import Launch, recorded
from river_trainer.adapter import new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES
from river_trainer.optimizer import AdamState, AdamStep, update_of
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.passes import Passes, Started
from river_trainer.protocol import AdapterShape
from river_trainer.strands import Job

META = torch.device("meta")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def planned(request: pytest.FixtureRequest, tiny_moe: Path) -> BaseModel:
    """The tiny model without its numbers."""
    return BaseModel(tiny_moe, request.param, META)


def sequences(base: BaseModel, lengths: list[int]) -> list[TrainingSequence]:
    return [
        decode_sequence(
            sequence,
            index=index,
            vocab_size=VOCAB_SIZE,
            context_length=256,
            routed_experts=base.routed_experts,
        )
        for index, sequence in enumerate(random_sequences(1, lengths))
    ]


def job(
    base: BaseModel,
    loss: str,
    adapter: AdapterShape,
    *,
    replay: bool = False,
    is_routed: bool = False,
) -> Job:
    data = sequences(base, [20, 9])
    if is_routed:
        assert base.routed_experts is not None
        routed = base.routed_experts
        data = [
            replace(
                one,
                expert_routing=torch.zeros(
                    one.tokens, routed.layers, routed.per_token, dtype=torch.uint8
                ),
            )
            for one in data
        ]
    return Job(
        new_adapter(base.sites, adapter).at(base.home),
        data,
        LOSSES[loss],
        backward=True,
        replay=replay,
    )


def start(base: BaseModel, jobs: Sequence[Job]) -> tuple[Passes, list[Started]]:
    lanes = Lanes(1)
    passes = Passes(base, lanes, GradientPool(META), tokens_max=96, piece_tokens=32)
    try:
        strands = [strand for of_job in passes.strands(jobs) for strand in of_job]
        return passes, passes.start(strands)
    finally:
        lanes.close()


def test_the_model_and_adapters_lie_on_the_device(planned: BaseModel) -> None:
    """Nothing is left on the host."""
    network = planned._network
    tensors = [*network.parameters(), *network.buffers()]
    adapter = new_adapter(planned.sites, shape()).at(planned.home)
    tensors += [part for pair in adapter.pairs(None).values() for part in (pair.a, pair.b)]
    assert tensors
    assert {tensor.device for tensor in tensors} == {META}
    assert all(pair.a.dtype is planned.home.dtype for pair in adapter.pairs(None).values())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_pass_waits_for_nothing(planned: BaseModel, loss: str) -> None:
    """A forward and backward of several runs and every loss starts without a number from the device."""
    jobs = [job(planned, loss, shape(rank=4)), job(planned, loss, shape(rank=7, seed=2))]
    launches: list[Launch] = []
    with recorded(launches.append):
        _, (started,) = start(planned, jobs)
    assert started.logprobs.device == META
    assert started.logprobs.shape == (58,)
    assert started.logprobs.dtype is torch.float32
    assert all(strand.gradient is not None for strand, _ in started.parts)
    assert launches, "the kernels of adapters are Triton's"


def test_replay_waits_for_nothing(planned: BaseModel) -> None:
    """A pass of a run that replays its sampler's experts beside one that only compares, and one that does neither."""
    routed = planned.routed_experts
    assert routed is not None
    jobs = [
        job(planned, "cross_entropy", shape(seed=seed), replay=replay, is_routed=is_routed)
        for seed, (replay, is_routed) in enumerate([(True, True), (False, True), (False, False)])
    ]
    _, passes = start(planned, jobs)
    compared = [(20 + 9 - 2) * routed.layers] * 2 + [0]
    assert [count for started in passes for count in started.compared] == compared


def test_a_long_job_has_a_pass_for_each_piece(planned: BaseModel) -> None:
    """Passes of pieces of one strand add to one gradient, one after another, and none is waited for."""
    long = replace(job(planned, "ppo", shape()), sequences=sequences(planned, [30, 31, 29]))
    _, passes = start(planned, [long, job(planned, "dro", shape(expert_layout="per_expert"))])
    assert [[piece.tokens for _, piece in started.parts] for started in passes] == [
        [29],
        [30],
        [31],
        [29],
    ]
    assert len({id(strand.gradient) for started in passes for strand, _ in started.parts}) == 2


def test_a_step_waits_for_nothing(planned: BaseModel) -> None:
    """A step on what a pass has left in the gradient, and the copy that kernels read, written by the same kernel."""
    _, (started,) = start(planned, [job(planned, "cross_entropy", shape())])
    ((strand, _),) = started.parts
    adapter, gradient = strand.job.adapter, strand.gradient
    assert gradient is not None
    state = AdamState.new(adapter.layout).on(META)
    step = AdamStep(adapter.weights, gradient, state, ADAM, adapter.copy)
    state.steps += 1
    update = update_of(step, norm=2.0)
    assert (update.copy is not None) == planned.home.has_copies
    launches: list[Launch] = []
    with recorded(launches.append):
        multi_adam([update])
    assert [launch.kernel.__name__ for launch in launches] == ["adam_chunks"]
