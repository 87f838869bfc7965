"""The unmodified `openai` and `anthropic` packages against a real engine: what is passed on does its work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from support.gateway_usage import billed
from support.platform_runs import answered, fit, new_model
from transformers import AutoTokenizer

import river_client as river
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe.problems import make_prompt, problems

QUESTION = problems("held_out", 1)[0].question
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
PARAMETERS: Any = {
    "type": "object",
    "properties": {"number": {"type": "integer"}},
    "required": ["number"],
    "additionalProperties": False,
}
CALL = '<tool_call>{"name": "add", "arguments": {"number": 3}}</tool_call><|im_end|>'
FUNCTION: Any = {"name": "add", "description": "Adds.", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}
FLAT_TOOL: Any = {"type": "function", **FUNCTION, "strict": True}
GREEDY: Any = {"temperature": 0}
"""The package has no such parameter any more; the API does."""
FLAG: Any = {
    "type": "object",
    "properties": {"flag": {"type": "boolean"}},
    "required": ["flag"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Caller:
    """A tenant, its clients, and a run of its own that answers `QUESTION` with a call of the tool `add`."""

    river: river.Client
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    model: river.Model

    def chat(self, model: str = TINY_MOE_NAME, **options: Any) -> Any:
        asked = {"messages": MESSAGES, "max_tokens": 32} | options
        return self.openai.chat.completions.create(model=model, **asked)


@pytest.fixture(scope="module")
def caller(stack: StackInfo) -> Iterator[Caller]:
    """One tenant for all tests here: to train the run takes longer than any of them."""
    key = new_tenant_key(stack)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    with (
        river.Client(api_key=key, base_url=stack.base_url) as client,
        openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=key, max_retries=0) as ours,
        anthropic.Anthropic(base_url=stack.base_url, api_key=key, max_retries=0) as theirs,
        client.session() as session,
    ):
        model = new_model(session)
        fit(model, [answered(tokenizer, QUESTION, CALL)], steps=100, lr=4e-3)
        yield Caller(client, ours, theirs, model)


# ---- Chat and text completions ---------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_adapter(caller: Caller) -> None:
    """The numbers of a run's completion are the trainer's for the same tokens, and not the base model's."""
    answer = caller.openai.completions.create(
        model=caller.model.path,
        prompt=make_prompt(QUESTION),
        max_tokens=12,
        temperature=1,
        seed=5,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    choice: Any = answer.choices[0]
    assert len(choice.logprobs.top_logprobs[0]) >= 2
    datum = {"input_ids": choice.prompt_token_ids + choice.token_ids}
    trained = caller.model.forward([datum], loss_fn="cross_entropy").logprobs[0]
    first = len(choice.prompt_token_ids) - 1
    own = np.asarray(trained)[first : first + len(choice.token_ids)]
    np.testing.assert_allclose(choice.logprobs.token_logprobs, own, atol=1e-4, rtol=0)
    base = caller.openai.completions.create(
        model=TINY_MOE_NAME,
        prompt=datum["input_ids"],
        max_tokens=1,
        echo=True,
        logprobs=1,
    )
    assert base.choices[0].logprobs is not None
    of_base: Any = base.choices[0].logprobs.token_logprobs
    assert np.abs(np.asarray(of_base[first + 1 : first + 1 + len(own)]) - own).max() > 0.1


def test_top_log_probabilities_of_chat(caller: Caller) -> None:
    """Each position has as many alternatives as were asked for, most likely first, the chosen one with its number."""
    answer = caller.chat(logprobs=True, top_logprobs=3, temperature=0, max_tokens=4)
    for position in answer.choices[0].logprobs.content:
        tops = [top.logprob for top in position.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert position.logprob == pytest.approx(tops[0])
        assert bytes(position.bytes).decode() == position.token


def test_choices_stops_and_seeds(caller: Caller) -> None:
    """`n` answers come of one prompt, which is counted once; a seed repeats; a stop string ends and is not shown."""
    several = caller.chat(n=3, seed=11, temperature=1.5, max_tokens=8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    one = caller.chat(seed=11, temperature=1, max_tokens=8)
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens <= 24
    again = caller.chat(n=3, seed=11, temperature=1.5, max_tokens=8)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) > 1
    whole = caller.chat(temperature=0, max_tokens=24).choices[0].message.content
    cut = whole[len(whole) // 2 :][:3]
    stopped = caller.chat(temperature=0, max_tokens=24, stop=[cut, "\n\n\n"])
    assert stopped.choices[0].message.content == whole[: whole.index(cut)]
    assert stopped.choices[0].finish_reason == "stop"


def test_biases_and_penalties(caller: Caller) -> None:
    """A bias that forbids the first token changes it; a bias that demands one gets it at every place."""
    first = caller.chat(temperature=0, max_tokens=1, extra_body={"return_token_ids": True})
    (token,) = first.choices[0].token_ids
    options: Any = {"temperature": 0, "extra_body": {"return_token_ids": True}}
    without = caller.chat(logit_bias={str(token): -100}, max_tokens=1, **options)
    assert without.choices[0].token_ids != [token]
    always = caller.chat(logit_bias={str(token): 100}, max_tokens=5, **options)
    assert always.choices[0].token_ids == [token] * 5
    penalized = caller.chat(
        logit_bias={str(token): 100},
        max_tokens=5,
        presence_penalty=2,
        frequency_penalty=2,
        **options,
    )
    assert penalized.choices[0].token_ids[0] == token


def test_json_that_follows_a_schema(caller: Caller) -> None:
    """What a schema asks for parses, through chat, through Responses, and as the package's own parsed objects."""
    schema: Any = {"name": "answer", "strict": True, "schema": FLAG}
    text: Any = {"format": {"type": "json_schema", **schema}}
    chat = caller.chat(
        response_format={"type": "json_schema", "json_schema": schema}, temperature=1
    )
    assert set(json.loads(chat.choices[0].message.content)) == {"flag"}
    response = caller.openai.responses.create(
        model=TINY_MOE_NAME,
        input=QUESTION,
        text=text,
        max_output_tokens=32,
    )
    assert isinstance(json.loads(response.output_text)["flag"], bool)


# ---- Tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "add"}}]
)
def test_a_tool_is_called(caller: Caller, choice: Any) -> None:
    """A model that has learned to call does so, left to itself, made to, and told which; streamed alike."""
    options: Any = {"tools": [TOOL], "tool_choice": choice, "temperature": 0, "max_tokens": 64}
    answer = caller.chat(caller.model.path, **options).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name) == ("function", "add")
    assert json.loads(call.function.arguments) == {"number": 3}
    name, arguments, reasons = "", "", set[str]()
    for chunk in caller.chat(caller.model.path, stream=True, **options):
        for part in chunk.choices:
            reasons |= {part.finish_reason} if part.finish_reason else set()
            for delta in part.delta.tool_calls or ():
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
    assert (name, json.loads(arguments)) == ("add", {"number": 3})
    assert reasons <= {"tool_calls", "stop"}


def test_tools_through_the_other_apis(caller: Caller) -> None:
    """Responses and Messages call the same tool in their own forms; a tool that is not wanted is not called."""
    response = caller.openai.responses.create(
        model=caller.model.path,
        input=QUESTION,
        tools=[FLAT_TOOL],
        temperature=0,
        max_output_tokens=64,
    )
    (called,) = [item for item in response.output if item.type == "function_call"]
    assert (called.name, json.loads(called.arguments)) == ("add", {"number": 3})
    message = caller.anthropic.messages.create(
        model=caller.model.path,
        messages=MESSAGES,
        tools=[{"name": "add", "description": "Adds.", "input_schema": PARAMETERS}],
        max_tokens=64,
        extra_body=GREEDY,
    )
    (used,) = [block for block in message.content if block.type == "tool_use"]
    assert (used.name, used.input) == ("add", {"number": 3})
    assert message.stop_reason == "tool_use"
    unwanted = caller.chat(tools=[TOOL], tool_choice="none", temperature=0)
    assert not unwanted.choices[0].message.tool_calls


# ---- Responses and Messages ------------------------------------------------------------------------------------------


def test_all_apis_give_the_same_answer(caller: Caller) -> None:
    """Greedy, a question gets one answer, whichever API it comes through, streamed or whole."""
    expected = caller.chat(temperature=0, max_tokens=24).choices[0].message.content
    asked: Any = {"model": TINY_MOE_NAME, "temperature": 0}
    response = caller.openai.responses.create(input=MESSAGES, max_output_tokens=24, **asked)
    assert (response.output_text, response.model) == (expected, TINY_MOE_NAME)
    with caller.openai.responses.create(
        input=MESSAGES, max_output_tokens=24, stream=True, **asked
    ) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == expected
    asked = {"model": TINY_MOE_NAME, "messages": MESSAGES, "max_tokens": 24, "extra_body": GREEDY}
    message = caller.anthropic.messages.create(**asked)
    assert message.content[0].type == "text"
    assert (message.content[0].text, message.model) == (expected, TINY_MOE_NAME)
    with caller.anthropic.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens


def test_tokens_are_counted_before_they_are_used(caller: Caller) -> None:
    """What count_tokens says is what the message then uses, cached tokens included."""
    counted = caller.anthropic.messages.count_tokens(model=TINY_MOE_NAME, messages=MESSAGES)
    used = caller.anthropic.messages.create(
        model=TINY_MOE_NAME, messages=MESSAGES, max_tokens=2
    ).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_every_route_bills_what_it_says(stack: StackInfo) -> None:
    """Whole and streamed, on each route, the bill has the tokens that the answers report; counting tokens is free."""
    key = new_tenant_key(stack)
    prompt = completion = 0
    with (
        openai.OpenAI(base_url=f"{stack.base_url}/v1", api_key=key, max_retries=0) as ours,
        anthropic.Anthropic(base_url=stack.base_url, auth_token=key, max_retries=0) as theirs,
    ):
        chat: Any = {"model": TINY_MOE_NAME, "messages": MESSAGES, "max_tokens": 5}
        whole = ours.chat.completions.create(**chat).usage
        streamed = [
            chunk.usage
            for chunk in ours.chat.completions.create(
                **chat, stream=True, stream_options={"include_usage": True}
            )
        ][-1]
        for usage in (whole, streamed):
            assert usage is not None
            prompt += usage.prompt_tokens
            completion += usage.completion_tokens
        asked: Any = {"model": TINY_MOE_NAME, "input": QUESTION, "max_output_tokens": 5}
        response = ours.responses.create(**asked)
        last: Any = list(ours.responses.create(**asked, stream=True))[-1]
        for of_response in (response.usage, last.response.usage):
            assert of_response is not None
            prompt += of_response.input_tokens
            completion += of_response.output_tokens
        theirs.messages.count_tokens(model=TINY_MOE_NAME, messages=MESSAGES)
        message = theirs.messages.create(**chat)
        with theirs.messages.stream(**chat) as stream:
            final = stream.get_final_message()
        for of_message in (message.usage, final.usage):
            prompt += of_message.input_tokens + (of_message.cache_read_input_tokens or 0)
            completion += of_message.output_tokens
    with river.Client(api_key=key, base_url=stack.base_url) as client:
        assert billed(client, events=6) == {"prompt": prompt, "completion": completion}


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        (
            {"messages": [{"role": "user", "content": "word " * 2000}]},
            None,
            "context_length_exceeded",
        ),
        ({"temperature": -3}, "temperature", None),
        ({"top_logprobs": -2, "logprobs": True}, "top_logprobs", None),
        ({"messages": "x"}, "messages", "invalid_type"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_type"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", None),
        ({"extra_body": {"no_such_field": 1}}, None, None),
    ],
)
def test_bad_requests(caller: Caller, options: Any, param: str | None, code: str | None) -> None:
    """What an engine refuses is a BadRequestError that names the field, with OpenAI's code where it has one."""
    with pytest.raises(openai.BadRequestError) as refused:
        caller.chat(**options)
    assert refused.value.type == "invalid_request_error"
    if param is not None:
        assert refused.value.param == param
    if code is not None:
        assert refused.value.code == code
    for word in ("vllm", "Traceback", "parameter=", "'loc'"):
        assert word not in refused.value.message


def test_bad_requests_of_the_other_apis(caller: Caller) -> None:
    """Responses refuses as chat does; Messages in Anthropic's classes and shape."""
    with pytest.raises(openai.BadRequestError) as refused:
        caller.openai.responses.create(model=TINY_MOE_NAME, input=QUESTION, temperature=-3)
    assert refused.value.param == "temperature"
    with pytest.raises(anthropic.BadRequestError) as bad:
        caller.anthropic.messages.create(
            model=TINY_MOE_NAME,
            messages=MESSAGES,
            max_tokens=2,
            extra_body={"temperature": -3},
        )
    body: Any = bad.value.body
    assert body["error"]["type"] == "invalid_request_error"
    assert "temperature" in body["error"]["message"]


def test_another_tenant_s_run_is_unknown_to_all(
    caller: Caller, new_anthropic: Callable[[], anthropic.Anthropic]
) -> None:
    """Anthropic's client is told of a stranger's run what it is told of nothing at all."""
    for name in (caller.model.path, "nobody/knows"):
        with pytest.raises(anthropic.NotFoundError):
            new_anthropic().messages.create(model=name, messages=MESSAGES, max_tokens=2)


@pytest.fixture
def new_anthropic(stack: StackInfo) -> Iterator[Callable[[], anthropic.Anthropic]]:
    """Makes clients, each of a tenant of its own."""
    clients: list[anthropic.Anthropic] = []

    def make() -> anthropic.Anthropic:
        clients.append(
            anthropic.Anthropic(
                base_url=stack.base_url, api_key=new_tenant_key(stack), max_retries=0
            )
        )
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_what_others_asked_cannot_be_found_out(
    caller: Caller, new_anthropic: Callable[[], anthropic.Anthropic]
) -> None:
    """A tenant's repeated prompt comes from the cache for itself, and is new for everybody else."""
    asked: Any = {
        "model": TINY_MOE_NAME,
        "messages": [{"role": "user", "content": "A secret of one tenant. " * 12}],
        "max_tokens": 1,
    }
    caller.anthropic.messages.create(**asked)
    assert caller.anthropic.messages.create(**asked).usage.cache_read_input_tokens
    assert not new_anthropic().messages.create(**asked).usage.cache_read_input_tokens
