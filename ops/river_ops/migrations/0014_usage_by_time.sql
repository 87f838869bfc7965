-- Usage of all tenants by time, for exports. It is no column that recording updates.

create index usage_hour_by_time on usage_hour (hour);
