"""Where runs are while nobody trains them: on the device, in the host's memory or on disk, each up to a budget.

    device, where passes read them ─▶ host memory, pinned ─▶ disk          least recently used first
             ▲                             │                  │
             └───── on the next operation ─┴──────────────────┘

Without an accelerator the first two are one. A run that leaves takes everything along: weights, moments, the pending
gradient. What lies on disk is an extension of memory and no more: it is worth nothing to another process, which has the
snapshots and the journal.
"""

from __future__ import annotations

import logging
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from river_trainer import limits
from river_trainer.adapter import Adapter, FlatTensors, Layout
from river_trainer.devices import HOME_OF_FLOATS, Home
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


class Residency:
    """Keeps `runs`, which the executor works on, within `budget_bytes` of memory. For the worker thread.

    With a `device_budget_bytes` that is for those that are not at `home`, where passes read them, and those that are
    have the other.
    """

    def __init__(
        self,
        runs: dict[str, Run | FailedRun],
        directory: Path,
        *,
        budget_bytes: int,
        home: Home = HOME_OF_FLOATS,
        device_budget_bytes: int | None = None,
    ) -> None:
        assert budget_bytes > 0
        assert device_budget_bytes is None or device_budget_bytes > 0
        self._runs = runs
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._home = home
        self._device_budget_bytes = device_budget_bytes
        self._away: set[str] = set()  # runs in memory that passes cannot read as they are
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
        """Memory of all runs that are not on disk."""
        return sum(run.size_bytes for run in list(self._runs.values()) if isinstance(run, Run))

    @property
    def device_runs(self) -> int:
        """How many runs are on the device, if there is another than the host."""
        return 0 if self._device_budget_bytes is None else len(self._at_home())

    @property
    def device_bytes(self) -> int:
        return sum(run.size_bytes for run in self._at_home())

    def holds(self, run_id: str) -> bool:
        """Whether the run is here, in memory or on disk."""
        return run_id in self._runs or run_id in self._spilled

    def size_bytes(self, run_id: str) -> int:
        """What the run takes while it is trained; of one that is not made yet, what the largest so far took."""
        run = self._runs.get(run_id)
        if isinstance(run, Run):
            size_bytes = self._home.run_bytes(run.adapter.layout.size)
            self._largest_bytes = max(self._largest_bytes, size_bytes)
            return size_bytes
        if isinstance(run, FailedRun):
            return 0
        spilled = self._spilled.get(run_id)
        return self._largest_bytes if spilled is None else self._home.run_bytes(spilled.layout.size)

    def fits(self, size_bytes: int) -> bool:
        """Whether runs of that size altogether can be trained at once."""
        return size_bytes <= (self._device_budget_bytes or self._budget_bytes)

    def admit(self, run: Run | FailedRun) -> None:
        """Takes in a run that comes from elsewhere, in the host's memory."""
        if isinstance(run, Run):
            self._make_room(run.size_bytes, {run.run_id})
            self._away.add(run.run_id)
        self._runs[run.run_id] = run
        self._use({run.run_id})

    def reach(self, run_ids: set[str]) -> None:
        """Makes sure that these runs are in some memory, as far as they are here at all.

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
            self._away.add(run_id)
        self._use(run_ids)

    def bring(self, run_ids: set[str]) -> None:
        """Makes sure that passes can read these runs, as far as they are here at all.

        Raises:
            OSError: the disk does not give one.
        """
        self.reach(run_ids)
        if self._device_budget_bytes is not None:
            coming = [id_ for id_ in run_ids if id_ in self._away or id_ not in self._runs]
            coming_bytes = sum(self.size_bytes(run_id) for run_id in coming)
            budget = self._device_budget_bytes
            for run in self._leaving(self._at_home(), budget, coming_bytes, run_ids):
                run.move(HOME_OF_FLOATS)
                self._away.add(run.run_id)
        for run_id in run_ids & self._away:
            run = self._runs[run_id]
            if isinstance(run, Run):
                run.move(self._home)
            self._away.remove(run_id)
        if self._device_budget_bytes is not None:
            self._make_room(0, run_ids)

    def drop(self, run_id: str) -> None:
        """Forgets a run, wherever it is."""
        self._runs.pop(run_id, None)
        self._used.pop(run_id, None)
        self._away.discard(run_id)
        if self._spilled.pop(run_id, None) is not None:
            self._path(run_id).unlink(missing_ok=True)

    def _use(self, run_ids: set[str]) -> None:
        for run_id in run_ids:
            self._used[run_id] = None
            self._used.move_to_end(run_id)

    def _at_home(self) -> list[Run]:
        runs = list(self._runs.values())
        return [run for run in runs if isinstance(run, Run) and run.run_id not in self._away]

    def _in_memory(self) -> list[Run]:
        """Runs that count as the host's."""
        runs = [run for run in list(self._runs.values()) if isinstance(run, Run)]
        if self._device_budget_bytes is None:
            return runs
        return [run for run in runs if run.run_id in self._away]

    def _leaving(
        self, here: Sequence[Run], budget_bytes: int, coming_bytes: int, needed: set[str]
    ) -> Iterator[Run]:
        """Those of the runs `here` that have to leave, for so much to come, least recently used first."""
        held = {run.run_id: run for run in here}
        resident = sum(run.size_bytes for run in here)
        if resident + coming_bytes <= budget_bytes:
            return
        # Some more than necessary, so that not every batch has to.
        target = budget_bytes * (1.0 - limits.SPILL_FREE_SHARE) - coming_bytes
        for run_id in list(self._used):
            if resident <= target:
                return
            if run_id in held and run_id not in needed:
                resident -= held[run_id].size_bytes
                yield held[run_id]

    def _make_room(self, coming_bytes: int, needed: set[str]) -> None:
        """In the host's memory."""
        here = self._in_memory()
        for run in self._leaving(here, self._budget_bytes, coming_bytes, needed):
            run_id = run.run_id
            try:
                self._write(run)
            except OSError:
                # More memory than wished is better than no training at all.
                self._path(run_id).unlink(missing_ok=True)
                logger.exception("cannot move a run to disk", extra={"run": run_id})
                return
            del self._runs[run_id]
            del self._used[run_id]
            self._away.discard(run_id)

    def _write(self, run: Run) -> None:
        buffers = [run.adapter.weights, run.optimizer.first, run.optimizer.second]
        if run.gradient is not None:
            buffers.append(run.gradient)
        with self._path(run.run_id).open("wb") as file:
            for buffer in buffers:
                buffer.wait()
                buffer.flat.numpy().tofile(file)
        self._spilled[run.run_id] = _Spilled(
            shape=run.adapter.shape,
            layout=run.adapter.layout,
            optimizer_steps=run.optimizer.steps,
            step=run.step,
            last_seq=run.last_seq,
            has_gradient=run.gradient is not None,
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
