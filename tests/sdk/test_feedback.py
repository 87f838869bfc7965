"""Feedback through the SDK, against the real gateway: rewards in, training data out, and what is refused."""

from __future__ import annotations

import pytest
from support.gateway import Rig
from support.stand_ins import BASE

import river_client as river


async def _completions(rig: Rig, count: int, *, n: int = 1) -> list[str]:
    """The ids of stored completions of one prompt."""
    chat = rig.tenant.openai.chat.completions
    messages = [{"role": "user", "content": "x"}]
    made = [
        await chat.create(model=BASE, messages=messages, store=True, n=n)  # type: ignore[arg-type]
        for _ in range(count)
    ]
    return [completion.id for completion in made]


async def test_rewards_come_back_as_training_data(
    rig: Rig, river_client: river.AsyncClient
) -> None:
    """A batch has what was judged, aligned and less its baseline, and can be trained on as it is."""
    (completion,) = await _completions(rig, 1, n=2)
    assert await river_client.feedback_batch(BASE) is None
    await river_client.feedback(completion, reward=0.0)
    assert await river_client.feedback_batch(BASE, min_batch=2) is None
    await river_client.feedback(completion, reward=1.0, choice=1, note="good", user="u")
    batch = await river_client.feedback_batch(BASE, min_batch=2)
    assert batch is not None
    assert batch.feedback[1] == river.Feedback(
        completion_id=completion, choice=1, reward=1.0, note="good", user="u"
    )
    assert batch.policy_versions == [BASE, BASE]
    assert [datum.advantages for datum in batch.data] == [
        [0.0] * 6 + [advantage, 0.0] for advantage in (-0.5, 0.5)
    ]
    async with river_client.session() as session:
        model = await session.create_model(BASE)
        result = await model.train_step(batch.data, loss_fn="importance_sampling", lr=1e-3)
    assert result.policy_version == f"{model.run_id}@1"


async def test_a_batch_is_nobody_elses_until_it_is_given_up(
    rig: Rig, river_client: river.AsyncClient
) -> None:
    """What one consumer has claimed or acknowledged it is not handed again, and others are."""
    completions = await _completions(rig, 3)
    await river_client.feedback_many(
        [river.Feedback(completion_id=one, reward=1.0) for one in completions]
    )
    first = await river_client.feedback_batch(BASE, max=2, baseline="none")
    assert first is not None
    assert [datum.advantages[-2] for datum in first.data] == [1.0, 1.0]  # type: ignore[index]
    rest = await river_client.feedback_batch(BASE)
    assert rest is not None
    assert [one.completion_id for one in rest.feedback] == completions[2:]
    assert await river_client.feedback_batch(BASE) is None
    for _ in range(2):
        await river_client.acknowledge(first)
    other = await river_client.feedback_batch(BASE, consumer="other")
    assert other is not None
    assert len(other.data) == 3


@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"completion_id": "none", "reward": 1.0}, river.NotFoundError, "completion_id"),
        ({"reward": float("inf")}, river.InvalidRequestError, "reward"),
        ({"reward": 1.0, "choice": 1}, river.InvalidRequestError, "choice"),
        ({"reward": 1.0, "note": "x" * 4097}, river.InvalidRequestError, "note"),
    ],
    ids=["unknown", "infinite", "choice", "long"],
)
async def test_wrong_feedback_is_named(
    rig: Rig,
    river_client: river.AsyncClient,
    wrong: dict[str, object],
    error: type[river.RiverError],
    param: str,
) -> None:
    """An error says which reward and which field of it, and nothing of the request is kept."""
    (completion,) = await _completions(rig, 1)
    given = [
        river.Feedback(completion_id=completion, reward=1.0),
        river.Feedback(**({"completion_id": completion} | wrong)),  # type: ignore[arg-type]
    ]
    with pytest.raises(error) as caught:
        await river_client.feedback_many(given)
    assert caught.value.param == f"feedback[1].{param}"
    assert await river_client.feedback_batch(BASE) is None


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"min_batch": 0}, "min_batch"),
        ({"min_batch": 9, "max": 8}, "min_batch"),
        ({"max": 4097}, "min_batch"),
    ],
    ids=["none", "crossed", "many"],
)
async def test_a_batch_of_no_possible_size_is_refused(
    river_client: river.AsyncClient, asked: dict[str, int], param: str
) -> None:
    """The limits of a batch are named."""
    with pytest.raises(river.InvalidRequestError, match="4096") as caught:
        await river_client.feedback_batch(BASE, **asked)  # type: ignore[arg-type]
    assert caught.value.param == param


async def test_anothers_completion_is_unknown(rig: Rig, river_client: river.AsyncClient) -> None:
    """Neither to be judged, nor among one's own training data."""
    (completion,) = await _completions(rig, 1)
    async with river.AsyncClient(api_key=rig.stranger.secret, base_url=rig.url) as stranger:
        with pytest.raises(river.NotFoundError) as caught:
            await stranger.feedback(completion, reward=1.0)
        assert caught.value.param == "feedback[0].completion_id"
        await river_client.feedback(completion, reward=1.0)
        assert await stranger.feedback_batch(BASE) is None
