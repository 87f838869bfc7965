"""Stored text completions: as chats, but of one prompt and without its echo."""

from __future__ import annotations

from typing import Any

import asyncpg
import msgspec
import pytest
from support.gateway import Rig
from support.stand_ins import BASE

from river_client import feedback_wire
from river_gateway.feedback.keeping import Tokens

URL = "/v1/completions"


async def _row(url: str) -> asyncpg.Record | None:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchrow("select * from stored_completion")
    finally:
        await connection.close()


async def _body(rig: Rig, **fields: Any) -> bytes:
    """What the client sees, without what differs from one answer to the next."""
    body = {"model": BASE, "prompt": "x"} | fields
    answer = await rig.tenant.http.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    request_id = answer.headers["x-request-id"].encode()
    return answer.content.replace(request_id, b"id").replace(b" ", b"")


def _without_nulls(body: bytes) -> bytes:
    """What vLLM leaves out where nobody asks for it, and says to be null where somebody has."""
    for name in (b"prompt_token_ids", b"token_ids"):
        body = body.replace(b',"%s":null' % name, b"")
    return body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("n", [1, 3])
async def test_the_client_sees_no_difference(
    rig: Rig, postgres_url: str, stream: bool, logprobs: int | None, n: int
) -> None:
    """A stored text looks like another to the client; tokens, log-probabilities and version are kept whole."""
    fields: dict[str, Any] = {"stream": stream, "logprobs": logprobs, "n": n}
    plain = await _body(rig, **fields)
    assert await _row(postgres_url) is None
    assert _without_nulls(await _body(rig, **fields, store=True)) == plain
    row = await _row(postgres_url)
    assert row is not None
    tokens = msgspec.msgpack.decode(row["tokens"], type=Tokens)
    produced = [10, 11, 12, 13] if stream else [10]
    assert tokens.prompt == [1, 2, 3, 4, 5, 6, 7]
    assert [choice.index for choice in tokens.choices] == list(range(n))
    assert all(choice.tokens == produced for choice in tokens.choices)
    assert all(choice.logprobs == [-t / 100 for t in produced] for choice in tokens.choices)
    answer = msgspec.json.decode(row["answer"])
    text = "w0 w1 w2 w3 " if stream else "w0 "
    assert [choice["text"] for choice in answer["choices"]] == [text] * n
    for choice in answer["choices"]:
        if logprobs is None:
            assert choice["logprobs"] is None
        else:
            assert choice["logprobs"]["tokens"] == [f"t{token}" for token in produced]
    assert (row["kind"], row["policy_version"]) == ("text", BASE)
    bodies = [body for engine in rig.engines for _, body in engine.requests]
    assert {body.get("store", False): body["logprobs"] for body in bodies} == {
        False: logprobs,
        True: logprobs or 0,
    }


async def test_they_are_read_changed_and_deleted(rig: Rig) -> None:
    """The routes of stored chats are there for texts, apart from chats; a text is shown with its prompt."""
    http = rig.tenant.http
    made = [
        (await http.post(URL, json={"model": BASE, "prompt": prompt, "store": True})).json()["id"]
        for prompt in ("a", [1, 2, 3])
    ]
    page = (await http.get(URL, params={"limit": 1})).json()
    assert ([one["prompt"] for one in page["data"]], page["has_more"]) == (["a"], True)
    page = (await http.get(URL, params={"after": made[0]})).json()
    assert [one["prompt"] for one in page["data"]] == [[1, 2, 3]]
    assert (await http.get("/v1/chat/completions")).json()["data"] == []
    assert (await http.get(f"/v1/chat/completions/{made[0]}")).status_code == 404
    changed = await http.post(f"{URL}/{made[0]}", json={"metadata": {"a": "b"}})
    assert changed.json()["metadata"] == {"a": "b"}
    assert (await http.get(URL, params={"metadata[a]": "b"})).json()["first_id"] == made[0]
    gone = await http.delete(f"{URL}/{made[0]}")
    assert gone.json() == {"object": "text_completion.deleted", "id": made[0], "deleted": True}
    assert (await http.get(f"{URL}/{made[0]}")).status_code == 404


async def test_they_are_learnt_from(rig: Rig) -> None:
    """A rewarded text comes back as training data beside chats."""
    http = rig.tenant.http
    body = {"model": BASE, "prompt": "x", "store": True, "stream": True, "n": 2}
    await http.post(URL, json=body)
    (completion,) = (await http.get(URL)).json()["data"]
    given = [{"completion_id": completion["id"], "choice": n, "reward": n} for n in range(2)]
    assert (await rig.tenant.post("/feedback", {"feedback": given})).status_code == 204
    answer = await rig.tenant.post("/feedback/batches", feedback_wire.ClaimFeedback(model=BASE))
    batch = msgspec.json.decode(answer.content, type=feedback_wire.FeedbackBatch)
    assert [datum.input_ids for datum in batch.data] == [[*range(1, 8), 10, 11, 12, 13]] * 2
    assert [datum.advantages for datum in batch.data] == [
        [0.0] * 6 + [advantage] * 4 + [0.0] for advantage in (-0.5, 0.5)
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
    ids=["echo", "texts", "tokens", "metadata"],
)
async def test_what_cannot_be_stored_is_refused(
    rig: Rig, fields: dict[str, Any], param: str
) -> None:
    """By name, before anything is generated; without `store` it is answered."""
    body = {"model": BASE, "prompt": "x"} | fields
    answer = await rig.tenant.http.post(URL, json=body | {"store": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not any(engine.requests for engine in rig.engines)
    if param != "metadata":
        assert (await rig.tenant.http.post(URL, json=body)).status_code == 200
    one = await rig.tenant.http.post(URL, json={"model": BASE, "prompt": ["x"], "store": True})
    assert one.status_code == 200
