"""Streams that their clients cut: the bill is what the engine produced, to the token, and the books stay in order."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.platform_runs import fit, new_model, supervised_data
from transformers import PreTrainedTokenizerBase

import river_client as river
from river_billing.audit import find_differences
from river_billing.database import connected
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo

STREAMS = 60
AT_ONCE = 6
MAX_TOKENS = 96
PATIENCE_S = 30.0
QUIET_S = 1.5
_COUNT = re.compile(r'^river_engine_tokens_total\{kind="(\w+)"\} (\S+)$', re.MULTILINE)

TOLD = """
select kind, sum(tokens)::bigint as tokens
from (select distinct on (producer_id, started_at, kind) kind, tokens from token_count
      where kind <> 'training' order by producer_id, started_at, kind, hour desc) life
group by 1
"""

TRAINED = """
select (select sum(tokens) from (select max(tokens) as tokens from token_count where kind = 'training'
                                 group by producer_id, started_at) life) as counted,
       (select sum(quantity) from usage_event where kind = 'training') as billed
"""
QUESTION = "What is 17 + 25? Explain every step at length, and then explain it again."
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTION}], "n": 2},
    "/v1/completions": {"prompt": [QUESTION, "Once upon a time"]},
    "/v1/responses": {"input": QUESTION},
    "/v1/messages": {"messages": [{"role": "user", "content": QUESTION}]},
}


def produced(stack: StackInfo) -> Counter[str]:
    """Tokens by kind, as the engines count them themselves."""
    counts: Counter[str] = Counter()
    for url in stack.engine_metrics_urls:
        for kind, value in _COUNT.findall(httpx.get(url).text):
            counts[kind] += int(float(value))
    return counts


def quiet(stack: StackInfo) -> Counter[str]:
    """The counts once nothing has been produced for a while."""
    deadline = time.monotonic() + PATIENCE_S
    last, since = produced(stack), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        assert time.monotonic() < deadline, "the engine does not come to rest"
        time.sleep(0.1)
        if (now := produced(stack)) != last:
            last, since = now, time.monotonic()
    return last


def billed(client: river.Client) -> Counter[str]:
    """Tokens by kind, as the tenant is billed for them."""
    counts: Counter[str] = Counter()
    for line in client.usage():
        counts[line.kind] += line.quantity
    return counts


class Cutter:
    """Opens streams and leaves them at random points: by time, or after so many bytes of the answer; some it reads."""

    def __init__(self, stack: StackInfo, key: str) -> None:
        self._http = httpx.Client(
            base_url=stack.base_url, headers={"authorization": f"Bearer {key}"}, timeout=60
        )
        self._lock = threading.Lock()
        self.ends: Counter[str] = Counter()

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        route = draw.choice(sorted(BODIES))
        limit = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
        body = {
            "model": TINY_MOE_NAME,
            "stream": True,
            "temperature": 1.0,
            limit: MAX_TOKENS,
            **BODIES[route],
        }
        cut_bytes = draw.choice([0, 1, draw.randrange(20_000), draw.randrange(60_000), 10**9])
        pause_s = draw.choice([0.0, 0.0, draw.random() / 5])
        end = "cut"
        with self._http.stream("POST", route, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            size = 0
            for piece in _pieces(answer):
                size += len(piece)
                if size > cut_bytes:
                    time.sleep(pause_s)
                    break
            else:
                end = "whole"
        with self._lock:
            self.ends[end] += 1

    def close(self) -> None:
        self._http.close()


def _pieces(answer: httpx.Response) -> Iterator[bytes]:
    yield b""  # A cut before the first byte of the body.
    yield from answer.iter_raw()


@pytest.mark.timeout(300)
def test_cut_streams_are_billed_to_the_token(stack: StackInfo) -> None:
    """Streams of every dialect, cut at random points or read to their end: the bill is the engine's own count."""
    key = new_tenant_key(stack)
    before = quiet(stack)
    cutter = Cutter(stack, key)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(cutter.run, range(STREAMS)):
            pass
    cutter.close()
    assert min(cutter.ends["cut"], cutter.ends["whole"]) >= 5, cutter.ends
    engine = quiet(stack) - before
    assert engine["completion"] > STREAMS
    with river.Client(api_key=key, base_url=stack.base_url) as client:
        deadline = time.monotonic() + PATIENCE_S
        while (bill := billed(client)) != engine:
            assert time.monotonic() < deadline, (bill, engine)
            time.sleep(0.1)

    asyncio.run(check_books(stack))


def test_training_is_billed_as_the_trainer_counts(
    stack: StackInfo, client: river.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokens that were trained on are on the bills and in the trainer's own counts alike."""
    with client.session() as session:
        fit(new_model(session), supervised_data(tokenizer), steps=2)

    async def check() -> None:
        deadline = time.monotonic() + PATIENCE_S
        async with connected(stack.postgres_url) as connection:
            while True:
                counted, billed = (await connection.fetch(TRAINED))[0].values()
                if counted == billed > 0:
                    break
                assert time.monotonic() < deadline, (counted, billed)
                await asyncio.sleep(0.2)

    asyncio.run(check())


async def check_books(stack: StackInfo) -> None:
    """The engines' own counts have reached the books, and the audit finds nothing."""
    counted = produced(stack)
    deadline = time.monotonic() + PATIENCE_S
    async with connected(stack.postgres_url) as connection:
        while (
            told := {row["kind"]: row["tokens"] for row in await connection.fetch(TOLD)}
        ) != counted:
            assert time.monotonic() < deadline, (told, counted)
            await asyncio.sleep(0.2)
        assert (await find_differences(connection)).differences == []
