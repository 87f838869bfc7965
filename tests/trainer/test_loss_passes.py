"""Losses through packed passes of the model: gradients of adapters, groups, soft targets beside hard ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from support.loss_formulas import CONFIGS, FORMULAS, in_sequences
from support.training import VOCAB_SIZE, floats, integers, random_sequences, shape

from river_trainer.adapter import Adapter, new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import LOSSES, find_loss, loss_data
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.passes import JobOutput, Passes
from river_trainer.protocol import Sequence as WireSequence
from river_trainer.strands import Job

LENGTHS = [7, 33, 2, 18]
RunJobs = Callable[..., list[JobOutput]]


@pytest.fixture
def run_jobs(base: BaseModel, lanes: Lanes) -> RunJobs:
    """Runs jobs in pieces of a chosen size."""

    def run(jobs: Sequence[Job], piece_tokens: int = 1000) -> list[JobOutput]:
        tokens_max = max(piece_tokens, 400)
        passes = Passes(
            base, lanes, GradientPool(), tokens_max=tokens_max, piece_tokens=piece_tokens
        )
        return passes.run(jobs)

    return run


def learned_adapter(base: BaseModel, seed: int) -> Adapter:
    """An adapter whose B is not zero."""
    adapter = new_adapter(base.sites, shape(rank=4, seed=seed))
    adapter.weights.flat.add_(
        torch.randn(adapter.layout.size, generator=torch.Generator().manual_seed(seed)), alpha=0.02
    )
    return adapter


def decoded(sequences: Sequence[WireSequence]) -> list[TrainingSequence]:
    return [
        decode_sequence(sequence, index=index, vocab_size=VOCAB_SIZE, context_length=256)
        for index, sequence in enumerate(sequences)
    ]


def policy_sequences(
    base: BaseModel, run_jobs: RunJobs, adapter: Adapter, seed: int = 3
) -> list[TrainingSequence]:
    """Sequences with old log-probabilities near those of the adapter, and echo weights."""
    data = decoded(random_sequences(seed, LENGTHS))
    (known,) = run_jobs([Job(adapter, data, LOSSES["cross_entropy"], backward=False)])
    generator = torch.Generator().manual_seed(seed)
    return [
        dataclasses.replace(
            sequence,
            old_logprobs=logprobs + 0.3 * torch.randn(sequence.tokens, generator=generator),
            echo_weights=sequence.weights * torch.rand(sequence.tokens, generator=generator),
        )
        for sequence, logprobs in zip(data, known.logprobs, strict=True)
    ]


def gradient_of(output: JobOutput) -> torch.Tensor:
    assert output.finite
    assert output.gradient is not None
    return output.gradient.flat


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", FORMULAS)
def test_an_adapter_learns_from_the_formula(base: BaseModel, run_jobs: RunJobs, name: str) -> None:
    """The adapter's gradient is that of a cross-entropy weighted by the formula's derivative in float64."""
    adapter = learned_adapter(base, 1)
    data = policy_sequences(base, run_jobs, adapter)
    loss = find_loss(name, CONFIGS.get(name, {}))
    (output,) = run_jobs([Job(adapter, data, loss, backward=True)])

    logprobs = torch.cat(output.logprobs).double().requires_grad_()
    zeros = torch.zeros(len(logprobs))
    inputs = loss_data(loss, data).with_outputs(logprobs.detach().float(), zeros)
    value = FORMULAS[name](in_sequences(inputs, logprobs), loss.config)
    (derivative,) = torch.autograd.grad(value, logprobs)
    weights = (-derivative).float().split(LENGTHS)
    surrogate = [
        dataclasses.replace(sequence, weights=piece)
        for sequence, piece in zip(data, weights, strict=True)
    ]
    (expected,) = run_jobs([Job(adapter, surrogate, LOSSES["cross_entropy"], backward=True)])
    assert output.metrics(loss)["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert relative_error(gradient_of(output), gradient_of(expected)) < 1e-4


@pytest.mark.parametrize("name", FORMULAS)
def test_pieces_keep_groups_together(base: BaseModel, run_jobs: RunJobs, name: str) -> None:
    """Cut as small as can be, metrics and gradient are those of the whole; a pair is never cut."""
    adapter = learned_adapter(base, 2)
    data = policy_sequences(base, run_jobs, adapter)
    job = Job(adapter, data, find_loss(name, CONFIGS.get(name, {})), backward=True)
    (whole,), (cut,) = run_jobs([job]), run_jobs([job], piece_tokens=1)
    assert cut.metrics(job.loss) == pytest.approx(whole.metrics(job.loss), rel=1e-4, abs=1e-6)
    assert relative_error(gradient_of(cut), gradient_of(whole)) < 1e-4


def soft_sequences(columns: int) -> list[WireSequence]:
    """Random sequences with K targets at a position, and weights of both signs."""
    source = torch.Generator().manual_seed(columns)
    return [
        WireSequence(
            input_ids=integers(torch.randint(VOCAB_SIZE, (length,), generator=source).tolist()),
            target_tokens=integers(
                torch.randint(VOCAB_SIZE, (length, columns), generator=source).tolist()
            ),
            weights=floats(torch.randn(length, columns, generator=source).tolist()),
            targets_per_token=columns,
        )
        for length in LENGTHS
    ]


def test_soft_targets_are_the_sum_of_hard_ones(base: BaseModel, run_jobs: RunJobs) -> None:
    """K targets have the loss, log-probabilities and gradient of K jobs with one target each."""
    adapter = learned_adapter(base, 3)
    soft = decoded(soft_sequences(3))
    loss = LOSSES["cross_entropy"]
    (output,) = run_jobs([Job(adapter, soft, loss, backward=True)], piece_tokens=40)
    hard = [
        Job(
            adapter,
            [
                dataclasses.replace(s, targets=s.targets[:, k], weights=s.weights[:, k])
                for s in soft
            ],
            loss,
            backward=True,
        )
        for k in range(3)
    ]
    parts = run_jobs(hard, piece_tokens=40)
    for index, logprobs in enumerate(output.logprobs):
        assert torch.equal(logprobs, torch.stack([part.logprobs[index] for part in parts], dim=1))
    total = sum(part.sums["loss_sum"] for part in parts)
    assert output.sums["loss_sum"] == pytest.approx(total, rel=1e-6)
    expected = torch.stack([gradient_of(part) for part in parts]).sum(dim=0)
    assert relative_error(gradient_of(output), expected) < 1e-4


def test_soft_targets_beside_hard_ones_change_no_bit(base: BaseModel, run_jobs: RunJobs) -> None:
    """Jobs with 1, 2 and 7 targets a token, and one that mixes them, share passes and stay bit for bit themselves."""
    loss = LOSSES["cross_entropy"]
    hard = random_sequences(4, LENGTHS)
    kinds = [hard, soft_sequences(2), soft_sequences(7), [*soft_sequences(3), *hard]]
    jobs = [
        Job(learned_adapter(base, seed), decoded(data), loss, backward=True)
        for seed, data in enumerate(kinds)
    ]
    for job, mixed in zip(jobs, run_jobs(jobs, piece_tokens=100), strict=True):
        (alone,) = run_jobs([job], piece_tokens=100)
        assert mixed.sums == alone.sums
        assert torch.equal(gradient_of(mixed), gradient_of(alone))
        for one, two, sequence in zip(mixed.logprobs, alone.logprobs, job.sequences, strict=True):
            assert one.shape == sequence.targets.shape
            assert torch.equal(one, two)


def test_a_temperature_divides_the_logits(base: BaseModel, run_jobs: RunJobs) -> None:
    """Log-probabilities and gradients are those of log-softmax(logits / T), and of a job beside it as they were."""
    temperature, halves = 0.7, (range(256), range(256, 512))
    adapter = learned_adapter(base, 5)
    (sequence,) = decoded(random_sequences(8, [11]))
    hot = find_loss("cross_entropy", {"logprob_temperature": temperature})
    plain = LOSSES["cross_entropy"]
    ones = dataclasses.replace(sequence, weights=torch.ones(11).index_fill(0, torch.tensor(10), 0))
    tempered, beside = run_jobs(
        [Job(adapter, [ones], hot, backward=True), Job(adapter, [ones], plain, backward=True)]
    )
    (alone,) = run_jobs([Job(adapter, [ones], plain, backward=True)])
    assert torch.equal(beside.logprobs[0], alone.logprobs[0])
    assert torch.equal(gradient_of(beside), gradient_of(alone))

    def soft(every_weight: torch.Tensor) -> list[TrainingSequence]:
        """The sequence with every token as a target, in two halves."""
        return [
            dataclasses.replace(
                sequence,
                targets=torch.tensor(half).expand(11, -1).clone(),
                weights=every_weight[:, half.start : half.stop].clone(),
            )
            for half in halves
        ]

    (scored,) = run_jobs([Job(adapter, soft(torch.zeros(11, 512)), plain, backward=False)])
    log_softmax = (torch.cat(scored.logprobs, 1) / temperature).log_softmax(-1)
    rows = torch.arange(10)
    expected = log_softmax[rows, ones.targets[:10]]
    torch.testing.assert_close(tempered.logprobs[0][:10], expected, rtol=1e-4, atol=1e-4)
    # By the logits z, the gradient of -log softmax(z / T)[target] is (softmax(z / T) - onehot) / T.
    slopes = log_softmax.exp()
    slopes[rows, ones.targets[:10]] -= 1.0
    slopes[10] = 0.0
    (same,) = run_jobs([Job(adapter, soft(-slopes / temperature), plain, backward=True)])
    assert relative_error(gradient_of(tempered), gradient_of(same)) < 1e-4
