"""Training sequences as tensors, and many of them packed one behind the other without padding."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
import torch

from river_kernels import Packing, Segment, Segments, make_packing
from river_trainer.errors import InvalidTaskError
from river_trainer.protocol import Sequence
from river_trainer.routing import PassRouting, RoutedExperts, decode_routing, pass_routing


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One sequence; every tensor is [T], and the last index counts for nothing.

    `expert_routing` [T, MoE layers, experts per token] is what a sampler chose.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    advantages: torch.Tensor | None
    expert_routing: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


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
    if sequence.targets_per_token != 1:
        raise InvalidTaskError(
            "soft targets [T, K] are not supported", param=f"{field}.target_tokens"
        )
    input_ids = _integers(sequence.input_ids, f"{field}.input_ids", vocab_size)
    tokens = input_ids.numel()
    if not 1 <= tokens <= context_length:
        raise InvalidTaskError(
            f"{tokens} tokens; 1 to {context_length} are possible", param=f"{field}.input_ids"
        )
    targets = torch.zeros_like(input_ids)
    if sequence.target_tokens is None:
        targets[:-1] = input_ids[1:]
    else:
        # The ignored last target may be any filler.
        name = f"{field}.target_tokens"
        given = _integers(sequence.target_tokens, name, vocab_size, ignore_last=True)
        targets[:-1] = _of_length(given, tokens, name)[:-1]
    weights = _floats(sequence.weights, tokens, f"{field}.weights")
    weights = torch.ones(tokens) if weights is None else weights
    weights[-1] = 0.0
    return TrainingSequence(
        input_ids,
        targets,
        weights,
        _floats(sequence.old_logprobs, tokens, f"{field}.old_logprobs"),
        _floats(sequence.advantages, tokens, f"{field}.advantages"),
        decode_routing(sequence.expert_routing, tokens, routed_experts, f"{field}.expert_routing"),
    )


def _integers(
    data: bytes, param: str, vocab_size: int, *, ignore_last: bool = False
) -> torch.Tensor:
    array = np.frombuffer(data, dtype="<i4").astype(np.int64)
    checked = array[:-1] if ignore_last else array
    if checked.size and (checked.min() < 0 or checked.max() >= vocab_size):
        raise InvalidTaskError(f"a token id is outside 0 to {vocab_size - 1}", param=param)
    return torch.from_numpy(array)


def _floats(data: bytes | None, tokens: int, param: str) -> torch.Tensor | None:
    if data is None:
        return None
    values = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
    return _of_length(values, tokens, param)


def _of_length(values: torch.Tensor, tokens: int, param: str) -> torch.Tensor:
    if values.numel() != tokens:
        raise InvalidTaskError(f"{values.numel()} values for {tokens} tokens", param=param)
    return values


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of several sequences, all of one adapter before all of the next. Tensors are [T]."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    segments: Segments
    packing: Packing
    routing: PassRouting | None = None


def pack(
    parts: Listing[Listing[TrainingSequence]], replayed: Listing[bool] | None = None
) -> PackedBatch:
    """Packs `parts`, one for each slot, in that order; every part has at least one sequence.

    The tokens of the parts that `replayed` names go to the experts that their sequences name.
    """
    segments: list[Segment] = []
    position = 0
    for slot, sequences in enumerate(parts):
        end = position + sum(sequence.tokens for sequence in sequences)
        assert end > position
        segments.append(Segment(slot, position, end))
        position = end
    everything = [sequence for sequences in parts for sequence in sequences]
    return PackedBatch(
        input_ids=torch.cat([sequence.input_ids for sequence in everything]),
        positions=torch.cat([torch.arange(sequence.tokens) for sequence in everything]),
        targets=torch.cat([sequence.targets for sequence in everything]),
        segments=tuple(segments),
        packing=make_packing([sequence.tokens for sequence in everything]),
        routing=pass_routing(
            [[sequence.expert_routing for sequence in part] for part in parts],
            [[sequence.tokens for sequence in part] for part in parts],
            tuple(segments),
            replayed or [False] * len(parts),
        ),
    )
