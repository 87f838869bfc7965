"""What others say to a trainer, and what a trainer says of its runs. Imports nothing heavy.

JetStream (every body is msgpack, see `journal`):

* `TRAIN_STREAM`, subjects `train.<base>.<run>`, message id `<run>:<seq>`: `TrainMessage`s, the journal of a run. It is
  kept until the trainer has snapshotted the run and trims it. The headers `TENANT_HEADER`, `TOKENS_HEADER` and
  `ADVANCES_HEADER` say what a trainer's queue has to know before it reads the body.
* `RESULTS_STREAM`, subjects `results.<operation>`, last value per subject: `TrainResult`s.
* `BODIES_BUCKET`, an object store: any body over `BODY_INLINE_MAX_BYTES` (of a result: over `RESULT_INLINE_MAX_BYTES`);
  the message then is empty and its header `BODY_HEADER` names the object. Bodies of results lie in a bucket of their
  own, `RESULT_BODIES_BUCKET`, which the header `BODY_BUCKET_HEADER` then names; its objects fade with the results.
* `LIVE_BUCKET`, a KV bucket, key = run id: the `LiveVersion` of a run, written before the result that made it.
* `TRAINERS_BUCKET`, a KV bucket: a `TrainerRecord` per trainer, renewed every `HEARTBEAT_INTERVAL_S`.
* `LEASES_BUCKET`, a KV bucket, key = token of the base: the id of the one trainer that may follow that base's journal.

Core NATS:

* `queue_subject(base)`: the trainer that has the lease answers the id of an operation (UTF-8) with its `QueueState`.
* `trainer_control_subject(id)`: a trainer answers a `Control` with a `Controlled`, as engines do. One that is drained
  ends what it has begun; what comes meanwhile waits in the journal.
"""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct, field

from river_billing import events
from river_billing.events import CheckpointSaved
from river_engine.protocol import AdapterRef, Problem, subject_token

TRAIN_STREAM = "TRAIN"
RESULTS_STREAM = "RESULTS"
BODIES_BUCKET = "bodies"
RESULT_BODIES_BUCKET = "result_bodies"
LIVE_BUCKET = "live"
TRAINERS_BUCKET = "trainers"
LEASES_BUCKET = "leases"
HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_LOST_AFTER_S = 8.0
BODY_INLINE_MAX_BYTES = 512 * 1024
RESULT_INLINE_MAX_BYTES = 32 * 1024
"""Of a result: the stream that keeps everybody's for a day must not be filled by a few long ones."""
BODY_HEADER = "River-Body"
BODY_BUCKET_HEADER = "River-Body-Bucket"
TENANT_HEADER = "River-Tenant"
TOKENS_HEADER = "River-Tokens"
ADVANCES_HEADER = "River-Advances"
RESULTS_MAX_AGE_S = 7 * 24 * 3600.0


def train_subject(base_model: str, run_id: str) -> str:
    return f"train.{subject_token(base_model)}.{run_id}"


def queue_subject(base_model: str) -> str:
    return f"train-state.{subject_token(base_model)}"


def trainer_control_subject(trainer_id: str) -> str:
    """Where a trainer is told to drain or to start again."""
    return f"trainer-control.{subject_token(trainer_id)}"


operation_id = (
    events.operation_id
)  # billing has to know it too: what an operation used is found by it


def result_subject(operation: str) -> str:
    return f"results.{operation}"


def policy_version(run_id: str, step: int) -> str:
    return f"{run_id}@{step}"


ExpertLayout = Literal["shared_outer", "per_expert"]


class AdapterShape(Struct, frozen=True, kw_only=True):
    """What of the base model an adapter changes; the update is scaled by `alpha / rank`.

    With `shared_outer` the experts of a layer share the factors of the model's width.
    """

    rank: int
    alpha: float
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    expert_layout: ExpertLayout


class Sequence(Struct, frozen=True, kw_only=True):
    """One validated training sequence of T tokens, as little-endian bytes.

    `input_ids`, `target_tokens` int32 [T] (or [T, K] targets with `weights` [T, K], K = `targets_per_token`);
    `weights`, `old_logprobs`, `advantages`, `echo_weights`, `clip_low`, `clip_high`, `sequence_mask` float32 [T].
    Index i describes the prediction from position i; the last index is ignored. `target_tokens` absent means
    `input_ids` shifted left; `weights` absent means one everywhere.
    `expert_routing` holds the experts a sampler chose, [T, MoE layers, experts per token] of `routing_dtype`.
    """

    input_ids: bytes
    target_tokens: bytes | None = None
    weights: bytes | None = None
    old_logprobs: bytes | None = None
    advantages: bytes | None = None
    echo_weights: bytes | None = None
    clip_low: bytes | None = None
    clip_high: bytes | None = None
    sequence_mask: bytes | None = None
    expert_routing: bytes | None = None
    targets_per_token: int = 1


class Adam(Struct, frozen=True, kw_only=True):
    """The gradient is multiplied by `gradient_scale` before it is clipped."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float | None
    gradient_scale: float = 1.0


class Task(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What an operation asks the trainer to do.

    `force_routing_replay`: every token goes to the experts that its sequence's `expert_routing` names.
    `expected_policy`: the policy version that the run is at when the operation's turn comes; it fails at any other.
    `zero_gradients`: those that are pending are dropped, once the operation has succeeded.
    """

    expected_policy: str | None = None


class CreateRun(Task, frozen=True, kw_only=True, tag="create_run"):
    """Always seq 0. `checkpoint` is the location of one to start from, with its `optimizer` or without."""

    shape: AdapterShape
    checkpoint: str | None = None
    optimizer: bool = True


class Forward(Task, frozen=True, kw_only=True, tag="forward"):
    data: list[Sequence]
    loss_fn: str
    loss_config: dict[str, float]
    force_routing_replay: bool = False


class ForwardBackward(Task, frozen=True, kw_only=True, tag="forward_backward"):
    data: list[Sequence]
    loss_fn: str
    loss_config: dict[str, float]
    force_routing_replay: bool = False
    zero_gradients: bool = False


class OptimStep(Task, frozen=True, kw_only=True, tag="optim_step"):
    adam: Adam


class TrainStep(Task, frozen=True, kw_only=True, tag="train_step"):
    data: list[Sequence]
    loss_fn: str
    loss_config: dict[str, float]
    adam: Adam
    force_routing_replay: bool = False
    zero_gradients: bool = False


class SaveWeights(Task, frozen=True, kw_only=True, tag="save_weights"):
    """`mode` is `training`, `inference` or `external`; the files of the last are encrypted for `age_recipients`."""

    checkpoint_id: str
    name: str
    mode: str
    ttl_s: int | None = None
    user_metadata: dict[str, str] = field(default_factory=dict[str, str])
    age_recipients: tuple[str, ...] = ()


class LoadWeights(Task, frozen=True, kw_only=True, tag="load_weights"):
    """The run goes on from `step`, that of the checkpoint, or from its own next one if it has come further itself."""

    location: str
    optimizer: bool
    step: int = 0


class TaskError(Struct, frozen=True, kw_only=True):
    type: str
    message: str
    param: str | None = None


class Unload(Task, frozen=True, kw_only=True, tag="unload"):
    """The run need not be in memory any more: it is snapshotted, and comes back with its next operation."""


class Refused(Task, frozen=True, kw_only=True, tag="refused"):
    """An operation that the gateway found to be wrong: in its turn it fails with `error`, and changes nothing.

    It keeps the place of what was asked for, so that what its client has sent behind it need not wait for it.
    """

    error: TaskError


ComputeTask = Forward | ForwardBackward | TrainStep
"""Tasks with data."""

AnyTask = (
    CreateRun
    | Forward
    | ForwardBackward
    | OptimStep
    | TrainStep
    | SaveWeights
    | Unload
    | LoadWeights
    | Refused
)

ADVANCING = (CreateRun, OptimStep, TrainStep, LoadWeights)
"""Tasks that, when they succeed, make a new policy version."""


def task_tokens(task: AnyTask) -> int:
    """Tokens of all sequences of a task."""
    if isinstance(task, Forward | ForwardBackward | TrainStep):
        return sum(len(sequence.input_ids) // 4 for sequence in task.data)
    return 0


class TrainMessage(Struct, frozen=True, kw_only=True):
    """`submitted_at` is Unix time in seconds: a replayed message bills at the time it was accepted.

    `context_length` is what the run was opened with, and so its price tier; 0, of older senders, is the trainer's own.
    """

    run_id: str
    seq: int
    tenant_id: str
    key_id: str
    session_id: str
    base_model: str
    submitted_at: float
    task: AnyTask
    context_length: int = 0


class TrainResult(Struct, frozen=True, kw_only=True):
    """`step` is the run's step after the operation; `logprobs` one float32 [T] little-endian array per sequence.

    With soft targets they are [T, K], and `targets_per_token` has the K of each sequence.
    """

    operation_id: str
    run_id: str
    seq: int
    step: int
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    logprobs: list[bytes] | None = None
    targets_per_token: list[int] | None = None
    training_tokens: int = 0
    checkpoint: CheckpointSaved | None = None
    error: TaskError | None = None


class QueueState(Struct, frozen=True, kw_only=True):
    """What an operation without a result is waiting for; `ahead` operations come before it.

    `state` is `running`, `queued`, `waiting_for_gap` (an earlier seq of its run is missing), `recovering` (the journal
    is being read after a start) or `unknown`; `reason` is a sentence for people.
    """

    state: str
    reason: str
    ahead: int = 0


class LiveVersion(Struct, frozen=True, kw_only=True):
    """The newest policy version of a run and where its adapter lies: `…/<step>`, beside the few before it."""

    run_id: str
    step: int
    adapter: AdapterRef

    def earlier(self, step: int) -> AdapterRef | None:
        """Where the adapter of an earlier step lies if it is still kept; None when there is no telling."""
        folder, _, newest = self.adapter.location.rpartition("/")
        if newest != str(self.step) or not 0 <= step <= self.step:
            return None
        return AdapterRef(name=policy_version(self.run_id, step), location=f"{folder}/{step}")


Phase = Literal["load", "forward", "backward", "optimizer", "publish"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""What the time of training goes into: reading operations and bringing runs to where passes read them; the passes; the
update; and telling what came of it, which happens beside the next batch."""


class TrainerHealth(Struct, frozen=True, kw_only=True):
    """How a trainer is, for whoever watches it; an older trainer says nothing of it.

    Runs by where they are; `waiting` operations of so many tokens are known and not done. `steps` of the optimizer,
    `tokens` that went through the model and the seconds by phase are those of the last `window_s`. `unsaved_runs` have
    operations that only the journal holds; the oldest newest snapshot of those is `snapshot_age_s` old. `problems` come
    oldest first.
    """

    started_at: float = 0.0
    runs_device: int = 0
    runs_memory: int = 0
    runs_disk: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    window_s: float = 0.0
    batches: int = 0
    steps: int = 0
    tokens: int = 0
    phase_s: dict[str, float] = field(default_factory=dict[str, float])
    unsaved_runs: int = 0
    snapshot_age_s: float = 0.0
    problems: list[Problem] = field(default_factory=list[Problem])

    @property
    def steps_per_s(self) -> float:
        """Optimizer steps of all runs."""
        return self.steps / self.window_s if self.window_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens that went through the model."""
        return self.tokens / self.window_s if self.window_s else 0.0


class TrainerRecord(Struct, frozen=True, kw_only=True):
    """`heartbeat_at` is Unix time in seconds; `context_length` bounds T of a sequence.

    A model without routed experts has no `moe_layers`.
    """

    trainer_id: str
    base_model: str
    context_length: int
    vocab_size: int
    max_lora_rank: int
    heartbeat_at: float
    runs: int = 0
    num_experts: int = 0
    moe_layers: int = 0
    experts_per_token: int = 0
    draining: bool = False
    health: TrainerHealth = field(default_factory=TrainerHealth)
