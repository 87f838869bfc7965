"""Work to be collected later: by the same gateway, through another one, once, twice, and after it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
from support.gateway import Rig, eventually

from river_gateway.bus import Bus
from river_gateway.errors import (
    GoneError,
    InvalidFieldError,
    NotFoundError,
    RateLimitedError,
    UnavailableError,
)
from river_gateway.inference import futures as futures_module
from river_gateway.inference.futures import Done, Failed, Futures, Large, Pending

TENANT, STRANGER = "tenant_a", "tenant_b"


def returning(body: bytes) -> Callable[[], Awaitable[bytes]]:
    async def work() -> bytes:
        return body

    return work


class Held:
    """Work that goes on until it is let go, and knows how often it was begun and cancelled."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.let_go = asyncio.Event()

    async def __call__(self) -> bytes:
        self.begun += 1
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return b"held"


@pytest.fixture
async def own(rig: Rig) -> AsyncGenerator[Futures]:
    """The futures of a gateway that answers the others."""
    futures = Futures(rig.services.bus)
    await futures.listen()
    yield futures
    await futures.close()


@pytest.fixture
async def other(rig: Rig, nats_url: str) -> AsyncGenerator[Futures]:
    """Those of another one, with a connection of its own."""
    bus = Bus()
    await bus.connect(nats_url)
    futures = Futures(bus)
    yield futures
    await futures.close()
    await bus.close()


async def test_work_is_collected_as_often_as_asked(own: Futures) -> None:
    """A result stays for a client whose connection broke while it was told."""
    request_id = own.submit(TENANT, returning(b"body"), asked_bytes=1)
    for _ in range(2):
        assert await own.result(TENANT, request_id, 5.0) == Done(body=b"body")


async def test_another_gateway_collects_it_whatever_its_size(own: Futures, other: Futures) -> None:
    """A result of several megabytes, more than NATS takes at once, and an empty one come whole."""
    large = bytes(range(256)) * 20_000
    for body in (large, b"", b"x"):
        request_id = own.submit(TENANT, returning(body), asked_bytes=1)
        assert await other.result(TENANT, request_id, 5.0) == Done(body=body)


async def test_a_long_poll_ends_with_the_work(own: Futures, other: Futures) -> None:
    """Both gateways wait for the end; a poll that is too short is told that it goes on."""
    work = Held()
    request_id = own.submit(TENANT, work, asked_bytes=1)
    assert await other.result(TENANT, request_id, 0.05) == Pending()
    polls = [asyncio.create_task(one.result(TENANT, request_id, 10.0)) for one in (own, other)]
    await asyncio.sleep(0.05)
    work.let_go.set()
    assert await asyncio.gather(*polls) == [Done(body=b"held")] * 2
    assert work.begun == 1


async def test_the_same_identity_is_the_same_work(own: Futures) -> None:
    """What a client sends again is not done again; another tenant's identity is another one."""
    work = Held()
    first = own.submit(TENANT, work, identity="batch 1", asked_bytes=1)
    assert own.submit(TENANT, work, identity="batch 1", asked_bytes=1) == first
    assert own.submit(STRANGER, work, identity="batch 1", asked_bytes=1) != first
    await eventually(lambda: work.begun == 2)


async def test_a_stranger_finds_nothing(own: Futures, other: Futures) -> None:
    """Another tenant's request and one that never was are told apart by nobody."""
    request_id = own.submit(TENANT, returning(b"body"), asked_bytes=1)
    never = request_id.rpartition("_")[0] + "_ffff"
    for unknown in (request_id, never, "fut_0_1", "nonsense"):
        for asked in (own, other):
            with pytest.raises(NotFoundError, match=unknown):
                await asked.result(STRANGER, unknown, 0.0)


async def test_what_a_gateway_held_is_gone_with_it(own: Futures) -> None:
    """A request of a gateway that nobody hears of is gone, at once, and not waited for."""
    async with asyncio.timeout(2.0):
        with pytest.raises(GoneError):
            await own.result(TENANT, "fut_0123456789abcdef_1", 30.0)


async def test_errors_are_kept_with_their_field(own: Futures, other: Futures) -> None:
    """A refusal reaches the client through any gateway with its status, type, sentence and field."""

    async def wrong() -> bytes:
        raise InvalidFieldError("max_tokens: 0, must be 1 to 512", param="max_tokens")

    request_id = own.submit(TENANT, wrong, asked_bytes=1)
    failed = Failed(
        status=422,
        type="invalid_request",
        message="max_tokens: 0, must be 1 to 512",
        param="max_tokens",
    )
    assert await own.result(TENANT, request_id, 5.0) == failed
    assert await other.result(TENANT, request_id, 5.0) == failed


async def test_a_bug_fails_its_own_request_only(
    own: Futures, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody expected is an internal error without its words, logged, and others' work goes on."""

    async def broken() -> bytes:
        raise ZeroDivisionError("a detail")

    bad, good = (
        own.submit(TENANT, broken, asked_bytes=1),
        own.submit(TENANT, returning(b"body"), asked_bytes=1),
    )
    outcome = await own.result(TENANT, bad, 5.0)
    assert isinstance(outcome, Failed)
    assert (outcome.status, outcome.message) == (500, "internal error")
    assert "a detail" in caplog.text
    assert await own.result(TENANT, good, 5.0) == Done(body=b"body")


@pytest.mark.parametrize(
    "error",
    [
        RateLimitedError("slow down", retry_after_s=0.1),
        UnavailableError("no engine", retry_after_s=0.1),
    ],
)
async def test_limits_are_waited_out(own: Futures, error: Exception) -> None:
    """Work that a limit or a lack of engines refuses is tried again; meanwhile it says what it waits for."""
    attempts: list[None] = []

    async def refused_twice() -> bytes:
        attempts.append(None)
        if len(attempts) < 3:
            raise error
        return b"at last"

    request_id = own.submit(TENANT, refused_twice, asked_bytes=1)
    assert await own.result(TENANT, request_id, 0.03) == Pending(reason=str(error))
    assert await own.result(TENANT, request_id, 5.0) == Done(body=b"at last")


async def test_patience_ends(own: Futures, monkeypatch: pytest.MonkeyPatch) -> None:
    """After so long the refusal itself is the result."""
    monkeypatch.setattr(futures_module, "FUTURE_PATIENCE_S", 0.2)

    async def refused() -> bytes:
        raise UnavailableError("no engine", retry_after_s=0.05)

    outcome = await own.result(TENANT, own.submit(TENANT, refused, asked_bytes=1), 5.0)
    assert isinstance(outcome, Failed)
    assert (outcome.status, outcome.message) == (503, "no engine")


async def test_cancelling_ends_the_work(own: Futures, other: Futures) -> None:
    """Through any gateway; its client is told that it is gone. What was done before stays."""
    work = Held()
    running, done = (
        own.submit(TENANT, work, asked_bytes=1),
        own.submit(TENANT, returning(b"body"), asked_bytes=1),
    )
    await own.result(TENANT, done, 5.0)
    await eventually(lambda: work.begun)
    for request_id in (running, done):
        await other.cancel(TENANT, request_id)
    await eventually(lambda: work.cancelled)
    outcome = await own.result(TENANT, running, 5.0)
    assert isinstance(outcome, Failed)
    assert outcome.status == 410
    assert await own.result(TENANT, done, 0.0) == Done(body=b"body")


async def test_only_so_much_of_a_tenant_runs_at_once(
    own: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest waits its turn, and does not keep another tenant's waiting."""
    monkeypatch.setattr(futures_module, "FUTURES_RUNNING_OF_TENANT_MAX", 2)
    work = Held()
    for _ in range(5):
        own.submit(TENANT, work, asked_bytes=1)
    theirs = own.submit(STRANGER, returning(b"body"), asked_bytes=1)
    assert await own.result(STRANGER, theirs, 5.0) == Done(body=b"body")
    assert work.begun == 2
    work.let_go.set()
    await eventually(lambda: work.begun == 5)


async def test_too_much_unfinished_work_is_refused(
    own: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one tenant, and of all together; what is finished makes room."""
    monkeypatch.setattr(futures_module, "FUTURES_OF_TENANT_MAX", 2)
    monkeypatch.setattr(futures_module, "FUTURES_MAX", 3)
    work = Held()
    for tenant in (TENANT, TENANT, STRANGER):
        own.submit(tenant, work, asked_bytes=1)
    with pytest.raises(RateLimitedError, match="at most 2"):
        own.submit(TENANT, work, asked_bytes=1)
    with pytest.raises(RateLimitedError, match="as much unfinished work"):
        own.submit(STRANGER, work, asked_bytes=1)
    work.let_go.set()
    await eventually(lambda: work.begun == 3)
    await asyncio.sleep(0.01)
    own.submit(TENANT, work, asked_bytes=1)


async def test_unfinished_work_is_bounded_by_what_it_keeps_in_memory(
    own: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one tenant, and of all together; a single request may be as large as it likes within what all may have."""
    monkeypatch.setattr(futures_module, "FUTURES_OF_TENANT_MAX_BYTES", 100)
    monkeypatch.setattr(futures_module, "FUTURES_MAX_BYTES", 250)
    work = Held()
    own.submit(TENANT, work, asked_bytes=120)
    with pytest.raises(
        RateLimitedError, match="120 bytes of unfinished requests wait, at most 100"
    ):
        own.submit(TENANT, work, asked_bytes=1)
    own.submit(STRANGER, work, asked_bytes=100)
    with pytest.raises(RateLimitedError, match="as much unfinished work"):
        own.submit("tenant_c", work, asked_bytes=50)
    work.let_go.set()
    await eventually(lambda: work.begun == 2)
    await asyncio.sleep(0.01)
    own.submit(TENANT, work, asked_bytes=1)


async def test_results_are_kept_up_to_so_many_bytes(
    own: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has most makes room: what was collected goes first, then the oldest; others' results stay."""
    monkeypatch.setattr(futures_module, "FUTURES_KEPT_MAX_BYTES", 40_000)
    theirs = own.submit(STRANGER, returning(bytes(5_000)), asked_bytes=1)
    kept: list[str] = []
    for _ in range(3):
        kept.append(own.submit(TENANT, returning(bytes(8_000)), asked_bytes=1))
        await asyncio.sleep(0.01)
    await own.result(TENANT, kept[1], 5.0)
    kept.append(own.submit(TENANT, returning(bytes(8_000)), asked_bytes=1))
    await own.result(TENANT, kept[3], 5.0)
    with pytest.raises(GoneError):
        await own.result(TENANT, kept[1], 0.0)
    assert await own.result(TENANT, kept[0], 0.0) == Done(body=bytes(8_000))
    assert await own.result(STRANGER, theirs, 0.0) == Done(body=bytes(5_000))


async def test_failures_are_counted_too(own: Futures, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, what a tenant never collects does not grow without end."""
    monkeypatch.setattr(futures_module, "FUTURES_KEPT_MAX_BYTES", 100_000)

    async def wrong() -> bytes:
        raise InvalidFieldError("wrong", param="field")

    made = [own.submit(TENANT, wrong, asked_bytes=1) for _ in range(200)]
    await own.result(TENANT, made[-1], 5.0)
    with pytest.raises(GoneError):
        await own.result(TENANT, made[0], 0.0)


async def test_a_result_that_never_fits_fails(
    own: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not forgotten as soon as it is done, to be asked for, made and billed again."""
    monkeypatch.setattr(futures_module, "FUTURE_MAX_BYTES", 100)
    request_id = own.submit(TENANT, returning(bytes(101)), asked_bytes=1)
    outcome = await own.result(TENANT, request_id, 5.0)
    assert isinstance(outcome, Failed)
    assert (outcome.status, outcome.type) == (413, "too_large")


async def test_a_large_result_can_be_announced_first(
    own: Futures, other: Futures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through any gateway; it then is kept until it is collected, however long the client has no room for it."""
    monkeypatch.setattr(futures_module, "FUTURES_COLLECTED_KEPT_S", 0.05)
    request_id = own.submit(TENANT, returning(bytes(1000)), asked_bytes=1)
    for asked in (own, other):
        announced = await asked.result(TENANT, request_id, 5.0, body_max_bytes=999)
        assert announced == Large(size_bytes=1000)
    await asyncio.sleep(0.1)
    own._sweep(asyncio.get_running_loop().time())
    whole = await other.result(TENANT, request_id, 5.0, body_max_bytes=1000)
    assert whole == Done(body=bytes(1000))


async def test_collected_results_fade(own: Futures, monkeypatch: pytest.MonkeyPatch) -> None:
    """A while after it was collected a result is forgotten, and its identity with it; one that waits is not."""
    monkeypatch.setattr(futures_module, "FUTURES_COLLECTED_KEPT_S", 0.05)
    monkeypatch.setattr(futures_module, "FUTURES_SWEEP_INTERVAL_S", 0.02)
    stopping = asyncio.Event()
    sweeping = asyncio.create_task(own.run(stopping))
    collected = own.submit(TENANT, returning(b"body"), identity="one", asked_bytes=1)
    waiting = own.submit(TENANT, returning(b"body"), asked_bytes=1)
    await own.result(TENANT, collected, 5.0)
    await asyncio.sleep(0.2)
    with pytest.raises(GoneError):
        await own.result(TENANT, collected, 0.0)
    assert own.submit(TENANT, returning(b"body"), identity="one", asked_bytes=1) != collected
    assert await own.result(TENANT, waiting, 0.0) == Done(body=b"body")
    stopping.set()
    await sweeping


async def test_a_gateway_that_stops_keeps_nobody_waiting(own: Futures) -> None:
    """A long poll is answered as soon as the gateway is asked to end."""
    stopping = asyncio.Event()
    sweeping = asyncio.create_task(own.run(stopping))
    request_id = own.submit(TENANT, Held(), asked_bytes=1)
    polling = asyncio.create_task(own.result(TENANT, request_id, 30.0))
    await asyncio.sleep(0.02)
    stopping.set()
    async with asyncio.timeout(2.0):
        assert await polling == Pending()
        await sweeping
