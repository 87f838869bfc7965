"""The structs of feedback under `/river/v1`, as those of `wire`: rewards, and the training data made of them."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from river_client.wire import Datum, Wire


class Feedback(Wire, frozen=True):
    """What a choice of a stored completion was worth. The newest reward of a choice counts."""

    completion_id: str
    reward: float
    choice: int = 0
    note: str | None = None
    user: str | None = None


class GiveFeedback(Wire, frozen=True):
    feedback: list[Feedback]


class ClaimFeedback(Wire, frozen=True):
    """Asks for training data from the feedback on a model name that `consumer` has not had yet.

    Nothing is handed out while there is less than `min_batch`. What is, is claimed for `claim_s` seconds, and used for
    good once acknowledged. `baseline` is what an advantage is a reward less of: the mean of the completions of the same
    prompt (of the batch where there is one only), the mean of the batch, or nothing.
    """

    model: str
    consumer: str = "default"
    min_batch: int = 1
    max_batch: int = 256
    claim_s: float = 600.0
    base_model: str | None = None
    baseline: Literal["prompt", "batch", "none"] = "prompt"


class FeedbackBatch(Wire, frozen=True):
    """`data[i]` is of `feedback[i]`, sampled by `policy_versions[i]`; all empty, without an id, if it is too little."""

    batch_id: str | None
    data: list[Datum]
    feedback: list[Feedback]
    policy_versions: list[str]


class ChangeRetention(Wire, frozen=True):
    """For how many seconds a tenant's stored completions are kept: 0 keeps none, None is the server's own time."""

    completions_kept_s: int | UnsetType | None = UNSET
