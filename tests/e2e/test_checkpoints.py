"""Checkpoints on the whole stack: adapters from elsewhere and back again, and the end of what expires."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_adapters import ATTENTION, EXPERTS, make_adapter, peft_logprobs
from support.platform_runs import fit, new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo

TOKENS = [(7 * index) % 500 for index in range(60)]
REMOVED_WITHIN_S = 20.0


def served_logprobs(client: river.Client, model: str) -> torch.Tensor:
    """Of `TOKENS[1:]`, by the engine."""
    (samples,) = client.sample(
        model=model, prompt_token_ids=[TOKENS], max_tokens=1, return_prompt_logprobs=True
    )
    logprobs = samples[0].prompt_logprobs
    assert logprobs is not None
    return torch.tensor(logprobs[1:])


def trained_logprobs(model: river.Model) -> torch.Tensor:
    """Of `TOKENS[1:]`, by the trainer."""
    result = model.forward([{"input_ids": TOKENS}], loss_fn="cross_entropy")
    assert result.logprobs is not None
    return torch.tensor([float(value) for value in result.logprobs[0][:-1]])


def test_an_adapter_from_elsewhere_is_served_trained_and_given_back(
    stack: StackInfo, client: river.Client, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """PEFT's own adapter on attention, experts and lm_head: engine and trainer agree with PEFT, before and after."""
    lora: dict[str, Any] = {
        "target_modules": [*ATTENTION, "lm_head"],
        "target_parameters": EXPERTS,
        "r": 8,
        "lora_alpha": 16,
    }
    made = make_adapter(tmp_path / "made", **lora)
    expected = peft_logprobs(made, TOKENS)
    printed = subprocess.run(
        [
            *(sys.executable, "-m", "river_client.cli", "checkpoints", "import", str(made)),
            *("--base-model", TINY_MOE_NAME, "--name", "theirs", "--json"),
        ],
        env={**os.environ, "RIVER_API_KEY": client.api_key, "RIVER_BASE_URL": stack.base_url},
        capture_output=True,
        text=True,
        check=True,
    )
    path = json.loads(printed.stdout)["path"]
    imported = client.checkpoints.get(path)
    assert imported.mode == "inference"
    # The engine computes in bfloat16 where the base says so; the trainer in float32.
    assert (served_logprobs(client, path) - expected).abs().mean() < 0.05
    assert client.chat("What is 2 + 2?", model=path, max_tokens=4).text is not None

    with client.session() as session:
        with pytest.raises(river.InvalidRequestError, match="optimizer=False"):
            session.create_model(TINY_MOE_NAME, checkpoint=path)
        model = session.create_model(TINY_MOE_NAME, checkpoint=path, optimizer=False)
        assert (trained_logprobs(model) - expected).abs().max() < 1e-4
        fit(model, supervised_data(tokenizer), steps=2)
        trained = trained_logprobs(model)
        saved = model.save_weights("further")
    assert (trained - expected).abs().max() > 0.01
    exported = client.checkpoints.export(saved.path, tmp_path / "exported")
    assert sorted(file.name for file in exported.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (peft_logprobs(exported, TOKENS) - trained).abs().max() < 1e-4


def test_an_expired_checkpoint_is_gone_with_its_files(
    stack_directory: Path, client: river.Client
) -> None:
    """It can be sampled and started from until it expires, and from then on not; its files go by themselves."""
    with client.session() as session:
        model = new_model(session)
        lasting = model.save_weights("lasting")
        brief = model.save_weights("brief", ttl=4)
        assert brief.expires_at is not None
        folder = stack_directory / "store" / "checkpoints" / brief.checkpoint_id
        assert folder.is_dir()
        assert client.sample(["x"], model=brief.path, max_tokens=1)
        deadline = time.monotonic() + REMOVED_WITHIN_S
        while len(client.checkpoints.list()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [checkpoint.path for checkpoint in client.checkpoints.list()] == [lasting.path]
        with pytest.raises(river.NotFoundError):
            client.sample(["x"], model=brief.path, max_tokens=1)
        with pytest.raises(river.NotFoundError):
            model.load_weights(brief.path)
        with pytest.raises(river.NotFoundError):
            client.checkpoints.download(brief.path, stack_directory / "never")
        while folder.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.sample(["x"], model=lasting.path, max_tokens=1)
        client.checkpoints.delete(lasting.path)
        client.checkpoints.delete(lasting.path)
        assert client.checkpoints.list() == []
