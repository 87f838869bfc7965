"""What a real engine says of the tokens of prompts, and of those it draws, against transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from river_engine.protocol import AdapterRef, EngineSampleGroup, TokenTable

from .conftest import RunningEngine
from .reference import all_logits, token_logprobs

PROMPTS = [[5 + 3 * i + j for i in range(20 + j)] for j in range(2)]
MakeAdapter = Callable[..., AdapterRef]


@pytest.fixture(scope="module")
def adapter(make_adapter: MakeAdapter) -> AdapterRef:
    return make_adapter(seed=31)


def table(ids: np.ndarray) -> TokenTable:
    return TokenTable(width=ids.shape[1], token_ids=ids.astype("<i4").tobytes())


def scores_of(group: EngineSampleGroup) -> np.ndarray:
    assert group.prompt_target_logprobs is not None
    return np.frombuffer(group.prompt_target_logprobs, "<f4")


def top_of(group: EngineSampleGroup) -> tuple[np.ndarray, np.ndarray]:
    top = group.prompt_top_logprobs
    assert top is not None
    shape = (-1, top.width)
    return (
        np.frombuffer(top.token_ids, "<i4").reshape(shape),
        np.frombuffer(top.logprobs, "<f4").reshape(shape),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_prompts_are_scored_by_the_model_itself(
    engine: RunningEngine, tiny_moe: Path, adapter: AdapterRef, which: str, temperature: float
) -> None:
    """At any temperature and top-p, the own, the likeliest and given tokens have log-softmax of the logits."""
    ref = adapter if which == "adapter" else None
    targets = [np.stack([np.arange(len(p) - 1), np.full(len(p) - 1, -1)], 1) for p in PROMPTS]
    groups = engine.sample(
        prompt_token_ids=PROMPTS,
        adapter=ref,
        max_tokens=1,
        temperature=temperature,
        top_p=0.4,
        return_prompt_logprobs=True,
        prompt_top_logprobs=4,
        prompt_targets=[table(ids) for ids in targets],
    ).groups
    for group, prompt, ids in zip(groups, PROMPTS, targets, strict=True):
        logprobs = all_logits(tiny_moe, ref, prompt).log_softmax(-1)[:-1]
        assert group.prompt_logprobs is not None
        assert group.prompt_logprobs[0] is None
        assert group.prompt_logprobs[1:] == pytest.approx(
            token_logprobs(tiny_moe, ref, prompt), abs=1e-4
        )
        top_ids, top_logprobs = top_of(group)
        assert top_ids[0].tolist() == [-1] * 4
        assert np.isneginf(top_logprobs[0]).all()
        expected = logprobs.topk(4)
        np.testing.assert_allclose(top_logprobs[1:], expected.values.numpy(), atol=1e-4)
        assert (top_ids[1:] == expected.indices.numpy()).mean() > 0.95
        scores = scores_of(group).reshape(ids.shape)
        rows = np.arange(len(ids))
        np.testing.assert_allclose(scores[:, 0], logprobs.numpy()[rows, ids[:, 0]], atol=1e-4)
        assert np.isneginf(scores[:, 1]).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_have_the_logprobs_of_what_they_were_drawn_from(
    engine: RunningEngine, tiny_moe: Path, adapter: AdapterRef, temperature: float, top_p: float
) -> None:
    """Log-softmax of the logits over the temperature, renormalised over the tokens that top-p leaves."""
    prompt = PROMPTS[0]
    group = engine.sample(
        prompt_token_ids=[prompt],
        adapter=adapter,
        max_tokens=10,
        num_samples=2,
        temperature=temperature,
        top_p=top_p,
        seed=5,
    ).groups[0]
    for sample in group.samples:
        logits = all_logits(tiny_moe, adapter, prompt + sample.tokens)[len(prompt) - 1 : -1]
        probabilities = (logits / temperature).softmax(-1)
        ordered = probabilities.sort(-1, descending=True)
        # The smallest set of the likeliest tokens that holds at least top_p.
        before = ordered.values.cumsum(-1) - ordered.values
        kept = torch.zeros_like(probabilities).scatter(
            -1, ordered.indices, (before < top_p).float() * ordered.values
        )
        expected = (kept / kept.sum(-1, keepdim=True)).log()
        drawn = expected.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
        assert sample.logprobs == pytest.approx(drawn.tolist(), abs=2e-4)


def test_only_the_last_tokens_of_a_prompt(engine: RunningEngine) -> None:
    """Earlier ones come back unscored, and the last as they are when all are scored; targets are not cut."""
    prompt = PROMPTS[0]
    ids = np.full((len(prompt) - 1, 1), -1)
    ids[3] = 7

    def ask(last: int | None) -> EngineSampleGroup:
        return engine.sample(
            prompt_token_ids=[prompt],
            max_tokens=0,
            return_prompt_logprobs=True,
            prompt_top_logprobs=2,
            prompt_logprobs_last=last,
            prompt_targets=[table(ids)],
        ).groups[0]

    whole, part = ask(None), ask(5)
    assert whole.prompt_logprobs is not None
    assert part.prompt_logprobs is not None
    assert part.prompt_logprobs[:-5] == [None] * (len(prompt) - 5)
    assert part.prompt_logprobs[-5:] == pytest.approx(whole.prompt_logprobs[-5:], abs=1e-5)
    assert (top_of(part)[0][:-5] == -1).all()
    np.testing.assert_array_equal(top_of(part)[0][-5:], top_of(whole)[0][-5:])
    scores = scores_of(part)
    assert np.isfinite(scores).tolist() == [row == 3 for row in range(len(ids))]


def test_a_long_prompt_is_scored_in_pieces(engine: RunningEngine, tiny_moe: Path) -> None:
    """Targets of many prompts of several steps each are those of each prompt alone, whatever is in the cache."""
    prompts = [[(11 * i + 5 * j) % 400 for i in range(700)] for j in range(12)]
    ids = np.arange(699)[:, None] % 400
    for _ in range(2):
        groups = engine.sample(
            prompt_token_ids=prompts,
            max_tokens=1,
            num_samples=2,
            prompt_targets=[table(ids)] * len(prompts),
        ).groups
        for group in groups[::5]:
            logprobs = all_logits(tiny_moe, None, group.prompt_token_ids).log_softmax(-1)
            scores = scores_of(group)
            expected = logprobs.numpy()[np.arange(699), ids[:, 0]]
            np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_scoring_alone_draws_and_bills_nothing(engine: RunningEngine) -> None:
    """With no tokens to draw, samples are empty and the engine counts the prompt only; the routing is the prompt's."""
    before = engine.token_counts()
    group = engine.sample(
        prompt_token_ids=[PROMPTS[0]],
        max_tokens=0,
        num_samples=3,
        logprobs=2,
        return_prompt_logprobs=True,
        return_expert_routing=True,
    ).groups[0]
    after = engine.token_counts()
    assert [sample.tokens for sample in group.samples] == [[]] * 3
    assert {sample.stop_reason for sample in group.samples} == {"length"}
    routing = group.samples[0].expert_routing
    assert routing is not None
    assert routing.shape[0] == len(PROMPTS[0])
    assert after["completion"] == before["completion"]
    assert after["prompt"] - before["prompt"] == len(PROMPTS[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_targets": []}, "prompt_targets"),
        ({"prompt_targets": [TokenTable(width=1, token_ids=b"\0" * 4)]}, "prompt_targets[0]"),
        ({"prompt_targets": [TokenTable(width=300, token_ids=b"")]}, "prompt_targets[0]"),
        ({"prompt_targets": [table(np.array([[1, 2], [3, 99999]]))]}, "prompt_targets[0][1][1]"),
        ({"prompt_targets": [table(np.array([[1, -2], [3, 4]]))]}, "prompt_targets[0][0][1]"),
        ({"prompt_top_logprobs": 257}, "prompt_top_logprobs"),
        ({"prompt_logprobs_last": 0}, "prompt_logprobs_last"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
    ],
)
def test_wrong_wishes_are_named(
    engine: RunningEngine, fields: dict[str, object], param: str
) -> None:
    """With the place at fault."""
    status, error = engine.refusal(prompt_token_ids=[[1, 2, 3]], **{"max_tokens": 1, **fields})
    assert (status, error.param) == (422, param), error
