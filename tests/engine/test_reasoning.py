"""What a model thinks before it answers, told apart from its answer by vLLM's parser, on a real engine.

The tiny model has not learned to think. Its copy here has the two tokens that set thoughts off, and requests force what
it writes: the next token is always the one with the highest bias that has not been written yet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from transformers import AutoTokenizer

from river_engine.main import EXIT_UNFIT

from .conftest import RunningEngine, running_engine

BEGIN, END = "<think>", "</think>"
WRITTEN = [BEGIN, "a", "b", END, "c", "d"]
"""What the model writes: the thought `ab` and the answer `cd`."""
BIAS_STEP = 14
"""More than what logits differ by otherwise."""
MESSAGES: Any = [{"role": "user", "content": "1+2"}]


def with_thoughts(model: Path, copy: Path) -> Path:
    """A copy of a model whose tokenizer has the two tokens, in the places of the two that it learned last."""
    shutil.copytree(model, copy)
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    last = sorted(vocabulary, key=lambda token: vocabulary[token])[-2:]
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-2]
    for token, content in zip(last, (BEGIN, END), strict=True):
        added = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": vocabulary.pop(token), "content": content, **added})
    path.write_text(json.dumps(tokenizer))
    return copy


class Thinker:
    """An engine with a reasoning parser; `forced` has the fields of a request that make the model write `WRITTEN`."""

    def __init__(self, engine: RunningEngine, model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = [tokenizer.convert_tokens_to_ids(text) for text in WRITTEN]
        self.forced: Any = {
            "temperature": 0,
            "logit_bias": {token: 100 - BIAS_STEP * place for place, token in enumerate(tokens)},
            "repetition_penalty": 1e6,
        }
        token = engine.client.headers["authorization"].removeprefix("Bearer ")
        self.openai = openai.OpenAI(base_url=f"{engine.url}/v1", api_key=token, max_retries=0)
        self.anthropic = anthropic.Anthropic(
            base_url=engine.url, auth_token=token, api_key=None, max_retries=0
        )

    def chat(self, **options: Any) -> Any:
        forced = self.forced | options.pop("extra_body", {})
        asked = {"model": "x", "messages": MESSAGES, "max_tokens": len(WRITTEN)} | options
        return self.openai.chat.completions.create(**asked, extra_body=forced)


@pytest.fixture(scope="module")
def thinker(
    tiny_moe: Path, nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Thinker]:
    directory = tmp_path_factory.mktemp("thinker")
    model = with_thoughts(tiny_moe, directory / "model")
    settings = {"RIVER_ENGINE_ID": "eng-thinker", "RIVER_REASONING_PARSER": "qwen3"}
    with running_engine(model, nats_url, directory, **settings) as running:
        thinker = Thinker(running, model)
        yield thinker
        thinker.openai.close()
        thinker.anthropic.close()


def test_chat_tells_thoughts_from_the_answer(thinker: Thinker) -> None:
    """In a field of their own, counted among the tokens of the answer, and left out where they are not wanted."""
    answer = thinker.chat()
    message = answer.choices[0].message
    assert (message.reasoning, message.content) == ("ab", "cd")
    assert answer.usage.completion_tokens == len(WRITTEN)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    (choice,) = thinker.chat(extra_body={"include_reasoning": False}).choices
    assert (getattr(choice.message, "reasoning", None), choice.message.content) == (None, "cd")


def test_chat_streams_thoughts_before_the_answer(thinker: Thinker) -> None:
    """Token by token, in the field that whole answers have, with nothing of the tokens that set them off."""
    said: list[tuple[str, Any]] = []
    for chunk in thinker.chat(stream=True):
        for choice in chunk.choices:
            thought, content = getattr(choice.delta, "reasoning", None), choice.delta.content
            assert not (thought and content)
            said += [("reasoning", thought)] * bool(thought) + [("content", content)] * bool(
                content
            )
    assert said == [("reasoning", "a"), ("reasoning", "b"), ("content", "c"), ("content", "d")]


def test_thoughts_that_do_not_end_are_no_answer(thinker: Thinker) -> None:
    """When the tokens run out before there is one."""
    (choice,) = thinker.chat(max_tokens=3).choices
    assert (choice.message.reasoning, choice.message.content) == ("ab", None)
    assert choice.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_is_for_the_answer_only(thinker: Thinker, stream: bool) -> None:
    """What a structured output allows holds after the thoughts, which are free."""
    answer = thinker.chat(
        stream=stream, max_tokens=32, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    if stream:
        deltas = [choice.delta for chunk in answer for choice in chunk.choices]
        thought = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        thought, content = answer.choices[0].message.reasoning, answer.choices[0].message.content
    assert thought == "ab"
    assert content in ("yes", "no")


def test_responses_have_thoughts_as_an_item(thinker: Thinker) -> None:
    """Before the message, whole and streamed."""
    asked: Any = {"model": "x", "input": "1+2", "max_output_tokens": len(WRITTEN)}
    response = thinker.openai.responses.create(**asked, extra_body=thinker.forced)
    thought: Any
    thought, message = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "ab")
    assert (message.type, response.output_text) == ("message", "cd")
    events = thinker.openai.responses.create(**asked, stream=True, extra_body=thinker.forced)
    deltas: Any = [event for event in events if event.type.endswith("_text.delta")]
    pieces = {"response.reasoning_text.delta": "", "response.output_text.delta": ""}
    for event in deltas:
        pieces[event.type] += event.delta
    assert list(pieces.values()) == ["ab", "cd"]


def test_messages_have_thoughts_as_a_block(thinker: Thinker) -> None:
    """Anthropic's way; its API has no biases, so here the model thinks what it likes, and comes to no end."""
    asked: Any = {"model": "x", "messages": MESSAGES, "max_tokens": 8}
    greedy = {"temperature": 0}
    (block,) = thinker.anthropic.messages.create(**asked, extra_body=greedy).content
    assert block.type == "thinking"
    assert block.thinking
    with thinker.anthropic.messages.stream(**asked, extra_body=greedy) as stream:
        pieces = [event.thinking for event in stream if event.type == "thinking"]
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "thinking"
    assert "".join(pieces) == streamed.thinking == block.thinking


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"RIVER_REASONING_PARSER": "nobody"}, "RIVER_REASONING_PARSER=nobody: must be one of ["),
        ({"RIVER_REASONING_PARSER": "deepseek_r1"}, "deepseek_r1: the model does not fit: "),
        ({"RIVER_TOOL_PARSER": "nobody"}, "RIVER_TOOL_PARSER=nobody: must be one of ["),
    ],
)
def test_a_parser_that_does_not_fit_is_told_at_the_start(
    tiny_moe: Path, tmp_path: Path, settings: dict[str, str], complaint: str
) -> None:
    """And not to everybody who asks something; the model that ships has no tokens that set off thoughts."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RIVER_BASE_MODEL": "river/tiny-moe",
        "RIVER_MODEL_PATH": str(tiny_moe),
        "RIVER_ENGINE_TOKEN": "x",
        "RIVER_PORT": "0",
        "RIVER_DATA_DIR": str(tmp_path),
        **settings,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "river_engine.main"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == EXIT_UNFIT
    assert complaint in ended.stderr
