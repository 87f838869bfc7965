"""Every bound of the trainer, named."""

MICRO_BATCH_TOKENS = 4_096
"""Tokens in one forward and backward, unless the settings say otherwise; one longer sequence goes alone.

Small enough that a layer's activations stay near the processor: on CPUs larger passes are slower."""

LORA_RANK_MAX = 64
VERSIONS_KEPT = 8
"""Adapter directories kept per run: an engine may still be asked for a version a few steps old."""

SNAPSHOT_EVERY_STEPS = 8
SNAPSHOT_IDLE_S = 3.0
SNAPSHOT_SCAN_INTERVAL_S = 1.0

FETCH_BATCH = 256
FETCH_TIMEOUT_S = 5.0
CONSUMER_INACTIVE_S = 300.0
RETRY_DELAY_MIN_S = 0.1
RETRY_DELAY_MAX_S = 5.0
NATS_REQUEST_TIMEOUT_S = 10.0
OPERATIONS_PENDING_MAX = 100_000
"""Operations known but not executed. Only their place in the stream is kept, not their bodies."""

STOP_GRACE_S = 8.0

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
