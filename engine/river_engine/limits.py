"""Every bound of an engine in one place. Standard library only."""

from __future__ import annotations

# vLLM sizes its kernels for these ranks only.
LORA_RANKS = frozenset({1, 8, 16, 32, 64, 128, 256, 320, 512})

BODY_MAX_BYTES = 64 * 1024 * 1024
HEADER_MAX_BYTES = 64 * 1024

PROMPTS_MAX = 1024
PROMPT_CHARACTERS_PER_TOKEN_MAX = 64
"""A longer text cannot be a prompt that fits into the context; it is refused before it is tokenised."""
TOKENIZE_INLINE_CHARACTERS_MAX = 10_000
"""More text than this is tokenised in a thread, so that the event loop goes on."""
SAMPLES_MAX = 256
TOP_LOGPROBS_MAX = 20
STOPS_MAX = 16
SEED_MAX = 2**63 - 1

ADAPTER_CONFIG_MAX_BYTES = 1024 * 1024
ADAPTER_WAITERS_MAX = 4096
PRELOAD_QUEUE_MAX = 16
PRELOAD_INTEREST_S = 600.0
"""How long after the last request to a run its new versions are loaded before anybody asks."""
PRELOAD_RUNS_MAX = 10_000

NATS_CONNECT_TIMEOUT_S = 2.0
NATS_RETRY_INTERVAL_S = 1.0

ENGINE_CHECK_INTERVAL_S = 0.5
STOP_GRACE_S = 4
STOP_KILL_AFTER_S = 8.0
RESTART_DELAY_FIRST_S = 0.5
RESTART_DELAY_MAX_S = 15.0
HEALTHY_AFTER_S = 60.0
START_FAILURES_MAX = 8

STORE_RETRIES_MAX = 4
STORE_RETRY_TIMEOUT_S = 20.0
"""An object store that is away is told after this long; whoever asked decides whether to go on."""
