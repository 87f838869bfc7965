"""Training sequences as tensors, and many of them packed one behind the other without padding."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
import torch

from river_kernels import Packing, Segment, Segments, make_packing
from river_trainer.errors import InvalidTaskError
from river_trainer.loss_specs import TARGETS_PER_TOKEN_MAX
from river_trainer.protocol import Sequence
from river_trainer.routing import PassRouting, RoutedExperts, decode_routing, pass_routing


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One sequence; every tensor is [T], soft targets and their weights [T, K]; the last index counts for nothing.

    `expert_routing` [T, MoE layers, experts per token] is what a sampler chose.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    advantages: torch.Tensor | None
    echo_weights: torch.Tensor | None
    clip_low: torch.Tensor | None = None
    clip_high: torch.Tensor | None = None
    sequence_mask: torch.Tensor | None = None
    expert_routing: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def targets_per_token(self) -> int:
        return 1 if self.targets.ndim == 1 else self.targets.shape[1]


def decode_sequence(
    sequence: Sequence,
    *,
    index: int,
    vocab_size: int,
    context_length: int,
    routed_experts: RoutedExperts | None = None,
) -> TrainingSequence:
    """`sequence` as tensors. The gateway has checked it; the checks here keep a wrong one from hurting the run.

    Raises:
        InvalidTaskError: it does not fit the base model, or its fields do not have one length.
    """
    field = f"data[{index}]"
    input_ids = _integers(sequence.input_ids)
    tokens = input_ids.numel()
    if not 1 <= tokens <= context_length:
        raise InvalidTaskError(
            f"{tokens} tokens; 1 to {context_length} are possible", param=f"{field}.input_ids"
        )
    _check_vocabulary(input_ids, f"{field}.input_ids", vocab_size)
    targets = _targets(sequence, input_ids, f"{field}.target_tokens", vocab_size)
    per_token = sequence.targets_per_token

    def floats(name: str, values_per_token: int = 1) -> torch.Tensor | None:
        return _floats(getattr(sequence, name), tokens, f"{field}.{name}", values_per_token)

    weights = floats("weights", per_token)
    weights = torch.ones(targets.shape) if weights is None else weights
    weights[-1] = 0.0
    echo_weights = floats("echo_weights")
    if echo_weights is not None:
        echo_weights[-1] = 0.0
    return TrainingSequence(
        input_ids,
        targets,
        weights,
        floats("old_logprobs"),
        floats("advantages"),
        echo_weights,
        floats("clip_low"),
        floats("clip_high"),
        floats("sequence_mask"),
        decode_routing(sequence.expert_routing, tokens, routed_experts, f"{field}.expert_routing"),
    )


def _targets(
    sequence: Sequence, input_ids: torch.Tensor, param: str, vocab_size: int
) -> torch.Tensor:
    """The targets, [T] or [T, K], with zeros at the last index."""
    per_token = sequence.targets_per_token
    if not 1 <= per_token <= TARGETS_PER_TOKEN_MAX:
        raise InvalidTaskError(
            f"{per_token} targets per token; 1 to {TARGETS_PER_TOKEN_MAX} are possible", param=param
        )
    if sequence.target_tokens is None:
        if per_token > 1:
            raise InvalidTaskError("soft targets have to be given", param=param)
        return torch.cat([input_ids[1:], input_ids.new_zeros(1)])
    given = _shaped(_integers(sequence.target_tokens), input_ids.numel(), per_token, param)
    given[-1] = 0  # what is there may be any filler
    _check_vocabulary(given, param, vocab_size)
    return given


def _integers(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<i4").astype(np.int64))


def _check_vocabulary(ids: torch.Tensor, param: str, vocab_size: int) -> None:
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        place = "".join(f"[{index}]" for index in outside[0].tolist())
        raise InvalidTaskError(
            f"a token id is outside 0 to {vocab_size - 1}", param=f"{param}{place}"
        )


def _floats(
    data: bytes | None, tokens: int, param: str, values_per_token: int
) -> torch.Tensor | None:
    if data is None:
        return None
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
    return _shaped(values, tokens, values_per_token, param)


def _shaped(values: torch.Tensor, tokens: int, values_per_token: int, param: str) -> torch.Tensor:
    """[T], or [T, K] if there is more than one value per token."""
    if values.numel() != tokens * values_per_token:
        wanted = (
            f"{tokens} tokens" if values_per_token == 1 else f"{tokens} times {values_per_token}"
        )
        raise InvalidTaskError(f"{values.numel()} values for {wanted}", param=param)
    return values if values_per_token == 1 else values.view(tokens, values_per_token)


def join_targets(tensors: Listing[torch.Tensor]) -> torch.Tensor:
    """Tensors [t] and [t, k] one behind the other: [T] if all are [t], else [T, largest k], filled up with zeros."""
    widths = [1 if tensor.ndim == 1 else tensor.shape[1] for tensor in tensors]
    if all(tensor.ndim == 1 for tensor in tensors):
        return torch.cat(list(tensors))
    joined = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), max(widths))
    start = 0
    for tensor, width in zip(tensors, widths, strict=True):
        joined[start : start + len(tensor), :width] = tensor.view(len(tensor), width)
        start += len(tensor)
    return joined


def own_targets(values: torch.Tensor, targets_per_token: int) -> torch.Tensor:
    """What is a sequence's own, [t] or [t, k], of its rows [t] or [t, K] of a batch with wider ones."""
    if values.ndim == 1:
        assert targets_per_token == 1
        return values
    return values[:, 0] if targets_per_token == 1 else values[:, :targets_per_token]


def split_logprobs(
    logprobs: torch.Tensor, sequences: Listing[TrainingSequence]
) -> list[torch.Tensor]:
    """Copies of each sequence's own log-probabilities, [t] or [t, k], zero at the ignored last index."""
    rows = logprobs.split([sequence.tokens for sequence in sequences])
    pieces = [
        own_targets(piece, sequence.targets_per_token).clone()
        for piece, sequence in zip(rows, sequences, strict=True)
    ]
    for piece in pieces:
        piece[-1] = 0.0
    return pieces


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of several sequences, all of one adapter before all of the next.

    Tensors are [T]; `targets` are [T, K] if any sequence has K targets at a position (`join_targets`). Logits are
    multiplied by `logit_scale`, if there is one.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    segments: Segments
    packing: Packing
    routing: PassRouting | None = None
    logit_scale: torch.Tensor | None = None


def pack(
    parts: Listing[Listing[TrainingSequence]],
    replayed: Listing[bool] | None = None,
    temperatures: Listing[float] | None = None,
) -> PackedBatch:
    """Packs `parts`, one for each slot, in that order; every part has at least one sequence.

    The tokens of the parts that `replayed` names go to the experts that their sequences name. `temperatures` are those
    that the logits of each part are divided by.
    """
    segments: list[Segment] = []
    position = 0
    for slot, sequences in enumerate(parts):
        end = position + sum(sequence.tokens for sequence in sequences)
        assert end > position
        segments.append(Segment(slot, position, end))
        position = end
    everything = [sequence for sequences in parts for sequence in sequences]
    scale = None
    if temperatures is not None and any(temperature != 1.0 for temperature in temperatures):
        scale = torch.cat(
            [
                torch.full((segment.end - segment.start,), 1.0 / temperature)
                for segment, temperature in zip(segments, temperatures, strict=True)
            ]
        )
    return PackedBatch(
        input_ids=torch.cat([sequence.input_ids for sequence in everything]),
        positions=torch.cat([torch.arange(sequence.tokens) for sequence in everything]),
        targets=join_targets([sequence.targets for sequence in everything]),
        segments=tuple(segments),
        packing=make_packing([sequence.tokens for sequence in everything]),
        routing=pass_routing(
            [[sequence.expert_routing for sequence in part] for part in parts],
            [[sequence.tokens for sequence in part] for part in parts],
            replayed or [False] * len(parts),
        ),
        logit_scale=scale,
    )
