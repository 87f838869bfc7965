"""The JSON bodies of the Tinker protocol: what its clients send and expect.

What a request has and is not here is refused by its name, so that nothing asked for is left out in silence. The `type`
that bodies repeat is taken and not looked at.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field

from river_client.wire import ExpertLayout


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of requests."""

    type: str | None = None


class Told(Struct, frozen=True, kw_only=True):
    """Base of answers."""


# ---- The client and its session --------------------------------------------------------------------------------------


class ClientConfig(Told, frozen=True):
    """How we want clients to behave; what is not here stays as they have it.

    Log-probabilities and tokens shrink to a fraction under zstd. A gateway that clients wait on for many samples at
    once is asked about all of them in one poll, and clones of a sampling client get their numbers from here.
    """

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = True
    custom_loss_server_side: bool = False
    sample_use_retrieve_futures: bool = False
    sample_join_sampling_session: bool = True


class DynamicConfig(Told, frozen=True):
    refresh_interval_sec: float = 300.0
    sample_cancel_enabled: bool = True
    sample_cancel_max_batch_size: int = 64


class CreateSession(Asked, frozen=True):
    tags: list[str] = field(default_factory=list[str])
    user_metadata: dict[str, str] | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


class SessionCreated(Told, frozen=True):
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    type: str = "create_session"


class Heartbeat(Asked, frozen=True):
    session_id: str


class Typed(Told, frozen=True):
    """An answer that says no more than what it is."""

    type: str


# ---- Models ----------------------------------------------------------------------------------------------------------


class LoraConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Struct, frozen=True, kw_only=True):
    """Which optimizer a model has for all its life, and maybe its settings; only `adamw` is there."""

    type: str = "adamw"


class CreateModel(Asked, frozen=True):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, str] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class OfModel(Asked, frozen=True):
    model_id: str


class ModelData(Told, frozen=True):
    model_name: str
    tokenizer_id: str
    arch: str | None = None


class ModelInfo(Told, frozen=True):
    model_id: str
    model_data: ModelData
    model_name: str
    lora_rank: int
    is_lora: bool = True
    optimizer_config: OptimizerConfig = OptimizerConfig()
    type: str = "get_info"


# ---- Training --------------------------------------------------------------------------------------------------------


class Accepted(Told, frozen=True, omit_defaults=True):
    """What is asked for the result with."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class Chunk(Struct, frozen=True, kw_only=True):
    """A piece of a model's input; only `encoded_text` is offered."""

    type: str = "encoded_text"
    tokens: list[int] | None = None


class ModelInput(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    chunks: list[Chunk]


class TensorData(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An array of `shape`, flat; or its cells that are not padding, in the CSR layout."""

    data: list[float]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Datum(Struct, frozen=True, kw_only=True):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]


class ForwardBackwardInput(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackward(Asked, frozen=True):
    """As older clients send it, and in `forward_input` its forward half."""

    model_id: str
    seq_id: int
    forward_backward_input: ForwardBackwardInput | None = None
    forward_input: ForwardBackwardInput | None = None


class AdamParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `grad_clip_norm` of 0 is none."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Asked, frozen=True):
    model_id: str
    seq_id: int
    adam_params: AdamParams | None = None
    optimizer_params: OptimizerConfig | None = None


class SaveWeights(Asked, frozen=True):
    model_id: str
    seq_id: int
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveWeightsForSampler(Asked, frozen=True):
    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class SaveWeightsExternal(Asked, frozen=True):
    """`age_encryption_recipients` are those for whom the files are encrypted, if there are any."""

    model_id: str
    seq_id: int
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Asked, frozen=True):
    """Into a model by `model_id` and `seq_id`, or as a new one by `session_id` and `model_seq_id`."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, str] | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None


# ---- Sampling --------------------------------------------------------------------------------------------------------


class CreateSamplingSession(Asked, frozen=True):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class SamplingSessionCreated(Told, frozen=True):
    sampling_session_id: str
    type: str = "create_sampling_session"


class JoinSamplingSession(Asked, frozen=True):
    sampling_session_id: str


class SamplingSessionJoined(Told, frozen=True):
    """The clone may number its requests from `client_counter` times a thousand million."""

    client_counter: int
    type: str = "join_sampling_session"


class Sampler(Told, frozen=True):
    sampler_id: str
    base_model: str
    model_path: str | None = None


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`stop` absent keeps the model's own end of text; empty, nothing ends a sample but its length."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Asked, frozen=True):
    prompt: ModelInput
    sampling_params: SamplingParams = SamplingParams()
    num_samples: int = 1
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


# ---- Futures ---------------------------------------------------------------------------------------------------------


class RetrieveFuture(Asked, frozen=True):
    request_id: str
    allow_metadata_only: bool = False


class OfRequest(Asked, frozen=True):
    request_id: str


class FuturesTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sampling_session_id: str
    cloned_sampler_id: int = 0
    type: str = "sampling_session"


class RetrieveFutures(Asked, frozen=True):
    """`timeout` absent waits as long as we like; 0 only tells what has been retrieved."""

    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = field(default_factory=list[str])


class Completion(Told, frozen=True, omit_defaults=True):
    request_id: str
    state: Literal["finished", "failed"] | UnsetType = UNSET
    response_payload_uncompressed_size: int | None = None


class Completions(Told, frozen=True):
    completions: list[Completion]
    cursor: int


QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]


class TryAgain(Told, frozen=True):
    request_id: str
    queue_state: QueueState
    queue_state_reason: str
    type: str = "try_again"


class MetadataOnly(Told, frozen=True):
    """The result is there, and so large: the client says when it has room for it."""

    response_payload_size: int
    status: str = "complete_metadata"


class Failed(Told, frozen=True):
    error: str
    category: Literal["unknown", "server", "user"]


# ---- Others ----------------------------------------------------------------------------------------------------------


class SupportedModel(Told, frozen=True):
    model_name: str
    max_context_length: int
    trainable: bool
    sampleable: bool


class Capabilities(Told, frozen=True):
    supported_models: list[SupportedModel]


EXPERT_LAYOUT: ExpertLayout = "shared_outer"
"""The layout of adapters on a mixture of experts that the protocol's own weights have."""
