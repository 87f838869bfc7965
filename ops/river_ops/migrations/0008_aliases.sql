-- What aliases have pointed at, version by version: to go back is to point at the version before.

alter table alias add column version integer not null default 1;

create table alias_version (
  tenant_id  text not null,
  name       text not null,
  version    integer not null check (version > 0),
  targets    jsonb not null,                            -- [{"target": …, "weight": …}, …]
  previous   integer,                                   -- the version in force before this one
  created_at timestamptz not null default now(),
  primary key (tenant_id, name, version),
  foreign key (tenant_id, name) references alias on delete cascade
);

insert into alias_version (tenant_id, name, version, targets, created_at)
select tenant_id, name, 1, jsonb_build_array(jsonb_build_object('target', target, 'weight', 1)), updated_at
from alias;

alter table alias drop column target;
