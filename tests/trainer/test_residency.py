"""Runs that do not fit into memory wait on disk and come back as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.training import ADAM, RunScript, forward_backward, shape, timeless
from support.workbench import Workbench

from river_trainer.adapter import layout_of
from river_trainer.protocol import CreateRun, OptimStep
from river_trainer.residency import Residency

Maker = Callable[..., Workbench]


def test_runs_come_back_as_they_were(make_executor: Maker, tmp_path: Path) -> None:
    """Five runs in the memory of two train as five in the memory of all, pending gradients included."""
    tight, roomy = make_executor(), make_executor()
    scripts = [RunScript(f"run_{number}") for number in range(5)]
    shapes = [shape(rank=1 + number) for number in range(5)]
    largest_bytes = 4 * 4 * layout_of(tight.base.sites, shapes[-1]).size
    budget = 2 * largest_bytes
    residency = Residency(tight.runs, tmp_path / "spill", budget_bytes=budget)
    for script, one in zip(scripts, shapes, strict=True):
        message = script.do(CreateRun(shape=one))
        residency.bring({script.run_id})
        for bench in (tight, roomy):
            bench.execute(message)
    for step in range(3):
        for task in (
            forward_backward(step, [9]),
            forward_backward(step, [5]),
            OptimStep(adam=ADAM),
        ):
            for script in scripts:
                message = script.do(task)
                residency.bring({script.run_id})
                ours, theirs = tight.execute(message), roomy.execute(message)
                assert timeless(ours.metrics) == timeless(theirs.metrics)
                assert ours.error is None
                assert residency.resident_bytes <= budget
    assert residency.spilled >= 2
    for script in scripts:
        residency.bring({script.run_id})
        ours, theirs = tight.run(script.run_id), roomy.run(script.run_id)
        assert (ours.step, ours.last_seq) == (theirs.step, theirs.last_seq) == (3, 9)
        assert ours.optimizer.steps == 3
        for one, two in (
            (ours.adapter.weights, theirs.adapter.weights),
            (ours.optimizer.first, theirs.optimizer.first),
            (ours.optimizer.second, theirs.optimizer.second),
        ):
            assert torch.equal(one.flat, two.flat)


def test_what_an_earlier_process_left_is_worth_nothing(
    make_executor: Maker, tmp_path: Path
) -> None:
    """The directory is emptied at the start: snapshots and the journal say what a run is, not a spilled file."""
    stale = tmp_path / "spill/run_old.bin"
    stale.parent.mkdir()
    stale.write_bytes(b"x")
    residency = Residency(make_executor().runs, stale.parent, budget_bytes=1)
    assert not stale.exists()
    assert not residency.holds("run_old")


_MANY = """
import resource, sys
from pathlib import Path
from support.training import ADAM, RunScript, forward_backward, shape, timeless
from support.workbench import Workbench
from river_trainer.base_model import BaseModel
from river_trainer.lanes import Lanes
from river_trainer.adapter import layout_of
from river_trainer.protocol import CreateRun, OptimStep
from river_trainer.residency import Residency
from river_trainer.store import FileSets

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder = Path(sys.argv[2])
bench = Workbench(BaseModel(sys.argv[1]), Lanes(2), FileSets((folder / "store").as_uri()), base_model="x")
warm = RunScript("run_warm")
for task in (CreateRun(shape=shape(rank=16)), forward_backward(0, [64] * 8), OptimStep(adam=ADAM)):
    bench.execute(warm.do(task))
before = peak_mb()
residency = Residency(bench.runs, folder / "spill", budget_bytes=10 * 6 * 1024**2)
scripts = [RunScript(f"run_{number}") for number in range(200)]
for script in scripts:
    residency.bring({script.run_id})
    assert bench.execute(script.do(CreateRun(shape=shape(rank=16)))).error is None
for _ in range(2):
    for start in range(0, 200, 8):
        group = scripts[start : start + 8]
        residency.bring({script.run_id for script in group})
        works = [script.do(task) for script in group for task in (forward_backward(1, [16]), OptimStep(adam=ADAM))]
        results = bench.execute_together(works)
        assert all(result.error is None for result in results)
print(residency.spilled, results[-1].step, peak_mb() - before)
"""


@pytest.mark.slow
def test_two_hundred_runs_are_open_in_the_memory_of_ten(tiny_moe: Path, tmp_path: Path) -> None:
    """200 runs of rank 16 on all targets stay trainable, in a small part of 4 GB beyond the base model."""
    done = subprocess.run(
        [sys.executable, "-c", _MANY, str(tiny_moe), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spilled, step, grown_mb = done.stdout.split()
    assert int(spilled) >= 190
    assert int(step) == 2
    assert float(grown_mb) < 512
