"""What calls return, where it is more than a wire struct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from river_client import wire
from river_client.arrays import pack, token_lists, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

# ---- Training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a training operation did.

    `policy_version` is the run's version after it. `logprobs` holds a float32 [T] array per sequence of a forward or
    forward_backward: index i is the log-probability of the target of position i; with soft targets it is [T, K].
    """

    operation_id: str
    policy_version: str
    metrics: dict[str, float]
    logprobs: list[npt.NDArray[np.float32]] = field(default_factory=list[Any])
    training_tokens: int = 0


def training_result(result: wire.OperationResult) -> TrainingResult:
    """The result of a finished operation."""
    assert result.status == "done"
    logprobs: list[Any] = [unpack(tensor) for tensor in result.logprobs or []]
    return TrainingResult(
        operation_id=result.operation_id,
        policy_version=result.policy_version or "",
        metrics=result.metrics,
        logprobs=logprobs,
        training_tokens=result.training_tokens,
    )


def saved_checkpoint(result: wire.OperationResult) -> wire.Checkpoint:
    """The checkpoint that a finished save made."""
    assert result.checkpoint is not None
    return result.checkpoint


# ---- Sampling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """The K most likely tokens at each of the T positions of a prompt, most likely first.

    `token_ids` int32 [T, K], `logprobs` float32 [T, K]. What was not scored, such as the first token, has rows of -1
    and minus infinity.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sampled sequence.

    `logprobs[i]` is the log-probability of `tokens[i]` under the distribution it was drawn from; `prompt_logprobs[0]`
    is None, as nothing precedes the first token; `policy_version` says which weights answered. `expert_routing` [T, MoE
    layers, experts per token] goes back with `prompt_token_ids + tokens` as the datum's field of that name.

    What all samples of a prompt share: `prompt_top_logprobs`, `prompt_target_logprobs` (float32 [T - 1, K] for a prompt
    of T tokens, minus infinity where -1 was asked), and how many of the prompt's tokens were `cached_prompt_tokens`.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    stop_reason: wire.StopReason
    prompt_token_ids: list[int]
    policy_version: str
    prompt_logprobs: list[float | None] | None = None
    top_logprobs: list[list[wire.TopLogprob]] | None = None
    expert_routing: npt.NDArray[np.generic] | None = None
    prompt_top_logprobs: TopLogprobs | None = None
    prompt_target_logprobs: npt.NDArray[np.float32] | None = None
    cached_prompt_tokens: int = 0


class SampleOptions(TypedDict, total=False):
    """How to sample; what is left out is as in `wire.SampleRequest`.

    Either `prompts` or `prompt_token_ids` (a list of ids per prompt) is given. `logprobs=K` asks for the K most likely
    tokens at each position of the samples, `prompt_top_logprobs=K` at each of the prompts. `prompt_targets` are token
    ids to be scored, an array [T - 1, K] per prompt of T tokens. `max_tokens=None` samples to the end of the context,
    `max_tokens=0` only scores the prompts. With `ignore_eos` nothing stops a sample but what `stop` (text) and
    `stop_token_ids` name.
    """

    prompt_token_ids: Sequence[Any]
    num_samples: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int | None
    logprobs: int | None
    return_prompt_logprobs: bool
    prompt_top_logprobs: int | None
    prompt_logprobs_last: int | None
    prompt_targets: Sequence[Any]
    return_expert_routing: bool


def sample_request(
    model: str, prompts: str | Sequence[str] | None, options: SampleOptions
) -> wire.SampleRequest:
    """The request for a call's arguments.

    Raises:
        TypeError: there is no such option.
    """
    fields: dict[str, Any] = dict(options)
    if "prompt_token_ids" in fields:
        fields["prompt_token_ids"] = token_lists(fields["prompt_token_ids"])
    if fields.get("prompt_targets") is not None:
        fields["prompt_targets"] = [
            pack(targets, f"prompt_targets[{index}]")
            for index, targets in enumerate(fields["prompt_targets"])
        ]
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if prompts is not None:
        fields["prompts"] = [prompts] if isinstance(prompts, str) else list(prompts)
    return wire.SampleRequest(model=model, **fields)


def sample_groups(response: wire.SampleResponse) -> list[list[Sample]]:
    """A list of samples per prompt."""
    return [_samples(group, response.policy_version) for group in response.groups]


def _samples(group: wire.SampleGroup, policy_version: str) -> list[Sample]:
    top: TopLogprobs | None = None
    if group.prompt_top_logprobs is not None:
        ids: Any = unpack(group.prompt_top_logprobs.token_ids)
        logprobs: Any = unpack(group.prompt_top_logprobs.logprobs)
        top = TopLogprobs(token_ids=ids, logprobs=logprobs)
    scores: Any = None
    if group.prompt_target_logprobs is not None:
        scores = unpack(group.prompt_target_logprobs)
    return [
        Sample(
            text=sequence.text,
            tokens=sequence.tokens,
            logprobs=sequence.logprobs,
            stop_reason=sequence.stop_reason,
            prompt_token_ids=group.prompt_token_ids,
            policy_version=policy_version,
            prompt_logprobs=group.prompt_logprobs,
            top_logprobs=sequence.top_logprobs,
            expert_routing=unpack(sequence.expert_routing) if sequence.expert_routing else None,
            prompt_top_logprobs=top,
            prompt_target_logprobs=scores,
            cached_prompt_tokens=group.cached_prompt_tokens,
        )
        for sequence in group.samples
    ]


# ---- Chat --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """The answer to a chat."""

    text: str
    model: str
    finish_reason: str | None
    policy_version: str | None
    prompt_tokens: int
    completion_tokens: int
