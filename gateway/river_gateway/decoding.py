"""Work on large bodies, done beside the event loop: parsing, unpacking and converting arrays.

What takes less time than handing it over is done in place. The threads are few and fixed, so that many large requests
wait for each other and not all of them for a processor at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from river_gateway.limits import DECODE_INLINE_MAX_BYTES, DECODE_THREADS

Given = ParamSpec("Given")
Made = TypeVar("Made")

_threads = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decoding")


async def beside_the_loop(
    size_bytes: int, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs
) -> Made:
    """What `work` makes of its arguments, `size_bytes` of them in all; raises as it does."""
    if size_bytes <= DECODE_INLINE_MAX_BYTES:
        return work(*args, **kwargs)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, lambda: work(*args, **kwargs))
