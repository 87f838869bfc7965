"""What calls return, where it is more than a wire struct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from river_client import wire
from river_client.arrays import token_lists, unpack

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
class Sample:
    """One sampled sequence.

    `logprobs[i]` is the log-probability of `tokens[i]` under the distribution it was drawn from; `prompt_logprobs[0]`
    is None, as nothing precedes the first token; `policy_version` says which weights answered. `expert_routing` [T, MoE
    layers, experts per token] goes back with `prompt_token_ids + tokens` as the datum's field of that name.
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


class SampleOptions(TypedDict, total=False):
    """How to sample; what is left out is as in `wire.SampleRequest`.

    Either `prompts` or `prompt_token_ids` (a list of ids per prompt) is given. `logprobs=K` asks for the K most likely
    tokens at each position.
    """

    prompt_token_ids: Sequence[Any]
    num_samples: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: str | list[str]
    seed: int | None
    logprobs: int | None
    return_prompt_logprobs: bool
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
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if prompts is not None:
        fields["prompts"] = [prompts] if isinstance(prompts, str) else list(prompts)
    return wire.SampleRequest(model=model, **fields)


def sample_groups(response: wire.SampleResponse) -> list[list[Sample]]:
    """A list of samples per prompt."""
    return [
        [
            Sample(
                text=sequence.text,
                tokens=sequence.tokens,
                logprobs=sequence.logprobs,
                stop_reason=sequence.stop_reason,
                prompt_token_ids=group.prompt_token_ids,
                policy_version=response.policy_version,
                prompt_logprobs=group.prompt_logprobs,
                top_logprobs=sequence.top_logprobs,
                expert_routing=unpack(sequence.expert_routing) if sequence.expert_routing else None,
            )
            for sequence in group.samples
        ]
        for group in response.groups
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
