"""Continual training: batches go in, the live version moves, nothing restarts."""

from __future__ import annotations

import time

import httpx
import openai
from openai.types.chat import ChatCompletionMessageParam
from support.platform_runs import new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.settings import StackInfo

APPLIED_WITHIN_S = 60.0
QUESTION: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Tom has 3 apples and gets 4 more. How many apples are there?"}
]


def engine_start_times(stack: StackInfo) -> list[str]:
    """The start times of the engine processes, as they report them."""
    lines: list[str] = []
    for url in stack.engine_metrics_urls:
        text = httpx.get(url, timeout=10).text
        lines += [
            line for line in text.splitlines() if line.startswith("process_start_time_seconds")
        ]
    assert lines
    return lines


def test_submitted_batches_move_the_live_version(
    stack: StackInfo, client: river.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`submit_batch` returns once stored; chat with `river://<run>` is then answered by each new version."""
    started = engine_start_times(stack)
    batches = 30
    with (
        client.session() as session,
        openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=client.api_key) as chat,
    ):
        model = new_model(session)
        data = supervised_data(tokenizer, answer="Yes.<|im_end|>")
        versions: list[str] = []
        for _ in range(batches):
            model.submit_batch(data, loss_fn="cross_entropy", lr=2e-3)
        answer = None
        deadline = time.monotonic() + APPLIED_WITHIN_S
        while not versions or versions[-1] != f"{model.run_id}@{batches}":
            assert time.monotonic() < deadline, f"only {versions} so far"
            raw = chat.chat.completions.with_raw_response.create(
                model=model.path, messages=QUESTION, max_tokens=16, temperature=0
            )
            versions.append(raw.headers["x-river-policy-version"])
            answer = raw.parse().choices[0].message.content
        assert answer == "Yes."
        steps = [int(version.rsplit("@", 1)[1]) for version in versions]
        assert steps == sorted(steps)
    assert engine_start_times(stack) == started
