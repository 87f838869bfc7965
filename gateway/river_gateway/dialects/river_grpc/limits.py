"""Every bound of the River dialect: sizes in bytes, times in seconds, counts otherwise."""

from __future__ import annotations

# ---- The server ------------------------------------------------------------------------------------------------------

MESSAGE_MAX_BYTES = 72 * 1024 * 1024
"""What the client sends in one message is below 64 MiB; a part of a divided body may be a little larger than 64."""
CALLS_CONCURRENT_MAX = 8192
"""Most of them wait for results."""
DETAILS_MAX_CHARS = 1500
"""Of a status: it is percent-encoded into a trailer, of which clients take 8 KiB."""
KEEPALIVE_S = 30.0
KEEPALIVE_TIMEOUT_S = 10.0
PING_INTERVAL_MIN_S = 4.0
"""How often a client may ask whether we are there; theirs does every 10 s."""

# ---- Results ---------------------------------------------------------------------------------------------------------

POLL_MAX_S = 60.0
POLL_MARGIN_S = 0.25
"""How long before a call's deadline it is answered."""

# ---- Sessions --------------------------------------------------------------------------------------------------------

SESSIONS_REMEMBERED_MAX = 10_000
SESSION_RUNS_FRESH_S = 10.0
SESSION_RUNS_MAX = 64
"""Of a session, so many runs are told of with a heartbeat."""

# ---- Training --------------------------------------------------------------------------------------------------------

ROUTING_MAX_BYTES = 256 * 1024 * 1024
"""Of all experts of a request, unpacked: a million tokens of 32 layers with 8 experts."""
LIMIT_PATIENCE_S = 30.0
"""How long an operation waits at the door while its key is over a limit."""
TEMPORARY_TTL_S = 24 * 3600
"""How long a checkpoint that need not be durable is kept."""

# ---- Uploads ---------------------------------------------------------------------------------------------------------

UPLOAD_MAX_BYTES = 512 * 1024 * 1024
UPLOAD_PARTS_MAX = 64
UPLOADS_OF_TENANT_MAX_BYTES = 1280 * 1024 * 1024
UPLOADS_MAX_BYTES = 8 * 1024 * 1024 * 1024
"""Of everybody's together."""
UPLOAD_KEPT_S = 900.0
UPLOAD_PARALLELISM = 4

# ---- Sampling --------------------------------------------------------------------------------------------------------

SAMPLING_BATCH_MAX = 128
PIECES_CONCURRENT_MAX = 64
"""Of one request's prompts, so many are with the engines at once."""
ORDER_WAIT_S = 5.0
"""How long samples wait at first for what was submitted before them, in one of the tenant's places for work …"""
ORDER_LOOK_AGAIN_S = 0.5
"""… and how long they leave it to others before they look again."""
SAMPLES_HELD_S = 5.0
"""How long a look at many samples is held while none of them is done."""
