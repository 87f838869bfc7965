"""Training data and operations for tests of the trainer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from river_trainer.protocol import (
    Adam,
    AdapterShape,
    AnyTask,
    CreateRun,
    ExpertLayout,
    ForwardBackward,
    OptimStep,
    Sequence,
    TrainMessage,
)

BASE_NAME = "river/tiny-moe"
VOCAB_SIZE = 512
ADAM = Adam(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0)


def shape(
    *,
    rank: int = 8,
    seed: int = 1,
    unembed: bool = True,
    expert_layout: ExpertLayout = "shared_outer",
) -> AdapterShape:
    return AdapterShape(
        rank=rank,
        alpha=32.0,
        seed=seed,
        train_attn=True,
        train_mlp=True,
        train_unembed=unembed,
        expert_layout=expert_layout,
    )


def random_sequences(seed: int, lengths: list[int]) -> list[Sequence]:
    """Sequences with every field: random tokens, weights, old log-probabilities and advantages."""
    source = random.Random(seed)
    return [
        Sequence(
            input_ids=integers([source.randrange(VOCAB_SIZE) for _ in range(length)]),
            weights=floats([source.random() for _ in range(length)]),
            old_logprobs=floats([-8 * source.random() for _ in range(length)]),
            advantages=floats([source.uniform(-1, 1) for _ in range(length)]),
        )
        for length in lengths
    ]


def integers(values: list[int]) -> bytes:
    return np.array(values, dtype="<i4").tobytes()


def floats(values: list[float]) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def forward_backward(
    seed: int, lengths: list[int], loss_fn: str = "cross_entropy"
) -> ForwardBackward:
    return ForwardBackward(data=random_sequences(seed, lengths), loss_fn=loss_fn, loss_config={})


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without how long it took."""
    return {name: value for name, value in metrics.items() if name != "milliseconds"}


@dataclass(slots=True)
class RunScript:
    """Numbers the operations of one run."""

    run_id: str
    base_model: str = BASE_NAME
    tenant_id: str = "ten_test"
    next_seq: int = 0
    messages: list[TrainMessage] = field(default_factory=list)

    def do(self, task: AnyTask) -> TrainMessage:
        message = TrainMessage(
            run_id=self.run_id,
            seq=self.next_seq,
            tenant_id=self.tenant_id,
            key_id="key_test",
            session_id="ses_test",
            base_model=self.base_model,
            submitted_at=1_800_000_000.0 + self.next_seq,
            task=task,
        )
        self.next_seq += 1
        self.messages.append(message)
        return message


def training_script(
    run_id: str, *, steps: int, base_model: str = BASE_NAME, rank: int = 8
) -> RunScript:
    """Creates a run and lets it learn the same few sequences for `steps` optimizer steps."""
    script = RunScript(run_id, base_model)
    script.do(CreateRun(shape=shape(rank=rank)))
    for _ in range(steps):
        script.do(forward_backward(5, [12, 20]))
        script.do(forward_backward(6, [9]))
        script.do(OptimStep(adam=ADAM))
    return script
