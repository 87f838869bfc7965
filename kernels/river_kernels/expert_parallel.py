"""`moe_lora` with the experts divided among the processes of a group.

Process r of W holds the experts r E/W to (r + 1) E/W. Every pair (token, chosen expert) goes to the process that has
the expert, with the slot of its adapter, and its result comes back:

    x [T, H] --gather, sorted by (process, expert, segment)--> [P, H] ==all_to_all==> [R, H] --experts--> [R, H]
        ==all_to_all==> [P, H] --weigh, sum over k--> [T, H]

Backward goes the same way. The rows that arrive are ordered by (process they come from, expert, segment), and each such
group is computed by itself, as `moe_lora` does it: results and gradients have the same bits as in one process, as long
as rows fill whole vector registers (a matrix library may round a row differently that begins at an odd address).

Factors that the experts share stay with the tokens: what `x A1^T` and `h A2^T` have for a row travels beside it. Their
gradients arise where the tokens are, and have to be summed over all processes.

Slots are those of the whole group of processes: every process has the pairs of every slot, and only segments of its own
tokens. An expert's own A and B get their gradients where the expert is, from the tokens of all processes, nowhere else.
All processes must call this, and run backward through it, in the same order; a process may have no rows for an expert.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from river_kernels.experts import (
    ByGroup,
    Group,
    Grouped,
    check_experts,
    run_experts,
    run_experts_backward,
    sum_over_chosen,
)
from river_kernels.quantized import FrozenWeight
from river_kernels.segments import NO_ADAPTER, LoraPair, Pairs, Segments
from river_kernels.shared_factors import (
    BySegment,
    expand_tokens,
    expand_tokens_backward,
    shrink_tokens,
    shrink_tokens_backward,
)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Where the rows of this process go: `sent[r]` of them to process r, from which `received[r]` come.

    `permutation` [P] sorts the flattened (token, k) pairs by process, expert and segment, `inverse` undoes it; `token`
    of each row. `grouped` says what arrives, with experts numbered from this process's first.
    """

    process_group: dist.ProcessGroup
    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    segments: Segments
    chosen: int
    sent: list[int]
    received: list[int]
    grouped: Grouped

    def send(self, rows_P: torch.Tensor) -> torch.Tensor:
        """Rows to the processes of their experts; what arrives here, [R, …]."""
        return _exchange(rows_P, self.sent, self.received, self.process_group)

    def send_back(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Rows back to where they came from; those of this process, [P, …]."""
        return _exchange(rows_R, self.received, self.sent, self.process_group)

    def to_rows(self, by_segment: BySegment, width: int, like_TH: torch.Tensor) -> torch.Tensor:
        """What tokens have, copied to the rows of this process, [P, width]; zeros where they have nothing."""
        values_TR = like_TH.new_zeros(like_TH.shape[0], width)
        for index, values in by_segment.items():
            segment = self.segments[index]
            values_TR[segment.start : segment.end, : values.shape[1]] = values
        return values_TR.index_select(0, self.token)

    def to_tokens(self, values_PR: torch.Tensor, ranks: Mapping[int, int]) -> BySegment:
        """What the rows of this process have, summed by token, of the segments that `ranks` names."""
        summed: BySegment = {}
        for index, rank in ranks.items():
            segment = self.segments[index]
            pairs = slice(segment.start * self.chosen, segment.end * self.chosen)
            values = values_PR[:, :rank].contiguous()
            summed[index] = sum_over_chosen(values, self.inverse[pairs], self.chosen)
        return summed

    def cut(self, values_RR: torch.Tensor, ranks: Sequence[int]) -> ByGroup:
        """What the rows that arrived have, for each group the columns of its rank; None where it is zero."""
        rows = values_RR.split_with_sizes(self.grouped.sizes)
        return [
            part[:, :rank].contiguous() if rank else None
            for part, rank in zip(rows, ranks, strict=True)
        ]

    def joined(self, by_group: ByGroup, width: int, like_RH: torch.Tensor) -> torch.Tensor:
        """What groups have as columns of the rows that arrived, [R, width]."""
        values_RR = like_RH.new_zeros(like_RH.shape[0], width)
        rows = values_RR.split_with_sizes(self.grouped.sizes)
        for part, values in zip(rows, by_group, strict=True):
            if values is not None:
                part[:, : values.shape[1]] = values
        return values_RR


def moe_lora_parallel(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: FrozenWeight,
    down: FrozenWeight,
    segments: Segments,
    gate_up_pairs: Pairs,
    down_pairs: Pairs,
    *,
    process_group: dist.ProcessGroup,
) -> torch.Tensor:
    """What `moe_lora` gives, with `gate_up` [E/W, 2I, H] and `down` [E/W, H, I] only those of this process.

    Pairs are whole, for all E experts; those of a slot without local tokens too.
    """
    check_experts(x_TH, gate_up, down, segments, gate_up_pairs, down_pairs)
    own = gate_up.shape[0]
    exchange = _make_exchange(experts_TK, segments, own, process_group)
    first = own * dist.get_rank(process_group)
    pairs = tuple(
        [_of_experts(pair, first, first + own) for pair in of_slots]
        for of_slots in (gate_up_pairs, down_pairs)
    )
    return _MoeLoraParallel.apply(x_TH, weights_TK, gate_up, down, exchange, *pairs)


@torch.no_grad()
def _make_exchange(
    experts_TK: torch.Tensor, segments: Segments, own: int, process_group: dist.ProcessGroup
) -> _Exchange:
    tokens, chosen = experts_TK.shape
    processes = dist.get_world_size(process_group)
    expert_P = experts_TK.reshape(-1)
    lengths = torch.tensor([(segment.end - segment.start) * chosen for segment in segments])

    def per_row(values: list[int]) -> torch.Tensor:
        by_segment = torch.tensor(values)
        return torch.repeat_interleave(by_segment, lengths, output_size=tokens * chosen)

    owner_P = expert_P // own
    segment_P = per_row(list(range(len(segments))))
    # Experts are numbered process by process.
    permutation = torch.argsort(expert_P * len(segments) + segment_P, stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel())
    # A row's slot and expert travel as one number, and slots are counted from NO_ADAPTER.
    slot_P = per_row([segment.slot - NO_ADAPTER for segment in segments])
    code_P = (slot_P * own + expert_P % own)[permutation]

    sent = torch.bincount(owner_P, minlength=processes)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=process_group)
    sent_sizes, received_sizes = sent.tolist(), received.tolist()
    code_R = _exchange(code_P, sent_sizes, received_sizes, process_group)
    return _Exchange(
        process_group,
        permutation,
        inverse,
        permutation // chosen,
        segments,
        chosen,
        sent_sizes,
        received_sizes,
        _grouped(code_R, own),
    )


def _grouped(code_R: torch.Tensor, own: int) -> Grouped:
    """The groups of the rows that arrived; no two segments with an adapter have the same slot."""
    codes, sizes = torch.unique_consecutive(code_R, return_counts=True)
    groups = [divmod(code, own) for code in codes.tolist()]
    return Grouped(
        tuple(Group(slot + NO_ADAPTER, expert) for slot, expert in groups), sizes.tolist()
    )


def _exchange(
    rows: torch.Tensor, sent: list[int], received: list[int], process_group: dist.ProcessGroup
) -> torch.Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=process_group)
    return arrived


class _MoeLoraParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up: FrozenWeight,
        down: FrozenWeight,
        exchange: _Exchange,
        gate_up_pairs: Pairs,
        down_pairs: Pairs,
    ) -> torch.Tensor:
        shared = _Shared(exchange, gate_up_pairs, down_pairs)
        segments, hidden = exchange.segments, x_TH.shape[1]
        weight_P = weights_TK.reshape(-1)[exchange.permutation]
        x_PH = x_TH.index_select(0, exchange.token)
        v1 = shrink_tokens(x_TH, segments, gate_up_pairs)
        v1_PR = exchange.to_rows(v1, shared.width_a, x_TH)
        # The router's weights are needed there by the backward pass.
        arrived = exchange.send(torch.cat([x_PH, weight_P[:, None].to(x_PH.dtype), v1_PR], dim=1))
        x_RH, weight_R, v1_RR = arrived.split([hidden, 1, shared.width_a], dim=1)
        x_RH, weight_R = x_RH.contiguous(), weight_R[:, 0].contiguous()
        y_RH, v2, kept = x_RH, [], []
        if exchange.grouped.groups:
            given = exchange.cut(v1_RR, shared.group_ranks_a)
            y_RH, v2, kept = run_experts(
                x_RH, gate_up, down, exchange.grouped, gate_up_pairs, down_pairs, given
            )
        v2_RR = exchange.joined(v2, shared.width_b, y_RH)
        returned = exchange.send_back(torch.cat([y_RH, v2_RR], dim=1)).mul_(weight_P[:, None])
        out_TH = sum_over_chosen(returned[:, :hidden], exchange.inverse, exchange.chosen)
        u = exchange.to_tokens(returned[:, hidden:], shared.segment_ranks_b)
        expand_tokens(out_TH, u, segments, down_pairs)
        ctx.weights, ctx.pairs = (gate_up, down), (gate_up_pairs, down_pairs)
        ctx.exchange, ctx.shared, ctx.with_u = exchange, shared, tuple(u)
        ctx.save_for_backward(x_TH, weight_R, *u.values(), *kept)
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        exchange: _Exchange = ctx.exchange
        shared: _Shared = ctx.shared
        gate_up_pairs, down_pairs = ctx.pairs
        x_TH, weight_R, *saved = ctx.saved_tensors
        hidden, u = x_TH.shape[1], dict(zip(ctx.with_u, saved, strict=False))
        du = expand_tokens_backward(dout_TH, u, exchange.segments, down_pairs)
        dout_PH = dout_TH.index_select(0, exchange.token)
        du_PR = exchange.to_rows(du, shared.width_b, dout_TH)
        arrived = exchange.send(torch.cat([dout_PH, du_PR], dim=1))
        dout_RH, dv2_RR = arrived.split([hidden, shared.width_b], dim=1)
        dout_RH = dout_RH.contiguous()
        dx_RH, dweight_R, dv1 = dout_RH, weight_R, []
        if exchange.grouped.groups:
            gate_up, down = ctx.weights
            dx_RH, dweight_R, dv1 = run_experts_backward(
                dout_RH,
                weight_R,
                saved[len(u) :],
                gate_up,
                down,
                exchange.grouped,
                gate_up_pairs,
                down_pairs,
                exchange.cut(dv2_RR, shared.group_ranks_b),
            )
        dv1_RR = exchange.joined(dv1, shared.width_a, dx_RH)
        returned = exchange.send_back(torch.cat([dx_RH, dweight_R[:, None], dv1_RR], dim=1))
        dx_PH, dweight_P, dv1_PR = returned.split([hidden, 1, shared.width_a], dim=1)
        dx_TH = sum_over_chosen(dx_PH, exchange.inverse, exchange.chosen)
        dv1_tokens = exchange.to_tokens(dv1_PR, shared.segment_ranks_a)
        shrink_tokens_backward(dx_TH, dv1_tokens, x_TH, exchange.segments, gate_up_pairs)
        dweights_TK = dweight_P[exchange.inverse].view(-1, exchange.chosen)
        return dx_TH, dweights_TK, None, None, None, None, None


class _Shared:
    """The ranks of the pairs whose experts share A of gate and up, or B of down.

    By group and by segment, 0 or absent where nothing is shared; `width_a` and `width_b`, the largest of all slots, are
    the same in every process.
    """

    def __init__(self, exchange: _Exchange, gate_up_pairs: Pairs, down_pairs: Pairs) -> None:
        ranks_a = [pair.rank if pair and pair.shares_a else 0 for pair in gate_up_pairs]
        ranks_b = [pair.rank if pair and pair.shares_b else 0 for pair in down_pairs]
        self.width_a, self.width_b = max(ranks_a, default=0), max(ranks_b, default=0)
        self.group_ranks_a, self.group_ranks_b = (
            [ranks[group.slot] if group.slot >= 0 else 0 for group in exchange.grouped.groups]
            for ranks in (ranks_a, ranks_b)
        )
        self.segment_ranks_a, self.segment_ranks_b = (
            {
                index: ranks[segment.slot]
                for index, segment in enumerate(exchange.segments)
                if segment.slot >= 0 and segment.end > segment.start and ranks[segment.slot]
            }
            for ranks in (ranks_a, ranks_b)
        )


def _of_experts(pair: LoraPair | None, first: int, end: int) -> LoraPair | None:
    """The part of a pair that belongs to the experts `first` to `end` (exclusive); views."""
    if pair is None:
        return None

    def own(tensor: torch.Tensor | None, *, shared: bool) -> torch.Tensor | None:
        return tensor if tensor is None or shared else tensor[first:end]

    return replace(
        pair,
        a=own(pair.a, shared=pair.shares_a),
        b=own(pair.b, shared=pair.shares_b),
        a_grad=own(pair.a_grad, shared=pair.shares_a),
        b_grad=own(pair.b_grad, shared=pair.shares_b),
    )
