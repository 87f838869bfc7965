"""What goes out in one system call, and that nothing of it is lost at the end."""

from __future__ import annotations

import asyncio

from river_gateway.http_protocol import GatheringTransport


class Sink(asyncio.Transport):
    """The end of the line: each write is what a system call would send."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def gathering() -> tuple[GatheringTransport, Sink]:
    """A transport of the running loop, and its end."""
    sink = Sink()
    return GatheringTransport(sink, asyncio.get_running_loop()), sink


async def test_writes_of_one_round_leave_together() -> None:
    """Head and body are one write; what comes in a later round is another."""
    transport, sink = gathering()
    transport.write(b"head ")
    transport.write(b"body")
    assert sink.writes == []
    await asyncio.sleep(0)
    assert sink.writes == [b"head body"]
    transport.write(b"more")
    await asyncio.sleep(0)
    assert sink.writes == [b"head body", b"more"]


async def test_nothing_is_lost_by_closing() -> None:
    """What was written is sent before the transport closes, once."""
    transport, sink = gathering()
    transport.write(b"last words")
    transport.close()
    assert sink.closed
    await asyncio.sleep(0)
    assert sink.writes == [b"last words"]


async def test_a_closed_connection_is_not_written_to() -> None:
    """The client was gone by the time that the round ended."""
    transport, sink = gathering()
    transport.write(b"too late")
    sink.close()
    await asyncio.sleep(0)
    assert sink.writes == []
    assert transport.is_closing()
