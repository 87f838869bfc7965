"""Hearing from admins over NATS: for engines and trainers alike. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from river_engine.protocol import Control, Controlled


async def obey(client: Client, subject: str, control: Callable[[Control], Controlled]) -> None:
    """Does what is asked for on a subject from now on, and answers with what came of it."""

    async def on_message(message: Msg) -> None:
        try:
            answer = control(msgspec.msgpack.decode(message.data, type=Control))
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            answer = Controlled(draining=False, refused=f"not understood: {error}")
        if message.reply:
            await client.publish(message.reply, msgspec.msgpack.encode(answer))

    await client.subscribe(subject, cb=on_message)
