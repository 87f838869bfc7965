"""What a run that learns is trained on: the part of a batch that it can be, if there is anything to learn from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from river_client import wire
from river_gateway.feedback import rewards
from river_gateway.limits import SEQUENCE_TOKENS_MIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_gateway.checkpoints.catalog import RunRow
    from river_gateway.database import Row

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def lesson(rows: Sequence[Row], run: RunRow, baseline: str) -> list[wire.Datum]:
    """Training data of a batch, without what the run can never be trained on: it would end its learning.

    Nothing if none of it teaches anything.
    """
    rows = [row for row in rows if rewards.is_reward(row["reward"])]
    if not rows:
        return []
    data = rewards.training_data(rows, baseline)
    data = [datum for datum in data if _is_trainable(datum, run.context_length)]
    return data if any(_teaches(datum) for datum in data) else []


def _is_trainable(datum: wire.Datum, context_length: int) -> bool:
    assert isinstance(datum.input_ids, list)
    assert isinstance(datum.old_logprobs, list)
    length = len(datum.input_ids)
    return (
        SEQUENCE_TOKENS_MIN <= length <= context_length
        and len(datum.old_logprobs) == length  # Not so where the prompt was empty.
        and bool(np.all(np.abs(np.asarray(datum.old_logprobs)) <= _FLOAT32_MAX))
    )


def _teaches(datum: wire.Datum) -> bool:
    """Whether a sequence was better or worse than what it is compared with; Adam would move without a gradient too."""
    assert not isinstance(datum.advantages, wire.Tensor)
    return any(datum.advantages or ())
