"""Handles that go to another process: they find the server again, with the key of that process."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from support.stub_gateway import KEY, RUN_ID, StubGateway

import river_client as river
from river_client import wire

DATA: list[dict[str, Any]] = [{"input_ids": [1, 2]}]

PROGRAM = """
import pickle, sys

client, model, pending = pickle.loads(sys.stdin.buffer.read())
print(pending.operation_id, pending.result(10).policy_version)
print(model.optim_step(lr=1e-3).operation_id, model.policy_version)
print(model.sample("x", num_samples=2)[0][0].policy_version)
print(client.operation(pending.operation_id).result(10).operation_id)
"""


def elsewhere(data: bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `PROGRAM` on what was pickled, in a process of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RIVER_")}
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=data,
        env={**environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_handles_go_on_in_another_process(
    client: river.Client, model: river.Model, gateway: StubGateway
) -> None:
    """An operation under way is awaited there, and the model's next one has the next seq."""
    model.forward_backward(DATA)
    gateway.polls_until_done = 1
    pending = model.submit_forward_backward(DATA)
    data = pickle.dumps((client, model, pending))
    done = elsewhere(data, RIVER_API_KEY=KEY)
    assert done.returncode == 0, done.stderr.decode()
    waited, stepped, sampled, found = done.stdout.decode().splitlines()
    assert waited.split()[0] == f"{RUN_ID}-2"
    assert stepped.split() == [f"{RUN_ID}-3", f"{RUN_ID}@1"]
    assert sampled.startswith(RUN_ID)
    assert found == f"{RUN_ID}-2"
    assert isinstance(gateway.operations[3], wire.OptimStep)
    assert gateway.repeated == []


def test_no_key_is_in_a_pickle(client: river.Client, model: river.Model) -> None:
    """Who finds the file cannot use it; without a key of its own a process is told what is missing."""
    pending = model.submit_forward(DATA)
    for handle in (client, model, pending, model.submit_save_weights("x")):
        assert KEY.encode() not in pickle.dumps(handle)
    refused = elsewhere(pickle.dumps((client, model, pending)))
    assert refused.returncode != 0
    assert b"AuthenticationError: no API key for http://127.0.0.1" in refused.stderr


def test_asynchronous_handles_too(gateway: StubGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The asynchronous handles go on in another event loop, sharing the connections that were pickled together."""

    async def first() -> bytes:
        async with (
            river.AsyncClient(api_key=KEY, base_url=gateway.base_url) as client,
            client.session() as session,
        ):
            model = await session.create_model("base")
            pending = await model.submit_forward_backward(DATA)
            return pickle.dumps((model, pending))

    async def second(data: bytes) -> str:
        model, pending = pickle.loads(data)
        assert model._transport is pending._transport
        await pending.result()
        result = await model.optim_step(lr=1e-3)
        await model._transport.close()
        return result.operation_id

    data = asyncio.run(first())
    monkeypatch.setenv("RIVER_API_KEY", KEY)
    assert asyncio.run(second(data)) == f"{RUN_ID}-2"


async def test_nothing_is_pickled_in_the_middle_of_a_submission(gateway: StubGateway) -> None:
    """Whether the operation under way has a seq is not known then."""
    async with (
        river.AsyncClient(api_key=KEY, base_url=gateway.base_url) as client,
        client.session() as session,
    ):
        model = await session.create_model("base")
        submitting = asyncio.create_task(model.submit_forward(DATA))
        await asyncio.sleep(0)
        with pytest.raises(TypeError, match="being submitted"):
            pickle.dumps(model)
        await submitting
        assert pickle.dumps(model)
