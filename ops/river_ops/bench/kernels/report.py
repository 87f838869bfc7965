"""What is found out, for programs and for people. Plain dataclasses: msgspec may be absent where this runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from river_ops.bench.kernels.workload import Cell
from river_ops.bench.measure import Machine

MEASURED = "ok"
FROZEN = ("frozen_river", "frozen_grouped")


@dataclass(slots=True, kw_only=True)
class Row:
    """One contender in one cell: medians over `steps`, or the reason why there are none as its `state`.

    `peak_mib` is the most memory of a step beyond weights, adapters, their gradients and the input. `over_base_percent`
    compares with the faster of the frozen contenders; `tflops` counts the arithmetic that the cell needs, not what
    padding adds.
    """

    contender: str
    state: str = MEASURED
    forward_ms: float | None = None
    backward_ms: float | None = None
    both_ms: float | None = None
    peak_mib: float | None = None
    over_base_percent: float | None = None
    tflops: float | None = None
    steps: int = 0


@dataclass(slots=True, kw_only=True)
class CellRows:
    """All contenders in one cell of the grid."""

    tokens: int
    adapters: int
    ranks: list[int]
    layout: str
    routing: str
    chosen: int
    rows: list[Row] = field(default_factory=list)

    def row(self, contender: str) -> Row | None:
        """What is measured of a contender, None if nothing is."""
        found = (row for row in self.rows if row.contender == contender and row.both_ms is not None)
        return next(found, None)

    def fastest_ms(self, *contenders: str) -> float | None:
        """The shortest step of those contenders that are measured."""
        rows = [self.row(contender) for contender in contenders]
        return min((row.both_ms for row in rows if row and row.both_ms), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What the design asks for. `measured` is None where its cells were not."""

    name: str
    bound: float
    at_most: bool
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


@dataclass(slots=True, kw_only=True)
class KernelsReport:
    """`parity` has each contender's largest error against float64 over all that was checked.

    `cpu_speedup` is the time of the loop over ours, on a machine without a GPU. `errors` are failures, of parity too:
    whoever fails has no times.
    """

    name: str = "kernels"
    device: str
    cells: list[CellRows] = field(default_factory=list)
    cpu_speedup: dict[str, float] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    settings: dict[str, int | float | str]
    machine: Machine


def cell_rows(cell: Cell, chosen: int) -> CellRows:
    return CellRows(
        tokens=cell.tokens,
        adapters=cell.adapters,
        ranks=list(cell.ranks),
        layout=cell.layout,
        routing=cell.routing,
        chosen=chosen,
    )


def compare_with_base(cell: CellRows) -> None:
    """Fills in how much longer everybody takes than the frozen experts."""
    base_ms = cell.fastest_ms(*FROZEN)
    for row in cell.rows:
        if base_ms is not None and row.both_ms is not None:
            row.over_base_percent = round(100 * (row.both_ms / base_ms - 1), 1)


def table(report: KernelsReport) -> list[str]:
    """The report for people."""
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    head = f"{'cell':<44}{'contender':<16}{'fwd ms':>9}{'bwd ms':>9}{'both ms':>9}"
    head += f"{'% over base':>13}{'TFLOP/s':>9}{'peak MiB':>10}"
    lines = [f"{report.device}; {settings}", "", head]
    for cell in report.cells:
        name = cell_name(cell)
        for row in cell.rows:
            lines.append(f"{name:<44}{_row(row)}")
            name = ""
    if report.parity:
        lines += ["", "largest error against float64, over the norm:"]
        lines += [f"  {name:<16}{error:.1e}" for name, error in report.parity.items()]
    if report.goals:
        lines += ["", f"{'goal':<66}{'bound':>8}{'found':>8}"]
        lines += [_goal(goal) for goal in report.goals]
    return lines + [f"FAILED: {error}" for error in report.errors]


def cell_name(cell: CellRows) -> str:
    ranks = "/".join(str(rank) for rank in cell.ranks)
    return f"{cell.layout} T{cell.tokens} top{cell.chosen} L{cell.adapters} r{ranks} {cell.routing}"


def _row(row: Row) -> str:
    if row.state != MEASURED:
        return f"{row.contender:<16}  {row.state}"
    columns = (
        _number(row.forward_ms, 9, 3),
        _number(row.backward_ms, 9, 3),
        _number(row.both_ms, 9, 3),
        _number(row.over_base_percent, 13, 1),
        _number(row.tflops, 9, 2),
        _number(row.peak_mib, 10, 0),
    )
    return f"{row.contender:<16}{''.join(columns)}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _goal(goal: Goal) -> str:
    sign = "<=" if goal.at_most else ">="
    verdict = {None: "not measured", True: "met", False: "MISSED"}[goal.is_met]
    return f"{goal.name:<66}{sign}{goal.bound:>6.1f}{_number(goal.measured, 8, 2)}  {verdict}"
