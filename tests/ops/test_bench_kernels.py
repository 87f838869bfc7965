"""The benchmark of kernels: everybody computes the same, and what fails or is absent says so beside the others."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from river_ops.bench.kernels.contender import FrozenRiver, River, RiverOneByOne, step
from river_ops.bench.kernels.goals import cpu_goals, gpu_goals
from river_ops.bench.kernels.grid import MODULES, OUT_OF_TIME, Grid
from river_ops.bench.kernels.grouped import FrozenGrouped, SplitLora, grouped_product
from river_ops.bench.kernels.parity import (
    ParityError,
    check_parity,
    expected_results,
    results_of,
)
from river_ops.bench.kernels.report import CellRows, KernelsReport, Row, compare_with_base, table
from river_ops.bench.kernels.runs import GPU_CONTENDERS, GPU_SIZES, gpu_cells, run_grid
from river_ops.bench.kernels.workload import (
    Base,
    Cell,
    ExpertLayout,
    Sizes,
    cells_of,
    choose_experts,
    make_base,
    make_workload,
)
from river_ops.bench.measure import machine

SIZES = Sizes(hidden=32, inner=16, experts=6, chosen=2)
CPU = torch.device("cpu")
LAYOUTS: tuple[ExpertLayout, ...] = ("shared_outer", "per_expert")


@pytest.fixture
def base() -> Base:
    return make_base(SIZES, CPU, torch.float32)


def silent(_: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_what_the_kernels_compute(base: Base, layout: ExpertLayout) -> None:
    """Loop and kernels, which share no code, agree on outputs and on every gradient."""
    cell = Cell(tokens=60, adapters=3, ranks=(8, 16, 32), layout=layout)
    workload = make_workload(cell, base)
    error = check_parity(River(workload), expected_results(workload, frozen=False))
    assert 0 < error < 1e-6


def test_the_whole_grid_runs_without_a_gpu(base: Base) -> None:
    """All contenders of a GPU but the Triton peer agree and are timed; who is absent in a layout says so."""
    cells = cells_of([64], [1, 4], [(16,), (8, 16)], LAYOUTS, ["zipf"])
    report = run_grid(
        base,
        cells,
        GPU_CONTENDERS,
        device_name="none",
        seconds=200.0,
        row_seconds=0.0,
        say=silent,
    )
    assert report.errors == []
    assert set(report.parity) == set(GPU_CONTENDERS) - {"scattermoe"}
    assert len(report.cells) == len(cells) == 6
    for cell in report.cells:
        states = {row.contender: row.state for row in cell.rows}
        assert states["scattermoe"].startswith("absent: ")
        assert states["peft"].startswith("absent: ") == (cell.layout == "shared_outer")
        assert ("one_by_one" in states) == (cell.adapters > 1)
        measured = [row for row in cell.rows if row.both_ms is not None]
        assert {"river", "split_lora", "frozen_grouped", "frozen_river"} <= {
            row.contender for row in measured
        }
        times = {row.contender: row.both_ms or 0.0 for row in measured}
        base_ms = min(times["frozen_grouped"], times["frozen_river"])
        for row in measured:
            percent = 100 * (times[row.contender] / base_ms - 1)
            assert row.over_base_percent == pytest.approx(percent, abs=0.1)
        assert all(row.steps >= 3 and (row.tflops or 0) > 0 for row in measured)
    assert "shared_outer T64 top2 L4 r16 zipf" in "\n".join(table(report))
    assert json.loads(json.dumps(dataclasses.asdict(report)))["cells"][0]["rows"]


def test_the_grid_of_the_design() -> None:
    """Every size, number of adapters, mix of ranks, layout and routing is there, and those with goals come first."""
    cells = gpu_cells(quick=False)
    assert len(set(cells)) == len(cells) == 56
    assert {cell.tokens for cell in cells} == {8192, 32768}
    assert {cell.adapters for cell in cells} == {1, 4, 16, 64}
    assert all(cell.routing == "uniform" and cell.ranks == (16,) for cell in cells[:16])
    assert set(gpu_cells(quick=True)) < set(cells)
    assert set(GPU_CONTENDERS) < set(MODULES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_waits_for_nothing_on_a_device(layout: ExpertLayout) -> None:
    """At the sizes of the design every contender of torch and ours goes through on memory without storage."""
    base = make_base(GPU_SIZES, torch.device("meta"), torch.bfloat16)
    cell = Cell(tokens=8190, adapters=3, ranks=(8, 16, 32), layout=layout)
    workload = make_workload(cell, base)
    for kind in (River, RiverOneByOne, FrozenRiver, FrozenGrouped, SplitLora):
        contender = kind(workload)
        step(contender)
        for part in contender.parts:
            assert part.x_TH.grad is not None
            assert part.x_TH.grad.shape == part.x_TH.shape


def test_a_wrong_contender_is_found_out(base: Base) -> None:
    """A gradient that is off by a percent is an error, and its owner is not timed."""

    class Wrong(River):
        def forward(self, index: int) -> torch.Tensor:
            return super().forward(index) * 1.01

    workload = make_workload(Cell(tokens=60, adapters=3, ranks=(8,), layout="per_expert"), base)
    with pytest.raises(ParityError, match="river: out is off by 1"):
        check_parity(Wrong(workload), expected_results(workload, frozen=False))


def test_failures_are_rows(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who fails has a row and an error that say so, who cannot be loaded is absent, and the rest goes on."""
    monkeypatch.setitem(MODULES, "missing", ("no_such_module", "Nothing"))
    report = KernelsReport(device="none", settings={}, machine=machine())
    names = ["missing", "river", "frozen_river"]
    grid = Grid(report, names, row_seconds=0.0, deadline=math.inf, say=silent)
    # A mixture whose experts are not frozen is refused by our kernels.
    unfrozen = Base(SIZES, base.gate_up.clone().requires_grad_(), base.down)
    cell = Cell(tokens=12, adapters=2, ranks=(8,), layout="per_expert")
    grid.measure(unfrozen, [cell])
    states = {row.contender: row.state for row in report.cells[0].rows}
    assert states["missing"].startswith("absent: No module")
    assert states["river"].startswith("failed: AssertionError: the base model is frozen")
    assert len(report.errors) == 2
    assert "FAILED: " in table(report)[-1]


def test_no_time_no_rows(base: Base) -> None:
    """Cells after the deadline are there, and say that they were not measured."""
    report = KernelsReport(device="none", settings={}, machine=machine())
    grid = Grid(report, ["river"], row_seconds=0.0, deadline=0.0, say=silent)
    grid.measure(base, [Cell(tokens=12, adapters=2, ranks=(8,), layout="per_expert")])
    assert [row.state for row in report.cells[0].rows] == [OUT_OF_TIME]


def test_many_groups_are_computed_in_blocks() -> None:
    """A product over more groups than one call takes has the values and gradients of a single call."""
    x = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(10, 4, 8, requires_grad=True)
    ends = torch.tensor([0, 5, 5, 9, 20, 20, 31, 31, 40, 40], dtype=torch.int32)
    found = []
    for groups_max in (16, 3):
        out = grouped_product(x, weight, ends, groups_max)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, whole)


def test_popular_experts() -> None:
    """Zipf's routing wants the first experts most, and never one twice for a token."""
    sizes = Sizes(hidden=8, inner=8, experts=16, chosen=4)
    torch.manual_seed(0)
    experts = choose_experts(2000, sizes, "zipf", CPU)
    counts = torch.bincount(experts.flatten(), minlength=16)
    assert counts[0] > 1.5 * counts[3] > 2 * counts[15] > 0
    assert all(len(set(row)) == 4 for row in experts.tolist())


def cell_with(adapters: int, layout: str, ranks: list[int], times: dict[str, float]) -> CellRows:
    rows = [Row(contender=name, both_ms=ms, peak_mib=ms) for name, ms in times.items()]
    cell = CellRows(
        tokens=32768,
        adapters=adapters,
        ranks=ranks,
        layout=layout,
        routing="uniform",
        chosen=8,
        rows=rows,
    )
    compare_with_base(cell)
    return cell


def test_goals_compare_with_the_best() -> None:
    """Overheads are over the faster base, speed-ups over the best peer of either layout."""
    cells = [
        cell_with(
            16,
            "shared_outer",
            [16],
            {"frozen_river": 10, "frozen_grouped": 11, "river": 11, "split_lora": 30},
        ),
        cell_with(16, "shared_outer", [8, 16, 32], {"river": 11.33}),
        cell_with(16, "per_expert", [16], {"scattermoe": 22, "peft": 80, "one_by_one": 60}),
        cell_with(1, "per_expert", [16], {"river": 12, "peft": 40}),
    ]
    found = {goal.name: goal for goal in gpu_goals(cells)}
    assert found["shared_outer T32768 L16: % over the frozen base"].measured == 10.0
    assert found["shared_outer T32768 L16: % over the frozen base"].is_met
    assert found["T32768 L16: times the best sequential peer"].measured == 5.45
    assert found["T32768 L16: times the best multi-adapter peer"].measured == 2.0
    assert found["T32768 L1: peak memory over PEFT's"].measured == 0.3
    assert found["shared_outer T32768 L16: mixed ranks, % over rank 16"].measured == 3.0
    assert found["shared_outer T8192 L1: % over the frozen base"].is_met is None
    (goal,) = cpu_goals(
        [cell_with(4, "per_expert", [16], {"loop": 29, "river": 10})], tokens=32768, adapters=4
    )
    assert (goal.measured, goal.is_met) == (2.9, False)


def test_frozen_contenders_ignore_adapters(base: Base) -> None:
    """Both bases compute the experts alone."""
    workload = make_workload(Cell(tokens=60, adapters=3, ranks=(8,), layout="per_expert"), base)
    expected = results_of(FrozenRiver(workload))
    assert len(expected) == 3
    for actual, right in zip(results_of(FrozenGrouped(workload)), expected, strict=True):
        torch.testing.assert_close(actual, right)
    assert not torch.allclose(results_of(SplitLora(workload))[0], expected[0], rtol=1e-3)


def test_it_needs_only_torch() -> None:
    """On a machine without msgspec and click the program itself runs."""
    program = (
        "import sys\n"
        "for name in ('msgspec', 'click', 'nats', 'river_trainer', 'transformers', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "import river_ops.bench.kernels.__main__, river_ops.bench.kernels.runs\n"
        "from river_ops.bench.kernels.grid import MODULES, make_contender\n"
        "import importlib\n"
        "for name, (module, _) in MODULES.items():\n"
        "    if name != 'peft':\n"
        "        importlib.import_module('river_ops.bench.kernels.' + module)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
