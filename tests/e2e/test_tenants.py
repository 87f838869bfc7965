"""Two tenants on one stack never see each other's things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.platform_runs import fit, new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.tiny_moe.problems import make_prompt


def test_a_stranger_finds_nothing(
    new_client: Callable[[], river.Client], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Another tenant's run, operations, checkpoints, files, aliases and usage do not exist for a stranger."""
    owner, stranger = new_client(), new_client()
    with owner.session() as session, stranger.session() as stranger_session:
        model = new_model(session)
        fit(model, supervised_data(tokenizer), steps=1)
        saved = model.save_weights("mine")
        owner.checkpoints.promote(saved.path, "mine")
        prompt = [make_prompt("?")]
        attempts: list[Callable[[], object]] = [
            lambda: stranger.runs.get(model.run_id),
            lambda: stranger.sample(model=model.path, prompts=prompt),
            lambda: stranger.sample(model=saved.path, prompts=prompt),
            lambda: stranger.sample(model="mine", prompts=prompt),
            lambda: stranger.checkpoints.download(saved.path, tmp_path / "stolen"),
            lambda: stranger.checkpoints.delete(saved.path),
            lambda: stranger.checkpoints.promote(saved.path, "stolen"),
            lambda: stranger_session.create_model(
                base_model=saved.base_model, checkpoint=saved.path
            ),
            lambda: new_model(stranger_session).load_weights(saved.path),
        ]
        for attempt in attempts:
            with pytest.raises(river.NotFoundError):
                attempt()
        assert stranger.checkpoints.list() == []
        own_runs = {run.run_id for run in stranger.runs.list()}
        assert model.run_id not in own_runs
        assert all(line.kind == "storage" or line.quantity == 0 for line in stranger.usage())
        assert owner.sample(model="mine", prompts=prompt, max_tokens=2)
