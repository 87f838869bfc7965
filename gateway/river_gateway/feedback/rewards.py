"""Rewards of stored completions, and the training data made of them.

A consumer is handed each rewarded choice once: it claims a batch, learns, and acknowledges it. A claim that is not
acknowledged in time ends, so that a consumer that has died loses nothing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec

from river_client import feedback_wire, wire
from river_gateway.codec import storable
from river_gateway.errors import InvalidFieldError, NotFoundError
from river_gateway.feedback.keeping import Tokens
from river_gateway.feedback.store import no_completion
from river_gateway.ids import new_id
from river_gateway.limits import (
    FEEDBACK_BATCH_MAX,
    FEEDBACK_BATCH_MAX_BYTES,
    FEEDBACK_CLAIM_MAX_S,
    FEEDBACK_NOTE_MAX_CHARS,
    FEEDBACK_REWARD_MAX,
    USER_MAX_CHARS,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_billing.database import Connection
    from river_gateway.database import Database, Pool, Row

_CHOICES = """
select completion_id, jsonb_array_length(answer -> 'choices') as choices from stored_completion
where tenant_id = $1 and completion_id = any($2::text[]) and expires_at > now()
"""
_PUT = """
insert into feedback (completion_id, choice, tenant_id, reward, note, "user")
select new.completion_id, new.choice, $1, new.reward, new.note, new."user"
from unnest($2::text[], $3::integer[], $4::double precision[], $5::text[], $6::text[])
  as new (completion_id, choice, reward, note, "user")
join stored_completion c using (completion_id)
on conflict (completion_id, choice) do update
set reward = excluded.reward, note = excluded.note, "user" = excluded."user", updated_at = now()
"""
# Two claims of one consumer at the same time must not be handed the same.
_LOCK = "select pg_advisory_xact_lock(hashtextextended($1 || chr(10) || $2, 0))"
_UNUSED = """
from feedback f join stored_completion c using (completion_id)
where f.tenant_id = $1 and c.model = $2 and c.expires_at > now() and c.tokens is not null
  and ($4::text is null or c.base_model = $4)
  and not exists (
    select 1 from feedback_use u
    where u.tenant_id = $1 and u.consumer = $3
      and u.completion_id = f.completion_id and u.choice = f.choice
      and (u.claimed_until is null or u.claimed_until > now())
  )
"""
_COUNT = f"select count(*) from (select 1 {_UNUSED} limit $5) as unused"  # noqa: S608 - built from constants
# The tokens stay where they are: their size is known without them.
_NEXT = f"""
select f.completion_id, f.choice, octet_length(c.tokens) as bytes {_UNUSED}
order by f.updated_at, f.completion_id, f.choice limit $5
"""
_CLAIM = """
insert into feedback_use (tenant_id, consumer, completion_id, choice, batch_id, claimed_until)
select $1, $2, new.completion_id, new.choice, $3, now() + make_interval(secs => $4::double precision)
from unnest($5::text[], $6::integer[]) as new (completion_id, choice)
on conflict (tenant_id, consumer, completion_id, choice) do update
set batch_id = excluded.batch_id, claimed_until = excluded.claimed_until
"""
_OF_BATCH = """
select f.completion_id, f.choice, f.reward, f.note, f."user", c.tokens, c.policy_version
from feedback_use u
join feedback f using (completion_id, choice)
join stored_completion c using (completion_id)
where u.tenant_id = $1 and u.batch_id = $2
order by f.updated_at, f.completion_id, f.choice
"""
_GIVE_BACK = "delete from feedback_use where tenant_id = $1 and batch_id = $2"
_ACKNOWLEDGE = """
update feedback_use set claimed_until = null where tenant_id = $1 and batch_id = $2
"""


async def give(
    database: Database, *, tenant_id: str, given: Sequence[feedback_wire.Feedback]
) -> None:
    """Attaches rewards to stored completions: all or none of them.

    Raises:
        InvalidFieldError: a reward is out of range, a choice does not exist, or there are none or too many.
        NotFoundError: a completion is unknown.
    """
    if not 1 <= len(given) <= FEEDBACK_BATCH_MAX:
        message = f"feedback: {len(given)} of them, must be 1 to {FEEDBACK_BATCH_MAX}"
        raise InvalidFieldError(message, param="feedback")
    rows = await database.fetch(_CHOICES, tenant_id, [one.completion_id for one in given])
    choices = {row["completion_id"]: row["choices"] for row in rows}
    for index, one in enumerate(given):
        _check(one, f"feedback[{index}]", choices)
    latest = {(one.completion_id, one.choice): one for one in given}.values()
    await database.execute(
        _PUT,
        tenant_id,
        [one.completion_id for one in latest],
        [one.choice for one in latest],
        [one.reward for one in latest],
        [one.note for one in latest],
        [one.user for one in latest],
    )


async def claim(
    pool: Pool, *, tenant_id: str, asked: feedback_wire.ClaimFeedback
) -> feedback_wire.FeedbackBatch:
    """A batch of training data for a consumer, claimed; an empty one when there is too little.

    Raises:
        InvalidFieldError: a size or time is out of range.
    """
    check_size(asked.min_batch, asked.max_batch)
    if not 0 < asked.claim_s <= FEEDBACK_CLAIM_MAX_S:
        message = f"claim_s: {asked.claim_s:g}, must be above 0, at most {FEEDBACK_CLAIM_MAX_S:g}"
        raise InvalidFieldError(message, param="claim_s")
    batch_id = new_id("bat")
    async with pool.acquire() as connection, connection.transaction():
        await claim_batch(
            connection, tenant_id=tenant_id, asked=asked, batch_id=batch_id, claim_s=asked.claim_s
        )
        rows = await connection.fetch(_OF_BATCH, tenant_id, batch_id)
    if not rows:
        return feedback_wire.FeedbackBatch(batch_id=None, data=[], feedback=[], policy_versions=[])
    return feedback_wire.FeedbackBatch(
        batch_id=batch_id,
        # Millions of numbers must not hold up everybody else's requests.
        data=await asyncio.to_thread(training_data, rows, asked.baseline),
        feedback=[_feedback(row) for row in rows],
        policy_versions=[row["policy_version"] for row in rows],
    )


async def is_enough(
    database: Database, *, tenant_id: str, asked: feedback_wire.ClaimFeedback
) -> bool:
    """Whether there is a batch for a consumer; the cheaper question for whoever asks it again and again."""
    return await count_unused(database, tenant_id=tenant_id, asked=asked) == asked.min_batch


async def count_unused(
    database: Database, *, tenant_id: str, asked: feedback_wire.ClaimFeedback
) -> int:
    """How many rewarded choices wait for a consumer; those beyond its `min_batch` are not counted."""
    return await database.fetchval(
        _COUNT, tenant_id, asked.model, asked.consumer, asked.base_model, asked.min_batch
    )


async def claim_batch(
    connection: Connection,
    *,
    tenant_id: str,
    asked: feedback_wire.ClaimFeedback,
    batch_id: str,
    claim_s: float | None,
) -> bool:
    """Claims a batch, without `claim_s` for good, in the caller's transaction; False when there is too little."""
    await connection.execute(_LOCK, tenant_id, asked.consumer)
    rows = await connection.fetch(
        _NEXT, tenant_id, asked.model, asked.consumer, asked.base_model, asked.max_batch
    )
    if len(rows) < asked.min_batch:
        return False
    rows = _that_fit(rows)
    await connection.execute(
        _CLAIM,
        tenant_id,
        asked.consumer,
        batch_id,
        claim_s,
        [row["completion_id"] for row in rows],
        [row["choice"] for row in rows],
    )
    return True


def _that_fit(rows: Sequence[Row]) -> Sequence[Row]:
    """The first of them, as many as a batch may hold, which is one at least."""
    sizes = accumulate(row["bytes"] for row in rows)
    return rows[: max(1, sum(size <= FEEDBACK_BATCH_MAX_BYTES for size in sizes))]


async def rows_of(database: Database, *, tenant_id: str, batch_id: str) -> Sequence[Row]:
    """What there is of a claimed batch: completions may have been deleted meanwhile; rewards are as they are now."""
    return await database.fetch(_OF_BATCH, tenant_id, batch_id)


async def give_back(database: Database, *, tenant_id: str, batch_id: str) -> None:
    """Ends the claim of a batch that was not learnt from: it is handed out again."""
    await database.execute(_GIVE_BACK, tenant_id, batch_id)


def check_size(min_batch: int, max_batch: int) -> None:
    """Raises InvalidFieldError unless a batch of that size is possible."""
    if not 1 <= min_batch <= max_batch <= FEEDBACK_BATCH_MAX:
        raise InvalidFieldError(
            f"min_batch: {min_batch}, must be 1 to max_batch: {max_batch}, at most {FEEDBACK_BATCH_MAX}",
            param="min_batch",
        )


async def acknowledge(database: Database, *, tenant_id: str, batch_id: str) -> None:
    """Says that a batch has been learnt from; again is a no-op.

    Raises:
        NotFoundError: there is none of that id, or another claim has taken all of it.
    """
    if await database.execute(_ACKNOWLEDGE, tenant_id, batch_id) == "UPDATE 0":
        raise NotFoundError(f"there is no batch {batch_id!r}", param="batch_id")


def is_reward(value: float) -> bool:
    """Whether it is a number that can be learnt from, which NaN is not."""
    return abs(value) <= FEEDBACK_REWARD_MAX


def training_data(rows: Sequence[Row], baseline: str) -> list[wire.Datum]:
    """A sequence of each row; index i describes the prediction made from position i."""
    tokens = [msgspec.msgpack.decode(row["tokens"], type=Tokens) for row in rows]
    rewards = [float(row["reward"]) for row in rows]
    baselines = _baselines([tuple(one.prompt) for one in tokens], rewards, baseline)
    data: list[wire.Datum] = []
    for row, one, reward, base in zip(rows, tokens, rewards, baselines, strict=True):
        choice = next(choice for choice in one.choices if choice.index == row["choice"])
        before = [0.0] * (len(one.prompt) - 1)
        data.append(
            wire.Datum(
                input_ids=one.prompt + choice.tokens,
                old_logprobs=[*before, *choice.logprobs, 0.0],
                advantages=[*before, *[reward - base] * len(choice.tokens), 0.0],
            )
        )
    return data


def _baselines(
    prompts: Sequence[tuple[int, ...]], rewards: Sequence[float], kind: str
) -> list[float]:
    if kind == "none":
        return [0.0] * len(rewards)
    of_batch = sum(rewards) / len(rewards)
    if kind == "batch":
        return [of_batch] * len(rewards)
    groups: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
    for prompt, reward in zip(prompts, rewards, strict=True):
        groups[prompt].append(reward)
    return [
        sum(groups[prompt]) / len(groups[prompt]) if len(groups[prompt]) > 1 else of_batch
        for prompt in prompts
    ]


def _check(one: feedback_wire.Feedback, where: str, choices: dict[str, int]) -> None:
    if one.completion_id not in choices:
        raise no_completion(one.completion_id, f"{where}.completion_id")
    if not is_reward(one.reward):
        field = f"{where}.reward"
        message = (
            f"{field}: {one.reward}, must be {-FEEDBACK_REWARD_MAX:g} to {FEEDBACK_REWARD_MAX:g}"
        )
        raise InvalidFieldError(message, param=field)
    if not 0 <= one.choice < choices[one.completion_id]:
        field = f"{where}.choice"
        raise InvalidFieldError(
            f"{field}: {one.choice}, must be below {choices[one.completion_id]}", param=field
        )
    texts = (("note", one.note, FEEDBACK_NOTE_MAX_CHARS), ("user", one.user, USER_MAX_CHARS))
    for name, text, longest in texts:
        field = f"{where}.{name}"
        if text is not None and len(storable(text, field)) > longest:
            raise InvalidFieldError(
                f"{field}: {len(text)} characters, at most {longest}", param=field
            )


def _feedback(row: Row) -> feedback_wire.Feedback:
    return feedback_wire.Feedback(
        completion_id=row["completion_id"],
        choice=row["choice"],
        reward=row["reward"],
        note=row["note"],
        user=row["user"],
    )
