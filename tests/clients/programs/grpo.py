"""Runs a GRPO program as a page prints it, with its blanks filled in, and prints the mean reward of each batch as JSON.

Arguments: the program, the module of the problems, the tokenizer's folder, the number of batches, and as JSON the names
that the program expects besides.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import AutoTokenizer

PROBLEMS_PER_BATCH = 32


def main(program: str, problems_module: str, tokenizer: str, batches: str, names: str) -> None:
    problems = _load(problems_module)
    rows = problems.problems("train", int(batches) * PROBLEMS_PER_BATCH, seed=1)
    seen: list[float] = []

    def reward(text: str, answer: int) -> float:
        seen.append(problems.reward(text, answer))
        return seen[-1]

    scope: dict[str, Any] = json.loads(names) | {
        "tok": AutoTokenizer.from_pretrained(tokenizer),
        "make_prompt": problems.make_prompt,
        "reward": reward,
        "batches": [
            {
                "question": [row.question for row in rows[start : start + PROBLEMS_PER_BATCH]],
                "answer": [row.answer for row in rows[start : start + PROBLEMS_PER_BATCH]],
            }
            for start in range(0, len(rows), PROBLEMS_PER_BATCH)
        ],
    }
    exec(compile(Path(program).read_text(), program, "exec"), scope)
    per_batch = len(seen) // int(batches)
    means = [
        sum(seen[start : start + per_batch]) / per_batch for start in range(0, len(seen), per_batch)
    ]
    print(json.dumps(means))


def _load(path: str) -> ModuleType:
    """The module of a file, without what stands beside it."""
    spec = importlib.util.spec_from_file_location("problems", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["problems"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
