"""Does this engine, as built and configured, compute adapters right? Asked once at every start, of the engine itself.

vLLM leaves out what it cannot apply without a word, and one wrong index lets one tenant's adapter answer for
another. So before anything is served: an adapter on each kind of module must move the log-probabilities of a
prompt, and rows of several adapters and of the base model in one batch must come out as they do alone.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from river_engine.adapter_files import Target, write_random_adapter
from river_engine.adapters import LoraEngine
from river_engine.counting import Generate, final
from river_engine.shared_experts import shared_directory, write_shared

# Numbers that no adapter version reaches: vLLM knows an adapter by its number.
_FIRST_NUMBER = 2_000_000_001
_PROMPT_LENGTH = 12
_RANK = 4
_STD = 0.15
# A random adapter moves some log-probability far more than this, and batch mates move it far less.
_MOVED_MIN = 0.05
_TOLERANCE_FLOAT32 = 1e-4
_TOLERANCE_ROUNDED = 0.25


class SelfTestError(RuntimeError):
    """The engine answers wrongly; the message says for what. It must not serve."""


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    lora: LoRARequest | None


async def self_test(
    engine: LoraEngine,
    generate: Generate,
    targets: dict[str, Target],
    *,
    vocab_size: int,
    exact: bool,
    rank_max: int,
    shared_experts: bool = False,
) -> None:
    """Raises `SelfTestError` if an adapter has no effect, or if rows of one batch disturb each other.

    `exact` says that the engine computes in float32, `shared_experts` that experts of its adapters share factors.
    """
    tolerance = _TOLERANCE_FLOAT32 if exact else _TOLERANCE_ROUNDED
    kinds = {
        "attention": {name: target for name, target in targets.items() if ".self_attn." in name},
        "experts": {name: target for name, target in targets.items() if ".experts" in name},
        "lm_head": {name: target for name, target in targets.items() if name == "lm_head"},
    }
    prompt = [(7 + 13 * position) % vocab_size for position in range(_PROMPT_LENGTH)]
    with tempfile.TemporaryDirectory(prefix="river-selftest-") as directory:
        rows = [_Row("base", None)]
        for number, (name, part) in enumerate(kinds.items()):
            if not part:
                continue
            path = Path(directory) / name
            write_random_adapter(
                path,
                part,
                rank=min(_RANK, rank_max),
                seed=number,
                std=_STD,
                shared_experts=shared_experts,
            )
            if shared_experts:
                write_shared(path, part)
                path = shared_directory(path)
            lora = LoRARequest(
                lora_name=f"selftest-{name}",
                lora_int_id=_FIRST_NUMBER + number,
                lora_path=str(path),
                is_3d_lora_weight=not shared_experts,
            )
            await engine.add_lora(lora)
            rows.append(_Row(name, lora))

        alone = [await _logprobs(generate, prompt, row, "alone") for row in rows]
        together = await asyncio.gather(
            *(_logprobs(generate, prompt, row, "together") for row in rows)
        )
        for row in rows:
            if row.lora is not None:
                await engine.remove_lora(row.lora.lora_int_id)

    for row, one, many in zip(rows, alone, together, strict=True):
        difference = _distance(one, many)
        if difference > tolerance:
            raise SelfTestError(
                f"{row.name}: batch mates change log-probabilities by {difference:.5f}"
            )
        moved = _distance(one, alone[0])
        if row.lora is not None and moved < _MOVED_MIN:
            raise SelfTestError(
                f"{row.name}: an adapter moves log-probabilities by {moved:.5f} only"
            )


async def _logprobs(generate: Generate, prompt: list[int], row: _Row, when: str) -> list[float]:
    """Of the prompt's tokens after the first."""
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    request_id = f"selftest-{row.name}-{when}"
    output = await final(generate(tokens_input(prompt), params, request_id, lora_request=row.lora))
    assert isinstance(output.prompt_logprobs, FlatLogprobs)
    assert len(output.prompt_logprobs.logprobs) == _PROMPT_LENGTH - 1
    return output.prompt_logprobs.logprobs


def _distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
