-- What engines and trainers say they have produced since they started, as their counters stood at the end of each hour.
-- Bills are held against it by the audit; nothing is charged by it.

create table token_count (
  producer_id text not null,
  started_at  timestamptz not null,                     -- a process that starts again counts anew
  kind        text not null,
  hour        timestamptz not null,
  base_model  text not null,
  tokens      bigint not null check (tokens >= 0),
  counted_at  timestamptz not null,
  final       boolean not null,                         -- the last word of a process that ended in order
  primary key (producer_id, started_at, kind, hour)
) with (fillfactor = 50);
