"""The client of engines, against a server that does what servers do at their worst."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import uvloop

from river_gateway import limits
from river_gateway.engines import http_client
from river_gateway.engines.http_client import EngineClient, EngineLostError

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Custom: yes\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """`requests` are the bodies read, `connections` how many were opened; `gone` is set when a client has left."""

    url: str = ""
    connections: int = 0
    requests: list[bytes] = field(default_factory=list[bytes])
    heads: list[bytes] = field(default_factory=list[bytes])
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def read_request(self, reader: asyncio.StreamReader) -> bool:
        """Reads one request; False at the end of the connection."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.heads.append(head)
        self.requests.append(await reader.readexactly(length))
        self.asked.set()
        return True


@asynccontextmanager
async def serving(behaviour: Callable[[Server], Behaviour]) -> AsyncGenerator[Server]:
    """A server on loopback while the block runs."""
    server = Server()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            await behaviour(server)(reader, writer)
        except ConnectionError:
            pass
        finally:
            server.gone.set()
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        await listening.wait_closed()


def answering(answer: bytes, *, times: int = 1000) -> Callable[[Server], Behaviour]:
    """Answers `times` requests of a connection, then closes it."""

    def behaviour(server: Server) -> Behaviour:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(times):
                if not await server.read_request(reader):
                    return
                writer.write(answer)

        return talk

    return behaviour


def saying_ok_and_no_more(server: Server) -> Behaviour:
    """The first chunk of an answer, and silence until the client leaves."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.read_request(reader)
        writer.write(CHUNKED + b"2\r\nok\r\n")
        await reader.read()

    return talk


async def post(client: EngineClient, server: Server, body: bytes = b"{}") -> tuple[int, bytes]:
    """Status and body of one request."""
    answer = await client.post(server.url, "/x", [(b"a", b"b")], body)
    try:
        return answer.status, await answer.read()
    finally:
        answer.close()


async def test_connections_are_kept() -> None:
    """Requests one after another share a connection; what was sent arrives, and headers have lower-case names."""
    client = EngineClient()
    async with serving(answering(OK)) as server:
        for index in range(3):
            assert await post(client, server, b"%d" % index) == (200, b"ok")
        answer = await client.post(server.url, "/x", [], b"")
        assert answer.headers[b"x-custom"] == b"yes"
        answer.close()
        await client.close()
        assert server.connections == 1
        assert server.requests == [b"0", b"1", b"2", b""]
        assert b"\r\na: b\r\n" in server.heads[0]


async def test_an_engine_may_live_below_a_path() -> None:
    """Where a proxy stands before several of them."""
    client = EngineClient()
    async with serving(answering(OK)) as server:
        (await client.post(f"{server.url}/engine-1/", "/x", [], b"")).close()
        await client.close()
        assert server.heads[0].startswith(b"POST /engine-1/x HTTP/1.1\r\n")


async def test_requests_at_once_have_connections_of_their_own() -> None:
    """Answers never mix."""
    client = EngineClient()
    async with serving(answering(OK)) as server:
        assert await asyncio.gather(*(post(client, server) for _ in range(5))) == [(200, b"ok")] * 5
        await client.close()
        assert server.connections == 5


async def test_closing_twice_gives_back_once() -> None:
    """A connection is never lent to two requests at once."""
    client = EngineClient()
    async with serving(answering(OK)) as server:
        answer = await client.post(server.url, "/x", [], b"")
        assert await answer.read() == b"ok"
        answer.close()
        answer.close()
        assert await asyncio.gather(*(post(client, server) for _ in range(3))) == [(200, b"ok")] * 3
        answer.close()
        assert await post(client, server) == (200, b"ok")
        await client.close()


async def test_a_connection_held_back_is_not_lent_again() -> None:
    """Of an answer that came whole but was not read; the next request is answered all the same."""
    body = bytes(2 * limits.UPSTREAM_BUFFER_BYTES)
    client = EngineClient()
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with serving(answering(head + body)) as server:
        for _ in range(20):
            answer = await client.post(server.url, "/x", [], b"")
            await asyncio.sleep(0.01)
            answer.close()
        status, read = await asyncio.wait_for(post(client, server), 5)
        assert (status, len(read)) == (200, len(body))
        await client.close()


async def test_a_dead_kept_connection_is_replaced() -> None:
    """A server that closes between requests costs nobody an error."""
    client = EngineClient()
    async with serving(answering(OK, times=1)) as server:
        for _ in range(3):
            assert await post(client, server) == (200, b"ok")
        await client.close()
        assert server.connections == 3


async def test_a_server_that_takes_a_request_and_closes_is_lost() -> None:
    """On a fresh connection there is no second try: the request may have been worked on."""

    def behaviour(server: Server) -> Behaviour:
        async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            await server.read_request(reader)

        return talk

    client = EngineClient()
    async with serving(behaviour) as server:
        with pytest.raises(EngineLostError):
            await post(client, server)
        assert len(server.requests) == 1
        await client.close()


@pytest.mark.parametrize(
    "broken",
    [b"nonsense\r\n\r\n", OK[:-1], CHUNKED + b"2\r\nok\r\n", CHUNKED + b"zz\r\n"],
    ids=["no HTTP", "short body", "no last chunk", "bad chunk"],
)
async def test_an_answer_that_breaks_off_is_an_error(broken: bytes) -> None:
    """Half an answer is never taken for a whole one."""
    client = EngineClient()
    async with serving(answering(broken, times=1)) as server:
        with pytest.raises(EngineLostError):
            await post(client, server)
        await client.close()


async def test_nobody_listening_is_an_error() -> None:
    """A port where nothing is."""
    client = EngineClient()
    async with serving(answering(OK)) as server:
        url = server.url
    with pytest.raises(EngineLostError, match="no connection"):
        await client.post(url, "/x", [], b"")
    await client.close()


async def test_silence_ends_a_request() -> None:
    """A server that falls silent is given up, in the middle of a stream too."""
    client = EngineClient(silence_timeout_s=0.2)
    async with serving(saying_ok_and_no_more) as server:
        answer = await client.post(server.url, "/x", [], b"")
        assert await answer.next_chunk() == b"ok"
        with pytest.raises(EngineLostError, match="silent"):
            await answer.next_chunk()
        answer.close()
        await asyncio.wait_for(server.gone.wait(), 5)
        await client.close()


async def test_a_lost_engine_s_silence_is_believed_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first byte and after it; the connections of others wait on."""
    monkeypatch.setattr(http_client, "UPSTREAM_LOST_SILENCE_S", 0.2)
    lost = set[str]()
    client = EngineClient(lambda urls: lost & set(urls))
    async with serving(saying_ok_and_no_more) as vanished, serving(saying_ok_and_no_more) as other:
        answers = [await client.post(server.url, "/x", [], b"") for server in (vanished, other)]
        for answer in answers:
            assert await answer.next_chunk() == b"ok"
        lost.add(vanished.url)
        with pytest.raises(EngineLostError, match="heartbeat"):
            await answers[0].next_chunk()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(answers[1].next_chunk(), 2 * limits.UPSTREAM_SWEEP_INTERVAL_S)
        await client.close()


async def test_what_still_comes_from_a_lost_engine_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that NATS does not reach may well go on streaming."""
    monkeypatch.setattr(http_client, "UPSTREAM_LOST_SILENCE_S", 1.0)
    pieces = 15

    def behaviour(server: Server) -> Behaviour:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.read_request(reader)
            writer.write(CHUNKED)
            for _ in range(pieces):
                writer.write(b"2\r\nok\r\n")
                await asyncio.sleep(0.2)
            writer.write(b"0\r\n\r\n")

        return talk

    client = EngineClient(lambda urls: urls)
    async with serving(behaviour) as server:
        assert await post(client, server) == (200, b"ok" * pieces)
        await client.close()


async def test_the_beginning_of_an_answer_is_waited_for_so_long() -> None:
    """It may be long after the head; what breaks off before is told at once."""

    def behaviour(server: Server) -> Behaviour:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await server.read_request(reader)
            writer.write(CHUNKED)
            await asyncio.sleep(0.3)

        return talk

    client = EngineClient()
    async with serving(behaviour) as server:
        answer = await client.post(server.url, "/x", [], b"")
        await answer.begun(0.05)
        with pytest.raises(EngineLostError):
            await answer.begun(5)
        answer.close()
    async with serving(saying_ok_and_no_more) as server:
        answer = await client.post(server.url, "/x", [], b"")
        await answer.begun(5)
        assert await answer.next_chunk() == b"ok"
        answer.close()
        await client.close()


async def test_idle_connections_are_closed() -> None:
    """Before the engine does, so that no request meets a connection that is just being closed."""
    client = EngineClient(keepalive_s=0.1)
    async with serving(answering(OK)) as server:
        assert await post(client, server) == (200, b"ok")
        await asyncio.wait_for(server.gone.wait(), 5)
        assert await post(client, server) == (200, b"ok")
        assert server.connections == 2
        await client.close()


async def test_closing_early_cuts_the_connection() -> None:
    """So the engine learns that nobody wants the rest."""
    client = EngineClient()
    async with serving(saying_ok_and_no_more) as server:
        answer = await client.post(server.url, "/x", [], b"")
        assert await answer.next_chunk() == b"ok"
        assert not server.gone.is_set()
        answer.close()
        await asyncio.wait_for(server.gone.wait(), 5)
        await client.close()


async def test_cancelling_cuts_the_connection() -> None:
    """A request that is given up while the engine thinks ends there too."""

    def behaviour(server: Server) -> Behaviour:
        async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            await server.read_request(reader)
            await reader.read()

        return talk

    client = EngineClient()
    async with serving(behaviour) as server:
        asking = asyncio.create_task(client.post(server.url, "/x", [], b""))
        await asyncio.wait_for(server.asked.wait(), 5)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(server.gone.wait(), 5)
        await client.close()


async def test_a_slow_reader_holds_the_engine_back() -> None:
    """What is read ahead is bounded, and nothing is lost by it."""
    sent = 0
    piece = bytes(range(256)) * 256
    pieces = 40 * limits.UPSTREAM_BUFFER_BYTES // len(piece)

    def behaviour(server: Server) -> Behaviour:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await server.read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (pieces * len(piece)))
            for _ in range(pieces):
                writer.write(piece)
                await writer.drain()
                sent += 1
            await reader.read()

        return talk

    client = EngineClient()
    async with serving(behaviour) as server:
        answer = await client.post(server.url, "/x", [], b"")
        await asyncio.sleep(0.3)
        assert sent < pieces
        assert await answer.read() == piece * pieces
        answer.close()
        await client.close()


def test_it_works_on_the_loop_that_the_gateway_runs_on() -> None:
    """The transports of uvloop are not those of asyncio; fresh and kept ones answer there too."""

    async def ask_twice() -> None:
        async with serving(answering(OK)) as server:
            client = EngineClient()
            for _ in range(2):
                answer = await client.post(server.url, "/", [], b"x")
                assert await answer.read() == b"ok"
                answer.close()
            assert server.connections == 1
            await client.close()

    uvloop.run(ask_twice())
