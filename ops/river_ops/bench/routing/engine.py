"""An engine in simulated time: how long requests take there, by what was measured of vLLM with River's adapters.

Running requests advance together, one token a step; a step takes longer with more requests and more adapters in it.
Loading an adapter and reading a prompt hold all of them up, as both happen between steps. A request waits until there
is room among the running ones and, with an adapter, until that is one of the `MAX_LORAS` in use or may become one:
River's admission lets nobody overtake a request that has waited longer than `SLOT_SLICE_S`.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from river_engine.limits import SLOT_SLICE_S
from river_engine.protocol import EngineRecord
from river_ops.bench.routing.traffic import COMPLETION_TOKENS_MEAN, SYSTEM_TOKENS, Request

BASE = "simulated"
MAX_LORAS = 4
MAX_CPU_LORAS = 16
"""The defaults of an engine's settings."""
RUNNING_MAX = 64
STEP_S = 0.0057
STEP_S_PER_REQUEST = 0.000155
STEP_S_PER_ADAPTER = 0.0051
"""Least squares of tokens/s at 1, 16 and 64 requests without an adapter, with one (all modules), and with eight."""
PROMPT_S_PER_TOKEN = 1 / (561 * 33)
"""561 requests/s of 32 prompt tokens and one completion token, with an adapter."""
LOAD_S = 0.21
"""What running requests are held up by the loading of an adapter of 96 MB."""
PREFIX_CACHE_TOKENS = 8 * 32_768
"""256 MB, of which 32 MB hold 32k tokens of the tiny model."""
SAME_STEP = 1e-6
"""Steps this close are the same but for rounding."""


@dataclass(slots=True, eq=False)
class Job:
    """A request at an engine; `gateway` is who sent it. Times are simulated seconds."""

    request: Request
    gateway: int
    sent_s: float = 0.0
    ends_at_step: float = math.inf
    first_token_s: float = math.inf
    tries: set[str] = field(default_factory=set[str])


@dataclass(slots=True)
class Counts:
    """What happened at all engines together; tokens of prompts are of system prompts alone."""

    adapter_requests: int = 0
    cold_loads: int = 0
    system_tokens: int = 0
    system_tokens_cached: int = 0


class SimulatedEngine:
    """`advance` to a time, then tell or ask things of that time."""

    def __init__(self, engine_id: str, counts: Counts) -> None:
        self.engine_id = engine_id
        self.alive = True
        self.wake_number = 0  # of the one wake-up that still counts
        self.counts = counts
        self._now_s = 0.0
        self._held_up_until_s = 0.0
        self._steps = 0.0
        self._running: list[tuple[float, int, Job]] = []
        self._pushed = 0
        self._waiting: deque[Job] = deque()
        self._adapters: Counter[str] = Counter()
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._prefixes: OrderedDict[str, int] = OrderedDict()
        self._prefix_tokens = 0

    def record(self) -> EngineRecord:
        """What the engine says of itself."""
        jobs = [job for _, _, job in self._running]
        left = sum(max(job.ends_at_step - self._steps, 0) for job in jobs)
        waiting = sum(job.request.prompt_tokens + COMPLETION_TOKENS_MEAN for job in self._waiting)
        return EngineRecord(
            engine_id=self.engine_id,
            base_model=BASE,
            url="",
            context_length=0,
            vocab_size=0,
            max_loras=MAX_LORAS,
            max_lora_rank=0,
            heartbeat_at=self._now_s,
            resident=list(self._resident),
            running=len(jobs),
            outstanding_tokens=round(left) + waiting,
        )

    def add(self, job: Job) -> None:
        """A request comes in."""
        job.sent_s = self._now_s
        self._waiting.append(job)
        self._admit()

    def advance(self, now_s: float) -> list[Job]:
        """The requests that are done by `now_s`."""
        begins_s = max(self._now_s, self._held_up_until_s)
        self._steps += max(now_s - begins_s, 0) / self._step_s()
        self._now_s = now_s
        done: list[Job] = []
        while self._running and self._running[0][0] <= self._steps + SAME_STEP:
            job = heapq.heappop(self._running)[2]
            if job.first_token_s == math.inf:
                job.first_token_s = now_s
            if job.ends_at_step > self._steps + SAME_STEP:
                self._push(job, job.ends_at_step)
                continue
            done.append(job)
            self._release(job.request.adapter)
        if done:
            self._admit()
        return done

    def next_wake_s(self) -> float:
        """When the next request will be done, if nothing comes in between."""
        if not self._running:
            return math.inf
        left = self._running[0][0] - self._steps
        return max(self._now_s, self._held_up_until_s) + left * self._step_s()

    def die(self) -> list[Job]:
        """Everything that was here, cut off."""
        self.alive = False
        return [*(job for _, _, job in self._running), *self._waiting]

    def _step_s(self) -> float:
        return (
            STEP_S
            + STEP_S_PER_REQUEST * len(self._running)
            + STEP_S_PER_ADAPTER * len(self._adapters)
        )

    def _admit(self) -> None:
        """Starts what may start, in order of arrival."""
        passed: deque[Job] = deque()
        while self._waiting and len(self._running) < RUNNING_MAX:
            job = self._waiting.popleft()
            if self._fits(job.request.adapter):
                self._start(job)
                continue
            passed.append(job)
            if self._now_s - job.sent_s > SLOT_SLICE_S:
                break
        passed.extend(self._waiting)
        self._waiting = passed

    def _fits(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self._adapters or len(self._adapters) < MAX_LORAS

    def _start(self, job: Job) -> None:
        request = job.request
        held_up_s = PROMPT_S_PER_TOKEN * (
            request.question_tokens + self._system_tokens_to_read(request)
        )
        if request.adapter is not None:
            held_up_s += self._load(request.adapter)
            self._adapters[request.adapter] += 1
        self._held_up_until_s = max(self._now_s, self._held_up_until_s) + held_up_s
        job.ends_at_step = self._steps + request.completion_tokens
        self._push(job, self._steps + 1)

    def _push(self, job: Job, step: float) -> None:
        """Lets a job run until a step, which is that of its first token or of its last."""
        self._pushed += 1
        heapq.heappush(self._running, (step, self._pushed, job))

    def _load(self, adapter: str) -> float:
        """Makes an adapter resident; how long that takes."""
        self.counts.adapter_requests += 1
        if adapter in self._resident:
            self._resident.move_to_end(adapter)
            return 0.0
        self.counts.cold_loads += 1
        self._resident[adapter] = None
        if len(self._resident) > MAX_CPU_LORAS:
            idle = next(name for name in self._resident if name not in self._adapters)
            del self._resident[idle]
        return LOAD_S

    def _system_tokens_to_read(self, request: Request) -> int:
        """How much of the system prompt is not in the prefix cache, into which it goes now."""
        self.counts.system_tokens += SYSTEM_TOKENS
        known_tokens = self._prefixes.pop(request.system_prompt, 0)
        kept_tokens = request.prompt_tokens + request.completion_tokens
        self._prefixes[request.system_prompt] = kept_tokens
        self._prefix_tokens += kept_tokens - known_tokens
        while self._prefix_tokens > PREFIX_CACHE_TOKENS:
            self._prefix_tokens -= self._prefixes.popitem(last=False)[1]
        if not known_tokens:
            return SYSTEM_TOKENS
        self.counts.system_tokens_cached += SYSTEM_TOKENS
        return 0

    def _release(self, adapter: str | None) -> None:
        if adapter is None:
            return
        self._adapters[adapter] -= 1
        if not self._adapters[adapter]:
            del self._adapters[adapter]
