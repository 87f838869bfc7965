"""What the recorder counts for Prometheus."""

from prometheus_client import Counter, Histogram

EVENTS = Counter("river_recorder_events", "Events committed, repeated ones included.")
LINES = Counter("river_recorder_usage_lines", "New lines of usage.")
REJECTED = Counter("river_recorder_rejected", "Messages that can never be recorded.")
UNPRICED = Counter("river_recorder_unpriced", "Batches' (model, kind) pairs without a price.")
OUTAGES = Counter("river_recorder_outages", "Times that NATS or Postgres was lost.")
BATCH_SECONDS = Histogram("river_recorder_batch_seconds", "Time to commit a batch.")
