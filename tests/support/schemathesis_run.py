"""Schemathesis, which makes requests out of an OpenAPI document, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from support.openai_package import ROOT, cache_directory, pip

REQUIREMENTS = ROOT / "tests" / "conformance" / "schemathesis" / "requirements.txt"
RUN_TIMEOUT_S = 200.0
ANSWER_TOKENS_MAX = 4
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def schemathesis() -> Path:
    """The program, installed on first use; skips the test when the package index cannot be reached."""
    made = cache_directory() / "schemathesis"
    stamp = made / "made"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        venv.create(made, with_pip=True, clear=True)
        pip(str(made / "bin" / "python"), ["install"], ["-r", str(REQUIREMENTS)])
        stamp.write_text(REQUIREMENTS.read_text())
    return made / "bin" / "schemathesis"


def document(base_url: str, model: str) -> dict[str, Any]:
    """The gateway's OpenAPI document, with the one model there is for a name and short answers for a length."""
    read: dict[str, Any] = httpx.get(f"{base_url}/schema/openapi.json").json()
    for path, operations in read["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if not path.startswith("/v1/") or body is None:
            continue
        schema = body["content"]["application/json"]["schema"]
        schema["properties"]["model"] = {"enum": [model]}
        for name in _LENGTHS:
            if name in schema["properties"]:
                length = {"type": "integer", "minimum": 1, "maximum": ANSWER_TOKENS_MAX}
                schema["properties"][name] = length
                schema["required"] = sorted({*schema["required"], name})
    return read


@dataclass(frozen=True)
class Fuzzed:
    """What schemathesis says of a run; it `failed` if an answer did not come, or does not pass `CHECKS`."""

    failed: bool
    report: str


def fuzz(
    base_url: str, key: str, described: dict[str, Any], directory: Path, *, only: str | None = None
) -> Fuzzed:
    """A run over all operations, or over those of the path `only`."""
    path = directory / "openapi.json"
    path.write_text(json.dumps(described))
    # Engines here make no embeddings, and the route says so with 501.
    chosen = ["--include-path", only] if only else ["--exclude-path", "/v1/embeddings"]
    finished = subprocess.run(
        [
            *(str(schemathesis()), "run", str(path), "--url", base_url),
            *("-H", f"Authorization: Bearer {key}", "-c", ",".join(CHECKS)),
            *("--phases", "fuzzing", "--max-examples", "25", "--seed", "1", "--workers", "2"),
            *("--request-timeout", "30", "--no-color"),
            *chosen,
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    return Fuzzed(finished.returncode != 0, finished.stdout + finished.stderr)
