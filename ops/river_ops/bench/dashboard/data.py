"""A platform that has been in use for a month: tenants, runs with curves, checkpoints, usage and its sums."""

from __future__ import annotations

import asyncpg
from msgspec import Struct

from river_gateway.limits import LOGGED_PER_RUN_MAX
from river_gateway.tenancy.accounts import create_key, create_tenant
from river_trainer.store import FileSets

_MONTHS = """
select create_usage_partition(month::date)
from generate_series(date_trunc('month', now() - interval '30 days'), now(), interval '1 month') month
"""
_SESSIONS = """
insert into session (session_id, tenant_id, key_id, tags, heartbeat_at)
select 'ses_' || n, t.tenant_id, k.key_id, jsonb_build_object('task', 'task-' || n % 7, 'seed', n::text),
       now() - make_interval(mins => n)
from generate_series(1, $1::int) n
join (select tenant_id, row_number() over (order by tenant_id) - 1 as at, count(*) over () as count from tenant) t
  on t.at = n % t.count
join lateral (select key_id from api_key where tenant_id = t.tenant_id limit 1) k on true
"""
_RUNS = """
insert into run (run_id, tenant_id, session_id, base_model, lora, context_length, created_at, updated_at, last_seq,
                 step, metrics)
select 'run_' || lpad(n::text, 20, '0'), s.tenant_id, s.session_id, 'river/model-' || n % 3, '{"rank": 16}', 32768,
       now() - make_interval(mins => n * 40), now() - make_interval(mins => n * 40 - 30), 400, 200,
       jsonb_build_object('loss_mean', 1 + 1.0 / n, 'grad_norm', 2)
from generate_series(1, $1::int) n join session s on s.session_id = 'ses_' || n
"""
_METRICS = """
insert into run_metric (run_id, seq, step, logged_at, metrics)
select run_id, n, n, r.created_at + make_interval(secs => n),
       jsonb_build_object('loss_mean', 3.0 / (1 + n / 50.0), 'kl', 0.01 * random(), 'grad_norm', 1 + random(),
                          'entropy', 2.0 / (1 + n / 100.0), 'num_tokens', 4096)
from run r, generate_series(1, case when r.run_id = $1 then $3::int else $2::int end) n
"""
_REWARDS = """
insert into run_metric (run_id, step, metrics)
select run_id, n, jsonb_build_object('reward', 1 - 1.0 / (1 + n / 40.0), 'length', 100 + n % 9)
from run r, generate_series(1, case when r.run_id = $1 then $3::int else $2::int end) n
"""
_SAMPLES = """
insert into run_sample (run_id, step, identity, place, prompt, completions, rewards, size_bytes)
select $1, n / 8, 'log_' || n / 8, n % 8, 'Tom has ' || n || ' apples and gets 4 more. How many apples does Tom have?',
       array['He has ' || n + 4 || ' apples.', repeat('Let us count them one by one. ', 30), ''],
       array[1, 0.5 * random(), null], 1200
from generate_series(1, $2::int) n
"""
_LEARNINGS = """
insert into learning (run_id, tenant_id, key_id, alias, settings, status, reason, first_seq, next_seq, steps,
                      completions, step, metrics, ended_at, leased_until)
select run_id, r.tenant_id, s.key_id, 'tutor', '{"alias": "tutor", "adam": {"lr": 0.0001}}',
       (array['learning', 'stopped', 'failed'])[1 + n % 3],
       case when n % 3 = 2 then 'no completion of the last batch can be trained on' end,
       1, 1 + n, n, 64 * n, n, '{"loss_mean": 0.5}', case when n % 3 > 0 then now() end, now() + interval '1 day'
from (select run_id, tenant_id, session_id, row_number() over (order by run_id) as n from run) r
join session s using (session_id) where n <= $1
"""
_CHECKPOINTS = """
insert into checkpoint (checkpoint_id, tenant_id, run_id, base_model, mode, name, step, location, size_bytes,
                        created_at)
select 'ckpt_' || r.run_id || '_' || n, r.tenant_id, r.run_id, r.base_model,
       case when n % 2 = 0 then 'training' else 'inference' end, 'step-' || n * 20, n * 20,
       'file:///nowhere/' || r.run_id || '/' || n, 40000000 + n, r.created_at + make_interval(mins => n)
from run r, generate_series(1, $1::int) n
"""
# Of the checkpoints only one has files: that whose page is asked for.
_SHOWN_CHECKPOINT = """
update checkpoint set location = $1, size_bytes = $2
where run_id = $3 and mode = 'training' and name = $4
"""
_INVOICE = """
with of as (select tenant_id, name, date_trunc('month', now() - interval '2 months')::date as month
            from tenant where name = 'tenant-00'),
     line as (select n, 1000 * n as quantity, 5000000 * n as amount from generate_series(1, $1::int) n),
     closed as (
       insert into invoice (number, tenant_id, tenant_name, month, amount_nano_usd, credit_used_nano_usd,
                            carried_nano_usd, due_cents, credit_before_nano_usd, credit_added_nano_usd)
       select 1, tenant_id, name, month, (select sum(amount) from line), 0,
              (select sum(amount) from line) % 10000000, (select sum(amount) from line) / 10000000, 0, 0
       from of returning number, month)
insert into invoice_line (number, line, month, base_model, kind, context_length, nano_usd_per_unit, quantity, events,
                          amount_nano_usd, credit_used_nano_usd)
select number, n, month, 'river/model-' || n % 3, (array['prompt', 'completion', 'training'])[1 + n % 3],
       32768, 5000, quantity, n, amount, 0
from closed, line
"""
_EVENTS = """
insert into usage_event (event_id, kind, occurred_at, tenant_id, key_id, run_id, base_model, context_length, quantity,
                         amount_nano_usd)
select gen_random_uuid(), (array['prompt', 'completion', 'cached_prompt', 'training'])[1 + n % 4],
       now() - (30 * ($1::bigint - n) / $1::float8) * interval '1 day', r.tenant_id,
       'key_' || right(r.tenant_id, 6) || '_' || n % 2, r.run_id, r.base_model, 32768, 100 + n % 1000, 50000 + n % 1000
from generate_series(1, $1::bigint) n join (
  select run_id, tenant_id, base_model, row_number() over (order by run_id) - 1 as at, count(*) over () as count
  from run
) r on r.at = (n / 7) % r.count
"""
# The recorder charges the checkpoints above for their storage, and sums that up itself.
_HOURS = """
insert into usage_hour (tenant_id, hour, base_model, context_length, kind, key_id, quantity, amount_nano_usd, events)
select tenant_id, date_trunc('hour', occurred_at), base_model, context_length, kind, key_id, sum(quantity),
       sum(amount_nano_usd), count(*)
from usage_event where kind <> 'storage' group by 1, 2, 3, 4, 5, 6
"""
_OF_RUNS = """
insert into usage_run (tenant_id, run_id, kind, quantity, amount_nano_usd)
select tenant_id, run_id, kind, sum(quantity), sum(amount_nano_usd) from usage_event
where run_id is not null and kind <> 'storage' group by 1, 2, 3
"""
SHOWN_KEY = "key_" + "1".zfill(20)
_SHOWN_KEY = """
insert into api_key (key_id, tenant_id, name, secret_hash, prefix, scopes, requests_per_minute, rotated_at,
                     last_used_at, previous_hash, previous_until)
select $1, tenant_id, 'application', 'shown', 'rv-Xn2pQ7', '{infer,train}', 600, now() - interval '2 hours', now(),
       'before', now() + interval '22 hours'
from tenant where name = 'tenant-00'
"""
# Three models at one price after another, the last one planned.
_PRICES = """
insert into price (model, context_length, kind, nano_usd_per_unit, valid_from, valid_to)
select 'river/model-' || m, 32768, kind, 100 + 10 * n, at, case when n < 11 then at + interval '7 days' end
from generate_series(0, 2) m, generate_series(0, 11) n, unnest(array['prompt', 'completion', 'training']) kind,
     lateral (select date_trunc('day', now()) + make_interval(days => 7 * (n - 10)) as at) a
"""
_DISCOUNTS = """
insert into discount (tenant_id, model, kind, share, valid_from)
select tenant_id, '*', '*', 0.05, now() - interval '9 days' from tenant
"""
_AUDIT = """
insert into audit_log (occurred_at, action, through, actor_key_id, actor_key_name, actor_tenant_id, tenant_id, subject,
                       details, request_id)
select now() - make_interval(mins => $1::int - n), (array['aliases.put', 'keys.limits', 'learning.start'])[1 + n % 3],
       (array['api', 'dashboard'])[1 + n % 2], k.key_id, k.name, k.tenant_id, k.tenant_id, 'subject-' || n % 100,
       jsonb_build_object('requests_per_minute', n, 'tokens_per_minute', null), gen_random_uuid()::text
from generate_series(1, $1::int) n
join (select *, row_number() over (order by key_id) - 1 as at, count(*) over () as count from api_key) k
  on k.at = n % k.count
"""
_LEARNING_RUNS = 60
LONG_RUN = "run_" + "1".zfill(20)
SHOWN_CHECKPOINT = "step-200"
_SHOWN_BYTES = 1_000_000
_INVOICE_LINES = 60


class Amounts(Struct, frozen=True, kw_only=True):
    """How much there is of everything; steps are those of each run, and of one that has been trained for long."""

    tenants: int
    runs: int
    steps: int
    steps_long: int
    checkpoints_per_run: int
    usage_events: int
    audit_lines: int


async def fill(postgres_url: str, store_url: str, amounts: Amounts) -> tuple[str, str]:
    """Makes all of it; returns the keys of an admin and of a tenant."""
    connection = await asyncpg.connect(postgres_url)
    try:
        keys: list[str] = []
        for number in range(amounts.tenants):
            tenant = await create_tenant(connection, f"tenant-{number:02}")
            key = await create_key(connection, tenant=tenant.tenant_id)
            keys.append(key.secret or "")
        admin = await create_tenant(connection, "operators")
        admin_key = await create_key(
            connection, tenant=admin.tenant_id, scopes=("admin", "infer", "train")
        )
        await connection.execute(_MONTHS)
        await connection.execute(_SESSIONS, amounts.runs)
        await connection.execute(_RUNS, amounts.runs)
        for statement in (_METRICS, _REWARDS):
            await connection.execute(statement, LONG_RUN, amounts.steps, amounts.steps_long)
        await connection.execute(_SAMPLES, LONG_RUN, LOGGED_PER_RUN_MAX)
        await connection.execute(_LEARNINGS, _LEARNING_RUNS)
        await connection.execute(_CHECKPOINTS, amounts.checkpoints_per_run)
        files = FileSets(store_url)
        size_bytes = files.write("shown", {"adapter_model.safetensors": bytes(_SHOWN_BYTES)}, {})
        await connection.execute(
            _SHOWN_CHECKPOINT, files.location("shown"), size_bytes, LONG_RUN, SHOWN_CHECKPOINT
        )
        await connection.execute(_INVOICE, _INVOICE_LINES)
        await connection.execute(_EVENTS, amounts.usage_events)
        await connection.execute(_HOURS)
        await connection.execute(_OF_RUNS)
        await connection.execute(_SHOWN_KEY, SHOWN_KEY)
        for statement in (_PRICES, _DISCOUNTS):
            await connection.execute(statement)
        await connection.execute(_AUDIT, amounts.audit_lines)
        await connection.execute("vacuum analyze")
    finally:
        await connection.close()
    return admin_key.secret or "", keys[0]
