"""The demo from end to end, against a running stack."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import msgspec
from openai import OpenAI
from transformers import AutoTokenizer

import river_client as river
from river_client.wire import (
    NANO_USD_PER_USD,
    ApiKey,
    CreateKey,
    CreateTenant,
    Tenant,
    UsageLine,
)
from river_ops.demo.counters import counted_tokens
from river_ops.demo.loop import MAX_TOKENS, Progress, train
from river_ops.models import TINY_MOE, TINY_MOE_NAME
from river_ops.settings import StackInfo
from river_ops.tiny_moe.problems import problems

RANK = 16
BILL_TIMEOUT_S = 30.0
BILL_POLL_INTERVAL_S = 0.2
SAMPLED_KIND = "completion"
TRAINED_KIND = "training"


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `river demo --json` prints."""

    reward_first: float
    reward_last: float
    steps: int
    seconds: float
    tokens_trained: int
    tokens_sampled: int
    cost_usd: float
    checkpoint: str


@dataclass(slots=True)
class Demo:
    """What the demo saw on its way."""

    curve: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    question: str = ""
    answer: str = ""
    bill: list[UsageLine] = field(default_factory=list[UsageLine])
    counted: Counter[str] = field(default_factory=Counter[str])
    result: DemoResult | None = None

    @property
    def billed(self) -> Counter[str]:
        """Tokens by kind on the bill."""
        return Counter({line.kind: line.quantity for line in self.bill})


def run_demo(info: StackInfo, *, steps: int, show: Callable[[Progress], None]) -> Demo:
    """Trains for `steps` steps as a new tenant, saves, chats, and reads the bill; calls `show` after each step.

    Raises:
        river_client.RiverError: the platform refused or failed something.
    """
    demo = Demo()
    started = time.monotonic()
    key = new_tenant_key(info)
    counted_before = counted_tokens(info.engine_metrics_urls, info.trainer_metrics_urls)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    with river.Client(api_key=key, base_url=info.base_url) as client, client.session() as session:
        model = session.create_model(
            base_model=TINY_MOE_NAME,
            lora=river.LoraConfig(
                rank=RANK, seed=0, train_attn=True, train_mlp=True, train_unembed=True
            ),
        )
        for progress in train(model, tokenizer, steps=steps):
            if progress.held_out_reward is not None:
                demo.curve.append((progress.step, progress.held_out_reward))
            show(progress)
        checkpoint = model.save_weights("final", mode="inference")
        demo.question = problems("held_out", 1)[0].question
        demo.answer = chat(info, key, checkpoint.path, demo.question)
        counted = counted_tokens(info.engine_metrics_urls, info.trainer_metrics_urls)
        demo.counted = Counter({kind: counted[kind] - counted_before[kind] for kind in counted})
        demo.bill = settled_bill(client, demo.counted)
    demo.result = DemoResult(
        reward_first=demo.curve[0][1],
        reward_last=demo.curve[-1][1],
        steps=steps,
        seconds=round(time.monotonic() - started, 1),
        tokens_trained=demo.billed[TRAINED_KIND],
        tokens_sampled=demo.billed[SAMPLED_KIND],
        cost_usd=sum(line.amount_nano_usd for line in demo.bill) / NANO_USD_PER_USD,
        checkpoint=checkpoint.path,
    )
    return demo


def new_tenant_key(info: StackInfo) -> str:
    """A key of a tenant made for this demo alone, so that its bill holds nothing else."""
    headers = {
        "authorization": f"Bearer {info.admin_key}",
        "content-type": "application/json",
        "accept": "application/json",
    }
    name = f"demo-{secrets.token_hex(4)}"
    with httpx.Client(base_url=f"{info.base_url}/river/v1", headers=headers) as client:
        body = msgspec.json.encode(CreateTenant(name=name))
        answer = client.post("/tenants", content=body).raise_for_status()
        tenant = msgspec.json.decode(answer.content, type=Tenant)
        body = msgspec.json.encode(CreateKey(tenant=tenant.tenant_id))
        answer = client.post("/keys", content=body).raise_for_status()
        key = msgspec.json.decode(answer.content, type=ApiKey)
    assert key.secret is not None
    return key.secret


def chat(info: StackInfo, key: str, model: str, question: str) -> str:
    """One completion from a checkpoint, through the unmodified `openai` package."""
    with OpenAI(base_url=f"{info.base_url}/v1", api_key=key) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=MAX_TOKENS,
            temperature=0.0,
        )
    return answer.choices[0].message.content or ""


def settled_bill(client: river.Client, counted: Counter[str]) -> list[UsageLine]:
    """The tenant's bill, once the recorder has written down as many tokens as were counted, or after a while anyway."""
    deadline = time.monotonic() + BILL_TIMEOUT_S
    while True:
        bill = client.usage()
        if sum(line.quantity for line in bill) >= counted.total() or time.monotonic() > deadline:
            return bill
        time.sleep(BILL_POLL_INTERVAL_S)
