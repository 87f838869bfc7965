"""Seeded sampling on the CPU, for prompts that take more than one step.

vLLM draws a token for every row of a step, also for a prompt that is not through yet, and then throws that one away and
turns the request's generator back. It knows how to turn back a GPU's generator; a CPU's raises, and the engine is dead
for everybody. Here the state of such a generator is kept before the draw and put back after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def keep_seeds_of_unfinished_prompts() -> None:
    """Replaces how the runner of a CPU turns generators back."""
    sample = GPUModelRunner._sample  # noqa: SLF001 - what is being replaced, here and below
    bookkeep = GPUModelRunner._bookkeeping_sync  # noqa: SLF001

    def sample_and_turn_back(self: GPUModelRunner, *args: Any, **options: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in _unfinished(self)]
        output = sample(self, *args, **options)
        for generator, state in states:
            generator.set_state(state)
        return output

    def bookkeep_without_generators(self: GPUModelRunner, *args: Any, **options: Any) -> Any:
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return bookkeep(self, *args, **options)
        finally:
            self.input_batch.generators = generators

    GPUModelRunner._sample = sample_and_turn_back  # noqa: SLF001
    GPUModelRunner._bookkeeping_sync = bookkeep_without_generators  # noqa: SLF001


def _unfinished(runner: GPUModelRunner) -> list[torch.Generator]:
    """The generators of seeded requests whose token of this step will be thrown away."""
    generators = runner.input_batch.generators
    if not generators:
        return []
    thrown_away = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
    return [generators[row] for row in thrown_away.tolist() if row in generators]
