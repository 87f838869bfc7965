"""Calls of the public functions that start every kernel in every configuration, on tensors without storage.

Sizes are those of Qwen3.6-35B-A3B in bfloat16, and of a tiny model in float32. What is in a batch varies over all that
kernels choose by: how many tokens and adapters there are, and of which ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product

import torch

from river_kernels.adam import AdamRule, AdamUpdate, multi_adam
from river_kernels.gpu.adam import norms
from river_kernels.gpu.augmented import PAD_MAX, augmented
from river_kernels.gpu.launch import Launch, recorded
from river_kernels.linear import Block, lora_linear_blocks
from river_kernels.logprobs import lora_logprobs
from river_kernels.moe import moe_lora
from river_kernels.quantized import (
    Fp8Weight,
    Nvfp4Weight,
    QuantizedWeight,
    Scratch,
    StoredWeight,
    dense_weight,
)
from river_kernels.segments import NO_ADAPTER, LoraPair, Segment, Segments

META = torch.device("meta")
WIDTH, EXPERT_WIDTH, EXPERTS, CHOSEN = 2048, 512, 256, 8
HEADS_WIDTH, KEYS_WIDTH, VOCABULARY = 4096, 512, 248320
TINY_WIDTH, TINY_VOCABULARY = 192, 512

TARGETS = (1, 8)
TOKENS = (512, 8192, 32768)
ADAPTERS = (1, 4, 16, 64)
RANKS = ((1,), (3,), (8,), (16,), (32,), (64,), (128,), (8, 16, 32), (1, 3, 8, 16, 32, 64, 128))


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` divided evenly between adapters of `ranks`, by slot, and those without one; what they compute in."""

    tokens: int
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def segments(self) -> Segments:
        slots = [*range(len(self.ranks)), NO_ADAPTER]
        bounds = [index * self.tokens // len(slots) for index in range(len(slots) + 1)]
        return tuple(map(Segment, slots, bounds, bounds[1:]))

    def pairs(self, inputs: int, outputs: int) -> list[LoraPair]:
        """The adapters of a dense layer."""
        return [self._pair((rank, inputs), (outputs, rank)) for rank in self.ranks]

    def expert_pairs(
        self, inputs: int, outputs: int, *, shares_a: bool, shares_b: bool
    ) -> list[LoraPair]:
        """The adapters of a mixture."""
        of_a, of_b = (1 if shared else EXPERTS for shared in (shares_a, shares_b))
        pairs = [self._pair((of_a, rank, inputs), (of_b, outputs, rank)) for rank in self.ranks]
        return [replace(pair, shares_a=shares_a, shares_b=shares_b) for pair in pairs]

    def _pair(self, a_shape: Sequence[int], b_shape: Sequence[int]) -> LoraPair:
        a, b = (_empty(*shape, dtype=self.dtype) for shape in (a_shape, b_shape))
        a_grad, b_grad = (_empty(*shape, dtype=torch.float32) for shape in (a_shape, b_shape))
        return LoraPair(a, b, 2.0, a_grad, b_grad)


def batches() -> Iterator[Batch]:
    """Those of the large model."""
    for tokens, adapters, ranks in product(TOKENS, ADAPTERS, RANKS):
        mixed = tuple(ranks[slot % len(ranks)] for slot in range(adapters))
        yield Batch(tokens, mixed, torch.bfloat16)


TINY = Batch(64, (4, 3), torch.float32)


def all_launches() -> list[Launch]:
    """Every launch of all workloads."""
    launches: list[Launch] = []
    with recorded(launches.append):
        _stored_weights()
        _optimizer()
        for batch in batches():
            _attention(batch, WIDTH)
            _head(batch, WIDTH, VOCABULARY)
        for batch in (*batches(), TINY):
            _experts(batch, shared=True)
            _experts(batch, shared=False)
        _attention(TINY, TINY_WIDTH)
        _head(TINY, TINY_WIDTH, TINY_VOCABULARY)
    return launches


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _fp8(rows: int, columns: int, block: tuple[int, int], scales: torch.dtype) -> StoredWeight:
    blocks = -(-rows // block[0]), -(-columns // block[1])
    values = _empty(EXPERTS, rows, columns, dtype=torch.float8_e4m3fn)
    return Fp8Weight(values, _empty(EXPERTS, *blocks, dtype=scales), block)


def _nvfp4(rows: int, columns: int) -> StoredWeight:
    return Nvfp4Weight(
        _empty(EXPERTS, rows, columns // 2, dtype=torch.uint8),
        _empty(EXPERTS, rows, columns // 16, dtype=torch.float8_e4m3fn),
        _empty(EXPERTS, dtype=torch.float32),
    )


def _stored_weights() -> None:
    for rows, columns in ((EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)):
        stored = [
            _fp8(rows, columns, (128, 128), torch.float32),
            _fp8(rows, columns, (128, 128), torch.bfloat16),
            _fp8(rows, columns, (1, 128), torch.float32),
            _nvfp4(rows, columns),
        ]
        for weight in stored:
            for dtype in (torch.bfloat16, torch.float32):
                dense_weight(QuantizedWeight((weight,), dtype, Scratch()))


def _optimizer() -> None:
    rule = AdamRule(lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    for copy_dtype in (torch.bfloat16, None):
        updates = [
            AdamUpdate(
                *(_empty(size, dtype=torch.float32) for _ in range(4)),
                step=3,
                rule=rule,
                copy=None if copy_dtype is None else _empty(size, dtype=copy_dtype),
            )
            for size in (40_000_000, 100, 65_537)
        ]
        multi_adam(updates)
        multi_adam(updates[:1])
        norms([update.gradient for update in updates])


def _attention(batch: Batch, width: int) -> None:
    """Queries, keys and values as one matrix, and what comes after them; with and without room behind the weights."""
    for inputs, outputs in (
        (width, (HEADS_WIDTH, KEYS_WIDTH, KEYS_WIDTH)),
        (HEADS_WIDTH, (width,)),
    ):
        ends = list(accumulate(outputs, initial=0))
        blocks = [
            Block(batch.pairs(inputs, end - start), start, end) for start, end in pairwise(ends)
        ]
        weight = _empty(ends[-1], inputs, dtype=batch.dtype)
        for weights in (weight, augmented(weight, PAD_MAX)):
            x = _empty(batch.tokens, inputs, dtype=batch.dtype).requires_grad_()
            y = lora_linear_blocks(x, weights, batch.segments, blocks)
            y.backward(torch.empty_like(y))


def _head(batch: Batch, width: int, vocabulary: int) -> None:
    """Log-probabilities of one target and of several; with and without room behind the weights."""
    weight = _empty(vocabulary, width, dtype=batch.dtype)
    for weights, targets in product((weight, augmented(weight, PAD_MAX)), TARGETS):
        hidden = _empty(batch.tokens, width, dtype=batch.dtype).requires_grad_()
        chosen = _empty(batch.tokens, targets, dtype=torch.int64)
        pairs = batch.pairs(width, vocabulary)
        logprobs, _ = lora_logprobs(hidden, weights, chosen, batch.segments, pairs)
        logprobs.backward(torch.empty_like(logprobs))


def _experts(batch: Batch, *, shared: bool) -> None:
    """A mixture, in the layout whose factors of the model's width are shared, or in that of one for each expert."""
    out = moe_lora(
        _empty(batch.tokens, WIDTH, dtype=batch.dtype).requires_grad_(),
        _empty(batch.tokens, CHOSEN, dtype=torch.int64),
        _empty(batch.tokens, CHOSEN, dtype=batch.dtype).requires_grad_(),
        _empty(EXPERTS, 2 * EXPERT_WIDTH, WIDTH, dtype=batch.dtype),
        _empty(EXPERTS, WIDTH, EXPERT_WIDTH, dtype=batch.dtype),
        batch.segments,
        batch.expert_pairs(WIDTH, 2 * EXPERT_WIDTH, shares_a=shared, shares_b=False),
        batch.expert_pairs(EXPERT_WIDTH, WIDTH, shares_a=False, shares_b=shared),
    )
    out.backward(torch.empty_like(out))
