"""How the rows of a mixture lie: pairs of a token and one of its experts, sorted by segment and in each by expert.

    rows      0 ............ 80 ............. 140 ........ 256
    block     slot 0         slot 2           NO_ADAPTER          one for each segment
    experts   0 0 1 3 3 3    0 1 1 2 3        0 2 2 3             adapters: a grouped product over a block's experts

    by expert 0 0 0 0 1 1 1 2 2 2 3 3 3 3 3 3                     frozen weights: one product over an expert's rows

Adapters want the rows of a segment together, frozen weights those of an expert. Products with frozen weights take their
rows from wherever they are, and leave them by expert.
"""

# Tensors carry their shape in capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from river_kernels.frozen import frozen_product, frozen_products, is_shareable, joined


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `start` to `end` (exclusive): those of one segment, expert by expert.

    `sizes` are the rows of each expert, and `ends` [E], int32, says where they end, counted from `start`. Where most
    experts have none, both leave out those that have none, and `experts` has the indices of the others.
    """

    slot: int
    start: int
    end: int
    sizes: list[int]
    ends: torch.Tensor
    experts: torch.Tensor | None = None

    def of_experts(self, factor_EOI: torch.Tensor) -> torch.Tensor:
        """What is there for each expert, of those that `sizes` tells of."""
        return factor_EOI if self.experts is None else factor_EOI.index_select(0, self.experts)

    def add_to(self, grad_EOI: torch.Tensor, more_EOI: torch.Tensor) -> None:
        """Adds to the gradients of those experts."""
        if self.experts is None:
            grad_EOI.add_(more_EOI)
        else:
            grad_EOI.index_add_(0, self.experts, more_EOI)


ByBlock = list[torch.Tensor | None]
"""For each block a tensor [rows, r] or, where tokens are meant, [tokens, r]; None where it has nothing."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that a product reads: those of `matrix` at `index` [P], or as they are; `by_expert` [P] sorts by expert.

    `by_expert` counts the rows of `matrix`; None if they lie by expert.
    """

    matrix: torch.Tensor
    index: torch.Tensor | None
    by_expert: torch.Tensor | None

    def rows(self) -> torch.Tensor:
        return self.matrix if self.index is None else self.matrix.index_select(0, self.index)

    def of(self, block: Block) -> torch.Tensor:
        rows = slice(block.start, block.end)
        if self.index is None:
            return self.matrix[rows]
        return self.matrix.index_select(0, self.index[rows])


@dataclass(frozen=True, slots=True)
class Rows:
    """`blocks` without a gap; `by_expert` [P] sorts rows by expert, `back` [P] undoes it.

    Both are None where rows lie by expert anyway. `sizes` are the rows of each expert.
    """

    blocks: tuple[Block, ...]
    sizes: list[int]
    by_expert: torch.Tensor | None
    back: torch.Tensor | None

    def source(self, matrix_PI: torch.Tensor) -> Source:
        """All of these rows."""
        return Source(matrix_PI, None, self.by_expert)

    def product(self, source: Source, weights_EOI: torch.Tensor) -> torch.Tensor:
        """Every row times the frozen matrix of its expert, [P, O]; by expert."""
        weights = weights_EOI.unbind()
        if is_shareable(source.matrix, weights[0]):
            return frozen_products(source.matrix, source.by_expert, weights, self.sizes)
        x_PI = source.rows()
        return joined(
            [
                frozen_product(x_PI[start : start + size], weights[expert], [size])
                for expert, start, size in sorted(self._groups())
            ]
        )

    def in_blocks(self, by_expert_PO: torch.Tensor) -> torch.Tensor:
        """Rows that lie by expert, as blocks have them."""
        return by_expert_PO if self.back is None else by_expert_PO.index_select(0, self.back)

    def of(self, by_expert_PO: torch.Tensor, block: Block) -> torch.Tensor:
        """The rows of a block, of rows that lie by expert; they may be written to."""
        if self.back is None:
            return by_expert_PO
        return by_expert_PO.index_select(0, self.back[block.start : block.end])

    def add_of(self, by_expert_PO: torch.Tensor, block: Block, more_PO: torch.Tensor) -> None:
        """Adds to the rows of a block, of rows that lie by expert."""
        if self.back is None:
            by_expert_PO.add_(more_PO)
        else:
            by_expert_PO.index_add_(0, self.back[block.start : block.end], more_PO)

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        """Expert, first row and rows of every group that has any."""
        for block in self.blocks:
            start = block.start
            indices = range(len(block.sizes)) if block.experts is None else block.experts.tolist()
            for expert, size in zip(indices, block.sizes, strict=True):
                if size:
                    yield expert, start, size
                start += size


def make_rows(slots: Sequence[int], counts_BE: torch.Tensor, expert_P: torch.Tensor) -> Rows:
    """For each block its slot and how many rows every expert has there; `expert_P` is the expert of each row."""
    counts, ends_BE = counts_BE.tolist(), counts_BE.cumsum(1, dtype=torch.int32)
    blocks: list[Block] = []
    start = 0
    for slot, sizes, ends in zip(slots, counts, ends_BE.unbind(), strict=True):
        end = start + sum(sizes)
        present = [expert for expert, size in enumerate(sizes) if size]
        if 2 * len(present) < len(sizes):
            experts = torch.tensor(present)
            kept = [sizes[expert] for expert in present]
            blocks.append(Block(slot, start, end, kept, ends[experts], experts))
        else:
            blocks.append(Block(slot, start, end, sizes, ends))
        start = end
    assert start == expert_P.numel()
    of_experts = [sum(sizes) for sizes in zip(*counts, strict=True)]
    if len(blocks) == 1:
        return Rows(tuple(blocks), of_experts, None, None)
    by_expert = torch.argsort(expert_P, stable=True)
    return Rows(tuple(blocks), of_experts, by_expert, inverted(by_expert))


def inverted(permutation: torch.Tensor) -> torch.Tensor:
    """Where each index is in `permutation`."""
    positions = torch.arange(permutation.numel())
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


def sum_over_chosen(
    y_PH: torch.Tensor, inverse: torch.Tensor, chosen: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The rows of each token, each times its weight, summed in the order of the token's choice; [T, H].

    `inverse` has the rows of the flattened (token, k), and `weights` their weights.
    """
    if weights is not None and weights.dtype is not y_PH.dtype:
        weighted_PH = y_PH.index_select(0, inverse).mul_(weights[:, None])
        return weighted_PH.view(-1, chosen, y_PH.shape[1]).sum(1)
    starts_T = torch.arange(0, inverse.numel(), chosen)
    # Gathers, weighs and adds in one pass over memory.
    return torch.embedding_bag(y_PH, inverse, starts_T, per_sample_weights=weights)[0]
