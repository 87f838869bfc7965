"""The unmodified `openai` package against the whole stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from support.platform_runs import fit, new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe.problems import make_prompt, problems

QUESTION = problems("held_out", 1)[0].question
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def openai_client(stack: StackInfo, client: river.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.base_url}/v1", api_key=client.api_key, max_retries=0
    ) as made:
        yield made


def test_chat_streams_what_it_answers(openai_client: openai.OpenAI) -> None:
    """Greedy chat gives the same text streamed and not, and the usage that was asked for."""
    whole = openai_client.chat.completions.create(
        model=TINY_MOE_NAME, messages=MESSAGES, max_tokens=24, temperature=0
    )
    assert whole.model == TINY_MOE_NAME
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 24
    chunks = list(
        openai_client.chat.completions.create(
            model=TINY_MOE_NAME,
            messages=MESSAGES,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions_stream_what_they_answer(openai_client: openai.OpenAI) -> None:
    """The older completions endpoint, streamed and not."""
    prompt = make_prompt(QUESTION)
    whole = openai_client.completions.create(
        model=TINY_MOE_NAME, prompt=prompt, max_tokens=16, temperature=0, logprobs=1
    )
    assert whole.choices[0].logprobs is not None
    pieces = openai_client.completions.create(
        model=TINY_MOE_NAME, prompt=prompt, max_tokens=16, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_a_checkpoint_an_alias_and_a_run_answer_by_name(
    stack: StackInfo,
    client: river.Client,
    openai_client: openai.OpenAI,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A run, a checkpoint of either mode and an alias are models, and each answer says which version made it."""
    with client.session() as session:
        model = new_model(session)
        fit(model, supervised_data(tokenizer, answer="Yes.<|im_end|>"), steps=30, lr=2e-3)
        version = model.policy_version
        paths = [model.path]
        paths += [
            model.save_weights("served", mode=mode).path for mode in ("training", "inference")
        ]
        client.checkpoints.promote(paths[-1], "mine")
        for name in [*paths, "mine"]:
            raw = openai_client.chat.completions.with_raw_response.create(
                model=name, messages=MESSAGES, max_tokens=16, temperature=0
            )
            assert raw.headers["x-river-policy-version"] == version
            assert raw.headers["x-request-id"]
            answer = raw.parse()
            assert answer.model == name
            assert answer.choices[0].message.content == "Yes."
        listed = {listed.id for listed in openai_client.models.list()}
        assert {TINY_MOE_NAME, "mine", paths[-1]} <= listed


def test_errors_are_the_packages_own(
    stack: StackInfo, openai_client: openai.OpenAI, new_client: Callable[[], river.Client]
) -> None:
    """A bad key, an unknown model, a stranger's run and a bad field raise the classes the package documents."""
    bad = openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key="rv-wrong", max_retries=0)
    with bad, pytest.raises(openai.AuthenticationError):
        bad.models.list()
    with pytest.raises(openai.NotFoundError) as unknown:
        openai_client.chat.completions.create(model="nobody/knows", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with new_client().session() as session:
        stranger = new_model(session)
        with pytest.raises(openai.NotFoundError):
            openai_client.chat.completions.create(model=stranger.path, messages=MESSAGES)
    with pytest.raises(openai.BadRequestError):
        openai_client.chat.completions.create(
            model=TINY_MOE_NAME, messages=MESSAGES, temperature=-3
        )
