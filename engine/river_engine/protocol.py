"""What others say to an engine, and what an engine says of itself. Imports nothing heavy.

HTTP, on the engine's own port, every request with `Authorization: Bearer <RIVER_ENGINE_TOKEN>`:

* vLLM's OpenAI routes, unchanged. `x-river-adapter` (an `AdapterRef` as JSON) names the adapter to answer with, and
  `x-river-model` the model name the client used, which the answer repeats. Without the first, the base model answers.
  `x-river-tenant` says whose turn it takes when there is a queue.
* `POST /river/sample`: `EngineSample` in, `EngineSampleResult` out, msgpack both ways.
* `POST /river/usage`: the `x-request-id` of a request to one of vLLM's routes in, a `StreamUsage` as JSON out, once the
  request has ended: what it had used, however much of its answer was read. 404 if it is not known any more.
* `/healthz`, `/readyz`, `/metrics` without a token.

NATS: an engine keeps an `EngineRecord` in the KV bucket `ENGINES_BUCKET` under its id, renewed every
`HEARTBEAT_INTERVAL_S`, and listens on `publish_subject(base)` for `AdapterRef`s worth loading before anybody asks. It
answers a `Control` on `control_subject(id)` with a `Controlled`. All are msgpack.
"""

from __future__ import annotations

import re
from typing import Literal

from msgspec import Struct, field

ENGINES_BUCKET = "engines"
HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_LOST_AFTER_S = 8.0
ADAPTER_HEADER = "x-river-adapter"
MODEL_HEADER = "x-river-model"
TENANT_HEADER = "x-river-tenant"
ADAPTER_LOADING = "adapter_loading"
"""The `type` of a 503: the adapter is still being loaded when the request has waited for it long enough."""
FINAL_USAGE_PATH = "/river/usage"
USAGE_COMMENT = b": river-usage "
"""Begins a comment in a stream of `/v1/responses` or `/v1/messages`; a `StreamUsage` as JSON follows."""
EXPERT_LAYOUT_METADATA = "expert_layout"
"""Of the file `adapter_model.safetensors`."""
SHARED_OUTER = "shared_outer"
"""Its experts share the factors of the model's width."""
ADAPTERS_TOLD_MAX = 64
"""Of the adapters that an engine holds, how many its record describes: those used last."""
PROBLEMS_TOLD_MAX = 12
PROBLEM_CHARACTERS_MAX = 240


def subject_token(name: str) -> str:
    """`name` as one NATS subject token: dots, slashes and wildcards become underscores."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def publish_subject(base_model: str) -> str:
    """Where newly published adapters of `base_model` are announced."""
    return f"adapters.{subject_token(base_model)}"


def control_subject(engine_id: str) -> str:
    """Where an engine is told to drain or to start again."""
    return f"engine-control.{subject_token(engine_id)}"


class AdapterRef(Struct, frozen=True, kw_only=True):
    """One immutable adapter: `run_…@17` or a checkpoint id, and the directory URL that holds its PEFT files.

    The name is never reused for other bytes: vLLM's prefix cache is keyed by it.
    """

    name: str
    location: str


class Problem(Struct, frozen=True, kw_only=True):
    """What a process has warned of, `count` times in a row, at `at` (Unix time in seconds) for the last time."""

    at: float
    message: str
    count: int = 1


class HeldAdapter(Struct, frozen=True, kw_only=True):
    """An adapter that is loaded; `loaded_at` and `used_at` are Unix times in seconds."""

    name: str
    loaded_at: float
    used_at: float


class LoadTimes(Struct, frozen=True, kw_only=True):
    """How long the last adapters took, milliseconds: to be fetched and checked, and to be put into vLLM.

    `loads` is how many those are; there may be fewer of them than an engine has loaded in its life.
    """

    loads: int
    fetch_median_ms: float
    load_median_ms: float
    load_p99_ms: float


class EngineHealth(Struct, frozen=True, kw_only=True):
    """How an engine is, for whoever watches it; an older engine says nothing of it.

    `inside` prompts are being computed in vLLM and `waiting` wait for that; `batch` of at most `batch_max` sequences
    are in its batch, and `slots_used` adapters. `kv_cache_used` and `prefix_hit_rate` are shares: of the cache's
    blocks, and of the last prompts' tokens that were found there; None while nothing is known. `tokens_per_s` are
    those generated lately. `adapters` come least recently used first, `problems` oldest first. `ends` is how often its
    server process has ended and come back under the same supervisor.
    """

    started_at: float = 0.0
    inside: int = 0
    waiting: int = 0
    batch: int = 0
    batch_max: int = 0
    slots_used: int = 0
    kv_cache_used: float | None = None
    prefix_hit_rate: float | None = None
    tokens_per_s: float = 0.0
    adapters: list[HeldAdapter] = field(default_factory=list[HeldAdapter])
    load_times: LoadTimes | None = None
    problems: list[Problem] = field(default_factory=list[Problem])
    ends: int = 0


class EngineRecord(Struct, frozen=True, kw_only=True):
    """What a gateway needs to route to an engine. `heartbeat_at` is Unix time in seconds.

    `expert_routing` says whether the engine can answer `return_expert_routing`. `outstanding_tokens` are those of all
    requests, running or waiting, that are not yet computed: an estimate. A `draining` engine takes no new requests.
    Adapters that are `loading` are on their way to being `resident`.
    """

    engine_id: str
    base_model: str
    url: str
    context_length: int
    vocab_size: int
    max_loras: int
    max_lora_rank: int
    heartbeat_at: float
    resident: list[str] = field(default_factory=list[str])
    loading: list[str] = field(default_factory=list[str])
    running: int = 0
    outstanding_tokens: int = 0
    draining: bool = False
    expert_routing: bool = False
    health: EngineHealth = field(default_factory=EngineHealth)


Action = Literal["drain", "undrain", "restart"]


class Control(Struct, frozen=True, kw_only=True):
    """What an engine or a trainer shall do.

    `drain`: end what it has begun and begin nothing new. `undrain`: go on. `restart`: drain, then leave, to be started
    again by whoever looks after it.
    """

    action: Action


class Controlled(Struct, frozen=True, kw_only=True):
    """What came of it: whether the process takes nothing new from now on, or why it does not do as it was told."""

    draining: bool
    refused: str | None = None


class StreamUsage(Struct, frozen=True):
    """What a request has used so far, or in all; `prompt_tokens` includes `cached_tokens`."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TokenTable(Struct, frozen=True, kw_only=True):
    """Token ids [rows, `width`], int32 and little-endian; -1 stands for none."""

    width: int
    token_ids: bytes


class EngineSample(Struct, frozen=True, kw_only=True):
    """Token-in/token-out sampling; exactly one of the two prompt fields is set. Fields as in `river_client.wire`.

    `prompt_targets`, where there are any, has a table for each prompt, of one row less than the prompt has tokens.
    """

    request_id: str
    tenant_id: str | None = None
    adapter: AdapterRef | None = None
    prompts: list[str] | None = None
    prompt_token_ids: list[list[int]] | None = None
    num_samples: int = 1
    max_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: list[str] = field(default_factory=list[str])
    stop_token_ids: list[int] = field(default_factory=list[int])
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    return_prompt_logprobs: bool = False
    prompt_top_logprobs: int | None = None
    prompt_logprobs_last: int | None = None
    prompt_targets: list[TokenTable] | None = None
    return_expert_routing: bool = False


class ExpertRouting(Struct, frozen=True, kw_only=True):
    """The experts of every token of a sequence in every MoE layer, first the prompt's tokens, then those generated.

    `data` is C-contiguous and little-endian, `shape` is (tokens, MoE layers, experts per token). The model never ran
    over the last token: its row is filler.
    """

    dtype: Literal["uint8", "uint16"]
    shape: tuple[int, int, int]
    data: bytes


def routing_dtype(experts: int) -> Literal["uint8", "uint16"]:
    """The type that the numbers of so many experts travel in."""
    return "uint8" if experts <= 256 else "uint16"  # noqa: PLR2004 - 2 ** 8


class EngineSequence(Struct, frozen=True, kw_only=True):
    """`top_logprobs[i]` lists (token, logprob), most likely first."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    stop_reason: str
    top_logprobs: list[list[tuple[int, float]]] | None = None
    expert_routing: ExpertRouting | None = None


class TopLogprobs(Struct, frozen=True, kw_only=True):
    """The most likely tokens of every position of a prompt, [T, `width`], most likely first, little-endian.

    `token_ids` int32, `logprobs` float32; a row that was not scored holds -1 and minus infinity.
    """

    width: int
    token_ids: bytes
    logprobs: bytes


class EngineSampleGroup(Struct, frozen=True, kw_only=True):
    """`prompt_target_logprobs` are float32, of the shape of the prompt's `TokenTable`; minus infinity for its -1."""

    prompt_token_ids: list[int]
    samples: list[EngineSequence]
    cached_prompt_tokens: int = 0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: TopLogprobs | None = None
    prompt_target_logprobs: bytes | None = None


class EngineSampleResult(Struct, frozen=True, kw_only=True):
    groups: list[EngineSampleGroup]


class EngineError(Struct, frozen=True, kw_only=True):
    """Body of every refusal of our own routes; `param` names the field, with its index where there is one."""

    type: str
    message: str
    param: str | None = None
