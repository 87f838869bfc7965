"""Requests made at random out of the gateway's OpenAPI document, against a real engine and trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.schemathesis_run import document, fuzz

from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo


@pytest.mark.timeout(600)
def test_nothing_that_the_document_allows_breaks_the_gateway(
    stack: StackInfo, tmp_path: Path
) -> None:
    """No request that the document describes, nor one that it forbids, is answered with 5xx, and all are answered.

    The answers have the status, the content type and the shape that the document says.
    """
    described = document(stack.base_url, TINY_MOE_NAME)
    key = new_tenant_key(stack)
    fuzzed = fuzz(stack.base_url, key, described, tmp_path)
    report = fuzzed.report
    assert not fuzzed.failed, report
    tested = re.search(r"Tested: (\d+)", report)
    assert tested is not None, report
    operations = sum(len(operations) for operations in described["paths"].values())
    assert int(tested[1]) == operations - 1, report
    ready = httpx.get(f"{stack.base_url}/readyz")
    assert ready.status_code == 200


def _forget_errors(operation: Any) -> None:
    operation["responses"] = {"200": operation["responses"]["200"]}


def _expect_text(operation: Any) -> None:
    for answer in operation["responses"].values():
        answer["content"] = {"text/plain": {"schema": {"type": "string"}}}


def _expect_more(operation: Any) -> None:
    for answer in operation["responses"].values():
        answer["content"]["application/json"]["schema"] = {"type": "object", "required": ["more"]}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_forget_errors, "Undocumented status code"),
        (_expect_text, "Undocumented Content-Type"),
        (_expect_more, "Response violates schema"),
    ],
)
def test_a_wrong_document_would_be_found_out(
    stack: StackInfo, tmp_path: Path, spoil: Callable[[Any], None], complaint: str
) -> None:
    """Statuses, content types and shapes that the gateway does not keep to are complained of."""
    described = document(stack.base_url, TINY_MOE_NAME)
    path = "/river/v1/runs/{run_id}"
    spoil(described["paths"][path]["get"])
    fuzzed = fuzz(stack.base_url, new_tenant_key(stack), described, tmp_path, only=path)
    assert fuzzed.failed
    assert complaint in fuzzed.report


def test_the_document_names_the_fields_of_every_inference_route(stack: StackInfo) -> None:
    """Bodies that no struct decodes are described all the same, with what they must have and no more than they may."""
    paths = httpx.get(f"{stack.base_url}/schema/openapi.json").json()["paths"]
    for path, needed in {
        "/v1/chat/completions": "messages",
        "/v1/completions": "prompt",
        "/v1/responses": "input",
        "/v1/messages": "max_tokens",
        "/v1/messages/count_tokens": "messages",
    }.items():
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"model", needed} <= set(schema["required"]) <= set(schema["properties"])
        assert schema["additionalProperties"] is False
        assert "priority" not in schema["properties"]
