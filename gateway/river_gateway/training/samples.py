"""Samples that clients log with their runs, in Postgres: bounded in number and size, the newest of each run kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from river_client.samples_wire import (
    LoggedCompletion,
    LogSamples,
    SamplesLogged,
    SamplesPage,
    StoredGroup,
)
from river_gateway.checkpoints import catalog
from river_gateway.codec import NUL
from river_gateway.errors import InvalidFieldError
from river_gateway.ids import new_id
from river_gateway.limits import (
    LOGGED_COMPLETIONS_MAX,
    LOGGED_GROUPS_MAX,
    LOGGED_PER_RUN_MAX,
    LOGGED_PER_RUN_MAX_BYTES,
    LOGGED_TEXT_MAX_CHARS,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_client.samples_wire import LoggedGroup
    from river_gateway.database import Database, Pool, Row

_INSERT = """
insert into run_sample (run_id, step, identity, place, prompt, completions, rewards, size_bytes)
values ($1, $2, $3, $4, $5, $6::text[], $7::double precision[], $8)
on conflict (run_id, identity, place) do nothing
"""
# The locked row of the run orders those who log at once, so that none forgets what it does not see.
_LOCK_RUN = "select from run where run_id = $1 for no key update"
_FORGET = """
with ranked as (
  select sample_id, row_number() over newest as place, sum(size_bytes) over newest as bytes
  from run_sample where run_id = $1 window newest as (order by sample_id desc)
)
delete from run_sample where sample_id in (select sample_id from ranked where place > $2 or bytes > $3)
"""
_LIST = """
select sample_id, step, logged_at, prompt, completions, rewards from run_sample
where run_id = $1 and ($2::bigint is null or step = $2) and ($3::bigint is null or sample_id < $3)
  and ($4::float8 is null and $5::float8 is null or exists (
    select from unnest(rewards) reward where reward >= coalesce($4, '-infinity') and reward <= coalesce($5, 'infinity')
  ))
order by sample_id desc limit $6
"""
_STEPS = """
select step, count(*) as prompts, sum(cardinality(rewards))::bigint as completions,
       (sum(given.total) / nullif(sum(given.count), 0))::float8 as reward
from run_sample, lateral (select sum(reward) as total, count(reward) as count from unnest(rewards) reward) as given
where run_id = $1 group by step order by step desc limit $2
"""
_SUMMARY = "select count(*) as prompts, max(step) as step from run_sample where run_id = $1"
_CUT = "… [{} more characters were not kept]"
_NUL_SHOWN = "\N{SYMBOL FOR NULL}"


@dataclass(frozen=True, slots=True)
class SampledStep:
    """What is kept of a step; `reward` is the mean of those that were given."""

    step: int
    prompts: int
    completions: int
    reward: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """How many prompts are kept of a run, and the highest step of them."""

    prompts: int
    step: int | None


@dataclass(slots=True)
class _Shortened:
    """Groups within the bounds, and what they lost on the way."""

    groups: list[tuple[str, list[str], list[float | None]]] = field(
        default_factory=list[tuple[str, list[str], list[float | None]]]
    )
    dropped_completions: int = 0
    cut: int = 0

    def text(self, text: str) -> str:
        """A text that can be stored, cut where it is too long."""
        more = len(text) - LOGGED_TEXT_MAX_CHARS
        if more > 0:
            self.cut += 1
            text = text[:LOGGED_TEXT_MAX_CHARS] + _CUT.format(more)
        return text.replace(NUL, _NUL_SHOWN)


async def log_samples(
    pool: Pool, *, run_id: str, tenant_id: str, asked: LogSamples, identity: str | None
) -> SamplesLogged:
    """Keeps samples with a run, of too many the first and of too long ones the beginning; the same request once.

    Raises:
        NotFoundError: there is no such run.
        InvalidFieldError: there are none, or a reward is not finite.
    """
    run = await catalog.find_run(pool, run_id=run_id, tenant_id=tenant_id)
    _check(asked.groups)
    kept = _shortened(asked.groups[:LOGGED_GROUPS_MAX])
    step = run.step if asked.step is None else asked.step
    identity = identity or new_id("log")
    async with pool.acquire() as connection, connection.transaction():
        await connection.fetchrow(_LOCK_RUN, run_id)
        for place, (prompt, completions, rewards) in enumerate(kept.groups):
            size_bytes = sum(len(text.encode()) for text in (prompt, *completions))
            await connection.execute(
                _INSERT, run_id, step, identity, place, prompt, completions, rewards, size_bytes
            )
        forgotten = await connection.execute(
            _FORGET, run_id, LOGGED_PER_RUN_MAX, LOGGED_PER_RUN_MAX_BYTES
        )
    return SamplesLogged(
        kept=len(kept.groups),
        dropped=len(asked.groups) - len(kept.groups),
        dropped_completions=kept.dropped_completions,
        cut=kept.cut,
        forgotten=int(forgotten.removeprefix("DELETE ")),
    )


def _check(groups: Sequence[LoggedGroup]) -> None:
    if not groups:
        raise InvalidFieldError("groups: empty, must hold at least one prompt", param="groups")
    for index, group in enumerate(groups):
        for place, completion in enumerate(group.completions):
            if completion.reward is not None and not math.isfinite(completion.reward):
                where = f"groups[{index}].completions[{place}].reward"
                message = f"{where}: {completion.reward}, must be finite"
                raise InvalidFieldError(message, param=where)


def _shortened(groups: Sequence[LoggedGroup]) -> _Shortened:
    kept = _Shortened()
    for group in groups:
        completions = group.completions[:LOGGED_COMPLETIONS_MAX]
        kept.dropped_completions += len(group.completions) - len(completions)
        texts = [kept.text(completion.text) for completion in completions]
        rewards = [completion.reward for completion in completions]
        kept.groups.append((kept.text(group.prompt), texts, rewards))
    return kept


async def list_samples(
    database: Database,
    run_id: str,
    *,
    step: int | None = None,
    reward_min: float | None = None,
    reward_max: float | None = None,
    before: int | None = None,
    limit: int,
) -> SamplesPage:
    """What is kept of a run, newest first: of a step, or of those prompts that have a reward between two bounds."""
    rows = await database.fetch(_LIST, run_id, step, before, reward_min, reward_max, limit + 1)
    found = [_group(row) for row in rows[:limit]]
    return SamplesPage(samples=found, before=found[-1].sample_id if len(rows) > limit else None)


async def sampled_steps(database: Database, run_id: str, *, limit: int) -> list[SampledStep]:
    """The steps that samples are kept of, the highest first."""
    return [SampledStep(**row) for row in await database.fetch(_STEPS, run_id, limit)]


async def summary(database: Database, run_id: str) -> Summary:
    """How much is kept of a run."""
    row = await database.fetchrow(_SUMMARY, run_id)
    assert row is not None
    return Summary(**row)


def _group(row: Row) -> StoredGroup:
    completions = [
        LoggedCompletion(text=text, reward=reward)
        for text, reward in zip(row["completions"], row["rewards"], strict=True)
    ]
    return StoredGroup(
        sample_id=row["sample_id"],
        step=row["step"],
        logged_at=row["logged_at"].isoformat(),
        prompt=row["prompt"],
        completions=completions,
    )
