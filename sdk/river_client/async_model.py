"""A model in training, and its operations."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Literal, SupportsFloat, Unpack

from river_client import feedback_wire, limits, wire
from river_client.arrays import DatumLike
from river_client.async_aliases import AsyncAliases
from river_client.async_feedback import teaches
from river_client.async_learning import AsyncLearning, AsyncLocalLearning
from river_client.async_operations import AsyncOperations
from river_client.custom_loss import CustomLoss, bare_data, custom_metrics, weighted_data
from river_client.learning_wire import Baseline, LearningLoss, StartLearning
from river_client.logged_samples import log_request
from river_client.progress import waiting
from river_client.results import (
    Sample,
    SampleOptions,
    TrainingResult,
    sample_groups,
    sample_request,
)
from river_client.samples_wire import SamplesLogged
from river_client.transport import Transport


class AsyncModel(AsyncOperations):
    """One adapter in training. Calls may come from many tasks; they are carried out in the order made."""

    def __init__(self, transport: Transport, run: wire.Run) -> None:
        super().__init__(transport, run)
        self.base_model = run.base_model
        self.lora = run.lora

    @property
    def path(self) -> str:
        """What to call the model's live version by, in `sample`, in chat and in the OpenAI API."""
        return f"river://{self.run_id}"

    # ---- Training ----------------------------------------------------------------------------

    async def forward(
        self,
        data: Sequence[DatumLike],
        *,
        loss_fn: wire.LossName = "cross_entropy",
        force_routing_replay: bool = False,
        expected_policy: str | None = None,
        **config: float,
    ) -> TrainingResult:
        """Loss and log-probabilities of `data`, without gradients; arguments as in `forward_backward`."""
        pending = await self.submit_forward(
            data,
            loss_fn=loss_fn,
            force_routing_replay=force_routing_replay,
            expected_policy=expected_policy,
            **config,
        )
        return await pending.result()

    async def forward_backward(
        self,
        data: Sequence[DatumLike],
        *,
        loss_fn: wire.LossName = "cross_entropy",
        force_routing_replay: bool = False,
        zero_gradients: bool = False,
        expected_policy: str | None = None,
        **config: float,
    ) -> TrainingResult:
        """Adds the gradients of the loss, summed over tokens, to those waiting for the next `optim_step`.

        `config` holds the loss's own settings. A sequence is a dict of `input_ids` and what the loss needs, aligned to
        the prediction position: index i is the prediction made from position i, the last index is ignored.

        Data that carry a sample's `expert_routing` get the metric `expert_flip`, the share of (token, layer) for which
        the gate chose other experts here than in the sampler. With `force_routing_replay` they go to the sampler's
        experts all the same. `zero_gradients` drops what was gathered before. For `expected_policy` see
        `AsyncOperations`.

        Raises:
            InvalidRequestError: names the field and index; nothing was done.
        """
        pending = await self.submit_forward_backward(
            data,
            loss_fn=loss_fn,
            force_routing_replay=force_routing_replay,
            zero_gradients=zero_gradients,
            expected_policy=expected_policy,
            **config,
        )
        return await pending.result()

    async def forward_backward_custom(
        self,
        data: Sequence[DatumLike],
        fn: CustomLoss,
        *,
        force_routing_replay: bool = False,
        zero_gradients: bool = False,
        expected_policy: str | None = None,
    ) -> TrainingResult:
        """`forward_backward` with a loss of your own, which is computed here, in a thread (`custom_loss`).

        `fn(logprobs, data)` returns the loss, its gradients by the log-probabilities, one array per sequence, and
        metrics; `torch_loss` makes one of a function over torch tensors. A sequence may hold fields for `fn` alone. The
        log-probabilities are those of the model when this is called: an `optim_step` from elsewhere in the meantime
        would make the gradients those of an older version. `fn` has to be waited for, so there is no `submit_` of it.

        Raises:
            InvalidRequestError: names the field and index; no gradient was added.
        """
        bare = bare_data(data)
        forward = await self.forward(
            bare, force_routing_replay=force_routing_replay, expected_policy=expected_policy
        )
        loss, gradients, metrics = await asyncio.to_thread(fn, list(forward.logprobs), data)
        weighted = weighted_data(bare, forward.logprobs, gradients)
        backward = await self.forward_backward(
            weighted,
            force_routing_replay=force_routing_replay,
            zero_gradients=zero_gradients,
            expected_policy=expected_policy,
        )
        return dataclasses.replace(
            backward,
            metrics=custom_metrics(backward.metrics, loss, metrics),
            training_tokens=forward.training_tokens + backward.training_tokens,
        )

    async def optim_step(
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
    ) -> TrainingResult:
        """One AdamW step with the gradients gathered so far; makes the next policy version.

        They are multiplied by `gradient_scale`, then clipped to `grad_clip_norm` if it is there and not 0.
        """
        pending = await self.submit_optim_step(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
            gradient_scale=gradient_scale,
            expected_policy=expected_policy,
        )
        return await pending.result()

    async def train_step(
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
    ) -> TrainingResult:
        """`forward_backward` and `optim_step` as one: both happen or neither."""
        pending = await self.submit_train_step(
            data,
            loss_fn=loss_fn,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
            gradient_scale=gradient_scale,
            force_routing_replay=force_routing_replay,
            zero_gradients=zero_gradients,
            expected_policy=expected_policy,
            **config,
        )
        return await pending.result()

    # ---- Weights, metrics, samples -----------------------------------------------------------

    async def save_weights(
        self,
        name: str,
        mode: wire.SaveMode = "training",
        *,
        ttl: float | timedelta | None = None,
        overwrite: bool = True,
        user_metadata: dict[str, str] | None = None,
        age_recipients: Sequence[str] = (),
        expected_policy: str | None = None,
    ) -> wire.Checkpoint:
        """Stores the weights under a name, replacing what had it; `ttl` (seconds) is how long to keep them.

        `training` keeps the optimizer too, `inference` only what is needed to serve. `external` is for use elsewhere:
        its files may be encrypted for `age_recipients` (X25519, `age1…`), and `checkpoints.signed_urls` hands them out.
        `user_metadata` is kept with it.

        Raises:
            InvalidRequestError: a field is wrong, or the name is taken and `overwrite` false.
        """
        pending = await self.submit_save_weights(
            name,
            mode,
            ttl=ttl,
            overwrite=overwrite,
            user_metadata=user_metadata,
            age_recipients=age_recipients,
            expected_policy=expected_policy,
        )
        return await pending.result()

    async def load_weights(
        self, path: str, *, optimizer: bool = True, expected_policy: str | None = None
    ) -> TrainingResult:
        """Puts a checkpoint's weights, and its optimizer state unless told otherwise, in place of the model's own."""
        pending = await self.submit_load_weights(
            path, optimizer=optimizer, expected_policy=expected_policy
        )
        return await pending.result()

    async def unload(self, *, expected_policy: str | None = None) -> TrainingResult:
        """Lets the trainer forget the model once it is stored; what is asked of it later brings it back as it was."""
        pending = await self.submit_unload(expected_policy=expected_policy)
        return await pending.result()

    async def log(self, metrics: Mapping[str, SupportsFloat], *, step: int | None = None) -> None:
        """Keeps metrics of your own with the run; `step` absent means the current one."""
        body = wire.LogMetrics(
            metrics={name: float(value) for name, value in metrics.items()}, step=step
        )
        await self._transport.tell("POST", f"/runs/{self.run_id}/metrics", body=body)

    async def log_samples(
        self,
        prompts: Sequence[str],
        samples: Sequence[Sequence[Sample | str]],
        rewards: Sequence[Sequence[SupportsFloat]] | None = None,
        *,
        step: int | None = None,
    ) -> SamplesLogged:
        """Keeps samples with the run, to be read on its page: a list of completions, and of rewards, for each prompt.

        `step` absent means the one of the version that drew them. Too many or too long ones are dropped or cut, and the
        oldest of the run make room: the answer counts them.

        Raises:
            InvalidRequestError: there are not as many of one as of the other, or a reward is not finite.
        """
        body = log_request(
            prompts, samples, rewards, step=step, current_step=self._submissions.step
        )
        path = f"/runs/{self.run_id}/samples"
        return await self._transport.call("POST", path, SamplesLogged, body=body)

    async def sample(
        self, prompts: str | Sequence[str] | None = None, **options: Unpack[SampleOptions]
    ) -> list[list[Sample]]:
        """Samples of the model's live version: a list per prompt. The options are those of `SampleOptions`."""
        return await draw_samples(self._transport, self.path, prompts, options)

    # ---- Learning from feedback --------------------------------------------------------------

    async def learn_from(
        self,
        alias: str,
        *,
        lr: float,
        loss_fn: LearningLoss = "importance_sampling",
        min_batch: int = 32,
        max_batch: int = 256,
        baseline: Baseline = "prompt",
        publish: Literal["live", "none"] = "live",
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip_norm: float | None = None,
        **config: float,
    ) -> AsyncLearning:
        """Tells the server to train on the feedback on an alias as it comes, until it is stopped.

        Completions are served, judged, trained on and served anew: from now on the alias follows this model's live
        version, unless `publish` is "none"; `client.aliases.rollback` brings back what it was before. It goes on when
        this process has ended. Each batch is one step, with the log-probabilities that the completions were sampled
        with. Nobody else can train the model meanwhile: operations raise `InvalidRequestError`.

        Raises:
            InvalidRequestError: a setting is wrong, or the model is learning something else already.
        """
        adam = wire.AdamParams(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
        )
        settings = StartLearning(
            alias=alias,
            adam=adam,
            loss_fn=loss_fn,
            loss_config=config,
            min_batch=min_batch,
            max_batch=max(min_batch, max_batch),
            baseline=baseline,
            publish=publish,
        )
        return await self._submissions.leave_to_server(settings)

    async def learn_locally(
        self,
        alias: str,
        *,
        lr: float,
        loss_fn: wire.LossName | CustomLoss = "importance_sampling",
        prepare: Callable[[feedback_wire.FeedbackBatch], Sequence[DatumLike]] | None = None,
        min_batch: int = 32,
        max_batch: int = 256,
        baseline: Baseline = "prompt",
        publish: Literal["live", "none"] = "live",
        force_routing_replay: bool = False,
        **config: float,
    ) -> AsyncLocalLearning:
        """`learn_from` in a loop of this process, for a loss of your own or data that you make of the feedback.

        `loss_fn` may be a function as in `forward_backward_custom`; `prepare` makes the training data of a batch, in
        place of its `data`. The loop ends with the process, or with an `error`, such as that the server has been told
        to train the model; the completions of a batch that was not applied are handed out again.
        """
        if publish == "live":
            await AsyncAliases(self._transport).set(alias, self.path)
        asked = feedback_wire.ClaimFeedback(
            model=alias,
            consumer=self.run_id,
            min_batch=min_batch,
            max_batch=max(min_batch, max_batch),
            base_model=self.base_model,
            baseline=baseline,
        )

        async def train(batch: feedback_wire.FeedbackBatch) -> bool:
            if prepare is None and not any(teaches(datum) for datum in batch.data):
                return False
            data: Sequence[DatumLike] = batch.data if prepare is None else prepare(batch)
            if callable(loss_fn):
                await self.forward_backward_custom(
                    data, loss_fn, force_routing_replay=force_routing_replay
                )
                await self.optim_step(lr=lr)
            else:
                await self.train_step(
                    data,
                    loss_fn=loss_fn,
                    lr=lr,
                    force_routing_replay=force_routing_replay,
                    zero_gradients=False,
                    expected_policy=None,
                    **config,
                )
            return True

        loop = AsyncLocalLearning(alias)
        loop.begin(self._transport, asked, train)
        return loop


async def draw_samples(
    transport: Transport,
    model: str,
    prompts: str | Sequence[str] | None,
    options: SampleOptions,
) -> list[list[Sample]]:
    """A list of samples per prompt, of any model."""
    request = sample_request(model, prompts, options)
    async with waiting("sampling"):
        response = await transport.call(
            "POST",
            "/sample",
            wire.SampleResponse,
            body=request,
            timeout_s=limits.GENERATION_TIMEOUT_S,
        )
    return sample_groups(response)
