-- What users write on their sessions, runs and checkpoints, how a session ended, and what is shown to other tenants.

alter table session
  add column display_name  text,
  add column user_metadata jsonb not null default '{}',
  add column project_id    text,
  add column end_reason    text check (end_reason in ('success', 'errored', 'interrupted')),
  add column end_detail    text;
create index session_newest on session (tenant_id, created_at desc, session_id desc);

-- The client's own number of a run in its session, by which some protocols call it.
alter table run
  add column user_metadata jsonb not null default '{}',
  add column model_seq_id  bigint check (model_seq_id >= 0);
create unique index run_of_session on run (session_id, model_seq_id) where model_seq_id is not null;

-- External checkpoints are for use elsewhere: they may be encrypted, and are never loaded or served here.
alter table checkpoint drop constraint checkpoint_mode_check;
alter table checkpoint
  add constraint checkpoint_mode_check check (mode in ('training', 'inference', 'external')),
  add column user_metadata jsonb not null default '{}',
  add column public        boolean not null default false;   -- other tenants may load it and sample from it, by path
-- Copies share the files of what they are copies of: the last to go takes them along.
create index checkpoint_location on checkpoint (location) where files_removed_at is null;

-- What all gateways know and nobody else: made once, by whoever needs it first.
create table gateway_secret (
  name   text primary key,
  secret bytea not null
);
