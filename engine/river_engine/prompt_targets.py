"""The log-probabilities of given tokens at the positions of a prompt (`prompt_logprob_token_ids`), on a CPU.

vLLM's second model runner computes them, and its scheduler passes on what any runner has computed. The runner of a
CPU does not know them, so our plugin adds them to it: beside its log-probabilities of prompts, a chunk of a prompt at
a time, with the adapter of the request that asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from river_engine.lora_wiring import use_adapter_of

if TYPE_CHECKING:
    from vllm import SamplingParams

_SCORES = "river_target_scores"
"""Of a request, and of a runner: what it has finished in this step."""


def score_targets_on_cpu() -> None:
    """Gives the runner of a CPU what vLLM's second runner has."""
    _let_through()
    compute = GPUModelRunner._get_prompt_logprobs_dict  # noqa: SLF001 - what is being added to

    def get_prompt_logprobs_dict(
        self: GPUModelRunner, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        setattr(self, _SCORES, _scores(self, hidden_states, num_scheduled_tokens))
        return compute(self, hidden_states, num_scheduled_tokens)

    runner: Any = GPUModelRunner
    sample = runner.sample_tokens

    def sample_tokens(self: Any, *args: Any, **options: Any) -> Any:
        setattr(self, _SCORES, {})
        output = sample(self, *args, **options)
        finished = getattr(self, _SCORES)
        if finished:
            output.prompt_token_id_logprobs_dict = finished
        return output

    runner._get_prompt_logprobs_dict = get_prompt_logprobs_dict  # noqa: SLF001
    runner.sample_tokens = sample_tokens


def _let_through() -> None:
    """Has vLLM accept the parameter for this runner too; `sampling.py` has checked it."""
    processor: Any = InputProcessor
    validate = processor._validate_params  # noqa: SLF001 - what is being replaced

    def validate_params(self: Any, params: Any, *args: Any) -> Any:
        ids = getattr(params, "prompt_logprob_token_ids", None)
        if ids is None:
            return validate(self, params, *args)
        start = params.prompt_logprob_start
        params.prompt_logprob_token_ids = params.prompt_logprob_start = None
        try:
            return validate(self, params, *args)
        finally:
            params.prompt_logprob_token_ids, params.prompt_logprob_start = ids, start

    processor._validate_params = validate_params  # noqa: SLF001


def _scores(
    runner: GPUModelRunner, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Scores this step's part of each prompt that has targets; returns those that are done, float32 [rows, K]."""
    finished: dict[str, torch.Tensor] = {}
    for request_id, tokens in num_scheduled_tokens.items():
        request = runner.requests[request_id]
        params = request.sampling_params
        if params is None or params.prompt_logprob_token_ids is None:
            continue
        done = request.num_computed_tokens
        if done >= request.num_prompt_tokens:
            continue  # Its prompt was scored before.
        if done == 0:
            shape = params.prompt_logprob_token_ids.shape
            setattr(request, _SCORES, torch.full(shape, -torch.inf))
        scores = getattr(request, _SCORES)
        end = min(done + tokens, request.num_prompt_tokens - 1)
        _score_chunk(runner, hidden_states, request_id, params, scores, (done, end))
        if done + tokens >= request.num_prompt_tokens:
            finished[request_id] = scores
    return finished


def _score_chunk(
    runner: GPUModelRunner,
    hidden_states: torch.Tensor,
    request_id: str,
    params: SamplingParams,
    scores: torch.Tensor,
    chunk: tuple[int, int],
) -> None:
    """Fills the rows of `scores` whose positions this step computed: from `chunk[0]` up to `chunk[1]`."""
    start = params.prompt_logprob_start or 0
    first, end = max(chunk[0], start), chunk[1]
    if first >= end:
        return
    use_adapter_of(runner, request_id, end - first)
    row = runner.input_batch.req_id_to_index[request_id]
    offset = int(runner.query_start_loc.np[row]) + first - chunk[0]
    model: Any = runner.get_model()
    logits = model.compute_logits(hidden_states[offset : offset + end - first])
    logprobs = runner.sampler.compute_logprobs(logits)
    assert params.prompt_logprob_token_ids is not None
    ids = torch.as_tensor(params.prompt_logprob_token_ids[first - start : end - start]).long()
    found = logprobs.gather(-1, ids.clamp_min(0))
    scores[first - start : end - start] = found.masked_fill(ids < 0, -torch.inf)
