"""Samples, routing and chats as the client's own guide asks for them; the first argument says which."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from typing import Any

import numpy as np
from river_setup import (
    BASE_MODEL,
    PROBLEMS,
    STOP,
    TOKENIZER,
    answered,
    connect,
    datum_of,
    encode,
    new_model,
)

from river_client.sampling import SamplingResultCollector

PROMPTS = [row["prompt"] for row in PROBLEMS[:3]]


def samples() -> dict[str, Any]:
    """All that a sample may carry, from a model in training, a base model and a checkpoint."""
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)
        model.train_step([answered(PROMPTS[0], "Yes<|im_end|>")], lr=3e-3)
        groups = model.sample(
            PROMPTS,
            num_samples=2,
            max_tokens=8,
            seed=7,
            logprobs=5,
            return_prompt_logprobs=True,
            stop=STOP,
        )
        again = model.sample(PROMPTS, num_samples=2, max_tokens=8, seed=7, stop=STOP)
        one = groups[0][0]
        full = one.prompt_token_ids + one.tokens
        scored = model.forward([{"input_ids": full}]).logprobs[0]
        at = len(one.prompt_token_ids)
        base = client.sample(PROMPTS[:1], base_model=BASE_MODEL, max_tokens=4, tokenizer=TOKENIZER)
        greedy = [
            session.sample(
                PROMPTS[0], base_model=BASE_MODEL, tokenizer=TOKENIZER, max_tokens=4, temperature=0
            )[0][0].tokens
            for _ in range(2)
        ]
        saved = model.save_weights("sampled", mode="inference")
        of_checkpoint = session.sample(
            PROMPTS[0], base_model=BASE_MODEL, checkpoint=saved, tokenizer=TOKENIZER, max_tokens=4
        )
        top, prompt_top = one.top_logprobs, one.prompt_top_logprobs
        return {
            "counts": [len(group) for group in groups],
            "same": [s.tokens for g in groups for s in g] == [s.tokens for g in again for s in g],
            "prompt_ids": one.prompt_token_ids == encode(PROMPTS[0]),
            "shapes": [top.token_ids.shape, prompt_top.token_ids.shape],
            "tokens": [len(one.tokens), at],
            "first_row": [int(prompt_top.token_ids[0].max()), len(one.prompt_logprobs)],
            "sampled_is_top": bool((top.token_ids[0] == one.tokens[0]).any()),
            "sorted": bool((np.diff(top.logprobs, axis=1) <= 0).all()),
            "off": [
                float(np.abs(np.array(one.logprobs) - scored[at - 1 : -1]).max()),
                float(np.abs(np.array(one.prompt_logprobs[1:]) - scored[: at - 1]).max()),
            ],
            "versions": [
                one.policy_version.id == f"{model.training_run_id}@1",
                [span.end for span in one.policy_spans] == [len(one.tokens)],
                base[0].prompt_logprobs,
                of_checkpoint[0][0].policy_version.step,
            ],
            "greedy": greedy[0] == greedy[1],
            "health": [client.health_check(), BASE_MODEL in client.get_capabilities()],
        }


def batches() -> dict[str, Any]:
    """Independent samples, collected as they come, of the newest snapshot and of a pinned policy."""
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)

        async def collect(**options: Any) -> list[Any]:
            pending = model.submit_sampling_batch(
                PROMPTS, num_samples=4, max_tokens=6, stop=STOP, timeout=60, **options
            )
            collector = SamplingResultCollector()
            found = [done async for done in pending.as_completed(collector=collector)]
            # Python 3.11 may lose a cancellation that comes with a wake-up; the client asks for 3.12, which does not.
            await asyncio.sleep(0.2)
            await collector.aclose()
            return found

        async def all_three() -> list[list[Any]]:
            plain = await collect()
            first = model.get_policy_version().id
            model.train_step([answered(PROMPTS[0], "Yes<|im_end|>")], lr=3e-3)
            newest = await collect(policy_selection="latest_snapshot")
            return [plain, newest, await collect(pinned_policy_id=first)]

        plain, newest, pinned = asyncio.run(all_three())
        return {
            "places": sorted([done.prompt_index, done.sample_index] for done in plain),
            "errors": [str(done.error) for done in (*plain, *newest, *pinned) if done.error],
            "steps": [
                sorted({done.sample.policy_version.step for done in batch})
                for batch in (plain, newest, pinned)
            ],
        }


def routing() -> dict[str, Any]:
    """Experts recorded while sampling, measured and replayed in training."""
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)
        groups = model.sample(PROMPTS, num_samples=2, max_tokens=8, return_expert_routing=True)
        data = [
            datum_of(sample.prompt_token_ids, sample, 1.0) for group in groups for sample in group
        ]
        measured = model.forward_backward(
            data, loss_fn="importance_sampling", compute_expert_flip_metric=True
        )
        replayed, _ = model.train_step(
            data, lr=1e-3, loss_fn="importance_sampling", force_routing_replay=True
        )
        shape = groups[0][0].expert_routing
        return {
            "shape": [shape.num_tokens, shape.num_decoder_layers, shape.top_k],
            "tokens": len(groups[0][0].prompt_token_ids) + len(groups[0][0].tokens),
            "flips": measured.metrics["expert_flip/per_token_expert_rate"],
            "ratio": [measured.metrics["mean_ratio"], replayed.metrics["mean_ratio"]],
        }


def chats() -> dict[str, Any]:
    """Chats of a base model, a checkpoint and a model in training."""
    messages = [{"role": "user", "content": PROBLEMS[0]["prompt"][:40]}]
    with closing(connect()) as client, client.session() as session:
        model = new_model(session)
        saved = model.save_weights("chatted", mode="inference")
        done = [
            client.chat_complete(messages, base_model=BASE_MODEL, max_tokens=4),
            client.chat_complete_from_checkpoint(
                messages, checkpoint_path=saved.path, max_tokens=4
            ),
            model.chat_complete(messages, max_tokens=4),
            client.chat_complete(messages, base_model=BASE_MODEL, max_tokens=-1),
        ]
        bodies = [json.loads(chat.response_json) for chat in done]
        return {
            "statuses": [chat.status_code for chat in done],
            "tokens": [body["usage"]["completion_tokens"] for body in bodies[:3]],
            "error": bodies[3]["error"]["type"],
        }


WORK = {work.__name__: work for work in (samples, batches, routing, chats)}
print(json.dumps(WORK[sys.argv[1]]()))
