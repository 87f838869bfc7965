"""What the audit looks for: a statement for each kind of difference, naming what differs.

Each answers with rows of `id`, `expected` and `found`: what the row is, what it should say by what it is derived from,
and what it says. `{events}` stands for all usage there is, of months that are set aside too; `{dropped_months}` for
months whose usage was dropped for good, `{dropped_at}` for the last moment at which that was done; `{settle_s}` for how
long, in seconds, usage may take to be recorded. Nothing here uses the functions and views that recording uses.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One kind of difference: the table that is wrong if it finds one, and what it compares."""

    table: str
    about: str
    statement: str


AMOUNTS = Check(
    "usage_event",
    "the amount is quantity times price less the discount, rounded half to even",
    """
    select concat_ws(' ', event_id, kind) as id, exact as expected, amount_nano_usd as found
    from (
      select e.*, p.price_id as known_price, d.discount_id as known_discount,
             coalesce(e.quantity * p.nano_usd_per_unit * (1 - coalesce(d.share, 0)), 0) as exact
      from {events} e left join price p using (price_id) left join discount d using (discount_id)
    ) e
    where not (
        abs(exact - amount_nano_usd) < 0.5 or (abs(exact - amount_nano_usd) = 0.5 and amount_nano_usd % 2 = 0)
      )
      or (price_id is not null and known_price is null)
      or (discount_id is not null and known_discount is null)
    """,
)

DISCOUNTS = Check(
    "usage_event",
    "the discount is one of the tenant, model and kind that was in force",
    """
    select concat_ws(' ', e.event_id, e.kind) as id,
           concat_ws(' ', e.tenant_id, e.base_model, e.kind, e.occurred_at) as expected,
           concat_ws(' ', 'discount', d.discount_id, d.tenant_id, d.model, d.kind, d.valid_from, d.valid_to) as found
    from {events} e join discount d using (discount_id)
    where d.tenant_id <> e.tenant_id
       or d.kind not in (e.kind, '*')
       or d.model not in (e.base_model, regexp_replace(e.base_model, '^.*/', ''), '*')
       or e.occurred_at < d.valid_from
       or e.occurred_at > d.valid_to + interval '1 minute'  -- the clock of who counted it may differ
    """,
)

PRICES = Check(
    "usage_event",
    "the price is one of the model and kind that was in force",
    """
    select concat_ws(' ', e.event_id, e.kind) as id,
           concat_ws(' ', e.base_model, e.kind, e.occurred_at) as expected,
           concat_ws(' ', 'price', p.price_id, p.model, p.kind, p.valid_from, p.valid_to) as found
    from {events} e join price p using (price_id)
    where p.kind <> e.kind
       or p.model not in (e.base_model, regexp_replace(e.base_model, '^.*/', ''), '*')
       or e.occurred_at < p.valid_from
       or e.occurred_at > p.valid_to + interval '1 minute'  -- the clock of who counted it may differ
    """,
)

HOURS = Check(
    "usage_hour",
    "hours are the sums of the events",
    """
    select concat_ws(' ', tenant_id, hour, base_model, context_length, kind, key_id) as id,
           concat_ws(' ', coalesce(e.quantity, 0), coalesce(e.amount, 0), coalesce(e.events, 0)) as expected,
           concat_ws(' ', coalesce(h.quantity, 0), coalesce(h.amount_nano_usd, 0), coalesce(h.events, 0)) as found
    from (
      select * from usage_hour
      where date_trunc('month', hour at time zone 'UTC')::date not in ({dropped_months})
    ) h
    full join (
      select tenant_id, date_trunc('hour', occurred_at, 'UTC') as hour, base_model, context_length, kind, key_id,
             sum(quantity) as quantity, sum(amount_nano_usd) as amount, count(*) as events
      from {events} u group by 1, 2, 3, 4, 5, 6
    ) e using (tenant_id, hour, base_model, context_length, kind, key_id)
    where (coalesce(e.quantity, 0), coalesce(e.amount, 0), coalesce(e.events, 0))
       <> (coalesce(h.quantity, 0), coalesce(h.amount_nano_usd, 0), coalesce(h.events, 0))
    """,
)

MONTHS = Check(
    "usage_month",
    "months are the sums of the hours",
    """
    select concat_ws(' ', tenant_id, to_char(month, 'YYYY-MM'), key_id) as id,
           coalesce(h.amount, 0) as expected, coalesce(m.amount_nano_usd, 0) as found
    from usage_month m
    full join (
      select tenant_id, date_trunc('month', hour at time zone 'UTC')::date as month, key_id,
             sum(amount_nano_usd) as amount
      from usage_hour group by 1, 2, 3
    ) h using (tenant_id, month, key_id)
    where coalesce(h.amount, 0) <> coalesce(m.amount_nano_usd, 0)
    """,
)

RUNS = Check(
    "usage_run",
    "what a run used is the sum of its events",
    """
    select concat_ws(' ', tenant_id, run_id, kind) as id,
           concat_ws(' ', coalesce(e.quantity, 0), coalesce(e.amount, 0)) as expected,
           concat_ws(' ', coalesce(r.quantity, 0), coalesce(r.amount_nano_usd, 0)) as found
    from usage_run r
    full join (
      select tenant_id, run_id, kind, sum(quantity) as quantity, sum(amount_nano_usd) as amount
      from {events} u where run_id is not null group by 1, 2, 3
    ) e using (tenant_id, run_id, kind)
    where (coalesce(e.quantity, 0), coalesce(e.amount, 0)) <> (coalesce(r.quantity, 0), coalesce(r.amount_nano_usd, 0))
      -- Of months that were dropped there may be more.
      and not (exists ({dropped_months}) and coalesce(e.quantity, 0) < coalesce(r.quantity, 0))
    """,
)

# A batch's usage and its postings are written at one moment. What was used before there was a ledger was posted at
# once. Where usage has been dropped, what was posted for it until then is compared tenant by tenant instead.
POSTINGS = Check(
    "ledger_transaction",
    "what a tenant used is posted as revenue when it is recorded",
    """
    with opening as (
      select tenant_id, max(created_at) as at from ledger_transaction
      where kind = 'usage' and note = 'usage before the ledger began' group by 1
    ), used as (
      select e.tenant_id, greatest(e.recorded_at, o.at) as at, sum(e.amount_nano_usd) as amount
      from {events} e left join opening o using (tenant_id) group by 1, 2
    ), posted as (
      select t.tenant_id, t.created_at as at, sum(e.amount_nano_usd) as amount,
             string_agg(distinct t.transaction_id::text, ', ') as transactions
      from ledger_transaction t left join ledger_entry e using (transaction_id)
      where t.kind = 'usage' and coalesce(e.account = 'revenue', true) group by 1, 2
    )
    select concat_ws(' ', coalesce(used.tenant_id, posted.tenant_id), 'at', coalesce(used.at, posted.at),
                     'transaction ' || transactions) as id,
           coalesce(used.amount, 0) as expected, coalesce(posted.amount, 0) as found
    from used full join posted on (used.tenant_id, used.at) = (posted.tenant_id, posted.at)
    where coalesce(used.amount, 0) <> coalesce(posted.amount, 0)
      and not (coalesce(used.amount, 0) < coalesce(posted.amount, 0) and posted.at <= {dropped_at})
    """,
)

REVENUE = Check(
    "ledger_entry",
    "a tenant's revenue of usage is what its hours say",
    """
    select tenant_id as id, coalesce(h.amount, 0) as expected, coalesce(r.amount, 0) as found
    from (
      select e.tenant_id, sum(e.amount_nano_usd) as amount
      from ledger_entry e join ledger_transaction t using (transaction_id)
      where t.kind = 'usage' and e.account = 'revenue' group by 1
    ) r
    full join (select tenant_id, sum(amount_nano_usd) as amount from usage_hour group by 1) h using (tenant_id)
    where coalesce(h.amount, 0) <> coalesce(r.amount, 0)
    """,
)

TRANSACTIONS = Check(
    "ledger_transaction",
    "a transaction has two entries or more, which sum to zero",
    """
    select concat_ws(' ', t.tenant_id, 'transaction', t.transaction_id) as id, '0' as expected,
           concat_ws(' ', coalesce(sum(e.amount_nano_usd), 0), 'in', count(e.account), 'entries') as found
    from ledger_transaction t left join ledger_entry e using (transaction_id)
    group by t.transaction_id having count(e.account) < 2 or sum(e.amount_nano_usd) <> 0
    """,
)

ACCOUNTS = Check(
    "ledger_entry",
    "money flows between the accounts of its kind of transaction, as its tenant's",
    """
    select concat_ws(' ', e.tenant_id, 'transaction', e.transaction_id, e.account) as id,
           concat_ws(' ', t.tenant_id, t.kind) as expected, concat_ws(' ', e.tenant_id, e.amount_nano_usd) as found
    from ledger_entry e left join ledger_transaction t using (transaction_id)
    where t.transaction_id is null or t.tenant_id <> e.tenant_id or not case
      when t.kind = 'usage' and e.account = 'revenue' then e.amount_nano_usd > 0
      when t.kind = 'usage' then e.account in ('credit', 'receivable') and e.amount_nano_usd < 0
      when e.account = 'credit' then t.kind = 'adjustment' or e.amount_nano_usd > 0
      when t.kind = 'top_up' then e.account = 'payments'
      when t.kind = 'grant' then e.account = 'promotions'
      else e.account = 'adjustments'
      end
    """,
)

BALANCES = Check(
    "ledger_balance",
    "balances are the sums of the entries",
    """
    select concat_ws(' ', tenant_id, account) as id,
           coalesce(e.total, 0) as expected, coalesce(b.balance_nano_usd, 0) as found
    from ledger_balance b
    full join (select tenant_id, account, sum(amount_nano_usd) as total from ledger_entry group by 1, 2) e
      using (tenant_id, account)
    where coalesce(e.total, 0) <> coalesce(b.balance_nano_usd, 0)
    """,
)

INVOICE_NUMBERS = Check(
    "invoice",
    "numbers begin with one and have no gaps",
    """
    select 'invoice ' || number as id, expected, number as found
    from (select number, row_number() over (order by number) as expected from invoice) n
    where number <> expected and number - 1 not in (select number from invoice)
    """,
)

INVOICE_SUMS = Check(
    "invoice",
    "the amount and the credit used are those of the lines",
    """
    select 'invoice ' || i.number as id,
           concat_ws(' ', coalesce(l.amount, 0), coalesce(l.credit, 0)) as expected,
           concat_ws(' ', i.amount_nano_usd, i.credit_used_nano_usd) as found
    from invoice i
    left join (
      select number, sum(amount_nano_usd) as amount, sum(credit_used_nano_usd) as credit from invoice_line group by 1
    ) l using (number)
    where (i.amount_nano_usd, i.credit_used_nano_usd) <> (coalesce(l.amount, 0), coalesce(l.credit, 0))
    """,
)

INVOICE_TOTALS = Check(
    "invoice",
    "what is due is rounded half to even, and the rest and the credit are carried from invoice to invoice",
    """
    with told as (
      select *, carried_nano_usd + amount_nano_usd - credit_used_nano_usd as owed,
             lag(due_cents * 10000000) over w as due_before,
             lag(carried_nano_usd + amount_nano_usd - credit_used_nano_usd) over w as owed_before,
             lag(credit_before_nano_usd + credit_added_nano_usd - credit_used_nano_usd) over w as credit_left,
             lag(credit_until) over w as credit_since
      from (
        select *, least((month + interval '1 month') at time zone 'UTC', closed_at) as credit_until from invoice
      ) i
      window w as (partition by tenant_id order by number)
    ), added as (
      select i.number, coalesce(sum(e.amount_nano_usd), 0) as amount
      from told i
      left join ledger_transaction t on t.tenant_id = i.tenant_id and t.kind <> 'usage'
        and t.created_at < i.credit_until and t.created_at >= coalesce(i.credit_since, '-infinity')
      left join ledger_entry e on e.transaction_id = t.transaction_id and e.account = 'credit'
      group by 1
    )
    select 'invoice ' || i.number as id,
           concat_ws(' ', coalesce(i.owed_before - i.due_before, 0), round(i.owed / 1e7, 9),
                     coalesce(i.credit_left, 0), added.amount) as expected,
           concat_ws(' ', i.carried_nano_usd, i.due_cents, i.credit_before_nano_usd, i.credit_added_nano_usd) as found
    from told i join added using (number)
    where i.carried_nano_usd <> coalesce(i.owed_before - i.due_before, 0)
       or not (abs(i.owed - i.due_cents * 10000000) < 5000000
               or (abs(i.owed - i.due_cents * 10000000) = 5000000 and i.due_cents % 2 = 0))
       or i.credit_before_nano_usd <> coalesce(i.credit_left, 0)
       or i.credit_added_nano_usd <> added.amount
    """,
)

INVOICE_PRICES = Check(
    "invoice_line",
    "a line has the price of its usage",
    """
    select concat_ws(' ', 'invoice', l.number, 'line', l.line) as id,
           concat_ws(' ', p.nano_usd_per_unit, p.context_length, p.kind) as expected,
           concat_ws(' ', l.nano_usd_per_unit, l.context_length, l.kind) as found
    from invoice_line l left join price p using (price_id)
    where (p.nano_usd_per_unit, p.context_length) is distinct from (l.nano_usd_per_unit, l.context_length)
       or p.kind <> l.kind
    """,
)

INVOICE_DISCOUNTS = Check(
    "invoice_line",
    "a line has the share of a discount of its tenant",
    """
    select concat_ws(' ', 'invoice', l.number, 'line', l.line) as id,
           concat_ws(' ', d.tenant_id, d.share) as expected, concat_ws(' ', i.tenant_id, l.discount_share) as found
    from invoice_line l join invoice i using (number) left join discount d using (discount_id)
    where l.discount_id is not null and (d.tenant_id, d.share) is distinct from (i.tenant_id, l.discount_share)
    """,
)

# Invoices may lack what came too late for them, and nothing else: so all of a tenant's together say at least what was
# recorded a minute before the last was closed (no batch takes that long), and at most what there is now.
INVOICED = Check(
    "invoice_line",
    "all invoices of a tenant say what was used: not more, and not less but for what is late",
    """
    with last as (
      select tenant_id, max(month) as month, max(closed_at) - interval '1 minute' as closed_at from invoice group by 1
    ), told as (
      select i.tenant_id, l.month, l.base_model, l.kind, coalesce(l.price_id, 0) as price_id,
             sum(l.quantity) as quantity, sum(l.events) as events, sum(l.amount_nano_usd) as amount,
             sum(l.credit_used_nano_usd) as credit
      from invoice_line l join invoice i using (number)
      where l.month not in ({dropped_months}) group by 1, 2, 3, 4, 5
    ), credited as (
      select distinct t.tenant_id, t.created_at as recorded_at
      from ledger_transaction t join ledger_entry e using (transaction_id)
      where t.kind = 'usage' and e.account = 'credit'
    ), used as (
      select e.tenant_id, date_trunc('month', e.occurred_at at time zone 'UTC')::date as month, e.base_model, e.kind,
             coalesce(e.price_id, 0) as price_id,
             sum(e.quantity) as quantity, count(*) as events, sum(e.amount_nano_usd) as amount,
             sum(e.amount_nano_usd) filter (where c.recorded_at is not null) as credit,
             sum(e.quantity) filter (where e.recorded_at < last.closed_at) as least_quantity,
             count(*) filter (where e.recorded_at < last.closed_at) as least_events,
             sum(e.amount_nano_usd) filter (where e.recorded_at < last.closed_at) as least_amount
      from {events} e
      join last on last.tenant_id = e.tenant_id
        and e.occurred_at < (last.month + interval '1 month') at time zone 'UTC'
      left join credited c on (c.tenant_id, c.recorded_at) = (e.tenant_id, e.recorded_at)
      group by 1, 2, 3, 4, 5
    )
    select concat_ws(' ', tenant_id, to_char(month, 'YYYY-MM'), base_model, kind, 'price ' || price_id) as id,
           concat_ws(' ', coalesce(u.least_quantity, 0), 'to', coalesce(u.quantity, 0), 'for',
                     coalesce(u.least_amount, 0), 'to', coalesce(u.amount, 0)) as expected,
           concat_ws(' ', coalesce(t.quantity, 0), 'for', coalesce(t.amount, 0)) as found
    from told t full join used u using (tenant_id, month, base_model, kind, price_id)
    where coalesce(t.quantity, 0) not between coalesce(u.least_quantity, 0) and coalesce(u.quantity, 0)
       or coalesce(t.events, 0) not between coalesce(u.least_events, 0) and coalesce(u.events, 0)
       or coalesce(t.amount, 0) not between coalesce(u.least_amount, 0) and coalesce(u.amount, 0)
       or coalesce(t.credit, 0) > coalesce(u.credit, 0)
    """,
)

# Between two moments: what was counted `{settle_s}` ago must be billed by now, and what was billed when the running
# processes last counted is counted. The latter only if none ended without a last word, such as one that was killed.
COUNTS = Check(
    "token_count",
    "what engines and trainers produced is what was billed",
    """
    with life as (
      select distinct on (producer_id, started_at, kind) * from token_count
      order by producer_id, started_at, kind, hour desc
    ), settled as (
      select producer_id, started_at, kind, max(tokens) as tokens from token_count
      where counted_at <= now() - make_interval(secs => {settle_s}) group by 1, 2, 3
    ), counted as (
      select l.base_model, l.kind, min(l.started_at) as since, sum(l.tokens) as tokens,
             coalesce(sum(s.tokens), 0) as settled, count(*) as lives,
             bool_and(l.final or l.counted_at > now() - interval '2 minutes') as complete,
             coalesce(min(l.counted_at) filter (where not l.final), now()) - interval '5 seconds' as until
      from life l left join settled s using (producer_id, started_at, kind) group by 1, 2
    ), billed as (
      select c.base_model, c.kind, coalesce(sum(e.quantity), 0) as tokens,
             coalesce(sum(e.quantity) filter (where e.recorded_at <= c.until), 0) as known
      from counted c
      left join {events} e
        on (e.base_model, e.kind) = (c.base_model, c.kind) and e.recorded_at >= c.since
      where not exists (select from ({dropped_months}) d (month) where month + interval '1 month' > c.since)
      group by 1, 2
    )
    select concat_ws(' ', base_model, kind, 'since', c.since) as id,
           concat_ws(' ', c.settled, 'to', c.tokens, 'counted by', c.lives, 'processes') as expected,
           concat_ws(' ', b.tokens, 'billed') as found
    from counted c join billed b using (base_model, kind)
    where b.tokens < c.settled or (c.complete and b.known > c.tokens)
    """,
)

CHECKS = (
    AMOUNTS,
    PRICES,
    DISCOUNTS,
    HOURS,
    MONTHS,
    RUNS,
    POSTINGS,
    REVENUE,
    TRANSACTIONS,
    ACCOUNTS,
    BALANCES,
    INVOICE_NUMBERS,
    INVOICE_SUMS,
    INVOICE_TOTALS,
    INVOICE_PRICES,
    INVOICE_DISCOUNTS,
    INVOICED,
    COUNTS,
)
