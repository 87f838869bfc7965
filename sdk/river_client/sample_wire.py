"""The structs of `POST /river/v1/sample`."""

from __future__ import annotations

from typing import Literal

from msgspec import field

from river_client.data_wire import Numbers, Tensor, Wire

StopReason = Literal["stop", "length", "abort"]


class SampleRequest(Wire, frozen=True):
    """`model` is a base model, a checkpoint path, `river://<run>` or an alias.

    Exactly one of the two prompt fields is set. `max_tokens` None samples to the end of the context; 0 draws nothing
    and only scores the prompts.

    A sample ends at the model's end tokens, unless `ignore_eos`; at a token of `stop_token_ids`, whatever `ignore_eos`
    is; or when its text holds a string of `stop`, over the borders of tokens too. The token that ended it, or the
    tokens through the end of the string, are part of the sample's `tokens`; a stop string is not part of its `text`.

    Log-probabilities of samples are those of the distribution drawn from: after `temperature`, `top_k` and `top_p`.
    Those of prompts are the model's own, whatever these are. `logprobs` and `prompt_top_logprobs` ask for the K most
    likely tokens at each position of the samples and of the prompts. Of `return_prompt_logprobs` and
    `prompt_top_logprobs`, `prompt_logprobs_last` leaves the last N tokens of each prompt.

    `prompt_targets` has an array of token ids for each prompt of T tokens, [T - 1, K]: row i is scored as what position
    i predicts, so beside the prompt's token i + 1; -1 asks for nothing. A row T would be ignored.
    """

    model: str
    prompts: list[str] | None = None
    prompt_token_ids: list[list[int]] | None = None
    num_samples: int = 1
    max_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: list[str] = field(default_factory=list[str])
    stop_token_ids: list[int] = field(default_factory=list[int])
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    return_prompt_logprobs: bool = False
    prompt_top_logprobs: int | None = None
    prompt_logprobs_last: int | None = None
    prompt_targets: list[Numbers] | None = None
    return_expert_routing: bool = False


class TopLogprob(Wire, frozen=True):
    """One of the most likely tokens of a position."""

    token: int
    logprob: float


class SampleSequence(Wire, frozen=True):
    """`logprobs[i]` is the log-probability of `tokens[i]` under the distribution it was drawn from.

    `expert_routing` [T, MoE layers, experts per token] has a row for each of the T tokens of prompt and sample; the
    last is filler, since the model never ran over the last token.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    top_logprobs: list[list[TopLogprob]] | None = None
    expert_routing: Tensor | None = None


class TopLogprobs(Wire, frozen=True):
    """The K most likely tokens of T positions, most likely first: `token_ids` int32 [T, K], `logprobs` float32 [T, K].

    A row that was not scored, such as that of the first token, holds -1 and minus infinity.
    """

    token_ids: Tensor
    logprobs: Tensor


class SampleGroup(Wire, frozen=True):
    """The samples of one prompt of T tokens; `prompt_logprobs[0]` is None, nothing precedes the first token.

    `prompt_top_logprobs` has a row for each of the T tokens. `prompt_target_logprobs` float32 [T - 1, K] answers
    `prompt_targets`, with minus infinity where that had -1. Of the prompt's tokens, `cached_prompt_tokens` did not have
    to be computed.
    """

    prompt_token_ids: list[int]
    samples: list[SampleSequence]
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: TopLogprobs | None = None
    prompt_target_logprobs: Tensor | None = None
    cached_prompt_tokens: int = 0


class TokenUsage(Wire, frozen=True):
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0


class SampleResponse(Wire, frozen=True):
    groups: list[SampleGroup]
    policy_version: str
    usage: TokenUsage
