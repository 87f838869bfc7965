"""The two runs: the grid of the design on a GPU, and the CPU path against its peers elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from river_kernels import verify_rows
from river_ops.bench.kernels.clock import Sample, samples
from river_ops.bench.kernels.contender import Contender
from river_ops.bench.kernels.goals import cpu_goals, gpu_goals
from river_ops.bench.kernels.grid import Grid, make_contender, row_of
from river_ops.bench.kernels.report import KernelsReport, cell_rows, compare_with_base
from river_ops.bench.kernels.workload import (
    Base,
    Cell,
    ExpertLayout,
    Sizes,
    cells_of,
    make_base,
    make_workload,
)
from river_ops.bench.measure import alternating, machine

Say = Callable[[str], None]

RANK = 16
UNIFORM, MIXED = (RANK,), (8, 16, 32)
LAYOUTS: tuple[ExpertLayout, ...] = ("shared_outer", "per_expert")

GPU_SIZES = Sizes(hidden=2048, inner=512, experts=256, chosen=8)
GPU_CONTENDERS = (
    "frozen_grouped",
    "frozen_river",
    "river",
    "one_by_one",
    "split_lora",
    "scattermoe",
    "peft",
)
GPU_SECONDS, GPU_SECONDS_QUICK = 540.0, 50.0
ROW_SECONDS, ROW_SECONDS_QUICK = 0.4, 0.15
PARITY_TOKENS, PARITY_ADAPTERS = 512, 4

CPU_SIZES = {"hidden": 256, "inner": 128, "experts": 16}
CPU_TOKENS, CPU_ADAPTERS = 512, (1, 4, 8)
CPU_GOAL_ADAPTERS = 4
CPU_CONTENDERS = ("frozen_grouped", "frozen_river", "river", "split_lora", "sorted_loop", "loop")
CPU_ROUNDS, CPU_ROUNDS_QUICK = 24, 4


def run_gpu(*, quick: bool, say: Say) -> KernelsReport:
    """The grid of the design on the first GPU, within minutes; a few of its cells if `quick`."""
    device = torch.device("cuda", 0)
    cells = gpu_cells(quick=quick)
    return run_grid(
        make_base(GPU_SIZES, device, torch.bfloat16),
        cells,
        GPU_CONTENDERS,
        device_name=torch.cuda.get_device_name(device),
        seconds=GPU_SECONDS_QUICK if quick else GPU_SECONDS,
        row_seconds=ROW_SECONDS_QUICK if quick else ROW_SECONDS,
        say=say,
    )


def gpu_cells(*, quick: bool) -> list[Cell]:
    """What tells most comes first, should the time not suffice for all."""
    if quick:
        return cells_of([8192], [1, 16], [UNIFORM], LAYOUTS, ["uniform"])
    return cells_of([32768, 8192], [1, 4, 16, 64], [UNIFORM, MIXED], LAYOUTS, ["uniform", "zipf"])


def run_grid(
    base: Base,
    cells: list[Cell],
    contenders: tuple[str, ...],
    *,
    device_name: str,
    seconds: float,
    row_seconds: float,
    say: Say,
) -> KernelsReport:
    """All contenders in all cells, none at the same time as another."""
    report = KernelsReport(
        device=device_name,
        settings=settings_of(base, {"threads": torch.get_num_threads()}),
        machine=machine(),
    )
    grid = Grid(
        report,
        contenders,
        row_seconds=row_seconds,
        deadline=time.monotonic() + seconds,
        say=say,
    )
    grid.check(base, parity_cells(cells, adapters=PARITY_ADAPTERS))
    grid.measure(base, cells)
    report.goals = gpu_goals(report.cells)
    return report


def parity_cells(cells: list[Cell], *, adapters: int) -> list[Cell]:
    """One small cell for each combination of ranks, layout and routing in `cells`."""
    return list(
        dict.fromkeys(replace(cell, tokens=PARITY_TOKENS, adapters=adapters) for cell in cells)
    )


def run_cpu(*, quick: bool, say: Say) -> KernelsReport:
    """The CPU path and its peers in turns, on one thread, as a lane of the trainer has it."""
    rounds = CPU_ROUNDS_QUICK if quick else CPU_ROUNDS
    with one_thread():
        report = KernelsReport(device="cpu", settings={}, machine=machine())
        for chosen in (2,) if quick else (2, 4):
            base = make_base(Sizes(**CPU_SIZES, chosen=chosen), torch.device("cpu"), torch.float32)
            # As the trainer does when it loads a model.
            verify_rows([base.gate_up[0], base.down[0]])
            report.settings = settings_of(base, {"threads": 1, "rounds": rounds})
            for cell in cells_of([CPU_TOKENS], CPU_ADAPTERS, [UNIFORM], LAYOUTS, ["uniform"]):
                say(f"top {chosen}, {cell.layout}, {cell.adapters} adapters…")
                measure_in_turns(report, base, cell, rounds)
    report.goals = cpu_goals(report.cells, tokens=CPU_TOKENS, adapters=CPU_GOAL_ADAPTERS)
    return report


def measure_in_turns(report: KernelsReport, base: Base, cell: Cell, rounds: int) -> None:
    """One more cell of the report; contenders that do not agree with float64 are left out."""
    grid = Grid(report, CPU_CONTENDERS, row_seconds=0.0, deadline=0.0, say=lambda _: None)
    grid.check(base, [cell])
    workload = make_workload(cell, base)
    contenders = {name: make_contender(name, workload) for name in grid.agreeing}
    taken: dict[str, list[Sample]] = {name: [] for name in contenders}

    def timed(name: str, contender: Contender) -> float:
        taken[name] += samples(contender, 1)
        return taken[name][-1].both_ms

    cases = {
        name: lambda name=name, contender=contender: timed(name, contender)
        for name, contender in contenders.items()
    }
    alternating(cases, rounds=rounds + 1)
    found = cell_rows(cell, base.sizes.chosen)
    found.rows = [row_of(contenders[name], of_name[1:], None) for name, of_name in taken.items()]
    compare_with_base(found)
    report.cells.append(found)
    ours, loop = found.fastest_ms("river"), found.fastest_ms("loop")
    if ours is not None and loop is not None:
        key = f"{cell.layout} top{base.sizes.chosen} L{cell.adapters}"
        report.cpu_speedup[key] = round(loop / ours, 2)


def settings_of(base: Base, more: dict[str, int]) -> dict[str, int | float | str]:
    sizes = base.sizes
    return {
        "hidden": sizes.hidden,
        "inner": sizes.inner,
        "experts": sizes.experts,
        "rank": RANK,
        "dtype": str(base.gate_up.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        **more,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, for as long as this lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
