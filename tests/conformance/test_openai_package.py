"""The `openai` package's own tests of its API, run against a real gateway and engine."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from support.openai_not_served import NOT_SERVED
from support.openai_package import package_tests, run_package_tests

import river_client as river
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo

FILES = [
    "chat/test_completions.py",
    "chat/completions/test_messages.py",
    "test_completions.py",
    "test_models.py",
    "test_responses.py",
    "responses/test_input_items.py",
    "responses/test_input_tokens.py",
]
MODELS = ("gpt-6-astra", "gpt-3.5-turbo-instruct")
"""What the tests call their models: here aliases of a run."""


@pytest.mark.timeout(900)
def test_what_river_serves_passes_and_the_rest_is_listed(stack: StackInfo) -> None:
    """Each test of the package passes, in all forms of its clients, unless its name and reason are in the list."""
    made = package_tests(version("openai"))
    key = new_tenant_key(stack)
    with river.Client(api_key=key, base_url=stack.base_url) as client, client.session() as session:
        run = session.create_model(base_model=TINY_MOE_NAME, lora=river.LoraConfig(rank=8))
        for model in MODELS:
            client.checkpoints.promote(run.path, model)
        outcomes = run_package_tests(made, FILES, base_url=stack.base_url, key=key)
    assert outcomes.failed - NOT_SERVED.keys() == set(), outcomes.report
    assert NOT_SERVED.keys() - outcomes.failed == set(), "served by now: take them off the list"
    # Its tests of parameters in paths never leave the client.
    sent = {name for name in outcomes.passed if "_path_params_" not in name}
    assert len(sent) >= 20, sorted(sent)


def test_the_list_names_tests_of_the_package() -> None:
    """A name that the package does not have would hide nothing, but mislead."""
    source = package_tests(version("openai")) / "source" / "tests" / "api_resources"
    for name in NOT_SERVED:
        file, _, function = name.partition("::")
        assert f"def {function}(" in Path(source, file).read_text(), name
