-- What sampling clients of the Tinker protocol sample from, settled when they are made.

create table sampling_session (
  sampling_session_id text primary key,                   -- <session>:sample:<n>, n counted by the client
  tenant_id           text not null references tenant,
  session_id          text not null references session,
  base_model          text not null,
  model               text not null,                      -- a base model, river://<run> or the path of a checkpoint
  model_path          text,                               -- what the client asked for, in its own words
  clones              bigint not null default 0,          -- copies of the client that have asked for a number
  created_at          timestamptz not null default now()
);
create index on sampling_session (session_id);
