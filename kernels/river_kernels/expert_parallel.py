"""`moe_lora` with the experts divided among the processes of a group.

Process r of W holds the experts r E/W to (r + 1) E/W. Every pair (token, chosen expert) goes to the process that has
the expert, with the slot of its adapter, and its result comes back:

    x [T, H] --gather, sorted by (process, segment, expert)--> [P, H] ==all_to_all==> [R, H] --experts--> [R, H]
        ==all_to_all==> [P, H] --weigh, sum over k--> [T, H]

Backward goes the same way. The rows that arrive are ordered by (process they come from, segment, expert): they are
blocks as `moe_lora` has them. Results and gradients have the same bits as in one process, as long as rows fill whole
vector registers (a matrix library may round a row differently that begins at an odd address).

Factors that the experts share stay with the tokens: what `x A1^T` and `h A2^T` have for a row travels beside it. Their
gradients arise where the tokens are, and have to be summed over all processes.

Slots are those of the whole group of processes: every process has the pairs of every slot, and only segments of its own
tokens. An expert's own A and B get their gradients where the expert is, from the tokens of all processes, nowhere else.
All processes must call this, and run backward through it, in the same order; a process may have no rows for an expert.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from river_kernels.experts import Experts, Kept, run_experts, run_experts_backward
from river_kernels.quantized import FrozenWeight
from river_kernels.rows import ByBlock, Rows, inverted, make_rows, sum_over_chosen
from river_kernels.segments import NO_ADAPTER, LoraPair, Pairs, Segments
from river_kernels.shared_factors import (
    expand_tokens,
    expand_tokens_backward,
    shrink_tokens,
    shrink_tokens_backward,
)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Where the rows of this process go: `sent[r]` of them to process r, from which `received[r]` come.

    `permutation` [P] sorts the flattened (token, k) pairs by process, segment and expert, `inverse` undoes it; `token`
    of each row. `rows` says what arrives, with experts numbered from this process's first. No segment is empty.
    """

    process_group: dist.ProcessGroup
    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    segments: Segments
    chosen: int
    sent: list[int]
    received: list[int]
    rows: Rows

    def send(self, rows_P: torch.Tensor) -> torch.Tensor:
        """Rows to the processes of their experts; what arrives here, [R, …]."""
        return _exchange(rows_P, self.sent, self.received, self.process_group)

    def send_back(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Rows back to where they came from; those of this process, [P, …]."""
        return _exchange(rows_R, self.received, self.sent, self.process_group)

    def to_rows(
        self, values: Sequence[torch.Tensor | None], width: int, like_TH: torch.Tensor
    ) -> torch.Tensor:
        """What the tokens of each segment have, copied to the rows of this process, [P, width]; zeros without."""
        values_TR = like_TH.new_zeros(like_TH.shape[0], width)
        for segment, of_tokens in zip(self.segments, values, strict=True):
            if of_tokens is not None:
                values_TR[segment.start : segment.end, : of_tokens.shape[1]] = of_tokens
        return values_TR.index_select(0, self.token)

    def to_tokens(
        self,
        values_PR: torch.Tensor,
        ranks: Sequence[int],
        weights_TK: torch.Tensor | None = None,
    ) -> ByBlock:
        """What the rows of this process have, weighted and summed by token; of segments with a rank."""
        summed: ByBlock = []
        for segment, rank in zip(self.segments, ranks, strict=True):
            if not rank:
                summed.append(None)
                continue
            pairs = slice(segment.start * self.chosen, segment.end * self.chosen)
            weights = None if weights_TK is None else weights_TK.reshape(-1)[pairs]
            values = values_PR[:, :rank].contiguous()
            summed.append(sum_over_chosen(values, self.inverse[pairs], self.chosen, weights))
        return summed

    def cut(self, values_RR: torch.Tensor, ranks: Sequence[int]) -> ByBlock:
        """What the rows that arrived have, for each block the columns of its rank; None where it is zero."""
        return [
            values_RR[block.start : block.end, :rank].contiguous() if rank else None
            for block, rank in zip(self.rows.blocks, ranks, strict=True)
        ]

    def joined(
        self, values: Sequence[torch.Tensor | None], width: int, like_RH: torch.Tensor
    ) -> torch.Tensor:
        """What blocks have as columns of the rows that arrived, [R, width]."""
        values_RR = like_RH.new_zeros(like_RH.shape[0], width)
        for block, of_block in zip(self.rows.blocks, values, strict=True):
            if of_block is not None:
                values_RR[block.start : block.end, : of_block.shape[1]] = of_block
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
    Experts(gate_up, down, gate_up_pairs, down_pairs).check(x_TH, segments)
    own = gate_up.shape[0]
    exchange = _make_exchange(experts_TK, segments, own, process_group)
    first = own * dist.get_rank(process_group)
    pairs = (
        [_of_experts(pair, first, first + own) for pair in of_slots]
        for of_slots in (gate_up_pairs, down_pairs)
    )
    experts = Experts(gate_up, down, *pairs)
    return _MoeLoraParallel.apply(x_TH, weights_TK, experts, exchange)


@torch.no_grad()
def _make_exchange(
    experts_TK: torch.Tensor, segments: Segments, own: int, process_group: dist.ProcessGroup
) -> _Exchange:
    tokens, chosen = experts_TK.shape
    segments = tuple(segment for segment in segments if segment.end > segment.start)
    processes = dist.get_world_size(process_group)
    expert_P = experts_TK.reshape(-1)
    lengths = torch.tensor([(segment.end - segment.start) * chosen for segment in segments])

    def per_row(values: list[int]) -> torch.Tensor:
        by_segment = torch.tensor(values)
        return torch.repeat_interleave(by_segment, lengths, output_size=tokens * chosen)

    owner_P = expert_P // own
    segment_P = per_row(list(range(len(segments))))
    group_P = (owner_P * len(segments) + segment_P) * own + expert_P % own
    permutation = torch.argsort(group_P, stable=True)
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
        inverted(permutation),
        permutation // chosen,
        segments,
        chosen,
        sent_sizes,
        received_sizes,
        _rows(code_R, received_sizes, own),
    )


def _rows(code_R: torch.Tensor, received: list[int], own: int) -> Rows:
    """A block for each slot of each process; no two segments with an adapter have the same slot."""
    slots: list[int] = []
    counts: list[torch.Tensor] = []
    for codes in code_R.split(received):
        found, lengths = torch.unique_consecutive(codes // own, return_counts=True)
        slots += [slot + NO_ADAPTER for slot in found.tolist()]
        counts += [
            torch.bincount(part, minlength=own) for part in (codes % own).split(lengths.tolist())
        ]
    if not counts:
        return make_rows([], code_R.new_empty(0, own), code_R)
    return make_rows(slots, torch.stack(counts), code_R % own)


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
        experts: Experts,
        exchange: _Exchange,
    ) -> torch.Tensor:
        shared = _Shared(exchange, experts)
        segments, hidden, rows = exchange.segments, x_TH.shape[1], exchange.rows
        weight_P = weights_TK.reshape(-1)[exchange.permutation]
        x_PH = x_TH.index_select(0, exchange.token)
        v1 = shrink_tokens(x_TH, segments, experts.gate_up_pairs)
        v1_PR = exchange.to_rows(v1, shared.width_a, x_TH)
        # The router's weights are needed there by the backward pass.
        arrived = exchange.send(torch.cat([x_PH, weight_P[:, None].to(x_PH.dtype), v1_PR], dim=1))
        x_RH, weight_R, v1_RR = arrived.split([hidden, 1, shared.width_a], dim=1)
        x_RH, weight_R = x_RH.contiguous(), weight_R[:, 0].contiguous()
        y_RH, v2, kept = x_RH, [], None
        if rows.blocks:
            given = exchange.cut(v1_RR, shared.block_ranks_a)
            by_expert_RH, v2, kept = run_experts(rows.source(x_RH), experts, rows, given)
            y_RH = rows.in_blocks(by_expert_RH)
        v2_RR = exchange.joined(v2, shared.width_b, y_RH)
        returned = exchange.send_back(torch.cat([y_RH, v2_RR], dim=1))
        out_TH = sum_over_chosen(
            returned[:, :hidden], exchange.inverse, exchange.chosen, weights_TK.reshape(-1)
        )
        u = exchange.to_tokens(returned[:, hidden:], shared.segment_ranks_b, weights_TK)
        expand_tokens(out_TH, u, segments, experts.down_pairs)
        ctx.experts, ctx.exchange, ctx.shared = experts, exchange, shared
        ctx.save_for_backward(x_TH, x_RH, weight_R, *u, *(kept.flat() if kept else []))
        return out_TH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        exchange: _Exchange = ctx.exchange
        shared: _Shared = ctx.shared
        experts: Experts = ctx.experts
        rows, segments = exchange.rows, exchange.segments
        x_TH, x_RH, weight_R, *saved = ctx.saved_tensors
        hidden, u = x_TH.shape[1], saved[: len(segments)]
        du = expand_tokens_backward(dout_TH, u, segments, experts.down_pairs)
        dout_PH = dout_TH.index_select(0, exchange.token)
        du_PR = exchange.to_rows(du, shared.width_b, dout_TH)
        arrived = exchange.send(torch.cat([dout_PH, du_PR], dim=1))
        dout_RH, dv2_RR = arrived.split([hidden, shared.width_b], dim=1)
        dout_RH = dout_RH.contiguous()
        dx_RH, dweight_R, dv1 = dout_RH, weight_R, []
        if rows.blocks:
            by_expert_RH, dweight_R, dv1 = run_experts_backward(
                rows.source(dout_RH),
                weight_R,
                rows.source(x_RH),
                Kept.from_flat(saved[len(segments) :], rows),
                experts,
                rows,
                exchange.cut(dv2_RR, shared.block_ranks_b),
            )
            dx_RH = rows.in_blocks(by_expert_RH)
        dv1_RR = exchange.joined(dv1, shared.width_a, dx_RH)
        returned = exchange.send_back(torch.cat([dx_RH, dweight_R[:, None], dv1_RR], dim=1))
        dx_PH, dweight_P, dv1_PR = returned.split([hidden, 1, shared.width_a], dim=1)
        dx_TH = sum_over_chosen(dx_PH, exchange.inverse, exchange.chosen)
        dv1_tokens = exchange.to_tokens(dv1_PR, shared.segment_ranks_a)
        shrink_tokens_backward(dx_TH, dv1_tokens, x_TH, segments, experts.gate_up_pairs)
        dweights_TK = dweight_P[:, 0][exchange.inverse].view(-1, exchange.chosen)
        return dx_TH, dweights_TK, None, None


class _Shared:
    """The ranks of the pairs whose experts share A of gate and up, or B of down.

    By block and by segment, 0 where nothing is shared; `width_a` and `width_b`, the largest of all slots, are the same
    in every process.
    """

    def __init__(self, exchange: _Exchange, experts: Experts) -> None:
        ranks_a = [pair.rank if pair and pair.shares_a else 0 for pair in experts.gate_up_pairs]
        ranks_b = [pair.rank if pair and pair.shares_b else 0 for pair in experts.down_pairs]
        self.width_a, self.width_b = max(ranks_a, default=0), max(ranks_b, default=0)
        self.block_ranks_a, self.block_ranks_b = (
            [0 if block.slot == NO_ADAPTER else ranks[block.slot] for block in exchange.rows.blocks]
            for ranks in (ranks_a, ranks_b)
        )
        self.segment_ranks_a, self.segment_ranks_b = (
            [
                0 if segment.slot == NO_ADAPTER else ranks[segment.slot]
                for segment in exchange.segments
            ]
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
