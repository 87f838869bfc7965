"""Samples as a client logs them with a run, for people to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat

from river_client.exceptions import InvalidRequestError
from river_client.results import Sample
from river_client.samples_wire import LoggedCompletion, LoggedGroup, LogSamples

if TYPE_CHECKING:
    from collections.abc import Sequence


def log_request(
    prompts: Sequence[str],
    samples: Sequence[Sequence[Sample | str]],
    rewards: Sequence[Sequence[SupportsFloat]] | None,
    *,
    step: int | None,
    current_step: int,
) -> LogSamples:
    """The request for `log_samples`; without a `step`, it is that of the version that drew the first sample.

    Raises:
        InvalidRequestError: there are not as many of one thing as of another.
    """
    _check_lengths("samples", len(samples), "prompts", len(prompts))
    if rewards is not None:
        _check_lengths("rewards", len(rewards), "prompts", len(prompts))
    groups: list[LoggedGroup] = []
    for index, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True)):
        worth: list[float | None] = [None] * len(drawn)
        if rewards is not None:
            _check_lengths(
                f"rewards[{index}]", len(rewards[index]), f"samples[{index}]", len(drawn)
            )
            worth = [float(reward) for reward in rewards[index]]
        completions = [
            LoggedCompletion(text=one if isinstance(one, str) else one.text, reward=reward)
            for one, reward in zip(drawn, worth, strict=True)
        ]
        groups.append(LoggedGroup(prompt=prompt, completions=completions))
    if step is None:
        versions = [
            one.policy_version for drawn in samples for one in drawn if isinstance(one, Sample)
        ]
        step = _step_of(versions[0]) if versions else None
    return LogSamples(groups=groups, step=current_step if step is None else step)


def _check_lengths(name: str, count: int, other: str, other_count: int) -> None:
    if count != other_count:
        raise InvalidRequestError(f"{name}: {count} of them, but {other_count} {other}", param=name)


def _step_of(policy_version: str) -> int | None:
    """The step of a version `run_…@17`; None where a base model or a checkpoint's path is meant."""
    _, _, step = policy_version.rpartition("@")
    return int(step) if step.isdecimal() else None
