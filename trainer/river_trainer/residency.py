"""Where runs are while nobody trains them: in memory up to a budget, beyond it on disk.

A run that leaves takes everything along: weights, moments, the pending gradient. What lies on disk is an extension of
memory and no more: it is worth nothing to another process, which has the snapshots and the journal.
"""

from __future__ import annotations

import logging
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from river_trainer import limits
from river_trainer.adapter import Adapter, FlatTensors, Layout
from river_trainer.optimizer import AdamState
from river_trainer.protocol import AdapterShape
from river_trainer.runs import FailedRun, Run

logger = logging.getLogger("river.trainer")


@dataclass(frozen=True, slots=True)
class _Spilled:
    """What of a run is not in its file."""

    shape: AdapterShape
    layout: Layout
    optimizer_steps: int
    step: int
    last_seq: int
    has_gradient: bool
    size_bytes: int


class Residency:
    """Keeps `runs`, which the executor works on, within `budget_bytes`. For the worker thread."""

    def __init__(
        self, runs: dict[str, Run | FailedRun], directory: Path, *, budget_bytes: int
    ) -> None:
        assert budget_bytes > 0
        self._runs = runs
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._used: OrderedDict[str, None] = (
            OrderedDict()
        )  # runs in memory, least recently used first
        self._spilled: dict[str, _Spilled] = {}
        self._largest_bytes = 0
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    @property
    def spilled(self) -> int:
        """How many runs are on disk."""
        return len(self._spilled)

    @property
    def resident_bytes(self) -> int:
        return sum(run.size_bytes for run in list(self._runs.values()) if isinstance(run, Run))

    def holds(self, run_id: str) -> bool:
        """Whether the run is here, in memory or on disk."""
        return run_id in self._runs or run_id in self._spilled

    def size_bytes(self, run_id: str) -> int:
        """What the run takes in memory; of one that is not made yet, what the largest so far took."""
        run = self._runs.get(run_id)
        if isinstance(run, Run):
            self._largest_bytes = max(self._largest_bytes, run.size_bytes)
            return run.size_bytes
        if isinstance(run, FailedRun):
            return 0
        spilled = self._spilled.get(run_id)
        return self._largest_bytes if spilled is None else spilled.size_bytes

    def admit(self, run: Run | FailedRun) -> None:
        """Takes in a run that comes from elsewhere."""
        if isinstance(run, Run):
            self._make_room(run.size_bytes, {run.run_id})
        self._runs[run.run_id] = run
        self._used[run.run_id] = None
        self._used.move_to_end(run.run_id)

    def fits(self, size_bytes: int) -> bool:
        """Whether runs of that size altogether can be in memory at once."""
        return size_bytes <= self._budget_bytes

    def bring(self, run_ids: set[str]) -> None:
        """Makes sure that these runs are in memory, as far as they are here at all.

        Raises:
            OSError: the disk does not give one.
        """
        for run_id in run_ids & self._runs.keys() & self._spilled.keys():
            # It has been given up while it was on disk.
            self._path(run_id).unlink()
            del self._spilled[run_id]
        coming = [run_id for run_id in run_ids if run_id in self._spilled]
        self._make_room(sum(self.size_bytes(run_id) for run_id in coming), run_ids)
        for run_id in coming:
            self._runs[run_id] = self._read(run_id)
        for run_id in run_ids:
            self._used[run_id] = None
            self._used.move_to_end(run_id)

    def _make_room(self, coming_bytes: int, needed: set[str]) -> None:
        resident = self.resident_bytes
        if resident + coming_bytes <= self._budget_bytes:
            return
        # Some more than necessary, so that not every batch has to.
        target = self._budget_bytes * (1.0 - limits.SPILL_FREE_SHARE) - coming_bytes
        for run_id in list(self._used):
            if resident <= target:
                return
            run = self._runs.get(run_id)
            if run_id in needed or not isinstance(run, Run):
                continue
            try:
                self._write(run)
            except OSError:
                # More memory than wished is better than no training at all.
                self._path(run_id).unlink(missing_ok=True)
                logger.exception("cannot move a run to disk", extra={"run": run_id})
                return
            resident -= run.size_bytes
            del self._runs[run_id]
            del self._used[run_id]

    def _write(self, run: Run) -> None:
        buffers = [run.adapter.weights, run.optimizer.first, run.optimizer.second]
        if run.gradient is not None:
            buffers.append(run.gradient)
        with self._path(run.run_id).open("wb") as file:
            for buffer in buffers:
                buffer.flat.numpy().tofile(file)
        self._spilled[run.run_id] = _Spilled(
            shape=run.adapter.shape,
            layout=run.adapter.layout,
            optimizer_steps=run.optimizer.steps,
            step=run.step,
            last_seq=run.last_seq,
            has_gradient=run.gradient is not None,
            size_bytes=run.size_bytes,
        )

    def _read(self, run_id: str) -> Run:
        spilled = self._spilled[run_id]
        path = self._path(run_id)
        layout = spilled.layout
        with path.open("rb") as file:
            weights, first, second, *gradient = (
                FlatTensors(layout, torch.from_numpy(np.fromfile(file, np.float32, layout.size)))
                for _ in range(4 if spilled.has_gradient else 3)
            )
        run = Run(
            run_id,
            Adapter(spilled.shape, weights),
            AdamState(first, second, spilled.optimizer_steps),
            spilled.step,
            spilled.last_seq,
            gradient[0] if gradient else None,
        )
        path.unlink()
        del self._spilled[run_id]
        return run

    def _path(self, run_id: str) -> Path:
        return self._directory / f"{run_id}.bin"
