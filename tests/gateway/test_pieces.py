"""The pure pieces: routing, counting, events, ids, ranges."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from river_billing.events import UsageKind
from river_gateway import ids
from river_gateway.checkpoints.catalog import Path, parse_path
from river_gateway.checkpoints.files import parse_range
from river_gateway.errors import InvalidFieldError
from river_gateway.inference.asked import engine_body, read_asked, read_fields
from river_gateway.inference.metering import Choice, Chunk, PromptDetails, Usage, UsageTally
from river_gateway.inference.sse import EventSplitter, UsageFilter, UsageWishes, filter_event
from river_gateway.limits import UPSTREAM_KEEPALIVE_S
from river_gateway.training.operations import to_wire
from river_trainer.protocol import TrainResult


def test_tally_of_several_prompts_and_choices() -> None:
    """Running counts are per choice and per prompt; the last chunk has the sum and wins."""
    tally = UsageTally(choices_per_prompt=2)
    for index, prompt, completion in ((0, 5, 1), (1, 5, 3), (0, 5, 2), (2, 7, 4)):
        tally.observe(Chunk([Choice(index)], Usage(prompt, completion)))
    assert tally.quantities() == {
        UsageKind.PROMPT: 12,
        UsageKind.CACHED_PROMPT: 0,
        UsageKind.COMPLETION: 9,
    }
    tally.observe(Chunk([], Usage(12, 10, PromptDetails(4))))
    assert tally.quantities() == {
        UsageKind.PROMPT: 8,
        UsageKind.CACHED_PROMPT: 4,
        UsageKind.COMPLETION: 10,
    }


@given(
    st.lists(st.binary(max_size=20).filter(lambda data: b"\n" not in data and b"\r" not in data)),
    st.data(),
)
def test_events_survive_any_cutting(payloads: list[bytes], data: st.DataObject) -> None:
    """However the network cuts a stream, the same events come out."""
    stream = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    splitter, rest, whole = EventSplitter(), stream, b""
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        events = splitter.feed(rest[:cut])
        assert not events or events.endswith(b"\n\n")
        whole += events
        rest = rest[cut:]
    assert whole == stream


def test_events_without_usage_pass_untouched() -> None:
    """Comments, errors, `[DONE]` and ordinary chunks are forwarded byte for byte."""
    tally, wishes = UsageTally(), UsageWishes(final=False, continuous=False)
    for event in (
        b": ping",
        b"data: [DONE]",
        b'data: {"choices": [ ]}',
        b'data: {"error": {"usage": 1}}',
        b'data: "usage',
    ):
        assert filter_event(event, tally, wishes) == event


def _stream(texts: list[str], details: int | None) -> list[bytes]:
    """The payloads of a stream of one choice as vLLM writes them, counts in every chunk and a sum at the end."""
    payloads: list[bytes] = []
    for index, text in enumerate(texts, 1):
        usage = {"prompt_tokens": 7, "completion_tokens": index, "total_tokens": 7 + index}
        choice = {"index": 0, "delta": {"content": text}}
        payloads.append(msgspec.json.encode({"choices": [choice], "usage": usage}))
    cached = None if details is None else {"cached_tokens": details}
    total = {"prompt_tokens": 7, "completion_tokens": len(texts), "prompt_tokens_details": cached}
    payloads.append(msgspec.json.encode({"choices": [], "usage": total}))
    return [*payloads, b"[DONE]"]


@given(
    st.lists(
        st.text() | st.sampled_from([',"usage":{"a":1}', "data: [DONE]\n\n", '"choices":[]']),
        min_size=1,
    ),
    st.none() | st.integers(0, 7),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_a_stream_is_shown_as_asked_and_counted(
    texts: list[str], cached: int | None, final: bool, continuous: bool, data: st.DataObject
) -> None:
    """Whatever the model says and however it is cut: the counts are right, and only those asked for are shown."""
    payloads = _stream(texts, cached)
    wishes = UsageWishes(final=final, continuous=final and continuous)
    usage = UsageFilter(wishes, choices_per_prompt=1, single=data.draw(st.booleans()))
    events = [b"data: " + payload + b"\n\n" for payload in payloads]
    shown = b""
    for index, event in enumerate(events):
        together = data.draw(st.booleans()) and index + 1 < len(events)
        if together:
            events[index + 1] = event + events[index + 1]
            continue
        shown += usage.show(event)
        tokens = usage.quantities()[UsageKind.COMPLETION]
        assert tokens == min(index + 1, len(texts))
        assert usage.done == (index == len(events) - 1)
    assert usage.quantities()[UsageKind.CACHED_PROMPT] == (cached or 0)
    *chunks, last = [event.removeprefix(b"data: ") for event in shown.split(b"\n\n")[:-1]]
    assert last == b"[DONE]"
    expected = [msgspec.json.decode(payload) for payload in payloads[:-1]]
    if not wishes.final:
        expected.pop()
    if not wishes.continuous:
        for chunk in expected[: len(texts)]:
            del chunk["usage"]
    assert [msgspec.json.decode(chunk) for chunk in chunks] == expected


def test_the_engine_s_body() -> None:
    """All but the model and the stream options travels byte for byte."""
    body = b'{"model":"river://run_1","x":1.50,"big":123456789012345678901234567890,"y":{"b" : 1}}'
    sent = engine_body(read_fields(body), read_asked(body), "base")
    assert sent == b'{"model":"base","x":1.50,"big":123456789012345678901234567890,"y":{"b" : 1}}'
    streamed: Any = {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": False, "z": 1},
    }
    body = msgspec.json.encode(streamed)
    sent = engine_body(read_fields(body), read_asked(body), "base")
    assert msgspec.json.decode(sent)["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": True,
        "z": 1,
    }


def test_uuid7() -> None:
    """The id is a version 7 UUID that says when it was made."""
    before = time.time()
    identity = ids.uuid7()
    assert uuid.UUID(identity).version == 7
    assert uuid.UUID(identity).variant == uuid.RFC_4122
    assert before - 0.002 <= ids.uuid7_time_s(identity) <= time.time()


def test_ids_follow_the_idempotency_key() -> None:
    """The same key of the same tenant names the same thing; without a key everything is new."""
    made = [
        ids.idempotent_id(kind, tenant, key)
        for kind in ("run", "ses")
        for tenant in ("ten_a", "ten_b")
        for key in ("x", "y", None, None)
    ]
    assert len(set(made)) == len(made)
    assert ids.idempotent_id("run", "ten_a", "x") == made[0]
    assert ids.seed_of(made[0]) == ids.seed_of(made[0]) != ids.seed_of(made[1])


def test_connections_end_before_the_engine_ends_them() -> None:
    """The engine, which is uvicorn as it comes, must not close a connection that a request is about to use."""
    assert uvicorn.Config("x").timeout_keep_alive > UPSTREAM_KEEPALIVE_S


def test_checkpoint_ids_follow_the_operation() -> None:
    """Submitting a save twice names the same checkpoint."""
    assert (
        ids.checkpoint_id("run_1-2") == ids.checkpoint_id("run_1-2") != ids.checkpoint_id("run_1-3")
    )


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("river://run_1", Path("run_1")),
        ("river://run_1/weights/a", Path("run_1", "training", "a")),
        ("river://run_1/sampler_weights/a", Path("run_1", "inference", "a")),
        ("river://run_1/other/a", None),
        ("river://run_1/weights/a/b", None),
        ("river://run_1/weights/", None),
        ("river://", None),
        ("run_1", None),
    ],
)
def test_paths(text: str, path: Path | None) -> None:
    """A path is a run or a checkpoint, and nothing else."""
    assert parse_path(text) == path


@pytest.mark.parametrize(
    "header", ["bytes=100-", "bytes=5-4", "bytes=-0", "bytes=-", "lines=1-2", "bytes=0-1,4-5"]
)
def test_wrong_ranges(header: str) -> None:
    """A range that is none, or begins past the end, is refused."""
    with pytest.raises(InvalidFieldError):
        parse_range(header, 100)


@pytest.mark.parametrize(
    ("widths", "shapes"), [(None, [(6,), (2,)]), ([3, 1], [(2, 3), (2,)])], ids=["hard", "soft"]
)
def test_logprobs_have_the_shape_of_their_targets(
    widths: list[int] | None, shapes: list[tuple[int, ...]]
) -> None:
    """A trainer's bytes become [T], or [T, K] where a sequence had K targets a token."""
    result = TrainResult(
        operation_id="run_a-1",
        run_id="run_a",
        seq=1,
        step=0,
        logprobs=[bytes(24), bytes(8)],
        targets_per_token=widths,
    )
    assert [tensor.shape for tensor in to_wire(result).logprobs or []] == shapes
