"""The operations of a run, each submitted without waiting for what it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from river_client import wire
from river_client.arrays import DatumLike, pack_data
from river_client.async_resources import ttl_seconds
from river_client.pending import AsyncPendingOp
from river_client.results import TrainingResult, saved_checkpoint, training_result
from river_client.submissions import Submissions
from river_client.transport import Transport

Result = TypeVar("Result")


class AsyncOperations:
    """What can be asked of a run. Every `submit_…` returns once its operation is stored for good.

    `expected_policy`, such as `model.policy_version`, makes an operation fail with the type `conflict`, and change
    nothing, should the run be at another version when its turn comes.
    """

    def __init__(self, transport: Transport, run: wire.Run) -> None:
        self.run_id = run.run_id
        self._transport = transport
        self._submissions = Submissions(transport, run)

    @property
    def policy_version(self) -> str:
        """The newest version that an answered operation has made."""
        return f"{self.run_id}@{self._submissions.step}"

    async def submit_forward(
        self,
        data: Sequence[DatumLike],
        *,
        loss_fn: wire.LossName = "cross_entropy",
        force_routing_replay: bool = False,
        expected_policy: str | None = None,
        **config: float,
    ) -> AsyncPendingOp[TrainingResult]:
        """`forward`, without waiting."""
        operation = wire.Forward(
            data=pack_data(data),
            loss_fn=loss_fn,
            loss_config=config,
            force_routing_replay=force_routing_replay,
            expected_policy=expected_policy,
        )
        return await self._submit(operation, training_result)

    async def submit_forward_backward(
        self,
        data: Sequence[DatumLike],
        *,
        loss_fn: wire.LossName = "cross_entropy",
        force_routing_replay: bool = False,
        zero_gradients: bool = False,
        expected_policy: str | None = None,
        **config: float,
    ) -> AsyncPendingOp[TrainingResult]:
        """`forward_backward`, without waiting."""
        operation = wire.ForwardBackward(
            data=pack_data(data),
            loss_fn=loss_fn,
            loss_config=config,
            force_routing_replay=force_routing_replay,
            zero_gradients=zero_gradients,
            expected_policy=expected_policy,
        )
        return await self._submit(operation, training_result)

    async def submit_optim_step(
        self,
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        gradient_scale: float = 1.0,
        expected_policy: str | None = None,
    ) -> AsyncPendingOp[TrainingResult]:
        """`optim_step`, without waiting."""
        adam = wire.AdamParams(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
            gradient_scale=gradient_scale,
        )
        return await self._submit(
            wire.OptimStep(adam=adam, expected_policy=expected_policy), training_result
        )

    async def submit_train_step(
        self,
        data: Sequence[DatumLike],
        *,
        loss_fn: wire.LossName = "cross_entropy",
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        gradient_scale: float = 1.0,
        force_routing_replay: bool = False,
        zero_gradients: bool = False,
        expected_policy: str | None = None,
        **config: float,
    ) -> AsyncPendingOp[TrainingResult]:
        """`train_step`, without waiting."""
        adam = wire.AdamParams(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
            gradient_scale=gradient_scale,
        )
        operation = wire.TrainStep(
            data=pack_data(data),
            adam=adam,
            loss_fn=loss_fn,
            loss_config=config,
            force_routing_replay=force_routing_replay,
            zero_gradients=zero_gradients,
            expected_policy=expected_policy,
        )
        return await self._submit(operation, training_result)

    async def submit_batch(
        self,
        data: Sequence[DatumLike],
        *,
        loss_fn: wire.LossName = "cross_entropy",
        lr: float,
        force_routing_replay: bool = False,
        zero_gradients: bool = False,
        expected_policy: str | None = None,
        **config: float,
    ) -> AsyncPendingOp[TrainingResult]:
        """Continual training: returns once the batch is stored for good; the live version moves when it is applied."""
        return await self.submit_train_step(
            data,
            loss_fn=loss_fn,
            lr=lr,
            force_routing_replay=force_routing_replay,
            zero_gradients=zero_gradients,
            expected_policy=expected_policy,
            **config,
        )

    async def submit_save_weights(
        self,
        name: str,
        mode: wire.SaveMode = "training",
        *,
        ttl: float | timedelta | None = None,
        overwrite: bool = True,
        user_metadata: dict[str, str] | None = None,
        age_recipients: Sequence[str] = (),
        expected_policy: str | None = None,
    ) -> AsyncPendingOp[wire.Checkpoint]:
        """`save_weights`, without waiting."""
        operation = wire.SaveWeights(
            name=name,
            mode=mode,
            ttl_s=None if ttl is None else ttl_seconds(ttl),
            overwrite=overwrite,
            user_metadata=user_metadata or {},
            age_recipients=list(age_recipients),
            expected_policy=expected_policy,
        )
        return await self._submit(operation, saved_checkpoint)

    async def submit_load_weights(
        self, path: str, *, optimizer: bool = True, expected_policy: str | None = None
    ) -> AsyncPendingOp[TrainingResult]:
        """`load_weights`, without waiting."""
        return await self._submit(
            wire.LoadWeights(path=path, optimizer=optimizer, expected_policy=expected_policy),
            training_result,
        )

    async def submit_unload(
        self, *, expected_policy: str | None = None
    ) -> AsyncPendingOp[TrainingResult]:
        """`unload`, without waiting."""
        return await self._submit(wire.Unload(expected_policy=expected_policy), training_result)

    async def _submit(
        self, operation: wire.AnyOperation, convert: Callable[[wire.OperationResult], Result]
    ) -> AsyncPendingOp[Result]:
        return await self._submissions.submit(operation, convert)
