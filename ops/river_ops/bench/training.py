"""`river bench training`: mixed batches of many runs against PEFT one run after another, and clients of a whole stack.

Tokens per second count every token of every sequence through a full step: forward, backward, clipping, AdamW. The peer
trains one run after another in the same process settings as we do, in turns with us. Since those settings are ours,
the peer is measured once more in the settings that suit it best, in programs of its own (`peer_best`).
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from river_ops.bench.measure import Machine, machine, significant
from river_ops.bench.programs import run_program
from river_ops.bench.stack_speedup import StackSpeedup, measure_stack
from river_ops.bench.training_step import StepAnswer, StepSettings, fastest

RUN_COUNTS = (1, 4, 16)
SEQUENCES, TOKENS, RANK = 8, 64, 16
THREADS = 2
ROUNDS, ROUNDS_QUICK = 24, 3
PROGRAM_TIMEOUT_S = 600.0
WAIT_POLICY = "OMP_WAIT_POLICY"
STEP_MODULE = "river_ops.bench.training_step"
SAME = {WAIT_POLICY: "PASSIVE"}
"""The trainer's own: its threads must not spin while an engine beside it works."""
SPINNING = {WAIT_POLICY: "ACTIVE"}
"""Faster for who has the machine alone."""


class PeerBest(Struct, frozen=True, kw_only=True):
    """The peer in the settings that suit it best."""

    tokens_per_s: float
    experts: str
    omp_wait_policy: str
    threads: int


class TrainingReport(Struct, frozen=True, kw_only=True):
    """By the number of runs, where there is a key; `loss_difference_per_token` is that between us and the peer."""

    name: str = "training"
    speedup_batched: dict[str, float]
    speedup_over_peer_best: dict[str, float]
    tokens_per_s: dict[str, float]
    peer_tokens_per_s: dict[str, float]
    peer_experts: str
    peer_best: PeerBest
    loss_difference_per_token: float
    stack_speedup_16: float
    stack: list[StackSpeedup]
    settings: dict[str, int | float | str]
    machine: Machine


def run(*, quick: bool, say: Callable[[str], None]) -> TrainingReport:
    """Measures everything; minutes, or under one if `quick`."""
    here = machine()
    rounds = ROUNDS_QUICK if quick else ROUNDS
    say("one process: mixed batches against PEFT…")
    steps = step_program(list(RUN_COUNTS), [THREADS], rounds, SAME)
    say("PEFT alone, in other settings…")
    others = step_program([], [THREADS, 1], rounds, SPINNING)
    best = peer_best(steps, others)
    say("the whole stack…")
    stack = measure_stack(quick=quick)
    ours = {name: tokens_per_s(int(name), seconds) for name, seconds in steps.ours_s.items()}
    peer = {name: tokens_per_s(int(name), seconds) for name, seconds in steps.peer_s.items()}
    assert steps.loss_difference is not None
    return TrainingReport(
        speedup_batched={name: significant(ours[name] / peer[name]) for name in ours},
        speedup_over_peer_best={name: significant(ours[name] / best.tokens_per_s) for name in ours},
        tokens_per_s={name: significant(value) for name, value in ours.items()},
        peer_tokens_per_s={name: significant(value) for name, value in peer.items()},
        peer_experts=fastest(steps.peers).experts,
        peer_best=best,
        loss_difference_per_token=significant(steps.loss_difference),
        stack_speedup_16=stack[0].speedup,
        stack=stack,
        settings={
            "sequences": SEQUENCES,
            "tokens": TOKENS,
            "rank": RANK,
            "targets": "attention, experts, lm_head",
            "threads": THREADS,
            "rounds": rounds,
            **SAME,
        },
        machine=here,
    )


def step_program(
    run_counts: list[int], threads: list[int], rounds: int, environment: dict[str, str]
) -> StepAnswer:
    settings = StepSettings(
        run_counts=run_counts,
        sequences=SEQUENCES,
        tokens=TOKENS,
        rank=RANK,
        threads=threads,
        rounds=rounds,
    )
    # Torch reads the number of threads from here too, when it is loaded.
    environment = {**environment, "OMP_NUM_THREADS": str(threads[0])}
    return run_program(
        STEP_MODULE, settings, StepAnswer, environment=environment, timeout_s=PROGRAM_TIMEOUT_S
    )


def peer_best(same: StepAnswer, others: StepAnswer) -> PeerBest:
    """The fastest of all ways of running the peer."""
    found = [
        PeerBest(
            tokens_per_s=significant(tokens_per_s(1, time.seconds)),
            experts=time.experts,
            threads=time.threads,
            omp_wait_policy=environment[WAIT_POLICY],
        )
        for answer, environment in ((same, SAME), (others, SPINNING))
        for time in answer.peers
    ]
    return max(found, key=lambda peer: peer.tokens_per_s)


def tokens_per_s(runs: int, seconds: float) -> float:
    return runs * SEQUENCES * TOKENS / seconds


def table(report: TrainingReport) -> list[str]:
    """The report for people."""
    lines = [f"{'runs':>6}{'ours tok/s':>14}{'PEFT tok/s':>14}{'speed-up':>10}{'over best':>11}"]
    lines += [
        f"{name:>6}{report.tokens_per_s[name]:>14,.0f}{report.peer_tokens_per_s[name]:>14,.0f}"
        f"{speedup:>10.2f}{report.speedup_over_peer_best[name]:>11.2f}"
        for name, speedup in report.speedup_batched.items()
    ]
    best = report.peer_best
    lines.append(
        f"PEFT at its best: {best.tokens_per_s:,.0f} tok/s ({best.experts}, {best.threads} threads, "
        f"{best.omp_wait_policy})"
    )
    for stack in report.stack:
        lines.append(
            f"stack, {stack.sequences} x {stack.tokens} tokens: 1 client {stack.steps_per_s_1:.1f} steps/s, "
            f"{stack.clients} clients {stack.steps_per_s_all:.1f} steps/s, x {stack.speedup:.2f}"
        )
        lines.append(f"  processor time per step with all clients, ms: {stack.cpu_ms_per_step}")
    return lines
