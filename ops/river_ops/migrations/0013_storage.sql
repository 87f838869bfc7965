-- Up to when the storage of a checkpoint is charged. What was stored before there were charges stays free.
alter table checkpoint add column storage_charged_until timestamptz;
update checkpoint set storage_charged_until = greatest(created_at, date_trunc('day', now(), 'UTC'));
