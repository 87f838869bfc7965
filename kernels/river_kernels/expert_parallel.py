"""`moe_lora` with the experts divided among the processes of a group.

Process r of W holds the experts r E/W to (r + 1) E/W. Every pair (token, chosen expert) goes to the process that has
the expert, with the slot of its adapter, and its result comes back:

    x [T, H] --gather, sorted by (process, segment, expert)--> [P, H] ==all_to_all==> [R, H] --experts--> [R, H]
        ==all_to_all==> [P, H] --weigh, sum over k--> [T, H]

Backward goes the same way. The rows that arrive are ordered by (process they come from, segment, expert), and each such
group is computed by itself, as `moe_lora` does it: results and gradients have the same bits as in one process, as long
as rows fill whole vector registers (a matrix library may round a row differently that begins at an odd address).

Slots are those of the whole group of processes: every process has the pairs of every slot, and only segments of its own
tokens. An expert's A and B get their gradients where the expert is, from the tokens of all processes, and nowhere else.
All processes must call this, and run backward through it, in the same order; a process may have no rows for an expert.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from river_kernels.moe import (
    Group,
    Grouped,
    Kept,
    check_experts,
    run_experts,
    run_experts_backward,
    sum_over_chosen,
)
from river_kernels.segments import NO_ADAPTER, LoraPair, Pairs, Segments


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Where the rows of this process go: `sent[r]` of them to process r, from which `received[r]` come.

    `permutation` [P] sorts the flattened (token, k) pairs by process, segment and expert, `inverse` undoes it; `token`
    of each row. `grouped` says what arrives, with experts numbered from this process's first.
    """

    process_group: dist.ProcessGroup
    permutation: torch.Tensor
    inverse: torch.Tensor
    token: torch.Tensor
    sent: list[int]
    received: list[int]
    grouped: Grouped

    def send(self, rows_P: torch.Tensor) -> torch.Tensor:
        """Rows to the processes of their experts; what arrives here, [R, …]."""
        return _exchange(rows_P, self.sent, self.received, self.process_group)

    def send_back(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Rows back to where they came from; those of this process, [P, …]."""
        return _exchange(rows_R, self.received, self.sent, self.process_group)


def moe_lora_parallel(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
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
    permutation = torch.argsort(
        (owner_P * len(segments) + segment_P) * own + expert_P % own, stable=True
    )
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
        gate_up: torch.Tensor,
        down: torch.Tensor,
        exchange: _Exchange,
        gate_up_pairs: Pairs,
        down_pairs: Pairs,
    ) -> torch.Tensor:
        weight_P = weights_TK.reshape(-1)[exchange.permutation]
        x_PH = x_TH.index_select(0, exchange.token)
        # The router's weights are needed there by the backward pass.
        arrived = exchange.send(torch.cat([x_PH, weight_P[:, None].to(x_PH.dtype)], dim=1))
        x_RH, weight_R = arrived[:, :-1].contiguous(), arrived[:, -1].contiguous()
        kept: Kept = []
        y_RH = x_RH
        if exchange.grouped.groups:
            y_RH, kept = run_experts(
                x_RH, gate_up, down, exchange.grouped, gate_up_pairs, down_pairs
            )
        ctx.weights, ctx.pairs = (gate_up, down), (gate_up_pairs, down_pairs)
        ctx.exchange = exchange
        ctx.save_for_backward(weight_R, *kept)
        y_PH = exchange.send_back(y_RH)
        y_PH.mul_(weight_P[:, None])
        return sum_over_chosen(y_PH, exchange.inverse, weights_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (dout_TH,) = grads
        exchange: _Exchange = ctx.exchange
        weight_R, *kept = ctx.saved_tensors
        dout_RH = exchange.send(dout_TH.index_select(0, exchange.token))
        dx_RH, dweight_R = dout_RH, weight_R
        if exchange.grouped.groups:
            gate_up, down = ctx.weights
            grouped, (gate_up_pairs, down_pairs) = exchange.grouped, ctx.pairs
            dx_RH, dweight_R = run_experts_backward(
                dout_RH, weight_R, kept, gate_up, down, grouped, gate_up_pairs, down_pairs
            )
        returned = exchange.send_back(torch.cat([dx_RH, dweight_R[:, None]], dim=1))
        chosen = exchange.permutation.numel() // dout_TH.shape[0]
        dx_TH = sum_over_chosen(returned[:, :-1], exchange.inverse, chosen)
        dweights_TK = returned[:, -1][exchange.inverse].view(-1, chosen)
        return dx_TH, dweights_TK, None, None, None, None, None


def _of_experts(pair: LoraPair | None, first: int, end: int) -> LoraPair | None:
    """The part of a pair that belongs to the experts `first` to `end` (exclusive); views."""
    if pair is None:
        return None
    a, b = pair.a[first:end], pair.b[first:end]
    if pair.a_grad is None or pair.b_grad is None:
        return LoraPair(a, b, pair.scale)
    return LoraPair(a, b, pair.scale, pair.a_grad[first:end], pair.b_grad[first:end])
