"""Uses every public method of the service, training and sampling clients of the `tinker` SDK; prints what came of it.

Runs in a folder where the base model's name is a folder with its tokenizer. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import warnings
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types
from tinker.lib.api_future_impl import QueueState

warnings.simplefilter("ignore")  # Half of the methods are deprecated, and are to work all the same.

BASE = os.environ["BASE_MODEL"]
ADAM = types.AdamParams(learning_rate=1e-2)
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0)


class Recorded:
    """A client, and the names of its methods that were called."""

    def __init__(self, client: Any, called: set[str]) -> None:
        self._client = client
        self._called = called

    def __getattr__(self, name: str) -> Any:
        self._called.add(name)
        return getattr(self._client, name)


CALLED: dict[type, set[str]] = {
    tinker.ServiceClient: set(),
    tinker.TrainingClient: set(),
    tinker.SamplingClient: set(),
}


def recorded(client: Any) -> Any:
    return Recorded(client, CALLED[type(client)])


def missed() -> dict[str, list[str]]:
    """Public methods that were not called."""
    return {
        kind.__name__: sorted(
            name for name in dir(kind) if not name.startswith("_") and name not in called
        )
        for kind, called in CALLED.items()
    }


def datum(tokens: list[int], weights: list[float] | None = None) -> types.Datum:
    """Every token of a text but the first, to be predicted from those before it."""
    inputs: dict[str, Any] = {"target_tokens": tokens[1:]}
    inputs["weights"] = weights if weights is not None else [1.0] * (len(tokens) - 1)
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def losses_of(outputs: types.ForwardBackwardOutput) -> list[list[float]]:
    return [output["logprobs"].tolist() for output in outputs.loss_fn_outputs]


# ---- Training --------------------------------------------------------------------------------------------------------


def train(training: Any, texts: list[list[int]]) -> dict[str, Any]:
    """Supervised steps, each submitted whole before its result is waited for."""
    data = [datum(tokens) for tokens in texts]
    before = training.forward(data, "cross_entropy").result()
    losses: list[float] = []
    for _ in range(4):
        computed = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(ADAM)
        losses.append(computed.result().metrics["loss:sum"])
        assert stepped.result().metrics["grad_norm"] > 0
    return {
        "losses": losses,
        "forward_loss": before.metrics["loss:sum"],
        "forward_logprobs": losses_of(before),
        "logprob_lengths": [len(row) for row in losses_of(before)],
        "input_lengths": [item.model_input.length for item in data],
    }


def train_by_a_loss_of_ones_own(
    service: Any, training: Any, texts: list[list[int]]
) -> dict[str, Any]:
    """A loss that the client differentiates itself must give the gradients of the same loss on the server."""
    data = [datum(tokens) for tokens in texts]

    def negative_logprobs(
        _data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = -sum(row.sum() for row in logprobs)
        return loss, {"mine": float(loss)}

    own = training.forward_backward_custom(data, negative_logprobs).result()
    handle = service.create_custom_loss(per_datum, {"logprobs": 1, "weights": 1}).result()
    traced = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    training.optim_step(types.AdamParams(learning_rate=0.0)).result()
    by_handle = training.forward_backward_custom(data, handle).result()
    own_norm = (
        training.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    )
    theirs = training.forward_backward(data, "cross_entropy").result()
    norm = training.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    return {
        "loss": theirs.metrics["loss:sum"],
        "traced": [traced, by_handle.metrics["custom/mine:sum"]],
        "own_loss": own.metrics["loss:sum"],
        "mine": own.metrics["mine"],
        "norms": [norm, own_norm],
    }


def per_datum(
    logprobs: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/mine:sum": loss}


def train_on_soft_targets(training: Any, tokens: list[int]) -> dict[str, Any]:
    """Targets [N, K], sent sparse by the SDK, with their log-probabilities [N, K]."""
    length, width = len(tokens) - 1, 8
    targets = torch.zeros(length, width, dtype=torch.int64)
    weights = torch.zeros(length, width)
    targets[:, 0], weights[:, 0] = torch.tensor(tokens[1:]), 1.0
    soft = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    sparse = soft.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    plain = training.forward([datum(tokens)], "cross_entropy").result()
    output = training.forward([soft], "cross_entropy").result()
    return {
        "sparse": sparse,
        "loss": output.metrics["loss:sum"],
        "plain_loss": plain.metrics["loss:sum"],
        "shape": output.loss_fn_outputs[0]["logprobs"].shape,
    }


def train_on_rewards(training: Any, sampling: Any, prompt: list[int]) -> dict[str, Any]:
    """Policy losses on the policy's own samples: every ratio is one, so the loss is minus the advantages."""
    drawn = sampling.sample(
        types.ModelInput.from_ints(prompt), 2, types.SamplingParams(max_tokens=5, seed=3)
    ).result()
    data: list[types.Datum] = []
    total = 0.0
    for index, sequence in enumerate(drawn.sequences):
        advantage = 1.0 + index
        total += advantage * len(sequence.tokens)
        lead = [0.0] * (len(prompt) - 1)
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(prompt + list(sequence.tokens[:-1])),
                loss_fn_inputs={
                    "target_tokens": prompt[1:] + list(sequence.tokens),
                    "logprobs": lead + list(sequence.logprobs),
                    "advantages": lead + [advantage] * len(sequence.tokens),
                },
            )
        )
    found: dict[str, Any] = {"advantages": total}
    for loss, config in (
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", None),
        ("dro", {"beta": 0.05}),
        ("gspo", None),
    ):
        output = training.forward_backward(data, loss, config).result()
        found[loss] = {
            "loss": output.metrics["loss:sum"],
            "mean_ratio": output.metrics["mean_ratio:mean"],
        }
    training.optim_step(types.AdamParams(learning_rate=0.0)).result()
    return found


def save_and_load(service: Any, training: Any, texts: list[list[int]]) -> dict[str, Any]:
    """Checkpoints of both kinds, and models that begin where they end."""
    data = [datum(tokens) for tokens in texts]
    path = training.save_state("half", ttl_seconds=7200).result().path
    expected = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    training.forward_backward(data, "cross_entropy")
    training.optim_step(ADAM).result()
    later = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    training.load_state(path).result()
    loaded = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    training.load_state_with_optimizer(path).result()
    weights = recorded(service.create_training_client_from_state(path).result())
    whole = recorded(service.create_training_client_from_state_with_optimizer(path).result())
    return {
        "path": path,
        "external": training.save_weights_external("out").result().path,
        "copied": service.copy_weights(path).result(),
        "model_id": training.model_id,
        "expected": expected,
        "later": later,
        "loaded": loaded,
        "from_state": weights.forward(data, "cross_entropy").result().metrics["loss:sum"],
        "with_optimizer": whole.forward(data, "cross_entropy").result().metrics["loss:sum"],
        "ranks": [weights.get_info().lora_rank, whole.get_info().lora_rank],
    }


# ---- Sampling --------------------------------------------------------------------------------------------------------


def sample(training: Any, service: Any, prompt: list[int]) -> dict[str, Any]:
    """Samples of what was just trained, by three ways to it, and what can be asked of a prompt."""
    given = types.ModelInput.from_ints(prompt)
    path = training.save_weights_for_sampler("served", user_metadata={"why": "test"}).result().path
    named = recorded(training.create_sampling_client(path).result())
    snapshot = recorded(training.save_weights_and_get_sampling_client().result())
    inflight = recorded(training.save_weights_and_get_sampling_client(kind="inflight").result())
    base = recorded(service.create_sampling_client(base_model=BASE).result())
    answers = [client.sample(given, 1, GREEDY).result() for client in (named, snapshot, inflight)]
    logprobs = named.compute_logprobs(given).result()
    forward = training.forward([datum(prompt)], "cross_entropy").result()
    asked = named.sample(
        given,
        2,
        types.SamplingParams(max_tokens=4, temperature=0.7, top_k=20, top_p=0.9, seed=5),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=3,
        target_prompt_logprobs=types.TensorData.from_numpy(
            np.asarray([[token, -1] for token in prompt[1:]], dtype=np.int64)
        ),
    ).result()
    last = named.compute_logprobs(given, prompt_logprobs_last_n=2).result()
    clone = pickle.loads(pickle.dumps(base._client))
    copied = tinker.SamplingClient.from_sampler_handle(named.get_sampler_handle())
    CALLED[tinker.SamplingClient].add("from_sampler_handle")
    made = recorded(tinker.SamplingClient.create(training.holder, base_model=BASE).result())
    CALLED[tinker.SamplingClient].add("create")
    made.on_queue_state_change(QueueState.ACTIVE, None)
    made.get_telemetry()
    return {
        "path": path,
        "tokens": [list(answer.sequences[0].tokens) for answer in answers],
        "copied": list(copied.sample(given, 1, GREEDY).result().sequences[0].tokens),
        "base": list(base.sample(given, 1, GREEDY).result().sequences[0].tokens),
        "clone": list(clone.sample(given, 1, GREEDY).result().sequences[0].tokens),
        "base_model": named.get_base_model(),
        "vocabulary": len(base.get_tokenizer()),
        "prompt_logprobs": logprobs,
        "forward_logprobs": losses_of(forward)[0],
        "last": last,
        "top_of_prompt": asked.topk_prompt_logprobs,
        "targets": asked.target_prompt_logprobs.tolist(),
        "again": asked.prompt_logprobs,
        "sequences": [
            {
                "tokens": list(sequence.tokens),
                "logprobs": list(sequence.logprobs),
                "top": sequence.topk_logprobs,
                "stop_reason": sequence.stop_reason,
            }
            for sequence in asked.sequences
        ],
        "ids": [sequence.sequence_id for sequence in asked.sequences],
        "cached": asked.prompt_cache_hit_tokens,
    }


def stops(service: Any, prompt: list[int]) -> dict[str, Any]:
    """What ends a sample: the model's own end, tokens, texts, or nothing but its length."""
    base = recorded(service.create_sampling_client(base_model=BASE).result())
    given, found = types.ModelInput.from_ints(prompt), {}
    free = base.sample(given, 1, types.SamplingParams(max_tokens=40, temperature=0.0)).result()
    whole = list(free.sequences[0].tokens)
    tokenizer = base.get_tokenizer()
    text = tokenizer.decode(whole[:6])
    for name, stop in (
        ("none", None),
        ("nothing", []),
        ("token", [whole[3]]),
        ("text", [text[len(text) // 2 : len(text) // 2 + 3]]),
    ):
        params = types.SamplingParams(max_tokens=40, temperature=0.0, stop=stop)
        sequence = base.sample(given, 1, params).result().sequences[0]
        tokens = list(sequence.tokens)
        found[name] = {
            "tokens": tokens,
            "reason": sequence.stop_reason,
            "text": tokenizer.decode(tokens),
        }
    found["stop_text"] = text[len(text) // 2 : len(text) // 2 + 3]
    return found


# ---- The deprecated twins --------------------------------------------------------------------------------------------


async def deprecated(service: Any, texts: list[list[int]], path: str) -> dict[str, Any]:
    """Every `*_async` method: they do the same."""
    data = [datum(tokens) for tokens in texts]
    capabilities = await service.get_server_capabilities_async()
    training = recorded(await service.create_lora_training_client_async(base_model=BASE, rank=4))
    await service.create_training_client_from_state_async(path)
    await service.create_training_client_from_state_with_optimizer_async(path)
    base = recorded(await service.create_sampling_client_async(base_model=BASE))
    await (await training.forward_async(data, "cross_entropy"))
    await (await training.forward_backward_async(data, "cross_entropy"))
    await (await training.optim_step_async(ADAM))

    def loss_of(_data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -sum(row.sum() for row in logprobs), {}

    await (await training.forward_backward_custom_async(data, loss_of))
    saved = await (await training.save_state_async("async"))
    await (await training.load_state_async(saved.path))
    await (await training.load_state_with_optimizer_async(saved.path))
    served = await (await training.save_weights_for_sampler_async("async"))
    named = recorded(await training.create_sampling_client_async(served.path))
    await training.save_weights_and_get_sampling_client_async()
    await (await training.save_weights_external_async("out"))
    info = await training.get_info_async()
    prompt = types.ModelInput.from_ints(texts[0])
    await named.sample_async(prompt, 1, GREEDY)
    logprobs = await base.compute_logprobs_async(prompt)
    return {
        "models": [model.model_name for model in capabilities.supported_models],
        "rank": info.lora_rank,
        "scored": sum(logprob is not None for logprob in logprobs),
        "base_model": await base.get_base_model_async(),
    }


# ---- All of it -------------------------------------------------------------------------------------------------------


def main() -> None:
    service = recorded(tinker.ServiceClient({"who": "test"}, project_id="default"))
    training = recorded(
        service.create_lora_training_client(
            base_model=BASE, rank=8, seed=1, user_metadata={"what": "sdk"}
        ).result()
    )
    tokenizer = training.get_tokenizer()
    texts = [tokenizer.encode(text) for text in ("Ada has 3 apples and 4 pens.", "Ben is here.")]
    prompt = tokenizer.encode("Ada has 3 apples")
    found: dict[str, Any] = {
        "info": training.get_info().model_dump(),
        "model_id": training.model_id,
        "session": service.holder.get_session_id(),
        "trained": train(training, texts),
    }
    found["sampled"] = sample(training, service, prompt)
    found["stops"] = stops(service, prompt)
    found["custom"] = train_by_a_loss_of_ones_own(service, training, texts)
    found["soft"] = train_on_soft_targets(training, texts[0])
    fresh = recorded(training.save_weights_and_get_sampling_client().result())
    found["rewarded"] = train_on_rewards(training, fresh, prompt)
    found["saved"] = save_and_load(service, training, texts)
    found["deprecated"] = asyncio.run(deprecated(service, texts, found["saved"]["path"]))
    found["urls"] = [service.get_console_url(), training.get_console_url()]
    assert service.get_server_capabilities().supported_models
    assert service.create_rest_client() is not None
    for client in (service, training):
        client.get_telemetry()
    service.close("success").result()
    found["missed"] = missed()
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
