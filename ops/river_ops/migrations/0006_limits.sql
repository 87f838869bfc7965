-- Limits of a tenant, over all its keys; those of a key are beside it.

alter table tenant
  add column requests_per_minute integer check (requests_per_minute > 0),
  add column tokens_per_minute   bigint check (tokens_per_minute > 0),
  add column concurrent_requests integer check (concurrent_requests > 0);
