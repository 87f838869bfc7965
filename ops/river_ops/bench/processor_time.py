"""Processor time of the stack's parts, from `/proc`: what a step costs, and where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from river_ops.bench.measure import significant

PARTS = ("engine", "trainer", "recorder", "gateway", "nats-server", "postgres", "stack_clients")


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """Seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def __add__(self, other: Self) -> ProcessorTime:
        return self._with(other, 1)

    def __sub__(self, other: Self) -> ProcessorTime:
        return self._with(other, -1)

    def _with(self, other: ProcessorTime, sign: int) -> ProcessorTime:
        parts = self.seconds.keys() | other.seconds.keys()
        mine, theirs = self.seconds, other.seconds
        return ProcessorTime(
            {part: mine.get(part, 0.0) + sign * theirs.get(part, 0.0) for part in sorted(parts)}
        )

    def ms_per(self, steps: int) -> dict[str, float]:
        """Milliseconds by part for each of `steps`."""
        assert steps > 0
        return {part: significant(1000 * spent / steps, 3) for part, spent in self.seconds.items()}


def processor_time() -> ProcessorTime:
    """What all our descendants have used so far."""
    alive = list(_processes())
    parents = {process: parent for process, parent, _ in alive}
    found: dict[str, float] = {}
    for process, _, spent_s in alive:
        part = _part_of(process, parents)
        if part is not None:
            found[part] = found.get(part, 0.0) + spent_s
    return ProcessorTime(found)


def _processes() -> Iterator[tuple[int, int, float]]:
    """Id, parent and processor time in seconds of every process."""
    ticks = os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(path.name), int(fields[1]), (int(fields[11]) + int(fields[12])) / ticks


def _part_of(process: int, parents: dict[int, int]) -> str | None:
    """Which part of the stack a process belongs to, by its own command line or its ancestors'; None if to none."""
    ours = os.getpid()
    part: str | None = None
    while process not in (0, 1, ours):
        part = _named_part(process) or part
        process = parents.get(process, 0)
    return part if process == ours else None


def _named_part(process: int) -> str | None:
    """The part that a command line names."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    for word in words:
        name = word.decode(errors="replace").rpartition("/")[2].rpartition(".")[2]
        if name in PARTS:
            return name
    return None
