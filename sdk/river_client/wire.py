"""The structs of the training API under `/river/v1`: what the SDK sends and the gateway answers.

Encoded as msgpack or JSON by Content-Type and Accept. Numeric sequences travel either as plain lists or, packed and
without loss, as `Tensor`. Every per-token field is aligned to the prediction position: index i describes the prediction
made from position i, and the last index is ignored.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType, field

from river_client.data_wire import Datum as Datum
from river_client.data_wire import Numbers as Numbers
from river_client.data_wire import Tensor as Tensor
from river_client.data_wire import Wire as Wire
from river_client.sample_wire import SampleGroup as SampleGroup
from river_client.sample_wire import SampleRequest as SampleRequest
from river_client.sample_wire import SampleResponse as SampleResponse
from river_client.sample_wire import SampleSequence as SampleSequence
from river_client.sample_wire import StopReason as StopReason
from river_client.sample_wire import TokenUsage as TokenUsage
from river_client.sample_wire import TopLogprob as TopLogprob
from river_client.sample_wire import TopLogprobs as TopLogprobs

API_PREFIX = "/river/v1"
NANO_USD_PER_USD = 10**9

LossName = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "echo_cispo", "dro", "gspo", "dpo"
]
SaveMode = Literal["training", "inference", "external"]


ExpertLayout = Literal["shared_outer", "per_expert"]


class LoraConfig(Wire, frozen=True):
    """The shape of a new adapter. The update is scaled by `alpha / rank`; `alpha` absent means 32.

    On a mixture of experts `expert_layout` says what each expert has of its own: with `per_expert` both factors, as in
    PEFT; with `shared_outer` only those of its inner width, while the factors of the model's width are one for all
    experts of a layer, which takes a fraction of the memory.
    """

    rank: int = 16
    alpha: float | None = None
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False
    expert_layout: ExpertLayout = "shared_outer"


class AdamParams(Wire, frozen=True):
    """AdamW (Loshchilov and Hutter, 2019) for one step.

    The gradients are multiplied by `gradient_scale`, then clipped to `grad_clip_norm`; absent, or 0, is no clipping.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    gradient_scale: float = 1.0


# ---- Sessions and runs -----------------------------------------------------------------------------------------------


class CreateSession(Wire, frozen=True):
    tags: dict[str, str] = field(default_factory=dict[str, str])
    sdk_version: str | None = None


class Session(Wire, frozen=True):
    session_id: str
    heartbeat_interval_s: float


class CreateRun(Wire, frozen=True):
    """`checkpoint` is the path of one to start from, with its optimizer unless `optimizer` is false.

    Its LoRA shape must equal `lora`; absent, `lora` is the checkpoint's, or without a checkpoint the default.
    `user_metadata` is the user's own, and kept as it is.
    """

    session_id: str
    base_model: str
    lora: LoraConfig | None = None
    checkpoint: str | None = None
    optimizer: bool = True
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])


class Run(Wire, frozen=True):
    """One adapter in training. Creating it is operation 0, so `<run_id>-0` can be awaited like any other.

    `lost` says why what the run had learned is gone, if it is: then it refuses every operation.
    """

    run_id: str
    session_id: str
    base_model: str
    lora: LoraConfig
    step: int
    created_at: str
    tags: dict[str, str] = field(default_factory=dict[str, str])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    lost: str | None = None
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])


# ---- Operations ------------------------------------------------------------------------------------------------------


class Operation(Wire, frozen=True, tag_field="kind"):
    """One step asked for on a run.

    Losses are sums over tokens. With lp the log-probability of a target, q the old one, A the advantage, w the weight
    and r = exp(lp - q), minimised are, with the settings of `loss_config` and their defaults:

    * `cross_entropy`: -w lp
    * `importance_sampling`: -w A r
    * `ppo`: -min(w A r, w A clip(r)), r clipped to `clip_low` 0.8 and `clip_high` 1.2, bounds of the ratio itself
    * `cispo`: -w A lp clip(r), the ratio without a gradient, clipped to `clip_low` 0 and `eps_max` 6; with `unit_ratio`
      1 it is taken as one
    * `echo_cispo`: cispo, and `echo_coef` 0.05 times the cross-entropy with `echo_weights`
    * `dro`: -w (A lp - `beta`/2 (lp - q)^2), beta 0.05
    * `gspo`: ppo with the ratio of the whole sequence, clipped to `clip_low` 0.9997 and `clip_high` 1.0004
    * `dpo`: sequences 2i are chosen and 2i+1 rejected, `old_logprobs` are the reference's; `beta` 0.1; a sum over pairs

    A `logprob_temperature` of 1, for all but `echo_cispo` and `dpo`, divides the logits before lp and the entropy are
    taken: that of sampling makes lp what a sampler's log-probabilities are.

    Where w A is zero a token does not count for a policy loss, whatever its `old_logprobs` are.

    With `force_routing_replay` every token goes to the experts its datum's `expert_routing` names, which then has to be
    there, with the gate's own weights for them. Data that carry routing get the metrics `expert_flip`, the share of
    (token, layer) for which the gate chose another set of experts, and `expert_slot_flip`, the share of single experts.

    `expected_policy`, a policy version such as `run_…@17`, is what the run has to be at when the operation's turn
    comes: else it fails with the type `conflict`, and nothing changes. With `zero_gradients` those gathered before are
    dropped first, unless the operation fails.
    """

    expected_policy: str | None = None


class Forward(Operation, frozen=True, kw_only=True, tag="forward"):
    data: list[Datum]
    loss_fn: LossName = "cross_entropy"
    loss_config: dict[str, float] = field(default_factory=dict[str, float])
    force_routing_replay: bool = False


class ForwardBackward(Operation, frozen=True, kw_only=True, tag="forward_backward"):
    data: list[Datum]
    loss_fn: LossName = "cross_entropy"
    loss_config: dict[str, float] = field(default_factory=dict[str, float])
    force_routing_replay: bool = False
    zero_gradients: bool = False


class OptimStep(Operation, frozen=True, kw_only=True, tag="optim_step"):
    adam: AdamParams


class TrainStep(Operation, frozen=True, kw_only=True, tag="train_step"):
    """forward_backward and optim_step as one: both happen or neither."""

    data: list[Datum]
    adam: AdamParams
    loss_fn: LossName = "cross_entropy"
    loss_config: dict[str, float] = field(default_factory=dict[str, float])
    force_routing_replay: bool = False
    zero_gradients: bool = False


class SaveWeights(Operation, frozen=True, kw_only=True, tag="save_weights"):
    """Keeps a checkpoint under `name`.

    `training` keeps weights and optimizer at `weights/<name>`, `inference` the weights at `sampler_weights/<name>`.
    `external` keeps them at `external_weights/<name>` for use elsewhere: each file encrypted, as age does it, for the
    X25519 keys in `age_recipients`, if there are any. Without `overwrite`, a name that is taken is a conflict.
    """

    name: str
    mode: SaveMode = "training"
    ttl_s: int | None = None
    overwrite: bool = True
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])
    age_recipients: list[str] = field(default_factory=list[str])


class LoadWeights(Operation, frozen=True, kw_only=True, tag="load_weights"):
    path: str
    optimizer: bool = True


class Unload(Operation, frozen=True, kw_only=True, tag="unload"):
    """Lets the trainer forget the run, once a snapshot of it is stored; any later operation brings it back."""


AnyOperation = (
    Forward | ForwardBackward | OptimStep | TrainStep | SaveWeights | LoadWeights | Unload
)


class SubmitOperation(Wire, frozen=True):
    """`seq` is 1, 2, 3… per run, assigned by the client; sending one again returns the first result."""

    seq: int
    operation: AnyOperation


class OperationError(Wire, frozen=True):
    type: str
    message: str
    param: str | None = None


class QueueState(Wire, frozen=True):
    """What a pending operation is waiting for; `ahead` operations come before it.

    `state` is `running`, `queued`, `waiting_for_gap`, `recovering`, `no_trainer` or `unknown`, and maybe others later;
    `reason` is a sentence for people.
    """

    state: str
    reason: str
    ahead: int = 0


class OperationResult(Wire, frozen=True):
    """`logprobs` holds one float32 tensor per datum of a forward or forward_backward: [T], with soft targets [T, K].

    `queue` comes with the status `pending`.
    """

    operation_id: str
    status: Literal["pending", "done", "failed"]
    policy_version: str | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    logprobs: list[Tensor] | None = None
    checkpoint: Checkpoint | None = None
    training_tokens: int = 0
    error: OperationError | None = None
    queue: QueueState | None = None


class OperationAccepted(Wire, frozen=True):
    """`result` is there if the client preferred to wait for it (RFC 7240, `Prefer: wait=<seconds>`)."""

    operation_id: str
    result: OperationResult | None = None


class LogMetrics(Wire, frozen=True):
    metrics: dict[str, float]
    step: int | None = None


# ---- Checkpoints, aliases, models, usage, administration ------------------------------------------------------------


class Checkpoint(Wire, frozen=True):
    """A policy version that is kept, at `path`; `expires_at` None is for ever."""

    checkpoint_id: str
    path: str
    run_id: str
    mode: SaveMode
    name: str
    base_model: str
    policy_version: str
    size_bytes: int
    created_at: str
    expires_at: str | None = None
    public: bool = False
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])


class CopyCheckpoint(Wire, frozen=True):
    """`path` is one's own or shown to all; `ttl_s` is how long the copy is to live, absent for ever."""

    path: str
    ttl_s: int | None = None


class SignedUrls(Wire, frozen=True):
    """A URL for each file of a checkpoint, by name, good until `expires_at` for whoever has it."""

    urls: dict[str, str]
    expires_at: str


class ChangeTtl(Wire, frozen=True):
    """Keeps a checkpoint for `ttl_s` seconds from now on; None is for ever."""

    ttl_s: int | None


class CheckpointFile(Wire, frozen=True):
    """`sha256` is of the whole file, in hexadecimal."""

    name: str
    size_bytes: int
    sha256: str | None = None


class AliasTarget(Wire, frozen=True):
    """A base model, a checkpoint path, or `river://<run>` to follow the run's live version; and its share."""

    target: str
    weight: int = 1


class PutAlias(Wire, frozen=True):
    """Either `target`, which takes all requests, or `targets`, among which they are shared by weight."""

    target: str | None = None
    targets: list[AliasTarget] | None = None


class Alias(Wire, frozen=True):
    """`target` is the one of `targets` with the greatest weight. Each change makes a new `version`, from 1 on."""

    name: str
    target: str
    targets: list[AliasTarget]
    version: int
    updated_at: str


class BaseModel(Wire, frozen=True):
    """A model that can be trained or served here; lengths are in tokens."""

    name: str
    context_length: int
    vocab_size: int
    max_lora_rank: int
    trainable: bool
    servable: bool


class UsageLine(Wire, frozen=True):
    """Sums over a period; money in nano-dollars (1e-9 USD)."""

    tenant: str
    model: str
    kind: str
    context_length: int
    quantity: int
    amount_nano_usd: int
    events: int


class Limits(Wire, frozen=True):
    """What a key, or a tenant with all its keys, may use; None is no limit.

    A limit per minute is a bucket of one minute's allowance that fills steadily.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


class ChangeLimits(Wire, frozen=True):
    """What is absent stays as it is; None ends a limit."""

    requests_per_minute: int | UnsetType | None = UNSET
    tokens_per_minute: int | UnsetType | None = UNSET
    concurrent_requests: int | UnsetType | None = UNSET


class CreateTenant(Wire, frozen=True):
    name: str
    limits: Limits | None = None


class Tenant(Wire, frozen=True):
    """`completions_kept_s` is how long its stored completions are kept: 0 is not at all, None the server's time."""

    tenant_id: str
    name: str
    created_at: str
    limits: Limits | None = None
    completions_kept_s: int | None = None


class CreateKey(Wire, frozen=True):
    tenant: str
    name: str = "default"
    scopes: list[str] = field(default_factory=lambda: ["infer", "train"])
    expires_at: str | None = None
    limits: Limits | None = None


class ChangeKey(Wire, frozen=True):
    """What is absent stays as it is; None ends an expiry."""

    name: str | UnsetType = UNSET
    scopes: list[str] | UnsetType = UNSET
    expires_at: str | UnsetType | None = UNSET


class RotateKey(Wire, frozen=True):
    """For `grace_s`, up to seven days, the old secret goes on beside the new one; 0 ends it at once."""

    grace_s: int = 0


class ApiKey(Wire, frozen=True):
    """`secret` is only in the answer that made it, of a new key or a rotation; with `tml-` for `rv-` it is the same.

    Until `previous_until` the secret before the last rotation works too. `last_used_at` is right to within a minute.
    """

    key_id: str
    tenant: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None
    rotated_at: str | None = None
    previous_until: str | None = None
    last_used_at: str | None = None
    limits: Limits | None = None
    secret: str | None = None


class Price(Wire, frozen=True):
    """`usd_per_million` is a decimal string; storage is priced in dollars per GB and month instead."""

    model: str
    context_length: int
    kind: str
    usd_per_million: str
    valid_from: str
    valid_to: str | None = None


class Page(Wire, frozen=True):
    """A list answer; exactly the field of the route's noun is filled."""

    runs: list[Run] | None = None
    checkpoints: list[Checkpoint] | None = None
    files: list[CheckpointFile] | None = None
    aliases: list[Alias] | None = None
    models: list[BaseModel] | None = None
    usage: list[UsageLine] | None = None
    tenants: list[Tenant] | None = None
    keys: list[ApiKey] | None = None
    prices: list[Price] | None = None


class ErrorBody(Wire, frozen=True):
    """`param` names the field, with its index where there is one: `data[3].input_ids[17]`."""

    type: str
    message: str
    param: str | None = None
    request_id: str | None = None


class ErrorEnvelope(Wire, frozen=True):
    error: ErrorBody
