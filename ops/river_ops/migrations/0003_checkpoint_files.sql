-- The files of checkpoints: when they were removed, so that those of expired, replaced and deleted ones all go at last.

alter table checkpoint add column files_removed_at timestamptz;
create index checkpoint_ended on checkpoint (least(deleted_at, expires_at)) where files_removed_at is null;

-- An adapter made elsewhere is a checkpoint of a run that never was in training here.
alter table run add column imported boolean not null default false;
