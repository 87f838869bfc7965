"""What importing parts of the engine may cost others."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["river_engine", "river_engine.protocol", "river_engine.main"])
def test_senders_and_the_supervisor_load_nothing_heavy(module: str) -> None:
    """The gateway imports the protocol, and the supervisor must survive whatever the model does."""
    code = f"import sys, {module}; print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
