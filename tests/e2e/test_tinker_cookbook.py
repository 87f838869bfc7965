"""Recipes of the unmodified tinker-cookbook against the whole stack, to their end, with files of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tinker_programs import run_tinker

from river_ops.settings import StackInfo

PROGRAM = "tinker_recipe.py"


def values(found: Any, name: str) -> list[float]:
    """What was logged under a name, step by step."""
    return [row[name] for row in found["metrics"] if name in row]


def test_the_supervised_loop(stack: StackInfo, tmp_path: Path) -> None:
    """It trains, evaluates and saves to the end; what it learns shows in its own loss."""
    found = run_tinker(stack, PROGRAM, tmp_path, "supervised")
    losses = values(found, "train_mean_nll")
    assert len(losses) == 9
    assert losses[-1] < 0.5 * losses[0]
    assert found["checkpoints"][-1]["name"] == "final"
    assert found["checkpoints"][-1]["state_path"].startswith("tinker://ses_")


def test_prompt_distillation(stack: StackInfo, tmp_path: Path) -> None:
    """The recipe's own command line, on answers from a file."""
    found = run_tinker(stack, PROGRAM, tmp_path, "distillation")
    losses = values(found, "train_mean_nll")
    assert losses[-1] < losses[0]


def test_preferences(stack: StackInfo, tmp_path: Path) -> None:
    """DPO, whose loss the client differentiates itself: the chosen answers come to be preferred."""
    found = run_tinker(stack, PROGRAM, tmp_path, "dpo")
    margins = values(found, "margin")
    losses = values(found, "dpo_loss")
    assert len(losses) == len(margins) == 8
    assert losses[-1] < losses[0]
    assert margins[-1] > margins[0]


@pytest.mark.parametrize("recipe", ["rl", "rl_async"])
def test_arithmetic_by_reinforcement(stack: StackInfo, tmp_path: Path, recipe: str) -> None:
    """Rollouts, rewards and steps of importance sampling to the end, in turns or beside each other."""
    found = run_tinker(stack, PROGRAM, tmp_path, recipe)
    assert len(values(found, "env/all/reward/total")) == 3
    assert found["checkpoints"][-1]["name"] == "final"
    assert {"state_path", "sampler_path"} <= found["checkpoints"][-1].keys()


@pytest.mark.parametrize("recipe", ["supervised", "distillation", "dpo", "rl", "rl_async"])
def test_what_is_wrong_ends_a_recipe(stack: StackInfo, tmp_path: Path, recipe: str) -> None:
    """A learning rate that cannot be is told by its name, through the cookbook's own error."""
    wanted = "adam_params.learning_rate: 99.0, must be 0 to 10"
    with pytest.raises(AssertionError, match=wanted):
        run_tinker(stack, PROGRAM, tmp_path, recipe, "99")


def test_the_loss_that_is_not_built_is_refused_by_name(stack: StackInfo, tmp_path: Path) -> None:
    """What the cookbook trains with unless told otherwise ends with our sentence, and trains with nothing else."""
    with pytest.raises(AssertionError, match="record_stability_info: not offered"):
        run_tinker(stack, PROGRAM, tmp_path, "rl_default")
