"""Every bound of billing, named."""

from decimal import Decimal

# ---- The stream --------------------------------------------------------------------------------

STREAM_SIZE_MAX_BYTES = 1024 * 1024 * 1024  # some three million events: hours of a busy outage
MESSAGE_SIZE_MAX_BYTES = 256 * 1024
GROUP_EVENTS_MAX = 100
# A user's name and a model's are bounded by a few hundred characters, so a group fits into a message.
DEDUPLICATION_WINDOW_S = 120.0
PUBLISH_TIMEOUT_S = 5.0

# ---- The recorder ------------------------------------------------------------------------------

# A batch is about so many events: larger ones cost no less each, and hold their tenants for longer.
BATCH_EVENTS_MAX = 4000
BATCH_MESSAGES_MAX = 1000
# Of all recorders together; a fetch of more than may be unacknowledged would wait out its whole time.
RECORDERS_MAX = 32
ACK_PENDING_MAX = RECORDERS_MAX * BATCH_MESSAGES_MAX
FETCH_TIMEOUT_S = 1.0
BATCH_PAUSE_S = 0.05
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
MODEL_NAME_MAX_CHARS = 256
NUMBER_MAX_CHARS = 64
PRICE_MAX_NANO_USD = 10**6  # a unit, as the table has it
OCCURRED_AT_MIN_S = 1_577_836_800.0  # 2020-01-01
OCCURRED_AT_MAX_S = 4_102_444_800.0  # 2100-01-01
PARTITION_MONTHS_AHEAD = 2
MAINTENANCE_INTERVAL_S = 300.0  # also until what failed, or was cut off, is tried again
DETACH_TIMEOUT_S = 5.0
LEAVING_MONTH_DELAY_S = 30.0
STORAGE_GRACE_S = 3600.0  # after midnight, for what is published late
STORAGE_CHECKPOINTS_MAX = 200
DETACHED_ATTEMPTS_MAX = 10

# ---- Credit ------------------------------------------------------------------------------------

# A gateway's slice of what a key may use: this share of it, at most so much. Where the share is less
# than the least slice, there is none: then every request's worst case is asked for by itself.
LEASE_SHARE = Decimal("0.05")
LEASE_SLICE_MAX_NANO_USD = 10**9
LEASE_SLICE_MIN_NANO_USD = 10**6
LEASE_USABLE_S = 60.0  # since the last renewal; what is admitted until then has time to end
LEASE_LIFE_S = 300.0
OPERATION_HOLD_LIFE_S = 7 * 24 * 3600.0  # as long as results of operations are kept
LEASES_KEPT_S = 24 * 3600.0
# How far the clocks of NATS, Postgres and the recorder may differ.
CLOCK_DIFFERENCE_MAX_S = 5.0
PROGRESS_INTERVAL_S = 1.0

AMOUNT_MAX_NANO_USD = 10**18  # a billion dollars
REFERENCE_MAX_CHARS = 256
NOTE_MAX_CHARS = 1024
TRANSACTIONS_MAX = 1000
WARNINGS_MAX = 1000

# ---- Exports -----------------------------------------------------------------------------------

EXPORT_DAYS_MAX = 400  # more than a year, so that one can be compared with the one before
EXPORT_ROWS_MAX = 10_000  # of a page
EXPORT_CSV_ROWS = 5_000  # of a piece

# ---- Invoices ----------------------------------------------------------------------------------

INVOICE_GRACE_S = 48 * 3600.0  # for what is spooled somewhere at the end of a month
INVOICES_MAX = 1000

# ---- The audit ---------------------------------------------------------------------------------

DIFFERENCES_MAX = 1000  # listed of each kind
AUDIT_TIMEOUT_S = 3600.0  # of a statement
COUNTS_SETTLE_S = 600.0  # for what was produced to be billed
