"""Operations on data as jobs: everything about them checked once more."""

from __future__ import annotations

from river_trainer.adapter import Adapter
from river_trainer.base_model import BaseModel
from river_trainer.errors import InvalidTaskError
from river_trainer.losses import check_data, find_loss
from river_trainer.packing import decode_sequence
from river_trainer.protocol import ComputeTask, Forward
from river_trainer.strands import Job


def make_job(task: ComputeTask, adapter: Adapter, base: BaseModel, *, context_length: int) -> Job:
    """The job of a forward, a forward_backward or the first half of a train_step.

    Raises:
        InvalidTaskError: the gateway let something through that does not fit.
    """
    loss = find_loss(task.loss_fn, task.loss_config)
    if not task.data:
        raise InvalidTaskError("there is no data", param="data")
    sequences = [
        decode_sequence(
            sequence,
            index=index,
            vocab_size=base.vocab_size,
            context_length=context_length,
            routed_experts=base.routed_experts,
        )
        for index, sequence in enumerate(task.data)
    ]
    check_data(loss, sequences)
    for index, sequence in enumerate(sequences):
        if task.force_routing_replay and sequence.expert_routing is None:
            raise InvalidTaskError(
                "force_routing_replay needs it", param=f"data[{index}].expert_routing"
            )
    return Job(
        adapter,
        sequences,
        loss,
        backward=not isinstance(task, Forward),
        replay=task.force_routing_replay,
        task=task,
    )
