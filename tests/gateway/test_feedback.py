"""Rewards of stored completions, and the training data that consumers are handed."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import msgspec
import pytest
from support.gateway import Rig, error_of
from support.stand_ins import BASE

from river_client import feedback_wire, wire
from river_gateway.feedback import rewards


async def _completions(rig: Rig, prompts: list[str], n: int = 1) -> list[str]:
    chat = rig.tenant.openai.chat.completions
    return [
        (
            await chat.create(
                model=BASE, messages=[{"role": "user", "content": prompt}], store=True, n=n
            )
        ).id
        for prompt in prompts
    ]


async def _give(rig: Rig, *given: dict[str, Any]) -> None:
    answer = await rig.tenant.post("/feedback", {"feedback": given})
    assert answer.status_code == 204, answer.text


async def _claim(rig: Rig, **asked: Any) -> feedback_wire.FeedbackBatch:
    answer = await rig.tenant.post(
        "/feedback/batches", feedback_wire.ClaimFeedback(model=BASE, **asked)
    )
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=feedback_wire.FeedbackBatch)


async def test_data_are_ready_to_train_on(rig: Rig) -> None:
    """A batch is aligned as losses want it, with the stored log-probabilities and rewards less their mean."""
    (completion,) = await _completions(rig, ["x"], n=2)
    given = [{"completion_id": completion, "choice": n, "reward": float(n)} for n in range(2)]
    await _give(rig, {"completion_id": completion, "reward": 9.0}, *given)
    batch = await _claim(rig)
    assert [one.reward for one in batch.feedback] == [0.0, 1.0]
    assert batch.policy_versions == [BASE, BASE]
    for datum, advantage in zip(batch.data, (-0.5, 0.5), strict=True):
        assert datum.input_ids == [1, 2, 3, 4, 5, 6, 7, 10]
        assert datum.old_logprobs == [0.0] * 6 + [-0.1, 0.0]
        assert datum.advantages == [0.0] * 6 + [advantage, 0.0]
    run = await rig.tenant.new_run()
    step = wire.TrainStep(
        data=batch.data, adam=wire.AdamParams(lr=1e-3), loss_fn="importance_sampling"
    )
    assert (await rig.tenant.submit(run.run_id, 1, step)).status_code == 202


async def test_each_consumer_is_handed_each_reward_once(rig: Rig) -> None:
    """What is claimed is nobody else's; what is not acknowledged in time is handed out again, what is never."""
    completions = await _completions(rig, ["a", "b", "c"])
    await _give(rig, *({"completion_id": one, "reward": 1.0} for one in completions))
    assert (await _claim(rig, min_batch=4)).batch_id is None
    lost = await _claim(rig, max_batch=2, claim_s=0.01)
    assert [one.completion_id for one in lost.feedback] == completions[:2]
    await asyncio.sleep(0.05)
    again = await _claim(rig)
    assert [one.completion_id for one in again.feedback] == completions
    assert (await _claim(rig)).batch_id is None
    assert len((await _claim(rig, consumer="other")).data) == 3
    for _ in range(2):
        done = await rig.tenant.post(f"/feedback/batches/{again.batch_id}/ack", {})
        assert done.status_code == 204
    assert (await _claim(rig)).batch_id is None
    late = await rig.tenant.post(f"/feedback/batches/{lost.batch_id}/ack", {})
    assert late.status_code == 404


async def test_a_batch_ends_before_it_is_too_large(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long completions come in smaller batches, the longest alone, and all of them come."""
    completions = await _completions(rig, ["a", "b", "c"])
    await _give(rig, *({"completion_id": one, "reward": 1.0} for one in completions))
    size = await rig.services.pool.fetchval(
        "select max(octet_length(tokens)) from stored_completion"
    )
    monkeypatch.setattr(rewards, "FEEDBACK_BATCH_MAX_BYTES", 2 * size)
    batches = [await _claim(rig, min_batch=1) for _ in range(2)]
    assert [len(batch.data) for batch in batches] == [2, 1]
    monkeypatch.setattr(rewards, "FEEDBACK_BATCH_MAX_BYTES", size - 1)
    alone = [await _claim(rig, consumer="other") for _ in range(3)]
    assert [batch.feedback[0].completion_id for batch in alone] == completions
    assert [len(batch.data) for batch in alone] == [1, 1, 1]


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"completion_id": "chatcmpl-0", "reward": 1.0}, 404, "feedback[1].completion_id"),
        ({"choice": 1, "reward": 1.0}, 422, "feedback[1].choice"),
        ({"choice": -1, "reward": 1.0}, 422, "feedback[1].choice"),
        ({"reward": 1.0, "note": "x" * 4097}, 422, "feedback[1].note"),
        ({"reward": "good"}, 422, "feedback[1].reward"),
    ],
    ids=["unknown", "choice", "negative", "long", "text"],
)
async def test_wrong_feedback(rig: Rig, given: dict[str, Any], status: int, param: str) -> None:
    """One wrong reward is refused by its place, and none of the others is kept."""
    (completion,) = await _completions(rig, ["x"])
    both = [{"completion_id": completion, "reward": 1.0}, {"completion_id": completion} | given]
    answer = await rig.tenant.post("/feedback", {"feedback": both})
    assert answer.status_code == status
    assert error_of(answer).param == param
    assert (await _claim(rig)).batch_id is None


@pytest.mark.parametrize("reward", [math.inf, math.nan, -1.1e6, 1e300])
async def test_a_reward_must_be_in_range(rig: Rig, reward: float) -> None:
    """What no float32 could hold, and infinity and NaN, which MessagePack can say, are refused with the limit."""
    (completion,) = await _completions(rig, ["x"])
    given = feedback_wire.GiveFeedback(
        feedback=[feedback_wire.Feedback(completion_id=completion, reward=reward)]
    )
    answer = await rig.tenant.http.post(
        "/river/v1/feedback",
        content=msgspec.msgpack.encode(given),
        headers={"content-type": "application/msgpack"},
    )
    assert answer.status_code == 422
    assert error_of(answer).param == "feedback[0].reward"
    assert "must be -1e+06 to 1e+06" in error_of(answer).message
