-- Who may do what, and what they have: tenants, keys, sessions, runs, checkpoints, aliases.

create table tenant (
  tenant_id  text primary key,
  name       text not null unique,
  created_at timestamptz not null default now()
);

create table api_key (
  key_id              text primary key,
  tenant_id           text not null references tenant,
  name                text not null,
  secret_hash         bytea not null unique,            -- SHA-256 of the whole key; the key itself is never stored
  prefix              text not null,                    -- the first characters, to recognise it by
  scopes              text[] not null check (scopes <@ array['infer', 'train', 'admin']),
  requests_per_minute integer check (requests_per_minute > 0),
  tokens_per_minute   bigint check (tokens_per_minute > 0),
  concurrent_requests integer check (concurrent_requests > 0),
  monthly_budget_nano_usd bigint check (monthly_budget_nano_usd >= 0),
  created_at          timestamptz not null default now(),
  expires_at          timestamptz,
  revoked_at          timestamptz
);
create index on api_key (tenant_id);

create table session (
  session_id   text primary key,
  tenant_id    text not null references tenant,
  key_id       text not null references api_key,
  tags         jsonb not null default '{}',
  created_at   timestamptz not null default now(),
  heartbeat_at timestamptz not null default now(),
  ended_at     timestamptz
);
create index on session (tenant_id);

create table run (
  run_id     text primary key,
  tenant_id  text not null references tenant,
  session_id text not null references session,
  base_model text not null,
  lora       jsonb not null,
  context_length integer not null check (context_length > 0),   -- the price tier the run was opened with
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  last_seq   bigint not null default -1,                        -- newest operation whose result is written down
  step       bigint not null default 0,
  metrics    jsonb not null default '{}'
);
create index on run (tenant_id, created_at desc);

create table run_metric (
  run_id    text not null references run,
  step      bigint not null,
  logged_at timestamptz not null default now(),
  metrics   jsonb not null
);
create index on run_metric (run_id, step);

create table checkpoint (
  checkpoint_id text primary key,
  tenant_id     text not null references tenant,
  run_id        text not null references run,
  base_model    text not null,
  mode          text not null check (mode in ('training', 'inference')),
  name          text not null,
  step          bigint not null,
  location      text not null,
  size_bytes    bigint not null check (size_bytes >= 0),
  created_at    timestamptz not null,
  expires_at    timestamptz,
  deleted_at    timestamptz
);
create unique index checkpoint_path on checkpoint (run_id, mode, name) where deleted_at is null;
create index on checkpoint (tenant_id, created_at desc);

create table alias (
  tenant_id  text not null references tenant,
  name       text not null,
  target     text not null,
  updated_at timestamptz not null default now(),
  primary key (tenant_id, name)
);
