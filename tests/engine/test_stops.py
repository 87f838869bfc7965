"""What ends a sample, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from river_engine.protocol import EngineSequence

from .conftest import RunningEngine

PROMPT = "12+30="
END = "<|im_end|>"


@pytest.fixture(scope="module")
def end_token(tiny_moe: Path) -> int:
    """The model's own end token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    token = tokenizer.convert_tokens_to_ids(END)
    eos = AutoConfig.from_pretrained(tiny_moe).eos_token_id
    assert token == eos or token in eos
    return token


def draw(engine: RunningEngine, **fields: object) -> list[EngineSequence]:
    """Samples that meet the model's end token early and often."""
    options = {"prompts": [PROMPT], "num_samples": 12, "max_tokens": 60, "seed": 3}
    samples = engine.sample(**{**options, **fields}).groups[0].samples
    assert all(len(sample.tokens) == len(sample.logprobs) for sample in samples)
    return samples


def test_the_end_token_stops_unless_ignored(engine: RunningEngine, end_token: int) -> None:
    """It is the last token of a sample that it stopped; ignored, samples go on past it to their limit."""
    stopped = [sample for sample in draw(engine) if sample.stop_reason == "stop"]
    assert stopped
    assert {sample.tokens[-1] for sample in stopped} == {end_token}
    on = draw(engine, ignore_eos=True)
    assert {(sample.stop_reason, len(sample.tokens)) for sample in on} == {("length", 60)}
    assert any(end_token in sample.tokens[:-1] for sample in on)


def test_the_end_token_stops_beside_stop_strings(engine: RunningEngine, end_token: int) -> None:
    """Naming strings, or tokens, to stop at does not take the model's own end away."""
    for stops in ({"stop": ["never said"]}, {"stop_token_ids": [0]}):
        stopped = [sample for sample in draw(engine, **stops) if sample.stop_reason == "stop"]
        assert {sample.tokens[-1] for sample in stopped} == {end_token}


def test_a_token_named_stops_even_where_the_end_is_ignored(
    engine: RunningEngine, end_token: int
) -> None:
    """`ignore_eos` with the end token, or its text, among the stops is a stop all the same."""
    plain = [sample.tokens for sample in draw(engine)]
    assert [s.tokens for s in draw(engine, ignore_eos=True, stop_token_ids=[end_token])] == plain
    assert [s.tokens for s in draw(engine, ignore_eos=True, stop=[END])] == plain


def test_a_stop_token_is_the_last_token(engine: RunningEngine) -> None:
    """A sample ends with the first token that is named, which belongs to it."""
    free = draw(engine, temperature=0.0, num_samples=1)[0]
    wanted = free.tokens[2]
    (sample,) = draw(engine, temperature=0.0, num_samples=1, stop_token_ids=[wanted])
    assert sample.stop_reason == "stop"
    assert sample.tokens == free.tokens[: free.tokens.index(wanted) + 1]
    assert sample.logprobs == pytest.approx(free.logprobs[: len(sample.tokens)], abs=1e-5)


def test_a_stop_string_is_found_over_tokens(engine: RunningEngine, tiny_moe: Path) -> None:
    """The tokens go through the one that completes it, the text ends before it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe)
    free = draw(engine, temperature=0.0, num_samples=1, ignore_eos=True)[0]
    texts = [tokenizer.decode(free.tokens[:end]) for end in range(len(free.tokens) + 1)]
    # The last character of one token and the first of the next.
    cut = next(i for i in range(2, 40) if texts[i] and len(texts[i + 1]) > len(texts[i]))
    stop = texts[cut + 1][len(texts[cut]) - 1 : len(texts[cut]) + 1]
    (sample,) = draw(engine, temperature=0.0, num_samples=1, ignore_eos=True, stop=[stop])
    assert sample.stop_reason == "stop"
    assert sample.text == texts[-1][: texts[-1].index(stop)]
    assert stop in tokenizer.decode(sample.tokens)
    assert stop not in tokenizer.decode(sample.tokens[:-1])
    assert sample.tokens == free.tokens[: len(sample.tokens)]


def test_no_limit_samples_to_the_end_of_the_context(engine: RunningEngine, tiny_moe: Path) -> None:
    """Without `max_tokens` a sample that nothing stops fills the context."""
    context_length = AutoConfig.from_pretrained(tiny_moe).max_position_embeddings
    prompt = [7] * (context_length - 9)
    group = engine.sample(
        prompt_token_ids=[prompt, [7] * 3], max_tokens=None, ignore_eos=True, stop_token_ids=[0]
    ).groups[0]
    assert len(group.samples[0].tokens) == 9
    assert group.samples[0].stop_reason == "length"


def test_a_stop_token_outside_the_vocabulary_is_named(engine: RunningEngine) -> None:
    """With its index."""
    status, error = engine.refusal(prompts=["a"], max_tokens=1, stop_token_ids=[1, 99999])
    assert (status, error.param) == (422, "stop_token_ids[1]"), error
