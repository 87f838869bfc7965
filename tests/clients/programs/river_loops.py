"""Training loops as the client's own guide writes them; the first argument names one, the result is printed as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import Any

import numpy as np
from river_setup import PROBLEMS, STOP, answered, connect, datum_of, encode, new_model, reward

import river_client as river

SHORT = "The answer is \\boxed{7}<|im_end|>"


def supervised() -> dict[str, Any]:
    """Steps of supervised learning, as one call and as micro-batches; the held capacity; what a forward says."""
    data = [answered(row["prompt"], SHORT) for row in PROBLEMS[:4]]
    losses: list[float] = []
    with closing(connect()) as client, client.session(experiment="supervised") as session:
        model = new_model(session)
        for _ in range(6):
            done, stepped = model.train_step(data, lr=3e-3, grad_clip_norm=1.0)
            losses.append(done.metrics["loss_mean"])
        before = model.forward(data).metrics["loss_sum"]
        whole = model.forward_backward(data).metrics["loss_sum"]
        first = model.submit_forward_backward(data[:2], zero_out=True)
        second = model.submit_forward_backward(data[2:], zero_out=False)
        parts = [pending.result().metrics["loss_sum"] for pending in (first, second)]
        last = model.optim_step(lr=3e-3, gradient_scale=0.5)
        soft = np.array([[token, 0] for token in data[0]["input_ids"]])
        targets = np.concatenate([soft[1:], soft[:1]])
        halves = np.full(targets.shape, 0.5, np.float32)
        two = model.forward(
            [{"input_ids": data[0]["input_ids"], "target_tokens": targets, "weights": halves}]
        )
        session._attempt_heartbeat()
        return {
            "losses": losses,
            "grad_norm": stepped.metrics["grad_norm"],
            "loss": done.metrics["loss"],
            "loss_sum": done.metrics["loss_sum"],
            "logprobs": [len(array) for array in done.logprobs],
            "lengths": [len(datum["input_ids"]) for datum in data],
            "sums": [before, whole, sum(parts)],
            "soft_shape": two.logprobs[0].shape,
            "steps": [model.step, last.policy_version.step, model.get_policy_version().step],
            "parent": last.policy_version.parent_id,
            "run": model.training_run_id,
            "capacity": [[status.workload, status.state] for status in session.capacity_status],
        }


def grpo() -> dict[str, Any]:
    """Group-relative policy optimisation, the samples of each step from the newest weights."""
    steps, per_step, group = int(sys.argv[2]), 24, 4
    rewards: list[float] = []
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)
        for step in range(steps):
            rows = PROBLEMS[step * per_step : (step + 1) * per_step]
            prompts = [encode(row["prompt"]) for row in rows]
            groups = model.sample(
                prompt_token_ids=prompts,
                num_samples=group,
                max_tokens=32,
                stop=STOP,
                poll_interval=0.01,
            )
            data: list[dict[str, Any]] = []
            seen: list[float] = []
            for row, prompt, samples in zip(rows, prompts, groups, strict=True):
                got = [reward(sample.text, row["answer"]) for sample in samples]
                seen += got
                mean = sum(got) / len(got)
                if all(value == mean for value in got):
                    continue
                data += [
                    datum_of(prompt, sample, value - mean)
                    for sample, value in zip(samples, got, strict=True)
                ]
            rewards.append(sum(seen) / len(seen))
            done, _ = model.train_step(
                data, lr=1e-3 * (1 - step / steps), loss_fn="importance_sampling"
            )
            ratio = done.metrics["mean_ratio"]
        versions = {sample.policy_version.id for samples in groups for sample in samples}
    return {
        "rewards": rewards,
        "ratio": ratio,
        "versions": sorted(versions),
        "exact": all(s.token_data_is_exact for samples in groups for s in samples),
        "run": model.training_run_id,
    }


def pipelined() -> dict[str, Any]:
    """Steps that are submitted before the one before is done, among them one that is refused at the door."""
    data = [answered(row["prompt"], SHORT) for row in PROBLEMS[:2]]
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)
        pending = [model.submit_train_step(data, lr=1e-3) for _ in range(4)]
        sampled = model.submit_sample(PROBLEMS[0]["prompt"], max_tokens=2, poll_interval=0.05)
        refusal = ""
        try:
            model.submit_train_step([{"input_ids": [1, 10**6]}], lr=1e-3)
        except river.RiverConnectionError as error:
            refusal = str(error)
        pending.append(model.submit_train_step(data, lr=1e-3))
        losses = [done.result().metrics["loss_mean"] for done, _ in pending]
        steps = [stepped.result().policy_version.step for _, stepped in pending]
        return {
            "losses": losses,
            "steps": steps,
            "refusal": refusal,
            "sampled_at": sampled.result()[0][0].policy_version.step,
        }


def resume() -> dict[str, Any]:
    """A checkpoint saved, and loaded into a new model of a new session: the same losses from there on."""
    data = [answered(row["prompt"], SHORT) for row in PROBLEMS[:2]]
    with closing(connect()) as client:
        with client.session() as session:
            model = new_model(session)
            for _ in range(3):
                model.train_step(data, lr=3e-3)
            saved = model.save_weights("step_3")
            temporary = model.save_weights("short", mode="inference", durable=False)
            distinct = [
                model.save_weights("twice", mode="inference", immutable=True).path for _ in range(2)
            ]
            went_on = [model.train_step(data, lr=3e-3)[0].metrics["loss_sum"] for _ in range(3)]
        with client.session() as session:
            model = new_model(session, checkpoint=saved)
            resumed_at = model.step
            resumed = [model.train_step(data, lr=3e-3)[0].metrics["loss_sum"] for _ in range(3)]
            sampled = session.sample(
                PROBLEMS[0]["prompt"],
                base_model=model.base_model,
                checkpoint=temporary,
                tokenizer=model.tokenizer,
                max_tokens=4,
            )
    return {
        "saved": [saved.path, saved.step, saved.policy_version.step],
        "temporary": temporary.path,
        "distinct": distinct,
        "resumed_at": resumed_at,
        "went_on": went_on,
        "resumed": resumed,
        "sampled_of": sampled[0][0].policy_version.id,
    }


def uploaded() -> dict[str, Any]:
    """The same data inline and, by a client that divides every body, in parts."""
    data = [answered(row["prompt"], SHORT) for row in PROBLEMS]
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)
        return {"loss_sum": model.forward_backward(data).metrics["loss_sum"]}


LOOPS = {loop.__name__: loop for loop in (supervised, grpo, pipelined, resume, uploaded)}
print(json.dumps(LOOPS[sys.argv[1]]()))
