"""Every bound of the gateway: sizes in bytes, times in seconds, counts otherwise."""

from __future__ import annotations

# ---- Requests --------------------------------------------------------------------------------------------------------

BODY_MAX_BYTES = 64 * 1024 * 1024
DECODE_INLINE_MAX_BYTES = 64 * 1024
"""Larger bodies of the dialects are parsed and converted beside the event loop, by so many threads:"""
DECODE_THREADS = 4
CLIENT_WATCHED_AFTER_S = 0.05
"""How long a request works before anybody looks whether its client is still there."""
UPSTREAM_CONCURRENT_MAX = 4096
UPSTREAM_CONNECT_TIMEOUT_S = 5.0
UPSTREAM_SILENCE_TIMEOUT_S = 600.0
UPSTREAM_LOST_SILENCE_S = 2.0
"""How long an engine may be silent on a connection once its heartbeat is lost; one that still streams is left alone."""
UPSTREAM_KEEPALIVE_S = 4.0
"""Below the 5 s after which uvicorn, and so an engine, closes an idle connection."""
UPSTREAM_BUFFER_BYTES = 256 * 1024
"""How much of an answer is read ahead of a client that is slower than the engine."""
UPSTREAM_SWEEP_INTERVAL_S = 1.0
UPSTREAM_REPLAY_S = 1.0
"""A kept connection that breaks later than this after a request was sent was not dead before: the engine was."""
UPSTREAM_FIRST_BYTE_S = 10.0
"""How long the beginning of an answer is waited for, when its head has come, before the client is given the head: so
long another engine can take over, and no longer, so that keep-alives can begin."""
UPSTREAM_FINAL_USAGE_S = 8.0
"""How long an engine may take to say what a request used that was cut off; it waits for the end itself."""
UPSTREAM_ATTEMPTS = 4
"""How many engines are asked, one after another, before the first byte."""
HEDGES_SHARE_MAX = 0.1
"""Of the requests in progress, so many may have a copy: when all engines are slow, copies would make them slower."""
UPSTREAM_LOSSES_MAX = 3
"""How many engines may break off on one request: it may be the request that kills them."""
SSE_EVENT_MAX_BYTES = 16 * 1024 * 1024
RETRY_AFTER_S = 1.0
RETRY_AFTER_MAX_S = 60.0
USER_MAX_CHARS = 256
CHOICES_MAX = 128
"""As with OpenAI: `n` of one request."""
STREAM_KEEP_ALIVE_S = 10.0
"""How long a stream may be silent before its client is told that it goes on."""
IDEMPOTENCY_KEY_MAX_CHARS = 256

# ---- Routing ---------------------------------------------------------------------------------------------------------

ROUTING_ROOM_FACTOR = 1.25
"""An engine takes requests that belong there up to so many times the average load."""
ROUTING_CROWDED_FACTOR = 2.0
"""An adapter is loaded once more when its engines have so many times what others have on average and …"""
ROUTING_CROWDED_SLACK_TOKENS = 1024
"""… this many more: about what an engine could have computed while it loads one."""
ROUTING_SLACK_TOKENS = 512
"""Below this, nobody counts as loaded: about one request. `river bench routing` shows what more would cost."""
BYTES_PER_TOKEN = 4
"""Of a request's body, about."""
COMPLETION_GUESS_TOKENS = 128
"""How long a completion will be, about."""
ROUTING_PREFIX_BYTES = 512
"""How much of a request's prompt says which prefix cache it belongs to."""
PLACEMENT_REMEMBERED_S = 10.0
"""How long a new place of an adapter is remembered while its engine has not reported it: a load and a heartbeat."""
PLACEMENTS_MAX = 10_000
ENGINES_REMEMBERED_MAX = 4096
BREAKER_FAILURES = 3
BREAKER_PAUSE_MIN_S = 0.5
BREAKER_PAUSE_MAX_S = 30.0

# ---- Keys ------------------------------------------------------------------------------------------------------------

KEY_CACHE_ENTRIES_MAX = 10_000
KEY_CACHE_FRESH_S = 30.0
KEY_CACHE_STALE_MAX_S = 900.0
"""While Postgres is away, a key seen this recently still works."""
KEY_RETRY_S = 1.0
"""How long an old answer stands in after Postgres could not be asked, before it is asked again."""
KEY_MAX_CHARS = 256
KEY_GRACE_MAX_S = 7 * 86_400
"""How long the old secret of a rotated key may go on."""
KEY_USE_NOTED_S = 60.0
"""When a key was last used is known to within this long; it is looked at when the key is looked up."""

# ---- Audit log -------------------------------------------------------------------------------------------------------

AUDIT_DETAILS_MAX_BYTES = 16 * 1024
AUDIT_PAGE_ROWS_MAX = 1000

# ---- Limits of keys and tenants --------------------------------------------------------------------------------------

LIMIT_MAX = 2**31 - 1
ANSWER_TOKENS_GUESSED = 512
"""What a request that does not say how long its answer may be counts as at first."""
QUOTA_OWNERS_MAX = 100_000
"""Keys and tenants whose limits are kept count of; the longest unused are forgotten."""
QUOTA_SWEEP_MAX = 256
"""How many of them are looked at every tick, to find those that can be forgotten."""
QUOTA_ROUND_S = 0.05
"""Between two draws of a gateway from the same limit: twice what an announcement may take to reach the others."""
QUOTA_PUBLISH_GAP_S = 0.01
QUOTA_TICK_S = 0.25
QUOTA_HOLD_S = 1.0
"""For how long a gateway may keep what it has drawn and not spent, looked at every tick."""
QUOTA_IDLE_S = 1.0
QUOTA_JOIN_S = 0.2
QUOTA_ECHO_LOST_S = 1.5
QUOTA_PEER_LOST_S = 3.0
QUOTA_ASK_GAP_S = 1.0
QUOTA_PARTS_MAX = 4096
"""Parts in one announcement: well below what NATS takes as a message."""

# ---- Credit ----------------------------------------------------------------------------------------------------------

LEASE_RENEWAL_INTERVAL_S = 10.0
LEASE_RETRY_S = 1.0
LEASE_IDLE_S = 60.0
RENEWALS_CONCURRENT_MAX = 4
"""Fewer than `POSTGRES_CONNECTIONS_MAX`, which requests need too."""
REFUSAL_FRESH_S = 0.25
"""How long a refusal is believed: what a client that has just paid may have to wait."""
PRICES_FRESH_S = 30.0
PRICES_STALE_MAX_S = 900.0

# ---- Aliases and names -----------------------------------------------------------------------------------------------

NAME_CACHE_ENTRIES_MAX = 10_000
NAME_CACHE_FRESH_S = 5.0
"""What a name means is told by whoever writes it; this is for changes that nobody tells, such as by the recorder."""
LIVE_FRESH_S = 5.0
ALIAS_TARGETS_MAX = 16
ALIAS_WEIGHT_MAX = 1_000_000
ALIAS_VERSIONS_KEPT = 100

# ---- Stored completions and feedback ---------------------------------------------------------------------------------

COMPLETIONS_KEPT_S = 30 * 24 * 3600.0
STORE_BACKLOG_MAX = 2000
"""Completions that wait for Postgres; each may be as large as a body."""
STORE_GROUP_MAX = 64
STORE_GROUP_MAX_BYTES = 8 * 1024 * 1024
STORE_BACKLOG_MAX_BYTES = 256 * 1024 * 1024
STORE_RETRY_S = 0.5
SWEEP_COMPLETIONS_BATCH = 500
"""How many rows one statement deletes: a fraction of a second, whatever they hold."""
SWEEP_PAUSE_S = 0.01
"""Between two such statements, for everybody else's."""
COMPLETIONS_KEPT_MAX_S = 10 * 365 * 24 * 3600
STORED_PAGE_DEFAULT = 20
STORED_PAGE_MAX = 100
FEEDBACK_BATCH_MAX = 4096
FEEDBACK_BATCH_MAX_BYTES = 32 * 1024 * 1024
"""Of a batch's tokens as they are stored, some 3 bytes each in a prompt and 12 where drawn; a batch ends before it."""
FEEDBACK_CLAIM_MAX_S = 24 * 3600.0
FEEDBACK_NOTE_MAX_CHARS = 4096
FEEDBACK_REWARD_MAX = 1e6
"""Of a reward's absolute value. Far below float32's end, so that no advantage made of them can be beyond it."""
LEARNINGS_MAX = 256
"""Runs that learn, of one gateway at once."""
LEARNINGS_PER_TENANT_MAX = 64
"""Far fewer than one gateway's, so that no tenant's keep those of others waiting for a gateway."""
LEARNING_LEASE_S = 15.0
"""After a gateway has died, so long at most nobody works on its runs."""
LEARNING_RENEWAL_S = 2.0
LEARNING_IDLE_MIN_S = 0.25
"""How soon a run looks for feedback again, at first; twice as long each time that there is too little, up to …"""
LEARNING_IDLE_MAX_S = 4.0
LEARNING_RETRY_S = 1.0
LEARNING_RESULT_S = 20.0
METADATA_ENTRIES_MAX = 16
METADATA_KEY_MAX_CHARS = 64
METADATA_MAX_CHARS = 512

# ---- Postgres and NATS -----------------------------------------------------------------------------------------------

POSTGRES_CONNECTIONS_MAX = 10
POSTGRES_TIMEOUT_S = 10.0
NATS_CONNECT_TIMEOUT_S = 2.0
NATS_CONNECT_PATIENCE_S = 60.0
NATS_RECONNECT_WAIT_S = 0.25
NATS_PING_INTERVAL_S = 5
NATS_ACK_TIMEOUT_S = 3.0
WATCH_SILENCE_S = 8.0
WATCH_RETRY_S = 0.5
USAGE_ROUND_S = 0.002
"""At least so long from one group of usage events to the next, so that a busy gateway makes groups of many."""
USAGE_RETRY_S = 0.5
USAGE_SPOOL_MAX_BYTES = 256 * 1024 * 1024
"""Some half a million events. Requests that were admitted before it was full are written down all the same."""
USAGE_SEGMENT_BYTES = 1024 * 1024
USAGE_ADOPT_INTERVAL_S = 60.0

# ---- Sessions and operations -----------------------------------------------------------------------------------------

SESSION_HEARTBEAT_INTERVAL_S = 10.0
LONG_POLL_DEFAULT_S = 20.0
LONG_POLL_MAX_S = 60.0
LOOK_AGAIN_S = 2.0
"""How often JetStream is asked about a result that was not heard of: what a lost connection may cost a client."""
RESULTS_KEPT_MAX = 16_384
RESULTS_KEPT_MAX_BYTES = 64 * 1024 * 1024
OPERATIONS_WATCHED_MAX = 100_000
RUN_CACHE_ENTRIES_MAX = 10_000
RUN_CACHE_FRESH_S = 60.0
QUEUE_STATE_TIMEOUT_S = 0.25
SEQUENCES_MAX = 65_536
SEQUENCE_TOKENS_MIN = 2
SEQ_MAX = 2**53
SEQ_AHEAD_MAX = 1024
"""How far an operation may be ahead of the newest one known to be done."""
METRICS_MAX = 256
METRIC_NAME_MAX_CHARS = 128
TAGS_MAX = 64
TAG_MAX_CHARS = 512
LOGGED_GROUPS_MAX = 64
"""Prompts that one request may log of a run's samples; more are dropped, and counted in the answer."""
LOGGED_COMPLETIONS_MAX = 32
"""Of one prompt; more are dropped likewise."""
LOGGED_TEXT_MAX_CHARS = 8192
"""Of a prompt or a completion; it is cut there, and says so."""
LOGGED_PER_RUN_MAX = 5000
"""Prompts that are kept of a run: the oldest make room for the newest, as they do above …"""
LOGGED_PER_RUN_MAX_BYTES = 32 * 1024 * 1024
"""… this size of all texts together."""
LOGGED_PAGE_DEFAULT, LOGGED_PAGE_MAX = 20, 200
SESSION_SILENT_S = 600
"""Whose client was not heard of for so long is taken to be gone."""

# ---- Names and values ------------------------------------------------------------------------------------------------

NAME_MAX_CHARS = 128
ALPHA_MAX = 1e6
LEARNING_RATE_MAX = 10.0
GRADIENT_SCALE_MAX = 1e6
SEED_MAX = 2**63 - 1
CHECKPOINT_TTL_MAX_S = 10 * 365 * 24 * 3600
AGE_RECIPIENTS_MAX = 16
SIGNED_URL_S = 3600
"""How long a signed URL opens a file."""

# ---- The Tinker dialect ----------------------------------------------------------------------------------------------

SPARSE_CELLS_MAX = 16 * 1024 * 1024
"""Cells of all sparse arrays of a request, spread out: 64 MiB of them, as much as a body may have."""
UNPACKED_MAX_BYTES = BODY_MAX_BYTES
"""What a compressed body may hold."""
ZSTD_WINDOW_MAX_BYTES = 32 * 1024 * 1024
TINKER_POLL_S = 25.0
"""How long a result is waited for before its client is told to ask again; it gives up after 45 s."""
TINKER_INLINE_MAX_BYTES = 1024 * 1024
"""A larger result is sent once its client has said that it has room for it."""
SAMPLER_CACHE_ENTRIES_MAX = 10_000
SNAPSHOT_TTL_S = 24 * 3600
"""How long the weights of a sampling session without a name are kept."""

# ---- Sampling --------------------------------------------------------------------------------------------------------

SAMPLE_PROMPTS_MAX = 1024
SAMPLES_MAX = 1024
PROMPT_CHARS_PER_TOKEN_MAX = 64
SAMPLE_STOPS_MAX = 16
SAMPLE_STOP_TOKENS_MAX = 128
SAMPLE_LOGPROBS_MAX = 256
TEMPERATURE_MAX = 2.0  # vLLM takes no more

# ---- Work to be collected later --------------------------------------------------------------------------------------

FUTURES_MAX = 65_536
"""Unfinished, of one gateway."""
FUTURES_OF_TENANT_MAX = 16_384
FUTURES_MAX_BYTES = 1024 * 1024 * 1024
"""What unfinished requests may keep in memory, all together; and of one tenant:"""
FUTURES_OF_TENANT_MAX_BYTES = 256 * 1024 * 1024
FUTURE_MAX_BYTES = 64 * 1024 * 1024
"""Of one result: several fit into what is kept."""
FUTURES_RUNNING_OF_TENANT_MAX = 512
"""The rest waits here and not in the engines' queues, which would refuse it."""
FUTURE_PATIENCE_S = 600.0
"""How long a limit that is used up, or the lack of an engine, is waited out."""
FUTURES_KEPT_S = 3600.0
FUTURES_COLLECTED_KEPT_S = 60.0
"""For a client whose connection broke while it was being told."""
FUTURES_KEPT_MAX_BYTES = 256 * 1024 * 1024
FUTURES_SWEEP_INTERVAL_S = 5.0
ANSWER_PART_BYTES = 256 * 1024
"""Of what one gateway tells another: NATS takes messages up to a size, and they pass each other between parts."""
ANSWER_MAX_BYTES = 256 * 1024 * 1024

# ---- Lists and files -------------------------------------------------------------------------------------------------

PAGE_ROWS_MAX = 1000
FILE_CHUNK_BYTES = 1024 * 1024

# ---- Imported adapters -----------------------------------------------------------------------------------------------

IMPORT_MAX_BYTES = 8 * 1024**3
IMPORT_CONFIG_MAX_BYTES = 1024 * 1024
IMPORT_HEADER_MAX_BYTES = 64 * 1024 * 1024
IMPORT_TENSORS_MAX = 500_000
IMPORT_NAME_MAX_CHARS = 512
IMPORTS_CONCURRENT_MAX = 2
"""How many uploads are brought into our form at once: it takes a processor each."""

# ---- Files of checkpoints that are gone ------------------------------------------------------------------------------

SWEEP_INTERVAL_S = 15.0
SWEEP_GRACE_S = 300.0
"""How long the files of an expired or replaced checkpoint stay for operations accepted before."""
SWEEP_BATCH = 100

# ---- The process -----------------------------------------------------------------------------------------------------

GC_THRESHOLD = 20_000
"""After how many allocations the garbage collector looks for cycles."""

# ---- Stopping --------------------------------------------------------------------------------------------------------

STOP_GRACE_S = 6

DASHBOARD_LIVE_S = 1.0
"""How often the parts of an open page are looked at."""
DASHBOARD_KEEP_ALIVE_S = 10.0
DASHBOARD_STREAMS_MAX, DASHBOARD_STREAMS_OF_TENANT_MAX = 400, 50

# ---- Health ----------------------------------------------------------------------------------------------------------

HEALTH_KEPT_S = 1800.0
HEALTH_SILENCE_S = 25.0
"""A gateway hears at least its own word every ten seconds."""
HEALTH_BUCKET_MAX_BYTES = 64 * 1024 * 1024
HEALTH_SERIES_MAX = 64
HEALTH_SLOTS_UNSENT_MAX = 180
HEALTH_FAILURES_MAX = 10
"""Of one gateway in ten seconds."""
HEALTH_FAILURES_SHOWN = 50
HEALTH_MESSAGE_MAX_CHARS = 240
CONTROL_TIMEOUT_S = 3.0
"""How long an engine or a trainer may take to say that it will do as it is told."""
