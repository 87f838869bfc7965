"""Runs and checkpoints in the catalog, in whatever order the news come."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from support.billing import OCCURRED_AT, TINY, add_run

from river_billing.catalog import advance_run, record_checkpoint
from river_billing.events import CheckpointSaved, RunAdvanced


def advanced(seq: int, **metrics: float) -> RunAdvanced:
    """Operation `seq` of run_1, which made step `seq`."""
    return RunAdvanced(
        run_id="run_1", seq=seq, step=seq, occurred_at=OCCURRED_AT + seq, metrics=metrics
    )


def saved(number: int, name: str = "final") -> CheckpointSaved:
    """The checkpoint that was saved `number` seconds in."""
    return CheckpointSaved(
        checkpoint_id=f"ckpt_{number}",
        run_id="run_1",
        tenant_id="ten_a",
        base_model=TINY,
        name=name,
        mode="training",
        step=number,
        location=f"file:///store/{number}",
        size_bytes=10,
        created_at=OCCURRED_AT + number,
    )


async def test_a_lost_run_stays_lost(connection: Any) -> None:
    """Why a run is lost is written down with the operation that said so; nothing later takes it back."""
    await add_run(connection)
    await advance_run(connection, advanced(1))
    assert await connection.fetchval("select lost from run") is None
    await advance_run(connection, msgspec.structs.replace(advanced(2), lost="its snapshot is gone"))
    await advance_run(connection, advanced(3))
    assert await connection.fetchval("select lost from run") == "its snapshot is gone"


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])), ids=str)
async def test_a_run_stands_where_its_newest_operation_left_it(
    connection: Any, order: tuple[int, ...]
) -> None:
    """Late and repeated news never set a run back, and every step's metrics are kept once."""
    await add_run(connection)
    for seq in (*order, *order):
        assert await advance_run(connection, advanced(seq, loss=float(seq)))
    await advance_run(connection, advanced(0, loss=0.0, kept=1.0))
    run = await connection.fetchrow("select last_seq, step, metrics from run")
    assert (run["last_seq"], run["step"], json.loads(run["metrics"])) == (
        3,
        3,
        {"loss": 3.0, "kept": 1.0},
    )
    rows = await connection.fetch("select step, metrics from run_metric order by step")
    assert [(row["step"], json.loads(row["metrics"])["loss"]) for row in rows] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
    ]


async def test_a_metric_that_is_not_finite_is_left_out(connection: Any) -> None:
    """A diverged run is written down without the numbers that JSON cannot hold."""
    await add_run(connection)
    await advance_run(connection, advanced(1, loss=float("nan"), grad_norm=2.0))
    assert json.loads(await connection.fetchval("select metrics from run")) == {"grad_norm": 2.0}


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])), ids=str)
async def test_the_last_checkpoint_saved_under_a_path_is_the_live_one(
    connection: Any, order: tuple[int, ...]
) -> None:
    """Saving again replaces, in whatever order and however often it is recorded."""
    await add_run(connection)
    for number in (*order, *order):
        assert await record_checkpoint(connection, saved(number))
    await record_checkpoint(connection, saved(9, "other"))
    rows = await connection.fetch(
        "select checkpoint_id, deleted_at is null as live from checkpoint order by checkpoint_id"
    )
    assert [(row["checkpoint_id"], row["live"]) for row in rows] == [
        ("ckpt_1", False),
        ("ckpt_2", False),
        ("ckpt_3", True),
        ("ckpt_9", True),
    ]


async def test_a_deleted_checkpoint_stays_deleted(connection: Any) -> None:
    """A repeated message does not bring back what the user deleted."""
    await add_run(connection)
    await record_checkpoint(connection, saved(1))
    await connection.execute("update checkpoint set deleted_at = now()")
    await record_checkpoint(connection, saved(1))
    assert await connection.fetchval("select deleted_at from checkpoint") is not None


async def test_news_of_an_unknown_run_are_told_apart(connection: Any) -> None:
    """Nothing is written for a run that is not there, and the caller learns it."""
    assert not await advance_run(connection, advanced(1))
    assert not await record_checkpoint(connection, saved(1))
    assert await connection.fetchval("select count(*) from checkpoint") == 0
