"""Every bound of the trainer, named."""

MICRO_BATCH_TOKENS = 1_024
"""Tokens in one packed pass of one lane, unless the settings say otherwise; one longer sequence goes alone.

On CPUs a pass is fastest while its activations stay in a core's own cache."""
PIECE_TOKENS = 512
"""Tokens of one run that are computed as one: more are cut, so that lanes can share them and passes be filled."""
SPARE_GRADIENTS_MAX_BYTES = 512 * 1024**2

BATCH_TOKENS = 8_192
"""About how many tokens of all runs one batch takes: enough to fill the lanes, and soon done."""
BATCH_OPERATIONS_MAX = 512

ACCELERATOR_MICRO_BATCH_TOKENS = 32_768
"""Fills the matrix units of a GPU: with 256 experts of which a token takes 8, an expert has a thousand rows."""
ACCELERATOR_PIECE_TOKENS = 16_384
"""There a pass has one piece of a run, which alone has to be worth a pass."""
ACCELERATOR_BATCH_TOKENS = 131_072
TENANT_QUANTUM_TOKENS = 2_048
"""What a tenant may spend at a turn: a few operations of usual size."""
OPERATION_TOKENS_MIN = 16
"""What an operation costs its tenant at least: one without data takes time too."""
GAP_MAX_S = 120.0
"""How long operations wait for one before them that is missing. Longer than a client goes on trying to send it."""

RUNS_MEMORY_MB = 4_096
"""Memory for the weights, moments and gradients of runs; those not in use beyond it wait on disk."""
SPILL_FREE_SHARE = 0.1
"""How much of that memory is made free at a time."""
DEVICE_RUNS_SHARE = 0.4
"""Of an accelerator's memory that is free beside the model, what runs may take; passes need the rest."""

LORA_RANK_MAX = 64
VERSIONS_KEPT = 8
"""Adapter directories kept per run: an engine may still be asked for a version a few steps old."""

SNAPSHOT_EVERY_STEPS = 8
SNAPSHOT_INTERVAL_S = 5.0
"""How much of a busy run's work a successor may have to do again: snapshots take time from everybody's training."""
SNAPSHOT_IDLE_S = 3.0
SNAPSHOT_OPERATIONS_MAX = 256
"""Operations after which even a run with a pending gradient is snapshotted."""
SNAPSHOTS_WRITING_MAX = 8
"""Snapshots of idle runs that are written at once: each is a copy of a run in memory."""
SCAN_INTERVAL_S = 1.0
"""How often idle runs are looked for, and operations that never came."""

FETCH_BATCH = 256
READ_AHEAD_OPERATIONS = 128
"""Operations whose bodies are read before their turn comes."""
READ_AHEAD_TOKENS_MAX = 8_192
EFFECTS_PENDING_MAX = 512
EFFECTS_PENDING_MAX_BYTES = 1024**3
"""Operations that are done and not told yet, and the copies of weights they hold; more stop the next batch."""
EFFECTS_OF_RUN_MAX = 64
"""Operations of one run that are not told yet; more stop that run alone."""
IO_THREADS = 4
FETCH_TIMEOUT_S = 5.0
CONSUMER_INACTIVE_S = 300.0
RETRY_DELAY_MIN_S = 0.1
RETRY_DELAY_MAX_S = 5.0
NATS_REQUEST_TIMEOUT_S = 10.0
OPERATIONS_PENDING_MAX = 100_000
"""Operations known but not executed. Only their place in the stream is kept, not their bodies."""

STOP_GRACE_S = 8.0

GROUP_TIMEOUT_S = 300.0
"""How long processes that share a model wait for one that says nothing; one that dies is noticed at once."""
GROUP_PULSE_INTERVAL_S = 10.0
"""How often the first of them says that it is still there while nothing is to be done."""
COUNTS_INTERVAL_S = 10.0
PACE_WINDOW_S = 30.0
"""Over which a trainer's record says how fast it is."""

TRAIN_STREAM_MAX_BYTES = 2 * 1024**3
RESULTS_STREAM_MAX_BYTES = 1024**3
BODIES_MAX_BYTES = 4 * 1024**3
RESULT_BODIES_MAX_BYTES = 1024**3
KV_MAX_BYTES = 64 * 1024**2
STREAM_MESSAGE_MAX_BYTES = 1024 * 1024
BODIES_MAX_AGE_S = 30 * 24 * 3600.0
TRAINER_RECORD_MAX_AGE_S = 60.0
LEASE_MAX_AGE_S = 5.0
"""How long the lease of a killed trainer keeps its successor waiting."""
LEASE_RENEWAL_INTERVAL_S = 1.0
LEASE_POLL_INTERVAL_S = 0.25
LEASE_REQUEST_TIMEOUT_S = 2.0
DEDUPLICATION_WINDOW_S = 300.0

STORE_READ_ATTEMPTS_MAX = 3
"""How often a set is read anew because it was replaced in the meantime."""
STORE_CHUNK_BYTES = 4 * 1024 * 1024
STORE_UNFINISHED_MAX_AGE_S = 24 * 3600.0
"""What a killed process left half-written is cleared away after this long, when a store is opened."""
