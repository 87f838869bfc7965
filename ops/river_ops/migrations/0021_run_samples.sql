-- What clients log of their runs' samples: a prompt, its completions, and what each was worth. Only the newest stay.

create table run_sample (
  sample_id   bigint generated always as identity primary key,
  run_id      text not null references run on delete cascade,
  step        bigint not null,                                -- of the weights that drew them
  logged_at   timestamptz not null default now(),
  identity    text not null,                                  -- of the request, so that a repeated one adds nothing
  place       integer not null,                               -- in that request
  prompt      text not null,
  completions text[] not null,
  rewards     double precision[] not null,                    -- null where none was given
  size_bytes  integer not null check (size_bytes >= 0),
  check (cardinality(completions) = cardinality(rewards)),
  unique (run_id, identity, place)
);
create index run_sample_newest on run_sample (run_id, sample_id desc) include (size_bytes);
create index run_sample_step on run_sample (run_id, step desc, sample_id desc);
