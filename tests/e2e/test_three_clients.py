"""The page of the SDK that prints one GRPO program for three clients: all three run as printed, and learn alike."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

from support.client_environment import run_client

import river_client as river
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe import problems

PAGE = Path(__file__).parents[2] / "sdk" / "README.md"
RUNNER = Path(__file__).parents[1] / "clients" / "programs" / "grpo.py"
BATCHES = 14
RISE_MIN = 0.25
"""Over what the first batches earn; about 0.45 as a rule."""
NOISE = 0.2
"""Of the mean reward of three batches: 0.02 by sampling, the rest by what each run happens to learn first."""


def test_the_reward_rises_the_same_way_through_three_clients(
    stack: StackInfo, client: river.Client, tmp_path: Path
) -> None:
    """From the same seed and data, each earns more after 14 steps, and as much as the others within noise."""
    section = PAGE.read_text().partition("## The same program in three clients")[2]
    printed = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(printed) == 3
    names = {
        "MODEL": TINY_MOE_NAME,
        "KEY": client.api_key,
        "BASE_URL": stack.base_url,
        "GRPC_PORT": stack.grpc_port,
    }
    curves: list[list[float]] = []
    for index, text in enumerate(printed):
        program = tmp_path / f"client_{index}.py"
        program.write_text(text)
        arguments = [
            str(program),
            str(problems.__file__),
            str(TINY_MOE),
            str(BATCHES),
            json.dumps(names),
        ]
        is_ours = index == 0
        finished = (
            subprocess.run(
                [sys.executable, str(RUNNER), *arguments],
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            if is_ours
            else run_client(RUNNER, *arguments, environment={})
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        curves.append(json.loads(finished.stdout.splitlines()[-1]))
    firsts = [sum(curve[:2]) / 2 for curve in curves]
    lasts = [sum(curve[-3:]) / 3 for curve in curves]
    assert all(last > first + RISE_MIN for first, last in zip(firsts, lasts, strict=True)), curves
    for ends in (firsts, lasts):
        assert max(abs(one - other) for one, other in combinations(ends, 2)) < NOISE, curves
    saved = [checkpoint.path for checkpoint in client.checkpoints.list()]
    assert sum(path.endswith("/weights/final") for path in saved) == 3
