"""A program of the training benchmark: steps per second of the peer, and of us beside it, under one set of settings."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

from river_ops.bench.measure import alternating, median
from river_ops.bench.our_trainer import OurTrainer
from river_ops.bench.peft_peer import Experts, PeftTrainer
from river_ops.bench.programs import answer_with, program_settings
from river_ops.models import TINY_MOE
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.protocol import Adam, AdapterShape

ADAM = Adam(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0)
VOCABULARY = 512
PARITY_STEPS = 3
LOSS_DIFFERENCE_MAX = 1e-3
PEERS: tuple[Experts, ...] = ("grouped_mm", "eager")


class StepSettings(Struct, frozen=True, kw_only=True):
    """`run_counts` empty measures the peer alone, with each number of `threads`; otherwise there is one."""

    run_counts: list[int]
    sequences: int
    tokens: int
    rank: int
    threads: list[int]
    rounds: int


class PeerTime(Struct, frozen=True, kw_only=True):
    """The median step of one run."""

    experts: Experts
    threads: int
    seconds: float


class StepAnswer(Struct, frozen=True, kw_only=True):
    """Medians. `ours_s` is the time of one step of so many runs.

    `peer_s` is the fastest peer's for the same runs, one after another, measured in turn with ours.
    `loss_difference` is the largest one per token between us and the peers over the first steps.
    """

    peers: list[PeerTime]
    peer_s: dict[str, float]
    ours_s: dict[str, float]
    loss_difference: float | None


def main() -> None:
    """Measures and answers."""
    answer_with(measure(program_settings(StepSettings)))


def measure(settings: StepSettings) -> StepAnswer:
    """First that we and the peer do the same, then how fast."""
    assert len(settings.threads) == 1 or not settings.run_counts
    torch.set_num_threads(settings.threads[0])
    runs = max(settings.run_counts, default=1)
    batches = random_batches(runs, settings.sequences, settings.tokens)
    shape = AdapterShape(
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        seed=1,
        train_attn=True,
        train_mlp=True,
        train_unembed=True,
        expert_layout="per_expert",
    )
    base, lanes = BaseModel(TINY_MOE), Lanes(torch.get_num_threads())
    ours = OurTrainer(base, shape=shape, runs=runs, adam=ADAM, lanes=lanes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours.write_adapter(folder)
        peers: dict[Experts, PeftTrainer] = {
            kind: PeftTrainer(TINY_MOE, folder, experts=kind, adam=ADAM) for kind in PEERS
        }
    difference = loss_difference(ours, peers, batches[0]) if settings.run_counts else None
    times = [
        found
        for threads in settings.threads
        for found in peer_times(peers, batches[0], threads=threads, rounds=settings.rounds)
    ]
    answer = StepAnswer(peers=times, peer_s={}, ours_s={}, loss_difference=difference)
    peer = peers[fastest(times).experts]

    def one_after_another(chosen: list[torch.Tensor]) -> None:
        for batch in chosen:
            peer.step(batch)

    for count in settings.run_counts:
        chosen = batches[:count]
        cases = {"ours": timed(ours.step, chosen), "peer": timed(one_after_another, chosen)}
        # Rounds of many runs take longer and vary less.
        found = medians(cases, rounds=max(3, settings.rounds // count))
        answer.ours_s[str(count)], answer.peer_s[str(count)] = found["ours"], found["peer"]
    return answer


def peer_times(
    peers: dict[Experts, PeftTrainer], batch: torch.Tensor, *, threads: int, rounds: int
) -> list[PeerTime]:
    """One run's step by each peer."""
    torch.set_num_threads(threads)
    found = medians({kind: timed(peer.step, batch) for kind, peer in peers.items()}, rounds=rounds)
    return [PeerTime(experts=kind, threads=threads, seconds=found[kind]) for kind in peers]


def fastest(times: list[PeerTime]) -> PeerTime:
    return min(times, key=lambda found: found.seconds)


def random_batches(runs: int, sequences: int, tokens: int) -> list[torch.Tensor]:
    """A batch [S, T] of token ids for each run."""
    generator = torch.Generator().manual_seed(7)
    shape = (sequences, tokens)
    return [torch.randint(VOCABULARY, shape, generator=generator) for _ in range(runs)]


def loss_difference(
    ours: OurTrainer,
    peers: dict[Experts, PeftTrainer],
    batch_ST: torch.Tensor,  # noqa: N803
) -> float:
    """The largest difference of the mean loss over a few steps, each after the same updates.

    Raises:
        AssertionError: it is so large that the two do not do the same work.
    """
    predictions = batch_ST.shape[0] * (batch_ST.shape[1] - 1)
    largest = 0.0
    for _ in range(PARITY_STEPS):
        (own,) = ours.step([batch_ST])
        for peer in peers.values():
            largest = max(largest, abs(own - peer.step(batch_ST)) / predictions)
    assert largest <= LOSS_DIFFERENCE_MAX, f"the losses differ by {largest}"
    return largest


def timed(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """A call that returns how long it took."""

    def run() -> float:
        started = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - started

    return run


def medians(cases: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """The median of each case, after one round that does not count."""
    found = alternating(cases, rounds=rounds + 1)
    return {name: median(values[1:]) for name, values in found.items()}


if __name__ == "__main__":
    main()
