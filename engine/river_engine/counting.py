"""Counts every token that leaves the engine, once, at the one place where all of them pass: vLLM's `generate`.

The three counters are the numbers that the answers report, so a bill made from the answers can be checked against
them: a prompt counts once however many samples are drawn from it, and its tokens are either `prompt` (computed) or
`cached_prompt`. What was produced for a client that went away is counted as far as it was handed out.

It is also where a request's turn learns what it produces, and where its end in vLLM is made sure of (`generating`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.output_processor import RequestState

from river_billing.events import TokensCounted, UsageKind
from river_engine.admission import Turn
from river_engine.limits import COUNTS_INTERVAL_S, STREAM_CLOSE_TIMEOUT_S
from river_engine.stream_usage import note_completion, note_prompt

_log = logging.getLogger("river.engine")
tokens_total = Counter("river_engine_tokens", "Tokens answered, as billed.", ["kind"])
_prompt = tokens_total.labels(kind="prompt")
_cached = tokens_total.labels(kind="cached_prompt")
_completion = tokens_total.labels(kind="completion")

many_prompts: ContextVar[bool] = ContextVar("many_prompts", default=False)
"""Set for a request with several prompts whose answer has one place only for the number of cached tokens."""


_prompts_only: ContextVar[bool] = ContextVar("prompts_only", default=False)


@contextmanager
def prompts_only() -> Iterator[None]:
    """What is generated in the block only brings out what is said of prompts: its tokens are told to nobody."""
    token = _prompts_only.set(True)
    try:
        yield
    finally:
        _prompts_only.reset(token)


class TokenCounts:
    """What has been produced since this was made, for the recorder, who keeps it for audits."""

    def __init__(self, engine_id: str, base_model: str) -> None:
        self._engine_id = engine_id
        self._base_model = base_model
        self._started_at = time.time()
        self._before = _totals()
        self._told_at = -COUNTS_INTERVAL_S

    def due(self) -> bool:
        """Whether it is time to say it again."""
        return time.monotonic() - self._told_at >= COUNTS_INTERVAL_S

    def event(self, *, final: bool = False) -> TokensCounted:
        """What there is to say now."""
        self._told_at = time.monotonic()
        counted_at = time.time()
        return TokensCounted(
            producer_id=self._engine_id,
            base_model=self._base_model,
            started_at=self._started_at,
            counted_at=counted_at,
            tokens={kind: count - self._before[kind] for kind, count in _totals().items()},
            final=final,
        )


def _totals() -> dict[UsageKind, int]:
    (metric,) = tokens_total.collect()
    return {
        UsageKind(sample.labels["kind"]): int(sample.value)
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


Generate = Callable[..., AsyncGenerator[RequestOutput, None]]


@dataclass(slots=True, eq=False)
class _Work:
    """What vLLM does for one turn: its streams, and when each has ended."""

    turn: Turn
    streams: dict[AsyncGenerator[RequestOutput, None], asyncio.Event] = field(
        default_factory=dict[AsyncGenerator[RequestOutput, None], asyncio.Event]
    )


_work: ContextVar[_Work | None] = ContextVar("work", default=None)


@asynccontextmanager
async def generating(turn: Turn) -> AsyncIterator[None]:
    """What is generated in the block is for `turn`; at the block's end none of it is left in vLLM.

    A handler that was cancelled between two tokens leaves its stream to the garbage collector, and vLLM goes on with
    it until then: longer than the files of its adapter would stay.
    """
    work = _Work(turn)
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)
        for stream, ended in list(work.streams.items()):
            await _end(stream, ended)


async def _end(stream: AsyncGenerator[RequestOutput, None], ended: asyncio.Event) -> None:
    try:
        await stream.aclose()
    except RuntimeError:  # Another task waits in it, which has been cancelled and closes it itself.
        try:
            async with asyncio.timeout(STREAM_CLOSE_TIMEOUT_S):
                await ended.wait()
        except TimeoutError:
            _log.warning("a stream goes on after the end of its request")


def counted(generate: Generate) -> Generate:
    """`AsyncLLM.generate`, counted."""

    async def generate_counted(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        cumulative = sampling_params.output_kind != RequestOutputKind.DELTA
        counted_by_index: dict[int, int] = {}
        first = True
        work = _work.get()
        stream = generate(prompt, sampling_params, request_id, **options)
        ended = asyncio.Event()
        if work is not None:
            work.streams[stream] = ended
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
                for part in output.outputs if not _prompts_only.get() else ():
                    before = counted_by_index.get(part.index, 0) if cumulative else 0
                    produced = len(part.token_ids) - before
                    _completion.inc(produced)
                    if work is not None:
                        work.turn.produced += produced
                    note_completion(produced)
                    counted_by_index[part.index] = len(part.token_ids)
                yield output
        finally:
            # Not left to the garbage collector: closing is what aborts the request.
            await stream.aclose()
            ended.set()
            if work is not None:
                work.streams.pop(stream, None)

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
