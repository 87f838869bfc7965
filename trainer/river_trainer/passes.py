"""Forward and backward over the jobs of many runs, in passes of bounded size.

Each job is one operation's data on one adapter. Jobs share passes: tokens are packed job by job, the frozen model runs
once for all of them, and each job has its own loss and its own gradients, which its run takes over only if the whole
job went well. A job too big for one pass is continued in the next; gradients and sums add up.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from river_trainer.adapter import Adapter
from river_trainer.base_model import BaseModel
from river_trainer.losses import Loss, LossInput, metrics_of
from river_trainer.packing import TrainingSequence, pack

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """`sequences` through `loss` on `adapter`; gradients only if `backward`."""

    adapter: Adapter
    sequences: Sequence[TrainingSequence]
    loss: Loss
    backward: bool


@dataclass(slots=True)
class JobOutput:
    """`logprobs` has one [T] per sequence with a zero at the ignored index; `gradients` are by tensor name.

    `finite` is false if a loss or a gradient is not; the rest then means nothing.
    """

    logprobs: list[torch.Tensor] = field(default_factory=list)
    gradients: Gradients = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    finite: bool = True

    def metrics(self, loss: Loss) -> dict[str, float]:
        return metrics_of(loss, self.sums)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some consecutive sequences of the job `job`."""

    job: int
    sequences: list[TrainingSequence]


def run_jobs(base: BaseModel, jobs: Sequence[Job], *, tokens_max: int) -> list[JobOutput]:
    """The outputs of `jobs`, in their order, in passes of at most `tokens_max` tokens (or one longer sequence)."""
    assert tokens_max > 0
    outputs = [JobOutput() for _ in jobs]
    for parts in _passes(jobs, tokens_max):
        _run_pass(base, jobs, parts, outputs)
    for output in outputs:
        output.finite &= all(
            bool(gradient.isfinite().all()) for gradient in output.gradients.values()
        )
    return outputs


def _passes(jobs: Sequence[Job], tokens_max: int) -> Iterator[list[_Part]]:
    parts: list[_Part] = []
    tokens = 0
    for index, job in enumerate(jobs):
        for sequence in job.sequences:
            if parts and tokens + sequence.tokens > tokens_max:
                yield parts
                parts, tokens = [], 0
            if not parts or parts[-1].job != index:
                parts.append(_Part(index, []))
            parts[-1].sequences.append(sequence)
            tokens += sequence.tokens
    if parts:
        yield parts


def _run_pass(
    base: BaseModel, jobs: Sequence[Job], parts: Sequence[_Part], outputs: Sequence[JobOutput]
) -> None:
    batch = pack([part.sequences for part in parts])
    adapters = [jobs[part.job].adapter for part in parts]
    with torch.set_grad_enabled(any(jobs[part.job].backward for part in parts)):
        logprobs_T, entropy_T = base.token_logprobs(batch, adapters)
        losses: list[torch.Tensor] = []
        learning: list[_Part] = []
        for part, segment in zip(parts, batch.segments, strict=True):
            rows = slice(segment.start, segment.end)
            job, output = jobs[part.job], outputs[part.job]
            data = _loss_input(part.sequences, logprobs_T[rows], entropy_T[rows])
            loss, sums = job.loss.function(data)
            _add_sums(output, sums)
            output.logprobs += _split(logprobs_T[rows].detach(), part.sequences)
            if job.backward:
                losses.append(loss)
                learning.append(part)
    if learning:
        _backward(torch.stack(losses).sum(), jobs, learning, outputs)


def _loss_input(
    sequences: Sequence[TrainingSequence], logprobs_T: torch.Tensor, entropy_T: torch.Tensor
) -> LossInput:
    def joined(name: str) -> torch.Tensor:
        fields = [getattr(sequence, name) for sequence in sequences]
        return torch.cat(
            [
                torch.zeros(sequence.tokens) if values is None else values
                for values, sequence in zip(fields, sequences, strict=True)
            ]
        )

    return LossInput(
        logprobs=logprobs_T,
        entropy=entropy_T,
        weights=joined("weights"),
        old_logprobs=joined("old_logprobs"),
        advantages=joined("advantages"),
    )


def _add_sums(output: JobOutput, sums: Mapping[str, torch.Tensor]) -> None:
    for name, value in sums.items():
        output.sums[name] = output.sums.get(name, 0.0) + float(value)
    output.finite &= bool(torch.isfinite(sums["loss_sum"]))


def _split(logprobs_T: torch.Tensor, sequences: Sequence[TrainingSequence]) -> list[torch.Tensor]:
    pieces = [piece.clone() for piece in logprobs_T.split([item.tokens for item in sequences])]
    for piece in pieces:
        piece[-1] = 0.0
    return pieces


def _backward(
    total: torch.Tensor,
    jobs: Sequence[Job],
    learning: Sequence[_Part],
    outputs: Sequence[JobOutput],
) -> None:
    places = [(part.job, name) for part in learning for name in jobs[part.job].adapter.tensors]
    leaves = [jobs[job].adapter.tensors[name] for job, name in places]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    for (job, name), gradient in zip(places, found, strict=True):
        if gradient is None:
            continue
        gradients = outputs[job].gradients
        if name in gradients:
            gradients[name].add_(gradient)
        else:
            gradients[name] = gradient
