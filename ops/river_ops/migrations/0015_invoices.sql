-- What tenants were told they used and owe: an invoice for each tenant and month, closed once and never changed.

-- Which account the usage of a batch was charged to is found by the moment it was recorded at.
create index ledger_usage_by_time on ledger_transaction (tenant_id, created_at) where kind = 'usage';
create index ledger_credit_by_time on ledger_transaction (tenant_id, created_at) where kind <> 'usage';

-- Tenants are not references, and are named as they were: invoices outlive them.
create table invoice (
  number                  bigint primary key check (number > 0),
  tenant_id               text not null,
  tenant_name             text not null,
  month                   date not null check (extract(day from month) = 1),   -- a calendar month in UTC
  closed_at               timestamptz not null default now(),
  closed_by               text,                                      -- the key that asked for it
  amount_nano_usd         bigint not null check (amount_nano_usd >= 0),        -- of all lines
  credit_used_nano_usd    bigint not null check (credit_used_nano_usd between 0 and amount_nano_usd),
  -- The rest is owed. Cents are rounded once, half to even, of everything ever owed: what that leaves is carried on.
  carried_nano_usd        bigint not null,
  due_cents               bigint not null,
  -- The prepaid credit: what earlier invoices left, and what was added before the end of the month.
  credit_before_nano_usd  bigint not null,
  credit_added_nano_usd   bigint not null,
  unique (tenant_id, month)
);
create index on invoice (tenant_id, number);

-- What was used of one thing in one month at one price. Of months before the invoice's own they are adjustments: usage
-- that was recorded after its month had been closed.
create table invoice_line (
  number               bigint not null references invoice,
  line                 integer not null check (line > 0),
  month                date not null check (extract(day from month) = 1),
  base_model           text not null,
  kind                 text not null,
  price_id             bigint,                                       -- none: nothing was asked for it
  context_length       integer,                                      -- the tier of the price
  nano_usd_per_unit    numeric(20,9),
  quantity             bigint not null check (quantity > 0),
  events               bigint not null check (events > 0),
  amount_nano_usd      bigint not null check (amount_nano_usd >= 0),
  credit_used_nano_usd bigint not null check (credit_used_nano_usd between 0 and amount_nano_usd),
  primary key (number, line)
);

create trigger invoice_final before update or delete on invoice for each row execute function refuse_change();
create trigger invoice_untruncated before truncate on invoice execute function refuse_change();
create trigger invoice_line_final before update or delete on invoice_line
  for each row execute function refuse_change();
create trigger invoice_line_untruncated before truncate on invoice_line execute function refuse_change();

-- Looked at when the closing transaction commits: numbers have no gaps, months come in their order, the sums are those
-- of the lines, and nothing is added to an invoice that is closed.
create function check_invoice() returns trigger language plpgsql as $$
declare
  closed  invoice;
  amount  numeric;
  used    numeric;
begin
  select * into closed from invoice where number = new.number;
  select coalesce(sum(amount_nano_usd), 0), coalesce(sum(credit_used_nano_usd), 0) into amount, used
  from invoice_line where number = new.number;
  if closed.closed_at <> now() then
    raise exception 'invoice % is closed since %', closed.number, closed.closed_at using errcode = 'restrict_violation';
  end if;
  if (amount, used) is distinct from (closed.amount_nano_usd::numeric, closed.credit_used_nano_usd::numeric) then
    raise exception 'invoice % says %, its lines %', closed.number, closed.amount_nano_usd, amount
      using errcode = 'check_violation';
  end if;
  if closed.number > 1 and not exists (select from invoice where number = closed.number - 1) then
    raise exception 'there is no invoice %', closed.number - 1 using errcode = 'check_violation';
  end if;
  if exists (select from invoice i where i.tenant_id = closed.tenant_id and i.number < closed.number
             and i.month >= closed.month) then
    raise exception 'a later month of % is closed', closed.tenant_id using errcode = 'check_violation';
  end if;
  return null;
end $$;

create constraint trigger invoice_whole after insert on invoice
  deferrable initially deferred for each row execute function check_invoice();
create constraint trigger invoice_line_whole after insert on invoice_line
  deferrable initially deferred for each row execute function check_invoice();

-- The months of a tenant in which more, or less, was used than its invoices say: how many lines, of what amount.
create function months_to_invoice(tenant text)
returns table (month date, events bigint, amount_nano_usd bigint) language sql stable as $$
  select month, sum(events)::bigint, sum(amount)::bigint
  from (
    select date_trunc('month', hour at time zone 'UTC')::date as month, events, amount_nano_usd as amount
    from usage_hour where tenant_id = tenant
    union all
    select l.month, -l.events, -l.amount_nano_usd
    from invoice i join invoice_line l using (number) where i.tenant_id = tenant
  ) together
  group by 1
  having sum(events) <> 0 or sum(amount) <> 0
$$;

-- What a tenant used in a month and no invoice says yet, by price; what is less than invoiced has a quantity below zero.
create function usage_to_invoice(tenant text, of_month date)
returns table (base_model text, kind text, price_id bigint, quantity bigint, events bigint, amount_nano_usd bigint,
               credit_used_nano_usd bigint) language sql stable as $$
  with batch as (
    -- Of all that was recorded at one moment, one account was charged.
    select e.base_model, e.kind, e.price_id, e.recorded_at, sum(e.quantity) as quantity, count(*) as events,
           sum(e.amount_nano_usd) as amount
    from usage_event e
    where e.tenant_id = tenant
      and e.occurred_at >= of_month::timestamp at time zone 'UTC'
      and e.occurred_at < (of_month + interval '1 month') at time zone 'UTC'
    group by 1, 2, 3, 4
  ), credited as (
    select distinct t.created_at
    from ledger_transaction t join ledger_entry e using (transaction_id)
    where t.tenant_id = tenant and t.kind = 'usage' and e.account = 'credit' and e.amount_nano_usd < 0
      and t.created_at in (select recorded_at from batch)
  )
  select base_model, kind, price_id, sum(quantity)::bigint, sum(events)::bigint, sum(amount)::bigint,
         sum(credit_used)::bigint
  from (
    select b.base_model, b.kind, b.price_id, b.quantity, b.events, b.amount,
           case when c.created_at is null then 0 else b.amount end as credit_used
    from batch b left join credited c on c.created_at = b.recorded_at
    union all
    select l.base_model, l.kind, l.price_id, -l.quantity, -l.events, -l.amount_nano_usd, -l.credit_used_nano_usd
    from invoice i join invoice_line l using (number)
    where i.tenant_id = tenant and l.month = of_month
  ) together
  group by 1, 2, 3
  having sum(quantity) <> 0 or sum(events) <> 0 or sum(amount) <> 0 or sum(credit_used) <> 0
$$;
