"""Every bound of an engine in one place. Standard library only."""

from __future__ import annotations

# vLLM sizes its kernels for these ranks only.
LORA_RANKS = frozenset({1, 8, 16, 32, 64, 128, 256, 320, 512})

BODY_MAX_BYTES = 64 * 1024 * 1024
HEADER_MAX_BYTES = 64 * 1024
TENANT_MAX_CHARACTERS = 256

PROMPTS_MAX = 1024
PROMPT_CHARACTERS_PER_TOKEN_MAX = 64
"""A longer text cannot be a prompt that fits into the context; it is refused before it is tokenised."""
TOKENIZE_INLINE_CHARACTERS_MAX = 10_000
"""More text than this is tokenised in a thread, so that the event loop goes on."""
SAMPLES_MAX = 256
TOP_LOGPROBS_MAX = 256
"""So many tokens a position may be told of, as many as training takes for soft targets."""
STOPS_MAX = 16
STOP_TOKENS_MAX = 128
TEMPERATURE_MAX = 2.0
"""vLLM's own."""
SEED_MAX = 2**63 - 1

ADAPTER_CONFIG_MAX_BYTES = 1024 * 1024
SLOT_SLICE_S = 0.25
"""How long a version may keep an adapter slot and take new requests while another waits for one."""
OWN_OVER_LEFT = 7
"""A tenant may have this many times what is left of a shared bound: alone, seven eighths of it."""
COMPLETION_GUESS_TOKENS = 256.0
"""How long an answer is thought to be before its tenant has had any; then its average, in which each counts for:"""
COMPLETION_GUESS_WEIGHT = 1 / 8
BYTES_PER_TOKEN = 4
"""Of the body of a request whose prompt is text."""
CACHE_OVERCOMMIT = 2
"""So many times the tokens of the KV cache may be inside vLLM: prompts share it, and guesses are guesses."""
WAITING_BYTES_MAX = 512 * 1024 * 1024
TENANTS_REMEMBERED_MAX = 10_000
RETRY_AFTER_MAX_S = 30
DRAIN_CHECK_INTERVAL_S = 0.05
STREAM_CLOSE_TIMEOUT_S = 5.0
ADAPTER_WAIT_S = 30.0
"""How long a request waits for its adapter to be fetched, and again for it to be loaded, unless told otherwise."""
ADAPTER_RETRY_AFTER_S = 5
ADAPTER_KEPT_S = 60.0
"""How long an adapter that came too late for a request is kept for the next one."""
PRELOAD_QUEUE_MAX = 16
PRELOAD_INTEREST_S = 600.0
"""How long after the last request to a run its new versions are loaded before anybody asks."""
PRELOAD_RUNS_MAX = 10_000

NATS_CONNECT_TIMEOUT_S = 2.0
NATS_RETRY_INTERVAL_S = 1.0

ENGINE_CHECK_INTERVAL_S = 0.5
STOP_GRACE_S = 1
"""For the last bytes of answers, after the requests themselves have had their time to end."""
STOP_KILL_AFTER_S = 8.0
RESTART_DELAY_FIRST_S = 0.5
RESTART_DELAY_MAX_S = 15.0
HEALTHY_AFTER_S = 60.0
START_FAILURES_MAX = 8

STORE_RETRIES_MAX = 4
STORE_RETRY_TIMEOUT_S = 20.0
"""An object store that is away is told after this long; whoever asked decides whether to go on."""

FINAL_COUNTS_MAX = 10_000  # requests, the latest
FINAL_COUNT_WAIT_S = 5.0
COUNTS_INTERVAL_S = 10.0  # between two reports of what was produced, at least

LOAD_TIMES_KEPT = 256  # of the adapters loaded last
RATE_WINDOW_S = 10.0  # over which what happens "lately" is measured
RESTART_DRAIN_S = 600.0
"""How long requests may take to end when an engine is told to start again; told by a signal, it has less time."""
