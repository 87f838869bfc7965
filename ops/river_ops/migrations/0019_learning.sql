-- Runs that learn from feedback, one row each. A gateway works on a run while it has the row's lease.

create table learning (
  run_id       text primary key references run,
  tenant_id    text not null references tenant,
  key_id       text not null references api_key,          -- in whose name operations are submitted
  alias        text not null,
  settings     jsonb not null,
  status       text not null check (status in ('learning', 'stopping', 'stopped', 'failed')),
  reason       text,                                      -- why it failed
  started_at   timestamptz not null default now(),
  ended_at     timestamptz,
  first_seq    bigint not null check (first_seq > 0),     -- operations from here to before next_seq are its own
  next_seq     bigint not null check (next_seq >= first_seq),
  -- The batch at hand, to be submitted as operation next_seq. It is used for good from the moment it is here.
  batch_id     text,
  batch_at     timestamptz,
  steps        bigint not null default 0,
  completions  bigint not null default 0,
  step         bigint not null,                           -- of the policy version made last
  metrics      jsonb not null default '{}',
  leased_by    text,
  leased_until timestamptz,
  check ((batch_id is null) = (batch_at is null))
);
create index on learning (tenant_id, started_at desc);
create index learning_open on learning (leased_until) where status in ('learning', 'stopping');
