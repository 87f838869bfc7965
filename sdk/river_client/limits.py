"""Every bound of the SDK, named."""

# ---- Requests and retries ----------------------------------------------------------------------------------------

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 60.0
GENERATION_TIMEOUT_S = 900.0  # sampling and chat answer when they are done
RETRY_PERIOD_S = 90.0  # bridges a restart of any server
FIRST_CONTACT_PERIOD_S = 10.0  # a server never reached yet is more likely a wrong address
ATTEMPTS_MAX = 40
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0
CONNECTIONS_MAX = 100

# ---- Waiting -----------------------------------------------------------------------------------------------------

LEARNING_POLL_S = 0.25  # how often who waits for a run to learn asks how far it has come
LONG_POLL_S = 20.0
LONG_POLL_FIRST_S = 3.0  # what takes longer is told why
EARLY_ANSWERS_MAX = 32  # submissions that wait for their results on a connection each
LONG_POLL_GRACE_S = 15.0  # how much later than asked an answer may come
PROGRESS_DELAY_S = 2.0
PROGRESS_INTERVAL_S = 0.2
HEARTBEAT_INTERVAL_MIN_S = 0.05
CLOSE_TIMEOUT_S = 5.0

# ---- Uploads and downloads ---------------------------------------------------------------------------------------

UPLOAD_TIMEOUT_S = 900.0  # the answer comes when the server has worked through it
DOWNLOAD_CHUNK_BYTES = 256 * 1024
DOWNLOAD_ATTEMPTS_MAX = 10
DIGEST_CHUNK_BYTES = 4 * 1024 * 1024
ERROR_TEXT_MAX_CHARS = 300

USAGE_PAGE_ROWS = 1000
