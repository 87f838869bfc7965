"""Samples as the client reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from river_gateway.dialects.river_grpc import river_pb2 as pb
from river_gateway.dialects.river_grpc import top_logprobs_pb2
from river_gateway.dialects.river_grpc.routing_handle import make_handle
from river_gateway.dialects.river_grpc.versions import version_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from river_client import wire
    from river_gateway.dialects.river_grpc.prompts import Piece, Wanted


def samples_body(drawn: Sequence[tuple[Piece, wire.SampleResponse]]) -> bytes:
    """The whole answer to a sampling request, with its results in the order of the client's prompts."""
    results: dict[int, pb.InferenceResult] = {}
    usage = pb.Usage()
    for piece, response in drawn:
        (group,) = response.groups
        for place, sequence in zip(piece.places, group.samples, strict=True):
            results[place] = _result(group, sequence, piece.wanted, response.policy_version)
        usage.prompt_tokens += response.usage.prompt_tokens
        usage.completion_tokens += response.usage.completion_tokens
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
    inference = pb.InferenceResponse(
        results=[results[place] for place in sorted(results)], usage=usage
    )
    return pb.RetrieveFutureResponse(inference=inference).SerializeToString()


def _result(
    group: wire.SampleGroup, sequence: wire.SampleSequence, wanted: Wanted, policy_version: str
) -> pb.InferenceResult:
    version = version_of(policy_version)
    result = pb.InferenceResult(
        text=sequence.text,
        token_ids=sequence.tokens,
        token_logprobs=sequence.logprobs,
        policy_version=version,
        prompt_tokens=len(group.prompt_token_ids),
        cached_prompt_tokens=group.cached_prompt_tokens,
    )
    if sequence.tokens:  # No request ever changes its version midway.
        result.policy_spans.append(pb.PolicySpan(end=len(sequence.tokens), policy_version=version))
    if wanted.prompt_token_ids:
        result.prompt_token_ids.extend(group.prompt_token_ids)
    if wanted.prompt_logprobs:
        # Nothing precedes the first token; the client's list has a number for each.
        scores = group.prompt_logprobs or []
        result.prompt_token_logprobs.extend(0.0 if score is None else score for score in scores)
    if sequence.top_logprobs is not None and wanted.top:
        result.top_logprobs.CopyFrom(_top_of_sample(sequence.top_logprobs, wanted.top))
    if group.prompt_top_logprobs is not None:
        ids, logprobs = group.prompt_top_logprobs.token_ids, group.prompt_top_logprobs.logprobs
        result.prompt_top_logprobs.CopyFrom(
            top_logprobs_pb2.TopLogprobs(
                rows=ids.shape[0], width=ids.shape[1], token_ids=ids.data, logprobs=logprobs.data
            )
        )
    if sequence.expert_routing is not None:
        result.expert_routing.CopyFrom(_routing(sequence.expert_routing))
    return result


def _top_of_sample(
    positions: Sequence[Sequence[wire.TopLogprob]], width: int
) -> top_logprobs_pb2.TopLogprobs:
    """The `width` most likely tokens at each position, filled up with id -1 and minus infinity."""
    ids = np.full((len(positions), width), -1, dtype="<i4")
    logprobs = np.full((len(positions), width), -np.inf, dtype="<f4")
    for row, position in enumerate(positions):
        best = position[:width]
        ids[row, : len(best)] = [entry.token for entry in best]
        logprobs[row, : len(best)] = [entry.logprob for entry in best]
    return top_logprobs_pb2.TopLogprobs(
        rows=len(positions), width=width, token_ids=ids.tobytes(), logprobs=logprobs.tobytes()
    )


def _routing(routing: wire.Tensor) -> pb.ExpertRouting:
    """A handle and its shape; the model never ran over the last token, so there is one less."""
    tokens, layers, per_token = routing.shape
    return pb.ExpertRouting(
        num_tokens=tokens - 1,
        num_decoder_layers=layers,
        top_k=per_token,
        routing_handle=make_handle(routing),
    )
