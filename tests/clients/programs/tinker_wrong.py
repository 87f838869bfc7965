"""Asks the `tinker` SDK for what cannot be; prints what it raises for each, as JSON by name."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tinker
from tinker import types

warnings.simplefilter("ignore")

BASE = os.environ["BASE_MODEL"]
GIVEN = types.ModelInput.from_ints([1, 2, 3])
PARAMS = types.SamplingParams(max_tokens=2)
ZERO = types.AdamParams(learning_rate=0.0)


def datum(**inputs: Any) -> types.Datum:
    return types.Datum(model_input=GIVEN, loss_fn_inputs=inputs)


def with_image() -> types.ModelInput:
    return GIVEN.append(types.ImageChunk(data=b"x", format="png", expected_tokens=1))


def attempts(service: Any, training: Any, sampling: Any) -> dict[str, Callable[[], Any]]:
    """Each by a name; what it returns is waited for."""
    good = datum(target_tokens=[2, 3, 4], weights=[1.0, 1.0, 1.0])
    nowhere = f"tinker://{training.model_id}/weights/none"
    return {
        "base model": lambda: service.create_lora_training_client(base_model="no/model"),
        "rank": lambda: service.create_lora_training_client(base_model=BASE, rank=4096),
        "dimuon": lambda: service.create_lora_training_client(
            base_model=BASE, optimizer=types.DimuonOptimizerConfig()
        ),
        "from nowhere": lambda: service.create_training_client_from_state(nowhere),
        "no path": lambda: service.create_training_client_from_state("river://run_0/weights/x"),
        "sampler of nothing": lambda: service.create_sampling_client(base_model="no/model"),
        "sampler of nowhere": lambda: service.create_sampling_client(model_path=nowhere),
        "vocabulary": lambda: training.forward_backward(
            [good, datum(target_tokens=[2, 3, 10**6], weights=[1.0] * 3)], "cross_entropy"
        ),
        "lengths": lambda: training.forward_backward(
            [datum(target_tokens=[2, 3], weights=[1.0, 1.0])], "cross_entropy"
        ),
        "not finite": lambda: training.forward_backward(
            [datum(target_tokens=[2, 3, 4], weights=[1.0, float("nan"), 1.0])], "cross_entropy"
        ),
        "too long": lambda: training.forward_backward(
            [
                types.Datum(
                    model_input=types.ModelInput.from_ints([1] * 5000),
                    loss_fn_inputs={"target_tokens": [1] * 5000},
                )
            ],
            "cross_entropy",
        ),
        "image": lambda: training.forward_backward(
            [types.Datum(model_input=with_image(), loss_fn_inputs={"target_tokens": [1] * 4})],
            "cross_entropy",
        ),
        "missing input": lambda: training.forward_backward([good], "importance_sampling"),
        "stable_reinforce": lambda: training.forward_backward([good], "stable_reinforce"),
        "unknown loss": lambda: training.forward_backward([good], "nll"),
        "setting": lambda: training.forward([good], "cross_entropy", {"beta": 1.0}),
        "learning rate": lambda: training.optim_step(types.AdamParams(learning_rate=99.0)),
        "dimuon step": lambda: training.optim_step(types.DimuonParams(learning_rate=0.1)),
        "nothing to step on": lambda: training.optim_step(ZERO),
        "name": lambda: training.save_state("a name"),
        "name taken": lambda: (training.save_state("x").result(), training.save_state("x"))[1],
        "load nowhere": lambda: training.load_state(nowhere),
        "token": lambda: training.load_state(nowhere, weights_access_token="tml-x"),
        "temperature": lambda: sampling.sample(
            GIVEN, 1, types.SamplingParams(max_tokens=2, temperature=-1.0)
        ),
        "prompt vocabulary": lambda: sampling.sample(
            types.ModelInput.from_ints([10**6]), 1, PARAMS
        ),
        "no prompt": lambda: sampling.sample(types.ModelInput.empty(), 1, PARAMS),
        "image prompt": lambda: sampling.sample(with_image(), 1, PARAMS),
        "alternatives": lambda: sampling.sample(GIVEN, 1, PARAMS, prompt_alt_tokens_k=2),
        "targets": lambda: sampling.sample(
            GIVEN,
            1,
            PARAMS,
            target_prompt_logprobs=types.TensorData.from_numpy(np.ones((1, 1), dtype=np.int64)),
        ),
        "stability": lambda: (
            training.save_weights_and_get_sampling_client(record_stability_info=True)
            .result()
            .sample(GIVEN, 1, PARAMS)
        ),
    }


def main() -> None:
    if sys.argv[1:] == ["key"]:
        try:
            tinker.ServiceClient().get_server_capabilities()
        except tinker.TinkerError as error:
            print(json.dumps({"key": [type(error).__name__, str(error)]}))
        return
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(base_model=BASE, rank=4).result()
    sampling = service.create_sampling_client(base_model=BASE).result()
    raised: dict[str, list[str]] = {}
    for name, attempt in attempts(service, training, sampling).items():
        try:
            outcome = attempt()
            raised[name] = ["nothing", str(outcome.result())]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is printed
            raised[name] = [type(error).__name__, str(error)]
    good = [datum(target_tokens=[2, 3, 4], weights=[1.0, 1.0, 1.0])]
    after = training.forward_backward(good, "cross_entropy")
    training.optim_step(ZERO).result()
    print(json.dumps({"raised": raised, "after": after.result().metrics["loss:sum"]}))


if __name__ == "__main__":
    main()
