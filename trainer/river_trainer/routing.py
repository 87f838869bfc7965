"""Sending tokens to the experts that a sampler sent them to, or counting how many would go elsewhere.

In bfloat16 two programs that compute the same thing round it differently, and now and then a token whose experts are
nearly tied goes to another one: a difference in the log-probabilities that no importance ratio is made for. A sampler
therefore says which experts it used. With replay they are used again; their weights are still the gate's own, computed
from the hidden states of the pass, so that gradients flow through the gate as always. Without replay the share of
(token, layer) that chose another set of experts is reported as `expert_flip`.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from river_engine.protocol import routing_dtype
from river_kernels import Segments
from river_trainer.errors import InvalidTaskError


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Of a model: experts of a MoE layer, MoE layers, and the experts that a token goes to in each."""

    experts: int
    layers: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Flips:
    """How many (token, layer) were compared with the sampler, and how many of them had other experts."""

    different: int = 0
    compared: int = 0

    def __add__(self, other: Flips) -> Flips:
        return Flips(self.different + other.different, self.compared + other.compared)

    def metrics(self) -> dict[str, float]:
        return {"expert_flip": self.different / self.compared} if self.compared else {}


def decode_routing(
    data: bytes | None, tokens: int, model: RoutedExperts | None, param: str
) -> torch.Tensor | None:
    """The experts of a sequence, [T, layers, K]; those of the last token mean nothing.

    Raises:
        InvalidTaskError: they are not of this model.
    """
    if data is None:
        return None
    if model is None:
        raise InvalidTaskError("the base model has no routed experts to replay", param=param)
    array = np.frombuffer(data, dtype=np.dtype(routing_dtype(model.experts)).newbyteorder("<"))
    shape = (tokens, model.layers, model.per_token)
    if array.size != np.prod(shape):
        raise InvalidTaskError(f"{array.size} experts, not {list(shape)}", param=param)
    if array.size and array.max() >= model.experts:
        raise InvalidTaskError(f"an expert is outside 0 to {model.experts - 1}", param=param)
    wide = np.uint8 if array.dtype.itemsize == 1 else np.int32  # torch can do little with uint16
    return torch.from_numpy(array.reshape(shape).astype(wide))


class PassRouting:
    """The sampler's experts of a packed pass, and what has been found out about them by its layers.

    `experts_TLK` are known where `known_T` says so; the tokens of segment i are forced to them if `forced[i]`.
    """

    def __init__(
        self,
        experts_TLK: torch.Tensor,
        known_T: torch.Tensor,
        segments: Segments,
        forced: Sequence[bool],
    ) -> None:
        assert experts_TLK.shape[0] == known_T.shape[0] == segments[-1].end
        assert len(forced) == len(segments)
        self._experts_LTK = experts_TLK.long().transpose(0, 1).contiguous()
        self._known_T = known_T
        self._segments = segments
        self._forced = forced
        self._different = [0] * len(segments)

    def route(
        self,
        layer: int,
        segment: int,
        answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        renormalise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a router is to say instead of its own `answer` (logits [t, E], weights [t, K], experts [t, K])."""
        logits_TE, _, own_TK = answer
        rows = slice(self._segments[segment].start, self._segments[segment].end)
        known_T, given_TK = self._known_T[rows], self._experts_LTK[layer, rows]
        if self._forced[segment]:
            experts_TK = torch.where(known_T[:, None], given_TK, own_TK)
            return logits_TE, gate_weights(logits_TE, experts_TK, renormalise), experts_TK
        other_T = (given_TK.sort(-1).values != own_TK.sort(-1).values).any(-1)
        self._different[segment] += int((other_T & known_T).sum())
        return answer

    def flips(self, segment: int) -> Flips:
        """Of one segment, once all layers have run; nothing is compared where tokens were forced."""
        if self._forced[segment]:
            return Flips()
        rows = slice(self._segments[segment].start, self._segments[segment].end)
        compared = int(self._known_T[rows].sum()) * self._experts_LTK.shape[0]
        return Flips(self._different[segment], compared)


def pass_routing(
    parts: Sequence[Sequence[torch.Tensor | None]],
    lengths: Sequence[Sequence[int]],
    segments: Segments,
    forced: Sequence[bool],
) -> PassRouting | None:
    """The routing of packed sequences, one part a segment; None if no sequence has any."""
    sample = next((rows for part in parts for rows in part if rows is not None), None)
    if sample is None:
        return None
    experts: list[torch.Tensor] = []
    known: list[torch.Tensor] = []
    for part, part_lengths in zip(parts, lengths, strict=True):
        for rows, length in zip(part, part_lengths, strict=True):
            experts.append(sample.new_zeros(length, *sample.shape[1:]) if rows is None else rows)
            is_known = torch.full((length,), rows is not None)
            is_known[-1] = False
            known.append(is_known)
    return PassRouting(torch.cat(experts), torch.cat(known), segments, forced)


def gate_weights(
    logits_TE: torch.Tensor, experts_TK: torch.Tensor, renormalise: bool
) -> torch.Tensor:
    """The weights [T, K] of given experts: their share of the softmax, or of the share they have together."""
    weights_TK = logits_TE.softmax(-1, dtype=torch.float32).gather(1, experts_TK)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype)


@torch.no_grad()
def gate_renormalises(router: Any) -> bool | None:
    """Whether the router divides the weights of the chosen experts by their sum; None if its rule is another one."""
    inputs = router.weight.shape[-1]
    probe = torch.linspace(0.0, 97.0, 8 * inputs).sin().view(8, inputs).to(router.weight.dtype)
    logits_TE, weights_TK, experts_TK = router(probe)
    for renormalise in (True, False):
        ours = gate_weights(logits_TE, experts_TK, renormalise)
        if ours.shape == weights_TK.shape and torch.equal(ours, weights_TK):
            return renormalise
    return None
