"""The same passes without any adapter: forward, loss and backward through the frozen layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from river_kernels import NO_ADAPTER, Segment
from river_ops.bench.our_trainer import sequences_of
from river_trainer.base_model import BaseModel
from river_trainer.devices import moved
from river_trainer.lanes import Lanes
from river_trainer.packing import PackedBatch, TrainingSequence, decode_sequence, pack


class FrozenPasses:
    """Packed passes of at most `pass_tokens` tokens, of which every lane has its share."""

    def __init__(self, base: BaseModel, lanes: Lanes, *, pass_tokens: int) -> None:
        self._base = base
        self._lanes = lanes
        self._pass_tokens = pass_tokens

    def step(self, batches_NST: Sequence[torch.Tensor]) -> float:  # noqa: N803
        """Forward and backward of all batches [S, T]; the loss summed over tokens."""
        losses = self._lanes.map(self.run_pass, self.passes(self.decoded(batches_NST)))
        return sum(float(loss) for loss in losses)

    def decoded(self, batches_NST: Sequence[torch.Tensor]) -> list[TrainingSequence]:  # noqa: N803
        """The rows of all batches."""
        return [
            decode_sequence(
                sequence,
                index=index,
                vocab_size=self._base.vocab_size,
                context_length=self._base.context_length,
            )
            for batch in batches_NST
            for index, sequence in enumerate(sequences_of(batch))
        ]

    def passes(self, sequences: Sequence[TrainingSequence]) -> list[list[TrainingSequence]]:
        """Who goes together."""
        total = sum(sequence.tokens for sequence in sequences)
        tokens_max = min(self._pass_tokens, -(-total // self._lanes.count))
        passes: list[list[TrainingSequence]] = [[]]
        for sequence in sequences:
            tokens = sum(other.tokens for other in passes[-1])
            if passes[-1] and tokens + sequence.tokens > tokens_max:
                passes.append([])
            passes[-1].append(sequence)
        return passes

    def run_pass(self, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
        """Forward and backward; the loss, on the device."""
        weights_T = torch.cat([sequence.weights for sequence in sequences])  # noqa: N806
        batch, weights_T = moved((_frozen(pack([sequences])), weights_T), self._base.home.device)  # noqa: N806
        with torch.enable_grad():
            logprobs_T, _ = self._base.token_logprobs(batch, [])  # noqa: N806
            loss = -(logprobs_T * weights_T).sum()
        loss.backward()
        return loss.detach()


def _frozen(batch: PackedBatch) -> PackedBatch:
    """`batch` with nobody's tokens."""
    return replace(batch, segments=(Segment(NO_ADAPTER, 0, batch.input_ids.numel()),))
