"""Counts every token that leaves the engine, once, at the one place where all of them pass: vLLM's `generate`.

The three counters are the numbers that the answers report, so a bill made from the answers can be checked against
them: a prompt counts once however many samples are drawn from it, and its tokens are either `prompt` (computed) or
`cached_prompt`. What was produced for a client that went away is counted as far as it was handed out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

from prometheus_client import Counter
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.output_processor import RequestState

from river_engine.stream_usage import note_completion, note_prompt

tokens_total = Counter("river_engine_tokens", "Tokens answered, as billed.", ["kind"])
_prompt = tokens_total.labels(kind="prompt")
_cached = tokens_total.labels(kind="cached_prompt")
_completion = tokens_total.labels(kind="completion")

many_prompts: ContextVar[bool] = ContextVar("many_prompts", default=False)
"""Set for a request with several prompts whose answer has one place only for the number of cached tokens."""

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]


def counted(generate: Generate) -> Generate:
    """`AsyncLLM.generate`, counted."""

    async def generate_counted(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        cumulative = sampling_params.output_kind != RequestOutputKind.DELTA
        counted_by_index: dict[int, int] = {}
        first = True
        stream = generate(prompt, sampling_params, request_id, **options)
        try:
            async for output in stream:
                if many_prompts.get():
                    # vLLM would report those of one prompt as those of all.
                    output.num_cached_tokens = 0
                if first:
                    first = False
                    cached = output.num_cached_tokens or 0
                    _prompt.inc(len(output.prompt_token_ids or ()) - cached)
                    _cached.inc(cached)
                    note_prompt(len(output.prompt_token_ids or ()), cached)
                for part in output.outputs:
                    before = counted_by_index.get(part.index, 0) if cumulative else 0
                    _completion.inc(len(part.token_ids) - before)
                    note_completion(len(part.token_ids) - before)
                    counted_by_index[part.index] = len(part.token_ids)
                yield output
        finally:
            # Not left to the garbage collector: closing is what aborts the request.
            await stream.aclose()

    return generate_counted


async def final(stream: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    """The one output of a request that asked for its final output only."""
    outputs = [output async for output in stream]
    assert len(outputs) == 1
    assert outputs[0].finished
    return outputs[0]


def share_cached_count() -> None:
    """Makes all samples of a prompt report the cached tokens it found, not those one sample left the next.

    vLLM reports whichever sample comes last, and all but the first find the prompt in the cache.
    """
    original = RequestState.make_request_output

    def make_request_output(self: RequestState, *args: Any, **options: Any) -> Any:
        parent: Any = self.parent_req
        if parent is not None:
            least = min(
                getattr(parent, "river_cached_tokens", self.num_cached_tokens),
                self.num_cached_tokens,
            )
            parent.river_cached_tokens = self.num_cached_tokens = least
        return original(self, *args, **options)

    RequestState.make_request_output = make_request_output
