"""A vLLM that knows nothing of River but its plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from river_engine.protocol import AdapterRef

from .reference import token_logprobs

TOKENS = [5 + 3 * i for i in range(24)]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter, tokens = json.loads(sys.argv[1])
llm = LLM(model, dtype="float32", enforce_eager=True, enable_lora=True, max_loras=1, max_lora_rank=8,
          enable_mixed_moe_lora_format=True, kv_cache_memory_bytes=16 << 20, max_model_len=128)
params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
for lora in (None, LoRARequest("a", 1, adapter, is_3d_lora_weight=True)):
    (output,) = llm.generate([{"prompt_token_ids": tokens}], params, lora_request=lora, use_tqdm=False)
    print("RESULT", json.dumps([row[token].logprob for row, token in zip(output.prompt_logprobs[1:], tokens[1:])]))
"""


@pytest.mark.slow
def test_a_plain_vllm_loads_the_same_files(
    tiny_moe: Path, make_adapter: Callable[..., AdapterRef]
) -> None:
    """`vllm.LLM` finds the plugin by its entry point, and agrees with transformers and PEFT."""
    ref = make_adapter(seed=60)
    arguments = json.dumps([str(tiny_moe), unquote(urlsplit(ref.location).path), TOKENS])
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert program.returncode == 0, program.stderr[-4000:]
    results = [
        json.loads(line[7:]) for line in program.stdout.splitlines() if line.startswith("RESULT ")
    ]
    for result, adapter in zip(results, (None, ref), strict=True):
        expected = token_logprobs(tiny_moe, adapter, TOKENS)
        assert max(abs(a - b) for a, b in zip(result, expected, strict=True)) < 1e-4
