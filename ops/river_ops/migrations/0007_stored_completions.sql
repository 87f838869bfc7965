-- Completions that a client asked to have stored, what was thought of them, and who has learnt from that.

alter table tenant add column completions_kept_s bigint check (completions_kept_s > 0);   -- null: the server's default

create table stored_completion (
  completion_id  text primary key,
  tenant_id      text not null references tenant,
  created_at     timestamptz not null default now(),
  expires_at     timestamptz not null,
  model          text not null,                          -- as asked for: an alias, mostly
  base_model     text not null,
  policy_version text not null,
  messages       jsonb not null,
  answer         jsonb not null,                         -- as the client saw it, but whole
  metadata       jsonb not null default '{}',
  tokens         bytea                                   -- of prompt and choices, with log-probabilities; msgpack
);
create index on stored_completion (tenant_id, created_at, completion_id);
create index on stored_completion (tenant_id, model, created_at);
create index on stored_completion (expires_at);

-- The newest reward of a choice is the one that counts.
create table feedback (
  completion_id text not null references stored_completion on delete cascade,
  choice        integer not null check (choice >= 0),
  tenant_id     text not null references tenant,
  reward        double precision not null,
  note          text,
  "user"        text,
  updated_at    timestamptz not null default now(),
  primary key (completion_id, choice)
);
create index on feedback (tenant_id, updated_at);

-- Which consumer has been handed which choice: for good once its batch is acknowledged, else until the claim ends.
create table feedback_use (
  tenant_id     text not null references tenant,
  consumer      text not null,
  completion_id text not null,
  choice        integer not null,
  batch_id      text not null,
  claimed_until timestamptz,                             -- null: used for good
  primary key (tenant_id, consumer, completion_id, choice),
  foreign key (completion_id, choice) references feedback on delete cascade
);
create index on feedback_use (batch_id);
