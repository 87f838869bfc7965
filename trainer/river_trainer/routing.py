"""Sending tokens to the experts that a sampler sent them to, or counting how many would go elsewhere.

In bfloat16 two programs that compute the same thing round it differently, and now and then a token whose experts are
nearly tied goes to another one: a difference in the log-probabilities that no importance ratio is made for. A sampler
therefore says which experts it used. With replay they are used again; their weights are still the gate's own, computed
from the hidden states of the pass, so that gradients flow through the gate as always. With and without replay the share
of (token, layer) whose gate chose another set of experts is reported as `expert_flip`, and the share of single experts
that it did not choose as `expert_slot_flip`.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806, N815

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from river_engine.protocol import routing_dtype
from river_kernels import Segment
from river_trainer.errors import InvalidTaskError


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Of a model: experts of a MoE layer, MoE layers, and the experts that a token goes to in each."""

    experts: int
    layers: int
    per_token: int


@dataclass(frozen=True, slots=True)
class Flips:
    """How many (token, layer) were compared with the sampler, how many of them had other experts, and how many experts.

    `slots` counts the sampler's experts that were not chosen, of `per_token` in each (token, layer).
    """

    different: int = 0
    slots: int = 0
    compared: int = 0
    per_token: int = 1

    def __add__(self, other: Flips) -> Flips:
        return Flips(
            self.different + other.different,
            self.slots + other.slots,
            self.compared + other.compared,
            max(self.per_token, other.per_token),
        )

    def metrics(self) -> dict[str, float]:
        if not self.compared:
            return {}
        return {
            "expert_flip": self.different / self.compared,
            "expert_slot_flip": self.slots / (self.compared * self.per_token),
        }


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


@dataclass(frozen=True, slots=True)
class PassRouting:
    """The sampler's experts of a packed pass, and what has been found out about them by its layers.

    `experts_LTK` are known where `known_T` says so; the tokens of segment i are forced to them if `forced[i]`, as
    `forced_T` says token by token. `compared[i]` are the (token, layer) of segment i that are compared. `different_T2`
    counts the layers in which a token's gate chose other experts, and those of the sampler's that it did not choose.
    """

    experts_LTK: torch.Tensor
    known_T: torch.Tensor
    forced_T: torch.Tensor
    different_T2: torch.Tensor
    forced: tuple[bool, ...]
    compared: tuple[int, ...]

    def route(
        self,
        layer: int,
        rows: slice,
        forced: Sequence[bool],
        answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        renormalise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a router is to say instead of its own `answer` (logits [t, E], weights [t, K], experts [t, K]).

        `rows` are those of whole segments, for which `forced` says whether they are.
        """
        logits_TE, weights_TK, experts_TK = answer
        known_T, given_TK = self.known_T[rows], self.experts_LTK[layer, rows]
        missed_TK = (given_TK[:, :, None] != experts_TK[:, None, :]).all(-1)
        missed_T = missed_TK.sum(-1, dtype=torch.int32) * known_T
        self.different_T2[rows] += torch.stack([(missed_T > 0).int(), missed_T], -1)
        if any(forced):
            forced_T1 = self.forced_T[rows, None]
            experts_TK = torch.where(known_T[:, None] & forced_T1, given_TK, experts_TK)
            replayed_TK = gate_weights(logits_TE, experts_TK, renormalise)
            weights_TK = (
                replayed_TK if all(forced) else torch.where(forced_T1, replayed_TK, weights_TK)
            )
        return logits_TE, weights_TK, experts_TK

    def different(self, segment: Segment) -> torch.Tensor:
        """(token, layer) of a segment that chose other experts, and how many of the sampler's they missed; [2]."""
        return self.different_T2[segment.start : segment.end].sum(0)

    @property
    def per_token(self) -> int:
        return self.experts_LTK.shape[-1]


def pass_routing(
    parts: Sequence[Sequence[torch.Tensor | None]],
    lengths: Sequence[Sequence[int]],
    forced: Sequence[bool],
) -> PassRouting | None:
    """The routing of packed sequences, one part a segment; None if no sequence has any."""
    sample = next((rows for part in parts for rows in part if rows is not None), None)
    if sample is None:
        return None
    experts: list[torch.Tensor] = []
    known: list[torch.Tensor] = []
    forced_tokens: list[torch.Tensor] = []
    compared: list[int] = []
    for part, part_lengths, is_forced in zip(parts, lengths, forced, strict=True):
        compared.append(0)
        for rows, length in zip(part, part_lengths, strict=True):
            experts.append(sample.new_zeros(length, *sample.shape[1:]) if rows is None else rows)
            is_known = torch.full((length,), rows is not None)
            is_known[-1] = False
            known.append(is_known)
            forced_tokens.append(torch.full((length,), is_forced))
            if rows is not None:
                compared[-1] += (length - 1) * sample.shape[1]
    known_T = torch.cat(known)
    return PassRouting(
        torch.cat(experts).long().transpose(0, 1).contiguous(),
        known_T,
        torch.cat(forced_tokens),
        torch.zeros(len(known_T), 2, dtype=torch.int32),
        tuple(forced),
        tuple(compared),
    )


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
