"""The SDK against wrong input: the right exception, naming field and index, and a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from support.platform_runs import new_model

import river_client as river
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo

GOOD = {"input_ids": [5, 6, 7, 8], "old_logprobs": [-1.0] * 4, "advantages": [1.0, -1.0, 1.0, 0.0]}


@dataclass(frozen=True)
class Running:
    client: river.Client
    model: river.Model


@pytest.fixture
def running(client: river.Client) -> Iterator[Running]:
    with client.session() as session:
        yield Running(client, new_model(session))


def vocabulary(running: Running) -> river.BaseModel:
    return next(model for model in running.client.models() if model.name == TINY_MOE_NAME)


def test_a_bad_key(stack: StackInfo) -> None:
    """A key nobody made is refused as such."""
    client = river.Client(api_key="rv-nobody", base_url=stack.base_url)
    with client, pytest.raises(river.AuthenticationError):
        client.session().__enter__()


def test_an_unknown_model(client: river.Client) -> None:
    """A base model that nobody serves is not found, for training and for sampling."""
    with client.session() as session, pytest.raises(river.NotFoundError, match="no/such-model"):
        session.create_model(base_model="no/such-model")
    with pytest.raises(river.NotFoundError, match="no/such-model"):
        client.sample(model="no/such-model", prompts=["hello"])


def wrong_data() -> list[Any]:
    """(what is changed in the second datum, the field and index that the error must name)."""
    return [
        pytest.param({"input_ids": [5, 6, 99_999, 8]}, "data[1].input_ids[2]", id="vocabulary"),
        pytest.param({"input_ids": [5, -1, 7, 8]}, "data[1].input_ids[1]", id="negative"),
        pytest.param({"advantages": [1.0, 2.0]}, "data[1].advantages", id="misaligned"),
        pytest.param(
            {"advantages": [0.0, float("nan"), 0.0, 0.0]}, "data[1].advantages[1]", id="nan"
        ),
        pytest.param(
            {"old_logprobs": [0.0, 0.0, float("inf"), 0.0]},
            "data[1].old_logprobs[2]",
            id="infinite",
        ),
        pytest.param({"input_ids": [5]}, "data[1].input_ids", id="too short"),
        pytest.param({"old_logprobs": None}, "data[1].old_logprobs", id="missing"),
    ]


@pytest.mark.parametrize(("change", "param"), wrong_data())
def test_wrong_data(running: Running, change: dict[str, Any], param: str) -> None:
    """Each kind of wrong data is refused before it is accepted, by field and index; good data then still works."""
    with pytest.raises(river.InvalidRequestError) as refused:
        running.model.forward_backward([GOOD, GOOD | change], loss_fn="importance_sampling")
    assert refused.value.field == param.split("[", 1)[0] or refused.value.param == param
    assert refused.value.param == param
    assert_usable(running)


def test_a_sequence_over_the_context_length(running: Running) -> None:
    """A sequence that is too long is refused with its length and the limit."""
    length = vocabulary(running).context_length + 1
    with pytest.raises(river.InvalidRequestError, match=str(length - 1)) as refused:
        running.model.forward_backward([{"input_ids": [5] * length}])
    assert refused.value.param == "data[0].input_ids"
    with pytest.raises(river.InvalidRequestError):
        running.model.sample(prompt_token_ids=[[5] * length])
    assert_usable(running)


def test_a_prompt_token_outside_the_vocabulary(running: Running) -> None:
    """Sampling names the token that is no token."""
    with pytest.raises(river.InvalidRequestError) as refused:
        running.model.sample(prompt_token_ids=[[5, 6], [7, 99_999]])
    assert refused.value.param == "prompt_token_ids[1][1]"
    assert_usable(running)


def test_a_step_without_gradients_fails_alone(running: Running) -> None:
    """An optimizer step with nothing to apply fails, and the run goes on."""
    with pytest.raises(river.OperationFailedError):
        running.model.optim_step(lr=1e-3)
    assert_usable(running)


def test_wrong_settings_are_named(running: Running) -> None:
    """An unknown loss, a senseless learning rate and an oversized rank are refused by name."""
    with pytest.raises(river.InvalidRequestError, match="loss_fn"):
        running.model.forward_backward([GOOD], loss_fn=cast("Any", "no_such_loss"))
    with pytest.raises(river.InvalidRequestError, match="lr"):
        running.model.train_step([GOOD], loss_fn="cross_entropy", lr=float("nan"))
    with (
        running.client.session() as session,
        pytest.raises(river.InvalidRequestError, match="rank"),
    ):
        session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=100_000))
    assert_usable(running)


def assert_usable(running: Running) -> None:
    """The run takes a step and moves on by exactly one version."""
    before = running.client.runs.get(running.model.run_id).step
    running.model.train_step([GOOD], loss_fn="importance_sampling", lr=1e-4)
    assert running.model.policy_version == f"{running.model.run_id}@{before + 1}"
    assert running.model.sample(prompt_token_ids=[[5, 6]], max_tokens=2)
