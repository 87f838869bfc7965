"""`river bench hotload`: from a finished optimizer step to the first token of the new version, streams undisturbed.

Ours begins when the SDK's `optim_step` returns and ends with the first token of a completion streamed through the
gateway from `river://<run>`, whose header has to name the new version. The peer's begins with writing the same adapter
as PEFT files, goes on with vLLM's own route for loading one, and ends with the first token that vLLM streams, without
any gateway. Both are measured in turns, alone and beside other streams of the same engine.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from msgspec import Struct

import river_client as river
from river_ops.bench.measure import Machine, machine, median, percentile, significant
from river_ops.bench.programs import ProgramError, finish_program, start_program
from river_ops.bench.stack_clients import LEARNING_RATE, VOCABULARY, batch
from river_ops.bench.streams import Arrivals, StreamSettings, completion_body
from river_ops.bench.vllm_peer import VllmPeer, running_vllm
from river_ops.demo.run import new_tenant_key
from river_ops.models import TINY_MOE_NAME
from river_ops.settings import StackInfo, StackOptions
from river_ops.stack import running_stack

RANK, SEQUENCES, TOKENS = 16, 8, 64
STREAMS, STREAM_TOKENS, PROMPT_TOKENS = 16, 900, 16
BLOCKS, BLOCKS_QUICK = 6, 1
PUBLISHES, PUBLISHES_QUICK = 10, 4
PAUSE_S = 0.15
"""Between publishes, for the peer the time that training takes us."""
POLICY_HEADER = "x-river-policy-version"
STREAMS_MODULE = "river_ops.bench.streams"
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Side:
    """We or the peer: `publish` makes a new version and returns how long its first token took, in seconds."""

    name: str
    base_url: str
    api_key: str
    publish: Callable[[], float]


@dataclass(slots=True)
class Found:
    """Seconds; `gaps` between two arrivals of a stream, `publish_gaps` those that a publish fell into."""

    alone: list[float] = field(default_factory=list[float])
    beside: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])
    publish_gaps: list[float] = field(default_factory=list[float])


class Latency(Struct, frozen=True, kw_only=True):
    """Milliseconds: of a publish with and without other streams, and between two tokens of the others.

    `stream_gap_*` are over all the time, training included; `publish_gap_ms_max` only between a publish and its first
    token.
    """

    beside_streams_ms: float
    beside_streams_ms_p99: float
    alone_ms: float
    alone_ms_p99: float
    stream_gap_ms_median: float
    stream_gap_ms_p99: float
    stream_gap_ms_max: float
    publish_gap_ms_max: float


class HotloadReport(Struct, frozen=True, kw_only=True):
    """The figures on top are ours beside other streams; `speedup` is the peer's median over ours."""

    name: str = "hotload"
    publish_to_first_token_ms: float
    publish_to_first_token_ms_p99: float
    stream_gap_ms_max: float
    stream_gap_ms_p99: float
    speedup: float
    speedup_alone: float
    ours: Latency
    peer: Latency
    settings: dict[str, int | float | str]
    machine: Machine


def run(*, quick: bool, say: Callable[[str], None]) -> HotloadReport:
    """Measures on a stack and a vLLM of its own."""
    here = machine()
    blocks = BLOCKS_QUICK if quick else BLOCKS
    publishes = PUBLISHES_QUICK if quick else PUBLISHES
    found = {"ours": Found(), "peer": Found()}
    with ExitStack() as stack:
        say("starting the stack and vLLM…")
        data, peer_data = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="river-bench-")))
            for _ in range(2)
        )
        info = stack.enter_context(running_stack(StackOptions(data_directory=data, port=0)))
        vllm = stack.enter_context(running_vllm(peer_data))
        own, files = stack.enter_context(our_side(info, peer_data / "files"))
        sides = (own, peer_side(vllm, files))
        for side in sides:
            side.publish()
        for number in range(blocks):
            say(f"block {number + 1} of {blocks}…")
            for side in sides if number % 2 == 0 else reversed(sides):
                measure_block(side, found[side.name], publishes)
    ours, peer = latency(found["ours"]), latency(found["peer"])
    return HotloadReport(
        publish_to_first_token_ms=ours.beside_streams_ms,
        publish_to_first_token_ms_p99=ours.beside_streams_ms_p99,
        stream_gap_ms_max=ours.stream_gap_ms_max,
        stream_gap_ms_p99=ours.stream_gap_ms_p99,
        speedup=significant(peer.beside_streams_ms / ours.beside_streams_ms),
        speedup_alone=significant(peer.alone_ms / ours.alone_ms),
        ours=ours,
        peer=peer,
        settings={
            "rank": RANK,
            "targets": "attention, experts, lm_head",
            "streams": STREAMS,
            "publishes": blocks * publishes,
            "batch": f"{SEQUENCES} x {TOKENS} tokens",
        },
        machine=here,
    )


def measure_block(side: Side, found: Found, publishes: int) -> None:
    """Some publishes alone, then as many beside other streams."""
    found.alone += [side.publish() for _ in range(publishes)]
    settings = StreamSettings(
        base_url=side.base_url,
        api_key=side.api_key,
        model=TINY_MOE_NAME,
        prompts=random_prompts(STREAMS),
        tokens=STREAM_TOKENS,
    )
    moments: list[tuple[float, float]] = []
    program = start_program(STREAMS_MODULE, settings)
    try:
        wait_for_line(program)
        for _ in range(publishes):
            took_s = side.publish()
            now = time.monotonic()
            found.beside.append(took_s)
            moments.append((now - took_s, now))
        arrivals = finish_program(program, Arrivals, timeout_s=STOP_TIMEOUT_S)
    finally:
        if program.poll() is None:
            program.kill()
            program.wait()
    for start, end in gaps_of(arrivals):
        found.gaps.append(end - start)
        if any(start < until and end > since for since, until in moments):
            found.publish_gaps.append(end - start)


def gaps_of(arrivals: Arrivals) -> Iterator[tuple[float, float]]:
    """Every two arrivals that follow each other in one stream."""
    for times in arrivals.requests:
        yield from itertools.pairwise(times)


def wait_for_line(program: subprocess.Popen[bytes]) -> None:
    """Returns when the streams have started.

    Raises:
        ProgramError: they did not.
    """
    assert program.stdout is not None
    if not program.stdout.readline():
        raise ProgramError(f"{STREAMS_MODULE} ended with code {program.wait()}")


# ---- The two sides ---------------------------------------------------------------------------------------------------


@contextmanager
def our_side(info: StackInfo, folder: Path) -> Iterator[tuple[Side, dict[str, bytes]]]:
    """A run on the stack, and its adapter's files as the peer will get them."""
    key = new_tenant_key(info)
    data = batch(0, SEQUENCES, TOKENS)
    headers = {"authorization": f"Bearer {key}"}
    with (
        river.Client(api_key=key, base_url=info.base_url) as client,
        httpx.Client(base_url=info.base_url, headers=headers, timeout=30.0) as http,
        client.session(bench="hotload") as session,
    ):
        lora = river.LoraConfig(
            rank=RANK, seed=0, train_attn=True, train_mlp=True, train_unembed=True
        )
        model = session.create_model(TINY_MOE_NAME, lora=lora)
        model.train_step(data, lr=LEARNING_RATE)
        saved = model.save_weights("for-the-peer", mode="inference")
        client.checkpoints.download(saved.path, folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}

        def publish() -> float:
            model.forward_backward(data, loss_fn="cross_entropy")
            model.optim_step(lr=LEARNING_RATE)
            started = time.monotonic()
            version = first_token(http, model.path)
            took_s = time.monotonic() - started
            assert version == model.policy_version, f"{version} is not {model.policy_version}"
            return took_s

        yield Side("ours", info.base_url, key, publish), files


def peer_side(vllm: VllmPeer, files: dict[str, bytes]) -> Side:
    def publish() -> float:
        time.sleep(PAUSE_S)
        started = time.monotonic()
        first_token(vllm.http, vllm.publish(files))
        return time.monotonic() - started

    return Side("peer", vllm.base_url, "none", publish)


def first_token(http: httpx.Client, model: str) -> str:
    """Streams one token, and returns when it has come: the policy version that answered, if the server says."""
    body = completion_body(model, random_prompts(1)[0], tokens=1)
    with http.stream("POST", "/v1/completions", content=body, headers=JSON_HEADERS) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                return response.headers.get(POLICY_HEADER, "")
    raise AssertionError("the stream had no token")


JSON_HEADERS = {"content-type": "application/json"}
_random = np.random.default_rng(11)


def random_prompts(count: int) -> list[list[int]]:
    """Prompts that no prefix cache knows."""
    return _random.integers(3, VOCABULARY, (count, PROMPT_TOKENS)).tolist()


# ---- Results ---------------------------------------------------------------------------------------------------------


def latency(found: Found) -> Latency:
    def ms(seconds: float) -> float:
        return significant(1000 * seconds)

    return Latency(
        beside_streams_ms=ms(median(found.beside)),
        beside_streams_ms_p99=ms(percentile(found.beside, 99)),
        alone_ms=ms(median(found.alone)),
        alone_ms_p99=ms(percentile(found.alone, 99)),
        stream_gap_ms_median=ms(median(found.gaps)),
        stream_gap_ms_p99=ms(percentile(found.gaps, 99)),
        stream_gap_ms_max=ms(max(found.gaps)),
        publish_gap_ms_max=ms(max(found.publish_gaps)),
    )


def table(report: HotloadReport) -> list[str]:
    """The report for people."""
    lines = [f"{'milliseconds':<34}{'ours':>10}{'vLLM':>10}"]
    for label, name in (
        (f"first token, {STREAMS} other streams", "beside_streams_ms"),
        ("  99 %", "beside_streams_ms_p99"),
        ("first token, alone", "alone_ms"),
        ("  99 %", "alone_ms_p99"),
        ("gap of the others, median", "stream_gap_ms_median"),
        ("  99 %", "stream_gap_ms_p99"),
        ("  largest", "stream_gap_ms_max"),
        ("  largest during a publish", "publish_gap_ms_max"),
    ):
        ours, peer = getattr(report.ours, name), getattr(report.peer, name)
        lines.append(f"{label:<34}{ours:>10.1f}{peer:>10.1f}")
    lines.append(f"speed-up {report.speedup:.2f} beside streams, {report.speedup_alone:.2f} alone")
    return lines
