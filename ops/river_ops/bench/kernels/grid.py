"""Goes through the grid: first that everybody computes the same, then how fast, one contender after another."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch

from river_ops.bench.kernels.clock import Sample, free_memory, peak_mib, samples, steps_within
from river_ops.bench.kernels.contender import AbsentError, Contender
from river_ops.bench.kernels.parity import ParityError, check_parity, expected_results
from river_ops.bench.kernels.report import (
    CellRows,
    KernelsReport,
    Row,
    cell_rows,
    compare_with_base,
)
from river_ops.bench.kernels.workload import (
    Base,
    Cell,
    Workload,
    base_flops,
    lora_flops,
    make_workload,
)

MODULES = {
    "frozen_grouped": ("grouped", "FrozenGrouped"),
    "frozen_river": ("contender", "FrozenRiver"),
    "river": ("contender", "River"),
    "one_by_one": ("contender", "RiverOneByOne"),
    "split_lora": ("grouped", "SplitLora"),
    "scattermoe": ("scattermoe", "ScatterMoe"),
    "peft": ("peft_experts", "Peft"),
    "loop": ("loop", "Loop"),
    "sorted_loop": ("loop", "SortedLoop"),
}
BATCHED_ALONE = ("one_by_one",)
"""With one adapter they are `river` itself."""
OUT_OF_TIME = "not measured: out of time"


class Grid:
    """Measures `contenders`, each in every cell, and writes into `report`.

    A contender that fails, for want of memory or otherwise, has a row that says so; all others go on.
    """

    def __init__(
        self,
        report: KernelsReport,
        contenders: Sequence[str],
        *,
        row_seconds: float,
        deadline: float,
        say: Callable[[str], None],
    ) -> None:
        self._report = report
        self._contenders = contenders
        self._row_seconds = row_seconds
        self._deadline = deadline
        self._say = say
        self._failed: dict[str, str] = {}
        """Who computes something else, and is not asked how fast."""

    @property
    def agreeing(self) -> list[str]:
        """The contenders that have passed every check so far."""
        return [name for name in self._contenders if name not in self._failed]

    def check(self, base: Base, cells: Iterable[Cell]) -> None:
        """That all contenders agree with float64 in `cells`."""
        for cell in cells:
            workload = make_workload(cell, base)
            expected = {
                frozen: expected_results(workload, frozen=frozen) for frozen in (False, True)
            }
            for name in self.agreeing:
                self._check(name, workload, expected)
            del workload, expected
            free_memory(base.gate_up.device)

    def _check(
        self, name: str, workload: Workload, expected: dict[bool, list[torch.Tensor]]
    ) -> None:
        cell = workload.cell
        self._say(f"parity: {name}, {cell.layout}, ranks {cell.ranks}")
        try:
            contender = make_contender(name, workload)
            error = check_parity(contender, expected[contender.frozen])
        except AbsentError:
            return
        except ParityError as failure:
            self._fail(name, f"{failure} ({cell.layout}, ranks {cell.ranks})")
        except Exception as failure:  # noqa: BLE001  # a supervisor: one contender must not end the comparison
            self._fail(name, f"{name}: {reason(failure)} ({cell.layout}, ranks {cell.ranks})")
        else:
            parity = self._report.parity
            parity[name] = max(parity.get(name, 0.0), float(f"{error:.2g}"))

    def measure(self, base: Base, cells: Iterable[Cell]) -> None:
        """The rows of `cells`, until the time is up."""
        for cell in cells:
            found = cell_rows(cell, base.sizes.chosen)
            self._report.cells.append(found)
            names = [
                name for name in self._contenders if cell.adapters > 1 or name not in BATCHED_ALONE
            ]
            if time.monotonic() > self._deadline:
                found.rows = [Row(contender=name, state=OUT_OF_TIME) for name in names]
                continue
            self._say(
                f"cell {len(self._report.cells)}: {cell.layout} T{cell.tokens} L{cell.adapters}"
            )
            self._measure_cell(found, cell, base, names)
            compare_with_base(found)

    def _measure_cell(self, found: CellRows, cell: Cell, base: Base, names: Sequence[str]) -> None:
        try:
            workload = make_workload(cell, base)
        except torch.OutOfMemoryError:
            found.rows = [Row(contender=name, state="out of memory: adapters") for name in names]
            return
        for name in names:
            found.rows.append(self._measure_row(name, workload))
            free_memory(base.gate_up.device)

    def _measure_row(self, name: str, workload: Workload) -> Row:
        if name in self._failed:
            return Row(contender=name, state=f"not measured: {self._failed[name]}")
        try:
            return measured_row(make_contender(name, workload), seconds=self._row_seconds)
        except AbsentError as absent:
            return Row(contender=name, state=f"absent: {absent}")
        except torch.OutOfMemoryError:
            return Row(contender=name, state="out of memory")
        except Exception as failure:  # noqa: BLE001  # a supervisor: one contender must not end the comparison
            self._report.errors.append(f"{name} in {workload.cell}: {reason(failure)}")
            return Row(contender=name, state=f"failed: {reason(failure)}")

    def _fail(self, name: str, why: str) -> None:
        self._failed[name] = why
        self._report.errors.append(why)


def make_contender(name: str, workload: Workload) -> Contender:
    """The contender called `name`.

    Raises:
        AbsentError: it cannot take part.
    """
    module, kind = MODULES[name]
    try:
        loaded = importlib.import_module(f"river_ops.bench.kernels.{module}")
    except ImportError as error:
        raise AbsentError(str(error)) from error
    return getattr(loaded, kind)(workload)


def measured_row(contender: Contender, *, seconds: float) -> Row:
    """The medians of as many steps as fit in `seconds`, after one that compiles and one that is timed for that."""
    samples(contender, 1)
    peak = peak_mib(contender)
    first = samples(contender, 1)[0]
    return row_of(contender, samples(contender, steps_within(seconds, first.both_ms)), peak)


def row_of(contender: Contender, found: Sequence[Sample], peak: float | None) -> Row:
    cell, sizes = contender.workload.cell, contender.workload.base.sizes
    both_ms = median(sample.both_ms for sample in found)
    # Backward passes have the frozen products once more, and those of the adapters twice.
    flops = 2 * base_flops(cell, sizes)
    if not contender.frozen:
        flops += 3 * lora_flops(cell, sizes)
    return Row(
        contender=contender.name,
        forward_ms=round(median(sample.forward_ms for sample in found), 4),
        backward_ms=round(median(sample.backward_ms for sample in found), 4),
        both_ms=round(both_ms, 4),
        peak_mib=None if peak is None else round(peak, 1),
        tflops=round(flops / max(both_ms, 1e-6) / 1e9, 4),
        steps=len(found),
    )


def reason(failure: Exception) -> str:
    """The first line of what went wrong."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:200]
