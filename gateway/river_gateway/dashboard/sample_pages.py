"""A run's samples as its client logs them: prompts, completions and rewards, by step, to be read by people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litestar import Request, Response, get
from litestar.response import ServerSentEvent

from river_gateway.dashboard import runs
from river_gateway.dashboard.pages import Page, follow, show
from river_gateway.dashboard.viewer import viewer_of
from river_gateway.limits import LOGGED_PAGE_DEFAULT, LOGGED_PER_RUN_MAX, SEQ_MAX
from river_gateway.services import services_of
from river_gateway.training import samples

if TYPE_CHECKING:
    from river_client.samples_wire import LoggedCompletion, StoredGroup
    from river_gateway.dashboard.viewer import Viewer

_PAGE = Page("samples.html", {"sampled": "parts/samples.html"})
_STEPS_SHOWN = 200


@dataclass(frozen=True, slots=True)
class _Asked:
    """What of the samples is asked for in the address."""

    step: int | None
    reward_min: float | None
    reward_max: float | None

    @property
    def by_reward(self) -> bool:
        return self.reward_min is not None or self.reward_max is not None

    def has(self, completion: LoggedCompletion) -> bool:
        """Whether a completion has such a reward."""
        if not self.by_reward:
            return True
        reward = completion.reward
        return (
            reward is not None
            and (self.reward_min is None or reward >= self.reward_min)
            and (self.reward_max is None or reward <= self.reward_max)
        )


@dataclass(frozen=True, slots=True)
class _ShownGroup:
    """A prompt with those of its completions that were asked for; `best` is the highest reward of all of them."""

    sample_id: int
    step: int
    logged_at: str
    prompt: str
    completions: list[LoggedCompletion]
    hidden: int
    best: float | None


@get("/runs/{run_id:str}/samples", include_in_schema=False)
async def samples_page(request: Request[Any, Any, Any], run_id: str) -> Response[str]:
    """The newest of them, by step and reward as the address says."""
    viewer = await viewer_of(request)
    values = await _read(request, viewer, run_id)
    pool, query = services_of(request).pool, request.query_params
    step, before = (_whole_number(query.get(name, "")) for name in ("step", "before"))
    asked = _Asked(step, _number(query.get("reward_min", "")), _number(query.get("reward_max", "")))
    found = await samples.list_samples(
        pool,
        run_id,
        step=asked.step,
        reward_min=asked.reward_min,
        reward_max=asked.reward_max,
        before=before,
        limit=LOGGED_PAGE_DEFAULT,
    )
    chosen = {name: query.get(name, "") for name in ("step", "reward_min", "reward_max")}
    shown = {
        "asked": asked,
        "steps": await samples.sampled_steps(pool, run_id, limit=_STEPS_SHOWN),
        "groups": [_shown(group, asked) for group in found.samples],
        "older": {**chosen, "before": found.before} if found.before else None,
    }
    return show(_PAGE, request, viewer, values | shown)


@get("/runs/{run_id:str}/samples/live", include_in_schema=False)
async def samples_live(request: Request[Any, Any, Any], run_id: str) -> ServerSentEvent:
    """How many there are by now; what is being read stays where it is."""
    viewer = await viewer_of(request)
    await runs.find_run(services_of(request).pool, viewer.tenant_id, run_id)
    return follow(_PAGE, request, viewer, lambda: _read(request, viewer, run_id))


async def _read(request: Request[Any, Any, Any], viewer: Viewer, run_id: str) -> dict[str, Any]:
    pool = services_of(request).pool
    run = await runs.find_run(pool, viewer.tenant_id, run_id)
    sampled = await samples.summary(pool, run_id)
    return {"run": run, "sampled": sampled, "kept_max": LOGGED_PER_RUN_MAX}


def _shown(group: StoredGroup, asked: _Asked) -> _ShownGroup:
    completions = [completion for completion in group.completions if asked.has(completion)]
    rewards = [one.reward for one in group.completions if one.reward is not None]
    return _ShownGroup(
        sample_id=group.sample_id,
        step=group.step,
        logged_at=group.logged_at,
        prompt=group.prompt,
        completions=completions,
        hidden=len(group.completions) - len(completions),
        best=max(rewards, default=None),
    )


def _whole_number(text: str) -> int | None:
    """What a field of the address says, if it is a number of ours."""
    return int(text) if text.isdecimal() and len(text) <= len(str(SEQ_MAX)) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


SAMPLE_HANDLERS: list[Any] = [samples_page, samples_live]
