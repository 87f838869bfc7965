-- What each run has used and cost so far, kept with its events.

create table usage_run (
  tenant_id       text not null,
  run_id          text not null,
  kind            text not null,
  quantity        bigint not null,
  amount_nano_usd bigint not null,
  primary key (tenant_id, run_id, kind)
) with (fillfactor = 50);

-- What is recorded meanwhile would be in no sum.
lock table usage_event in share row exclusive mode;
insert into usage_run (tenant_id, run_id, kind, quantity, amount_nano_usd)
select tenant_id, run_id, kind, sum(quantity), sum(amount_nano_usd)
from usage_event where run_id is not null group by 1, 2, 3;
