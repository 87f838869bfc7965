"""The main job: the GRPO loop, its bill, and the README's program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.demo.loop import MAX_TOKENS
from river_ops.demo.run import run_demo
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe.problems import make_prompt, problems, reward

README = Path(__file__).parents[2] / "README.md"


def test_the_loop_learns_and_the_bill_is_what_was_counted(stack: StackInfo) -> None:
    """A short demo raises the held-out reward, and every token billed was counted by engine or trainer."""
    demo = run_demo(stack, steps=16, show=lambda _: None)
    assert demo.result is not None
    assert demo.result.reward_first < 0.45
    assert demo.result.reward_last > demo.result.reward_first + 0.2
    assert demo.billed == demo.counted
    assert demo.counted["training"] > 0
    assert demo.counted["completion"] > 0
    assert demo.result.cost_usd > 0
    assert demo.answer


def test_the_readme_example_runs_verbatim(
    stack: StackInfo,
    client: river.Client,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The program in the README trains and saves a checkpoint as it is printed there."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    program = next(block for block in blocks if "create_model" in block)
    rows = problems("train", 8, seed=3)
    names: dict[str, Any] = {
        "MODEL": TINY_MOE_NAME,
        "batches": [
            {
                "question": [row.question for row in rows],
                "answer": [row.answer for row in rows],
            }
        ],
        "make_prompt": make_prompt,
        # At 128 tokens nearly every answer is right; a limit on the text gives the groups something to differ in.
        "reward": lambda text, answer: reward(text, answer) * (len(text) < 4 * MAX_TOKENS),
        "tok": tokenizer,
    }
    monkeypatch.setenv("RIVER_BASE_URL", stack.base_url)
    monkeypatch.setenv("RIVER_API_KEY", client.api_key)
    exec(compile(program, str(README), "exec"), names)
    names["client"].close()
    model = names["model"]
    saved = [checkpoint.path for checkpoint in client.checkpoints.list()]
    assert f"river://{model.run_id}/weights/final" in saved
