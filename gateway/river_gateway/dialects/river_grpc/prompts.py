"""The prompts of a sampling request as requests to the engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from river_client import wire
from river_gateway.dialects.river_grpc.refused import NO_IMAGES, NO_RETAINED_KV
from river_gateway.errors import GatewayError, InvalidFieldError, NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_gateway.dialects.river_grpc import river_pb2 as pb


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a sample its client wants back beside tokens and their log-probabilities; `top` is the K of top-K."""

    prompt_logprobs: bool
    prompt_token_ids: bool
    top: int


@dataclass(slots=True)
class Piece:
    """One request with one prompt; its samples answer the client's prompts at `places`, which are all the same."""

    asked: wire.SampleRequest
    wanted: Wanted
    places: list[int] = field(default_factory=list[int])

    def to_wire(self) -> wire.SampleRequest:
        """The request with a sample for each place."""
        return msgspec.structs.replace(self.asked, num_samples=len(self.places))


def pieces_of(model: str, prompts: Sequence[pb.InferencePrompt]) -> list[Piece]:
    """A request to `model` for each prompt, and one for all that follow each other, are equal and have no seed.

    Raises:
        InvalidFieldError: there is no prompt, or one has both text and tokens.
        NotSupportedError: one has images, or wants a cache of another policy.
    """
    if not prompts:
        raise InvalidFieldError("prompts: empty, must hold at least one", param="prompts")
    pieces: list[Piece] = []
    for index, prompt in enumerate(prompts):
        asked = _request(model, prompt, f"prompts[{index}]")
        last = pieces[-1] if pieces else None
        if last is None or asked.seed is not None or asked != last.asked:
            last = Piece(asked, _wanted(prompt))
            pieces.append(last)
        last.places.append(index)
    return pieces


def _request(model: str, prompt: pb.InferencePrompt, where: str) -> wire.SampleRequest:
    if prompt.images or prompt.image_inputs or prompt.resolved_image_handles:
        raise NotSupportedError(f"{where}: {NO_IMAGES}", param=where)
    if prompt.kv_cache_namespace or prompt.HasField("kv_cache_policy"):
        raise NotSupportedError(f"{where}: {NO_RETAINED_KV}", param=where)
    if bool(prompt.prompt) == bool(prompt.input_ids):
        raise InvalidFieldError(f"{where}: give either prompt or input_ids", param=where)
    top = prompt.logprobs if prompt.HasField("logprobs") else 0
    content: dict[str, Any] = (
        {"prompt_token_ids": [list(prompt.input_ids)]}
        if prompt.input_ids
        else {"prompts": [prompt.prompt]}
    )
    return wire.SampleRequest(
        model=model,
        **content,
        max_tokens=prompt.max_tokens,
        temperature=prompt.temperature,
        top_p=prompt.top_p,
        top_k=prompt.top_k or -1,
        stop=list(prompt.stop),
        seed=prompt.seed if prompt.HasField("seed") else None,
        logprobs=top or None,
        return_prompt_logprobs=prompt.return_prompt_logprobs,
        prompt_top_logprobs=top if top and prompt.return_prompt_logprobs else None,
        return_expert_routing=prompt.return_expert_routing,
    )


def _wanted(prompt: pb.InferencePrompt) -> Wanted:
    scored = prompt.return_prompt_logprobs
    return Wanted(
        prompt_logprobs=scored,
        prompt_token_ids=scored or prompt.return_prompt_token_ids or prompt.return_expert_routing,
        top=prompt.logprobs if prompt.HasField("logprobs") else 0,
    )


def with_place(error: GatewayError, place: int) -> InvalidFieldError:
    """An error about the only prompt of a piece, as one about the client's prompt at `place`."""
    message = error.message
    for ours, theirs in (("prompt_token_ids[0]", "input_ids"), ("prompts[0]", "prompt")):
        message = message.replace(ours, theirs)
    where = f"prompts[{place}]"
    return InvalidFieldError(f"{where}.{message}", param=where)
