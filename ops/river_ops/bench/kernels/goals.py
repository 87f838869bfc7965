"""What the design asks of the kernels, looked up in the cells that were measured."""

from __future__ import annotations

from collections.abc import Sequence

from river_ops.bench.kernels.report import CellRows, Goal

UNIFORM, MIXED = [16], [8, 16, 32]
LONG, SHORT = 32768, 8192
OVER_BASE_PERCENT: dict[tuple[str, int], dict[int, float]] = {
    ("shared_outer", LONG): {1: 6, 4: 8, 16: 12, 64: 25},
    ("shared_outer", SHORT): {1: 10, 4: 15, 16: 30, 64: 80},
    ("per_expert", LONG): {1: 12, 4: 15, 16: 35},
}
LAYOUTS = ("shared_outer", "per_expert")
TENANTS = 16
SEQUENTIAL, BATCHED = ("peft", "one_by_one"), ("split_lora", "scattermoe")
SPEEDUP_SEQUENTIAL_MIN, SPEEDUP_BATCHED_MIN = 5.0, 2.0
MEMORY_OF_PEFT_MAX = 0.4
MIXED_OVER_UNIFORM_PERCENT_MAX = 5.0
LOOP_SPEEDUP_MIN = 3.0


def gpu_goals(cells: Sequence[CellRows]) -> list[Goal]:
    """Those of a GPU, with uniform routing."""
    grid = _Grid(cells)
    goals = [
        Goal(
            name=f"{layout} T{tokens} L{adapters}: % over the frozen base",
            bound=bound,
            at_most=True,
            measured=grid.over_base(tokens, adapters, layout),
        )
        for (layout, tokens), bounds in OVER_BASE_PERCENT.items()
        for adapters, bound in bounds.items()
    ]
    for tokens in (LONG, SHORT):
        goals += [
            Goal(
                name=f"T{tokens} L{TENANTS}: times the best sequential peer",
                bound=SPEEDUP_SEQUENTIAL_MIN,
                at_most=False,
                measured=grid.speedup(tokens, SEQUENTIAL),
            ),
            Goal(
                name=f"T{tokens} L{TENANTS}: times the best multi-adapter peer",
                bound=SPEEDUP_BATCHED_MIN,
                at_most=False,
                measured=grid.speedup(tokens, BATCHED),
            ),
            Goal(
                name=f"T{tokens} L1: peak memory over PEFT's",
                bound=MEMORY_OF_PEFT_MAX,
                at_most=True,
                measured=grid.memory_of_peft(tokens),
            ),
        ]
    goals += [
        Goal(
            name=f"{layout} T{LONG} L{TENANTS}: mixed ranks, % over rank 16",
            bound=MIXED_OVER_UNIFORM_PERCENT_MAX,
            at_most=True,
            measured=grid.mixed_over_uniform(LONG, layout),
        )
        for layout in LAYOUTS
    ]
    return goals


def cpu_goals(cells: Sequence[CellRows], *, tokens: int, adapters: int) -> list[Goal]:
    """Those of a machine without a GPU."""
    return [
        Goal(
            name=f"{cell.layout} T{tokens} top{cell.chosen} L{adapters}: times the loop",
            bound=LOOP_SPEEDUP_MIN,
            at_most=False,
            measured=_ratio(cell.fastest_ms("loop"), cell.fastest_ms("river")),
        )
        for cell in cells
        if cell.tokens == tokens and cell.adapters == adapters and cell.ranks == UNIFORM
    ]


class _Grid:
    """The cells with uniform routing."""

    def __init__(self, cells: Sequence[CellRows]) -> None:
        self._cells = {
            (cell.tokens, cell.adapters, cell.layout, tuple(cell.ranks)): cell
            for cell in cells
            if cell.routing == "uniform"
        }

    def over_base(self, tokens: int, adapters: int, layout: str) -> float | None:
        cell = self._cell(tokens, adapters, layout)
        row = cell.row("river") if cell else None
        return row.over_base_percent if row else None

    def speedup(self, tokens: int, peers: tuple[str, ...]) -> float | None:
        """Of ours in the default layout over the best peer in whichever layout suits it."""
        cells = [self._cell(tokens, TENANTS, layout) for layout in LAYOUTS]
        times = [cell.fastest_ms(*peers) for cell in cells if cell]
        best = min((time for time in times if time is not None), default=None)
        return _ratio(best, cells[0].fastest_ms("river") if cells[0] else None)

    def memory_of_peft(self, tokens: int) -> float | None:
        """PEFT has the layout per_expert alone; ours is measured in it too."""
        cell = self._cell(tokens, 1, "per_expert")
        rows = [cell.row(name) for name in ("river", "peft")] if cell else []
        ours, theirs = [row.peak_mib if row else None for row in rows] or [None, None]
        return _ratio(ours, theirs)

    def mixed_over_uniform(self, tokens: int, layout: str) -> float | None:
        cells = [self._cell(tokens, TENANTS, layout, ranks) for ranks in (MIXED, UNIFORM)]
        mixed, uniform = [cell.fastest_ms("river") if cell else None for cell in cells]
        ratio = _ratio(mixed, uniform)
        return None if ratio is None else round(100 * (ratio - 1), 1)

    def _cell(
        self, tokens: int, adapters: int, layout: str, ranks: Sequence[int] = UNIFORM
    ) -> CellRows | None:
        return self._cells.get((tokens, adapters, layout, tuple(ranks)))


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else round(over / under, 2)
