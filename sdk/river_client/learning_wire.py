"""The structs of continual learning under `/river/v1`, as those of `wire`: a run that the server trains on feedback."""

from __future__ import annotations

from typing import Literal

from msgspec import field

from river_client.wire import AdamParams, Wire

LearningLoss = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo"]
"""The losses that need nothing but what feedback has: log-probabilities and advantages."""
Baseline = Literal["prompt", "batch", "none"]
LearningStatus = Literal["learning", "stopping", "stopped", "failed"]


class StartLearning(Wire, frozen=True):
    """Tells a run to train on the feedback on a model name, one optimizer step for each batch, until it is stopped.

    A batch is at least `min_batch` rewarded choices and at most `max_batch`. `baseline` is what an advantage is a
    reward less of, as in `feedback_wire.ClaimFeedback`. With `publish` "live" the name follows the run from now on, so
    that what has been learnt is served at once; with "none" the name stays as it is.
    """

    alias: str
    adam: AdamParams
    loss_fn: LearningLoss = "importance_sampling"
    loss_config: dict[str, float] = field(default_factory=dict[str, float])
    min_batch: int = 32
    max_batch: int = 256
    baseline: Baseline = "prompt"
    publish: Literal["live", "none"] = "live"


class LearningState(Wire, frozen=True):
    """How far a run has come that learns. `reason` says why it failed, if it has.

    While `status` is "learning" or "stopping", which is until the batch at hand has been applied, operations of anybody
    else are refused; afterwards they go on with seq `next_seq`, those from
    `first_seq` to before it being the learning's own. `metrics` are those of the last of its `steps`.
    """

    run_id: str
    alias: str
    settings: StartLearning
    status: LearningStatus
    steps: int
    completions: int
    policy_version: str
    first_seq: int
    next_seq: int
    started_at: str
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    reason: str | None = None
    ended_at: str | None = None

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.status in ("learning", "stopping")


class LearningPage(Wire, frozen=True):
    learning: list[LearningState]
