"""Steps per second of many clients of a whole stack against one client's.

A step is a forward_backward and an optim_step, each awaited, as in the README's loop. Every client has a tenant and
connections of its own; they live in `CLIENT_PROCESSES` programs, so that no event loop of theirs is the bottleneck.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from river_ops.bench.measure import median, significant
from river_ops.bench.processor_time import ProcessorTime, processor_time
from river_ops.bench.programs import ProgramError, start_program
from river_ops.bench.stack_clients import ClientSettings, Measured, Measurement
from river_ops.demo.run import new_tenant_key
from river_ops.settings import StackInfo, StackOptions
from river_ops.stack import running_stack

CLIENTS = 16
CLIENT_PROCESSES = 2
CLIENTS_MODULE = "river_ops.bench.stack_clients"
RANK = 16
SHAPES = ((2, 64), (8, 64))
"""Sequences and tokens of a batch; the first one is the headline."""
ROUNDS, ROUNDS_QUICK = 3, 1
SECONDS, SECONDS_QUICK = 6.0, 2.0
WARM_UP_S = 1.0
END_TIMEOUT_S = 30.0


class StackSpeedup(Struct, frozen=True, kw_only=True):
    """Medians over the rounds. `cpu_ms_per_step` is processor time with all clients, by part of the stack."""

    sequences: int
    tokens: int
    clients: int
    client_processes: int
    steps_per_s_1: float
    steps_per_s_all: float
    speedup: float
    cpu_ms_per_step_1: dict[str, float]
    cpu_ms_per_step: dict[str, float]


def measure_stack(*, quick: bool) -> list[StackSpeedup]:
    """One result for each of `SHAPES`, on a stack of our own."""
    rounds = ROUNDS_QUICK if quick else ROUNDS
    seconds = SECONDS_QUICK if quick else SECONDS
    with tempfile.TemporaryDirectory(prefix="river-bench-") as name:
        options = StackOptions(data_directory=Path(name), port=0)
        with running_stack(options) as info, client_programs(info) as programs:
            ask(programs, Measurement(clients=CLIENTS, sequences=1, tokens=8, seconds=WARM_UP_S))
            return [
                measure_shape(programs, sequences, tokens, rounds=rounds, seconds=seconds)
                for sequences, tokens in (SHAPES[:1] if quick else SHAPES)
            ]


def measure_shape(
    programs: list[subprocess.Popen[bytes]],
    sequences: int,
    tokens: int,
    *,
    rounds: int,
    seconds: float,
) -> StackSpeedup:
    """One client and all clients in turns."""
    rates: dict[int, list[float]] = {1: [], CLIENTS: []}
    steps = {1: 0, CLIENTS: 0}
    spent: dict[int, ProcessorTime] = {1: ProcessorTime(), CLIENTS: ProcessorTime()}
    for _ in range(rounds):
        for clients in (1, CLIENTS):
            asked = Measurement(
                clients=clients, sequences=sequences, tokens=tokens, seconds=seconds
            )
            before = processor_time()
            done, rate = ask(programs, asked)
            spent[clients] += processor_time() - before
            steps[clients] += done
            rates[clients].append(rate)
    one, many = median(rates[1]), median(rates[CLIENTS])
    pairs = zip(rates[CLIENTS], rates[1], strict=True)
    return StackSpeedup(
        sequences=sequences,
        tokens=tokens,
        clients=CLIENTS,
        client_processes=CLIENT_PROCESSES,
        steps_per_s_1=significant(one),
        steps_per_s_all=significant(many),
        speedup=significant(median([all_rate / one_rate for all_rate, one_rate in pairs])),
        cpu_ms_per_step_1=spent[1].ms_per(steps[1]),
        cpu_ms_per_step=spent[CLIENTS].ms_per(steps[CLIENTS]),
    )


@contextmanager
def client_programs(info: StackInfo) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs with all clients open."""
    keys = [new_tenant_key(info) for _ in range(CLIENTS)]
    programs = [
        start_program(
            CLIENTS_MODULE,
            ClientSettings(
                base_url=info.base_url, api_keys=keys[number::CLIENT_PROCESSES], rank=RANK
            ),
        )
        for number in range(CLIENT_PROCESSES)
    ]
    try:
        for program in programs:
            read_answer(program)
        yield programs
        for program in programs:
            assert program.stdin is not None
            program.stdin.close()
            program.wait(END_TIMEOUT_S)
    finally:
        for program in programs:
            if program.poll() is None:
                program.kill()
                program.wait()


def ask(programs: list[subprocess.Popen[bytes]], asked: Measurement) -> tuple[int, float]:
    """Steps and steps per second of `asked.clients` clients, spread evenly over the programs."""
    used = programs[: asked.clients]
    for number, program in enumerate(used):
        share = len(range(number, asked.clients, len(used)))
        assert program.stdin is not None
        program.stdin.write(msgspec.json.encode(msgspec.structs.replace(asked, clients=share)))
        program.stdin.write(b"\n")
        program.stdin.flush()
    with ThreadPoolExecutor(len(used)) as pool:
        answers = list(pool.map(read_answer, used))
    assert all(answer.steps for answer in answers)
    return (
        sum(answer.steps for answer in answers),
        sum(answer.steps / answer.seconds for answer in answers),
    )


def read_answer(program: subprocess.Popen[bytes]) -> Measured:
    """The next answer.

    Raises:
        ProgramError: the program has ended instead.
    """
    assert program.stdout is not None
    line = program.stdout.readline()
    if not line:
        raise ProgramError(f"{CLIENTS_MODULE} ended with code {program.wait()}")
    return msgspec.json.decode(line, type=Measured)
