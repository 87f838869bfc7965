"""An engine that holds one copy of what the experts of an adapter share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from safetensors.torch import load_file, save_file

from river_engine.adapter_files import WEIGHTS_FILE
from river_engine.protocol import EXPERT_LAYOUT_METADATA, SHARED_OUTER, AdapterRef

from .conftest import RunningEngine, running_engine
from .reference import token_logprobs

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(scope="module")
def engine(
    tiny_moe: Path, nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """One in vLLM's layout of shared factors; its self-test has passed."""
    directory = tmp_path_factory.mktemp("shared")
    with running_engine(
        tiny_moe,
        nats_url,
        directory,
        RIVER_EXPERT_LAYOUT=SHARED_OUTER,
        RIVER_ENGINE_ID="eng-shared",
    ) as running:
        yield running


@pytest.mark.parametrize("only", ["", ".self_attn."], ids=["everything", "attention"])
def test_it_answers_as_peft_does(
    engine: RunningEngine, tiny_moe: Path, make_adapter: Callable[..., AdapterRef], only: str
) -> None:
    """The log-probabilities of prompt and sample are those of PEFT, which has a copy for every expert."""
    ref = make_adapter(seed=71, shared_experts=True, only=only)
    answer = engine.sample(
        adapter=ref,
        prompt_token_ids=[PROMPT],
        max_tokens=6,
        temperature=1.0,
        return_prompt_logprobs=True,
    )
    (group,) = answer.groups
    (sample,) = group.samples
    expected = token_logprobs(tiny_moe, ref, PROMPT + sample.tokens)
    assert group.prompt_logprobs is not None
    prompt = [value for value in group.prompt_logprobs if value is not None]
    assert [*prompt, *sample.logprobs] == pytest.approx(expected, abs=1e-4)


def test_adapters_that_share_nothing_are_refused(
    engine: RunningEngine, make_adapter: Callable[..., AdapterRef]
) -> None:
    """They would answer wrongly: with the first expert's factors for all."""
    status, error = engine.refusal(
        adapter=make_adapter(seed=72), prompt_token_ids=[PROMPT], max_tokens=1, temperature=1.0
    )
    assert status == 422
    assert "its experts share no factor" in error.message


def test_copies_that_differ_are_refused(
    engine: RunningEngine, make_adapter: Callable[..., AdapterRef]
) -> None:
    """A file that says its experts share a factor, and has different ones, is broken."""
    ref = make_adapter(seed=73, shared_experts=True)
    file = Path(unquote(urlsplit(ref.location).path)) / WEIGHTS_FILE
    tensors = load_file(file)
    name = next(name for name in tensors if "base_layer.lora_A" in name)
    tensors[name][-1] += 1.0
    save_file(tensors, file, {EXPERT_LAYOUT_METADATA: SHARED_OUTER})
    status, error = engine.refusal(
        adapter=ref, prompt_token_ids=[PROMPT], max_tokens=1, temperature=1.0
    )
    assert status == 422
    assert "differs from expert to expert" in error.message
