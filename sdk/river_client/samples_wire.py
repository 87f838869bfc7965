"""The structs of logged samples under `/river/v1`, as those of `wire`: what a model said, and what that was worth."""

from __future__ import annotations

from river_client.wire import Wire


class LoggedCompletion(Wire, frozen=True):
    """A completion as text; `reward` is what the client found it worth, if it did."""

    text: str
    reward: float | None = None


class LoggedGroup(Wire, frozen=True):
    """The completions of one prompt."""

    prompt: str
    completions: list[LoggedCompletion]


class LogSamples(Wire, frozen=True):
    """Keeps samples with a run. `step` is that of the weights that drew them; absent, it is the run's."""

    groups: list[LoggedGroup]
    step: int | None = None


class SamplesLogged(Wire, frozen=True):
    """What became of logged samples: nothing is dropped without being counted here.

    `kept` prompts are stored with their completions. `dropped` prompts and `dropped_completions` were too many for one
    request or prompt, `cut` texts too long and cut there. `forgotten` older prompts of the run made room.
    """

    kept: int
    dropped: int = 0
    dropped_completions: int = 0
    cut: int = 0
    forgotten: int = 0


class StoredGroup(Wire, frozen=True):
    """A logged prompt with its completions; ids grow with time."""

    sample_id: int
    step: int
    logged_at: str
    prompt: str
    completions: list[LoggedCompletion]


class SamplesPage(Wire, frozen=True):
    """Logged samples, newest first; `before` leads to the next page, and is None on the last one."""

    samples: list[StoredGroup]
    before: int | None = None
