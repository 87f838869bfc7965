"""Runs a recipe of tinker-cookbook to its end, with tokenizer and data from files; prints its metrics as JSON.

The first argument says which: `supervised`, `distillation`, `dpo`, `rl`, `rl_async` or `rl_default`, whose loss is what
the cookbook would use by itself. The second, if there is one, is a learning rate in place of the recipe's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder
from tinker_cookbook.recipes.prompt_distillation import train as distillation
from tinker_cookbook.rl import train as rl
from tinker_cookbook.supervised import train as supervised
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

MODEL = os.environ["BASE_MODEL"]
RENDERER = "qwen3_instruct"
LOGS = Path("logs")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")


def rate(usual: float) -> float:
    return float(sys.argv[2]) if len(sys.argv) > 2 else usual


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def written(name: str, rows: list[dict[str, Any]]) -> str:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversations() -> str:
    """Eight questions with one answer each, four times over."""
    return written(
        "conversations.jsonl",
        [
            {
                "messages": [
                    message("user", f"Who is {name}?"),
                    message("assistant", f"{name} is me."),
                ]
            }
            for name in NAMES * 4
        ],
    )


def comparisons() -> str:
    """A better and a worse answer to each of eight questions."""
    return written(
        "comparisons.jsonl",
        [
            {
                "comparison": {
                    "prompt_conversation": [message("user", f"Where is {name}?")],
                    "completion_A": [message("assistant", "Here.")],
                    "completion_B": [message("assistant", "I do not know, go away.")],
                },
                "label": "A",
            }
            for name in NAMES
        ],
    )


def common(batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
        max_length=256,
        batch_size=batch_size,
    )


def run_supervised() -> None:
    config = supervised.Config(
        log_path=str(LOGS),
        model_name=MODEL,
        recipe_name="recipe_sl_basic",
        renderer_name=RENDERER,
        dataset_builder=FromConversationFileBuilder(
            common_config=common(8), file_path=conversations(), test_size=4
        ),
        learning_rate=rate(5e-3),
        lora_rank=8,
        num_epochs=3,
        save_every=2,
        eval_every=3,
    )
    asyncio.run(supervised.main(config))


def run_distillation() -> None:
    distillation.cli_main(
        distillation.CLIConfig(
            file_path=conversations(),
            log_path=str(LOGS),
            model_name=MODEL,
            renderer_name=RENDERER,
            learning_rate=rate(5e-3),
            num_epochs=2,
            lora_rank=8,
            batch_size=8,
            max_length=256,
            save_every=0,
            eval_every=0,
            behavior_if_log_dir_exists="delete",
        )
    )


def run_dpo() -> None:
    train_dpo.main(
        train_dpo.Config(
            log_path=str(LOGS),
            model_name=MODEL,
            recipe_name="recipe_preference_dpo",
            renderer_name=RENDERER,
            dataset_builder=DPODatasetBuilderFromComparisons(
                common_config=common(4),
                comparison_builder=ComparisonBuilderFromJsonl(train_path=comparisons()),
            ),
            evaluator_builders=[],
            learning_rate=rate(2e-3),
            lr_schedule="constant",
            num_epochs=4,
            dpo_beta=0.5,
            lora_rank=8,
            save_every=0,
            eval_every=0,
        )
    )


def run_rl(*, asynchronous: bool, loss_fn: str | None) -> None:
    chosen: dict[str, Any] = {} if loss_fn is None else {"loss_fn": loss_fn}
    if asynchronous:
        chosen = {
            "async_config": rl.AsyncConfig(max_steps_off_policy=1, groups_per_batch=2, **chosen)
        }
    config = rl.Config(
        log_path=str(LOGS),
        model_name=MODEL,
        recipe_name="recipe_rl_basic",
        renderer_name=RENDERER,
        dataset_builder=ArithmeticDatasetBuilder(
            batch_size=2,
            model_name_for_tokenizer=MODEL,
            renderer_name=RENDERER,
            n_batches=3,
            group_size=4,
        ),
        learning_rate=rate(1e-3),
        max_tokens=24,
        lora_rank=8,
        eval_every=0,
        save_every=2,
        **chosen,
    )
    asyncio.run(rl.main(config))


def main() -> None:
    match sys.argv[1]:
        case "supervised":
            run_supervised()
        case "distillation":
            run_distillation()
        case "dpo":
            run_dpo()
        case "rl":
            run_rl(asynchronous=False, loss_fn="importance_sampling")
        case "rl_async":
            run_rl(asynchronous=True, loss_fn="importance_sampling")
        case "rl_default":
            run_rl(asynchronous=True, loss_fn=None)
    metrics = [json.loads(line) for line in (LOGS / "metrics.jsonl").read_text().splitlines()]
    checkpoints = LOGS / "checkpoints.jsonl"
    saved = checkpoints.read_text().splitlines() if checkpoints.exists() else []
    print(json.dumps({"metrics": metrics, "checkpoints": [json.loads(line) for line in saved]}))


if __name__ == "__main__":
    main()
