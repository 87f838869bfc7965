"""The same token has the same log-probability wherever it is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.platform_runs import fit, new_model, supervised_data
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import river_client as river
from river_client.wire import SaveMode
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.tiny_moe.problems import make_prompt, problems

PROMPTS = [make_prompt(problem.question) for problem in problems("held_out", 6, seed=9)]


def test_sampler_and_trainer_agree(
    client: river.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Sampled log-probabilities equal the trainer's for the same tokens and version, to 1e-4 in float32."""
    with client.session() as session:
        model = new_model(session)
        fit(model, supervised_data(tokenizer), steps=3)
        groups = model.sample(prompts=PROMPTS, num_samples=2, max_tokens=24)
        samples = [sample for group in groups for sample in group]
        assert {sample.policy_version for sample in samples} == {model.policy_version}
        data = [{"input_ids": s.prompt_token_ids + s.tokens} for s in samples]
        trained = model.forward(data, loss_fn="cross_entropy").logprobs
    for sample, logprobs in zip(samples, trained, strict=True):
        first = len(sample.prompt_token_ids) - 1
        own = np.asarray(logprobs)[first : first + len(sample.tokens)]
        np.testing.assert_allclose(own, sample.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_checkpoint_loads_into_peft(
    client: river.Client, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, mode: SaveMode
) -> None:
    """A downloaded checkpoint is a PEFT adapter, experts and output head included, with the trainer's numbers."""
    with client.session() as session:
        model = new_model(session)
        data = supervised_data(tokenizer)
        fit(model, data, steps=3)
        saved = model.save_weights("peft", mode=mode)
        trained = model.forward(data, loss_fn="cross_entropy").logprobs
        client.checkpoints.download(saved.path, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    plain = log_probabilities(base, data[0]["input_ids"])
    peft = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for datum, logprobs in zip(data, trained, strict=True):
        loaded = log_probabilities(peft, datum["input_ids"])
        np.testing.assert_allclose(loaded, np.asarray(logprobs)[:-1], atol=1e-4, rtol=0)
    moved = np.abs(log_probabilities(peft, data[0]["input_ids"]) - plain).max()
    assert moved > 0.1, "the adapter changed nothing, so the comparison shows nothing"


def test_a_mixed_batch_gives_everyone_their_own_numbers(
    new_client: Callable[[], river.Client], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Base, tenant A and tenant B, asked at once, get the log-probabilities they get alone, to 1e-5."""
    owners = [new_client(), new_client()]
    sessions = [owner.session() for owner in owners]
    models: list[river.Model] = []
    for number, (owner_session, answer) in enumerate(
        zip(sessions, ("It is \\boxed{1}<|im_end|>", "No.<|im_end|>"), strict=True)
    ):
        lora = river.LoraConfig(rank=(4, 16)[number], seed=number, train_unembed=True)
        model = new_model(owner_session.__enter__(), lora)
        fit(model, supervised_data(tokenizer, answer=answer), steps=3)
        models.append(model)
    paths = [
        (owners[0], TINY_MOE_NAME),
        *[(o, m.path) for o, m in zip(owners, models, strict=True)],
    ]

    def scores(owner: river.Client, path: str) -> np.ndarray:
        groups = owner.sample(
            prompts=PROMPTS,
            model=path,
            max_tokens=12,
            temperature=1.0,
            seed=7,
            return_prompt_logprobs=True,
        )
        samples = [sample for group in groups for sample in group]
        values = [[*(s.prompt_logprobs or [])[1:], *s.logprobs] for s in samples]
        return np.concatenate([np.asarray(value, dtype=np.float64) for value in values])

    alone = [scores(*path) for path in paths]
    with ThreadPoolExecutor(len(paths)) as pool:
        for _ in range(3):
            mixed = list(pool.map(lambda path: scores(*path), paths))
            for own, together in zip(alone, mixed, strict=True):
                np.testing.assert_allclose(together, own, atol=1e-5, rtol=0)
    assert np.abs(alone[1][:20] - alone[2][:20]).max() > 0.1
    for owner_session in sessions:
        owner_session.__exit__(None, None, None)


def log_probabilities(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """The log-probability of each token after the first, float32 [T - 1]."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
