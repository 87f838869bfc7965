"""Programs that use the unmodified `tinker` SDK and cookbook against the running stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.client_environment import run_client
from support.openai_package import ROOT

from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.settings import StackInfo

PROGRAMS = ROOT / "tests" / "clients" / "programs"


def tinker_key(stack: StackInfo) -> str:
    """A key of a fresh tenant, with the prefix that the SDK insists on."""
    return "tml-" + new_tenant_key(stack).removeprefix("rv-")


def run_tinker(
    stack: StackInfo, program: str, folder: Path, *arguments: str, key: str | None = None
) -> Any:
    """The JSON that a program prints last.

    It runs in `folder`, where the base model's name is a folder too, so that a tokenizer is found by it without a hub.
    """
    tokenizer = folder / TINY_MOE_NAME
    if not tokenizer.exists():
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.symlink_to(TINY_MOE)
    environment = {
        "TINKER_BASE_URL": stack.base_url,
        "TINKER_API_KEY": key or tinker_key(stack),
        "BASE_MODEL": TINY_MOE_NAME,
        "HOME": str(folder),
    }
    ended = run_client(PROGRAMS / program, *arguments, environment=environment, folder=folder)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    return json.loads(ended.stdout.splitlines()[-1])
