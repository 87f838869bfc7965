"""Every bound of billing, named."""

# ---- The stream --------------------------------------------------------------------------------

STREAM_SIZE_MAX_BYTES = 1024 * 1024 * 1024  # some three million events: hours of a busy outage
MESSAGE_SIZE_MAX_BYTES = 256 * 1024
GROUP_EVENTS_MAX = 100
# A user's name and a model's are bounded by a few hundred characters, so a group fits into a message.
DEDUPLICATION_WINDOW_S = 120.0
PUBLISH_TIMEOUT_S = 5.0

# ---- The recorder ------------------------------------------------------------------------------

BATCH_EVENTS_MAX = 500
# Above one batch, because a fetch of more than may be unacknowledged would wait out its whole time.
ACK_PENDING_MAX = 2 * BATCH_EVENTS_MAX
FETCH_TIMEOUT_S = 1.0
ACK_WAIT_S = 10.0  # after this, what a killed recorder had in hand is delivered again
CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 30.0
BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 5.0

UNKNOWN_RUN_DELIVERIES_MAX = 5
UNKNOWN_RUN_DELAY_S = 2.0

# ---- Events ------------------------------------------------------------------------------------

# Together with the price limit of the table (1e6 nano-dollars a unit) an amount stays below 2^63.
QUANTITY_MAX = 10**12
CONTEXT_LENGTH_MAX = 2**31 - 1
OCCURRED_AT_MIN_S = 1_577_836_800.0  # 2020-01-01
OCCURRED_AT_MAX_S = 4_102_444_800.0  # 2100-01-01
PARTITION_MONTHS_AHEAD = 2
