"""Stored completions: kept only when asked for, the same to the client, and served as OpenAI serves them."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from support.gateway import Rig, eventually
from support.stand_ins import BASE

from river_gateway.feedback.keeping import Tokens

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
    {"role": "user", "content": "x"},
]


async def _rows(url: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch("select * from stored_completion order by created_at")
    finally:
        await connection.close()


async def _body(rig: Rig, **fields: Any) -> bytes:
    """What the client sees of a completion, whole, without what differs from one to the next."""
    body = {"model": BASE, "messages": MESSAGES} | fields
    answer = await rig.tenant.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    request_id = answer.headers["x-request-id"].encode()
    return answer.content.replace(request_id, b"id").replace(b" ", b"")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("logprobs", [False, True], ids=["plain", "logprobs"])
@pytest.mark.parametrize("n", [1, 3])
async def test_the_client_sees_no_difference(
    rig: Rig, postgres_url: str, stream: bool, logprobs: bool, n: int
) -> None:
    """A stored completion looks like another; what was stored is whole, and there when the client has seen the end."""
    fields: dict[str, Any] = {"stream": stream, "logprobs": logprobs, "n": n}
    plain = await _body(rig, **fields)
    assert await _rows(postgres_url) == []
    assert await _body(rig, **fields, store=False) == plain
    kept = await _body(rig, **fields, store=True)
    if not stream:
        assert msgspec.json.decode(kept) | {"prompt_token_ids": None} == {
            **msgspec.json.decode(plain),
            "prompt_token_ids": None,
            "choices": [
                choice | {"token_ids": None} for choice in msgspec.json.decode(plain)["choices"]
            ],
        }
    assert b'"token_ids":[' not in kept
    assert b'prompt_token_ids":[' not in kept
    assert (b'logprob":' in kept) is logprobs
    (row,) = await _rows(postgres_url)
    tokens = msgspec.msgpack.decode(row["tokens"], type=Tokens)
    produced = [10, 11, 12, 13] if stream else [10]
    assert tokens.prompt == [1, 2, 3, 4, 5, 6, 7]
    assert [choice.index for choice in tokens.choices] == list(range(n))
    assert all(choice.tokens == produced for choice in tokens.choices)
    assert all(choice.logprobs == [-t / 100 for t in produced] for choice in tokens.choices)
    answer = msgspec.json.decode(row["answer"])
    text = "w0 w1 w2 w3 " if stream else "w0 "
    assert [choice["message"]["content"] for choice in answer["choices"]] == [text] * n
    assert (answer["choices"][0]["logprobs"] is not None) is logprobs
    assert row["policy_version"] == BASE


async def test_the_openai_package_reads_them(rig: Rig) -> None:
    """List, retrieve, update, delete and the messages are what the package parses; filters and pages work."""
    chat = rig.tenant.openai.chat.completions
    made = [
        await chat.create(
            model=BASE, messages=MESSAGES, store=True, metadata={"n": str(n % 2), "who": "me"}
        )
        for n in range(5)
    ]
    ids = [completion.id for completion in made]
    assert [c.id async for c in chat.list(limit=2)] == ids
    assert [c.id async for c in chat.list(limit=2, order="desc")] == ids[::-1]
    assert [c.id async for c in chat.list(metadata={"n": "1"})] == ids[1::2]
    assert [c.id async for c in chat.list(model="other")] == []
    first = await chat.list(limit=2, after=ids[1])
    assert ([c.id for c in first.data], first.has_more) == (ids[2:4], True)
    one = await chat.retrieve(ids[0])
    assert one.choices[0].message.content == made[0].choices[0].message.content
    assert (await chat.update(ids[0], metadata={"n": "7"})).to_dict()["metadata"] == {"n": "7"}
    assert [c.id async for c in chat.list(metadata={"n": "7"})] == ids[:1]
    messages = [message async for message in chat.messages.list(ids[0], limit=1)]
    assert [message.role for message in messages] == ["system", "user"]
    assert messages[0].content is None
    assert messages[0].content_parts is not None
    assert messages[1].content == "x"
    assert (await chat.delete(ids[0])).deleted
    with pytest.raises(openai.NotFoundError):
        await chat.retrieve(ids[0])
    assert [c.id async for c in rig.stranger.openai.chat.completions.list()] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata"),
    ],
    ids=["number", "many", "long", "nul"],
)
async def test_wrong_metadata(rig: Rig, fields: dict[str, Any], param: str) -> None:
    """Metadata that cannot be stored are refused before anything is generated."""
    body = {"model": BASE, "messages": MESSAGES, "store": True} | fields
    answer = await rig.tenant.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not any(engine.requests for engine in rig.engines)


async def test_a_text_with_nul_is_stored(rig: Rig, postgres_url: str) -> None:
    """What Postgres cannot hold as JSON is replaced, not lost with all that was written with it."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "a\0b"}]
    chat = rig.tenant.openai.chat.completions
    await asyncio.gather(
        *(chat.create(model=BASE, messages=m, store=True) for m in (messages, MESSAGES))
    )
    assert len(await _rows(postgres_url)) == 2


async def test_what_postgres_refuses_harms_nobody(rig: Rig, postgres_url: str) -> None:
    """A number beyond jsonb is answered and not kept; what was written with it is, and the gateway goes on."""
    good = msgspec.json.encode({"model": BASE, "messages": MESSAGES, "store": True})
    bad = good.replace(b'"role"', b'"x":1e999999,"role"', 1)
    url = "/v1/chat/completions"
    for _ in range(2):
        answers = await asyncio.gather(
            *(rig.tenant.http.post(url, content=body) for body in (good, bad, good))
        )
        assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len(await _rows(postgres_url)) == 4


async def test_each_of_many_is_there_when_its_end_is_seen(rig: Rig, postgres_url: str) -> None:
    """Also those that end while others are being written."""

    async def one() -> None:
        chat = rig.tenant.openai.chat.completions
        done = await chat.create(model=BASE, messages=MESSAGES, store=True)
        assert (await chat.retrieve(done.id)).id == done.id

    await asyncio.gather(*(one() for _ in range(30)))


async def test_a_stream_that_was_left_is_not_stored(rig: Rig, postgres_url: str) -> None:
    """Nothing is kept of a completion whose end nobody has seen."""
    for engine in rig.engines:
        engine.behaviour = "hang"
    stream = await rig.tenant.openai.chat.completions.create(
        model=BASE, messages=MESSAGES, store=True, stream=True
    )
    await anext(aiter(stream))
    await stream.close()
    await eventually(lambda: any(engine.cancelled for engine in rig.engines))
    assert await _rows(postgres_url) == []


async def test_they_go_when_their_time_is_up(rig: Rig, postgres_url: str) -> None:
    """A tenant's own retention counts, and expired completions are neither shown nor kept."""
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(
        "update tenant set completions_kept_s = 1 where tenant_id = $1", rig.tenant.tenant_id
    )
    await connection.close()
    chat = rig.tenant.openai.chat.completions
    await chat.create(model=BASE, messages=MESSAGES, store=True)
    assert len(await _rows(postgres_url)) == 1
    async with asyncio.timeout(10):
        while await _rows(postgres_url):  # noqa: ASYNC110 - Postgres has no event to wait for
            await asyncio.sleep(0.1)
    assert [c.id async for c in chat.list()] == []
