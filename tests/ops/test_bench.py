"""Every benchmark runs, and what it prints can be true. How fast things are is for people to judge, not for tests."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest

from river_ops.bench.measure import alternating, percentile, significant
from river_ops.bench.streams import Arrivals
from river_ops.commands.bench import BENCHMARKS

REPORT_TIMEOUT_S = 280.0


def report(name: str) -> dict[str, Any]:
    """The last line of `river bench NAME --quick`."""
    program = subprocess.run(
        [sys.executable, "-m", "river_client.cli", "bench", name, "--quick"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=REPORT_TIMEOUT_S,
        check=False,
    )
    assert program.returncode == 0, program.stderr[-4000:]
    found = json.loads(program.stdout.splitlines()[-1])
    assert found["name"] == name
    assert found["machine"]["cores"] >= 1
    return found


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@pytest.mark.slow
def test_training() -> None:
    """We and PEFT do the same work, and every ratio is that of the two rates beside it."""
    found = report("training")
    assert found["settings"]["rank"] == 16
    assert found["loss_difference_per_token"] < 1e-3
    for ratios in ("speedup_batched", "speedup_over_peer_best"):
        assert list(found[ratios]) == ["1", "4", "16"]
        assert all(is_positive(value) for value in found[ratios].values())
    for runs, speedup in found["speedup_batched"].items():
        ratio = found["tokens_per_s"][runs] / found["peer_tokens_per_s"][runs]
        assert speedup == pytest.approx(ratio, rel=1e-2)
        best = found["tokens_per_s"][runs] / found["peer_best"]["tokens_per_s"]
        assert found["speedup_over_peer_best"][runs] == pytest.approx(best, rel=1e-2)
    stack = found["stack"][0]
    assert found["stack_speedup_16"] == stack["speedup"]
    assert is_positive(stack["steps_per_s_1"])
    assert is_positive(stack["steps_per_s_all"])
    assert stack["clients"] == 16
    parts = {"gateway", "trainer", "nats-server", "postgres", "stack_clients"}
    assert parts <= {part for part, spent_ms in stack["cpu_ms_per_step"].items() if spent_ms > 0}


@pytest.mark.slow
def test_hotload() -> None:
    """The new version answers on both sides, and no percentile is below its median."""
    found = report("hotload")
    assert found["settings"]["rank"] == 16
    for side in ("ours", "peer"):
        latency = found[side]
        assert all(is_positive(value) for value in latency.values())
        assert latency["beside_streams_ms_p99"] >= latency["beside_streams_ms"]
        assert latency["stream_gap_ms_max"] >= latency["stream_gap_ms_p99"]
        assert latency["stream_gap_ms_max"] >= latency["publish_gap_ms_max"]
    assert found["publish_to_first_token_ms"] == found["ours"]["beside_streams_ms"]
    ratio = found["peer"]["beside_streams_ms"] / found["ours"]["beside_streams_ms"]
    assert found["speedup"] == pytest.approx(ratio, rel=1e-2)
    assert found["settings"]["streams"] == 16


@pytest.mark.slow
def test_consistency() -> None:
    """Sampler and trainer agree far more closely than training has moved them."""
    found = report("consistency")
    assert found["tokens"] > 100
    assert 0 < found["mean_abs_logprob_diff"] <= found["max_abs_logprob_diff"] < 1e-3
    assert 0 <= found["kl"] < 1e-6
    assert found["moved_abs_logprob_mean"] > 100 * found["max_abs_logprob_diff"]


@pytest.mark.slow
def test_kernels() -> None:
    """Everybody agrees with float64, and every speed-up is that of the two times of its cell."""
    found = report("kernels")
    assert found["errors"] == []
    assert all(error < 1e-5 for error in found["parity"].values())
    for cell in found["cells"]:
        times = {row["contender"]: row["both_ms"] for row in cell["rows"]}
        assert all(is_positive(value) for value in times.values())
        if found["cpu_speedup"]:
            key = f"{cell['layout']} top{cell['chosen']} L{cell['adapters']}"
            ratio = times["loop"] / times["river"]
            assert found["cpu_speedup"][key] == pytest.approx(ratio, abs=0.01)


@pytest.mark.slow
def test_layers() -> None:
    """New adapters change no loss, all rates are there, and overheads are those of the times beside them."""
    found = report("layers")
    assert found["loss_difference_per_token"] < 1e-2
    assert found["adapter_weights"] > 0
    assert list(found["tokens_per_s"]) == ["frozen", "1", "4", "16"]
    assert all(is_positive(value) for value in found["tokens_per_s"].values())
    assert all(is_positive(value) for value in found["optimizer_ms_per_adapter"].values())
    times = found["forward_backward_ms"]
    for runs, percent in found["over_frozen_percent"].items():
        assert percent == pytest.approx(100 * (times[runs] / times["frozen"] - 1), abs=0.5)


@pytest.mark.slow
def test_gateway() -> None:
    """Every answer of the gateway is billed, and every ratio is that of the two rates beside it."""
    found = report("gateway")
    for name in ("requests_per_s", "cpu_us_per_request", "cpu_us_per_event", "memory_mb"):
        assert is_positive(found[name])
    assert found["recorded"] == found["billable"] > found["settings"]["memory_requests"]
    assert found["added_stream_p99_ms"] >= found["added_stream_p50_ms"]
    for peer, ratio in (("vllm_router", "vllm_router_ratio"), ("litellm", "litellm_ratio")):
        if found["peers"][peer] is None:
            assert found[ratio] is None
        else:
            rates = found["requests_per_s"] / found["peers"][peer]["requests_per_s"]
            assert found[ratio] == pytest.approx(rates, rel=1e-2)
    assert found["throughput_ratio"] is None  # there is no time for a real engine


@pytest.mark.slow
def test_billing() -> None:
    """Nothing is lost or doubled by kills that hit events on their way, and the speed-up is over the best peer."""
    found = report("billing")
    zero = ("lost", "doubled", "wrong_nano_usd", "ledger_differences", "deadlocks")
    assert all(found[name] == 0 for name in zero)
    assert found["killed_mid_work"]
    assert found["lines_per_s"] > found["events_per_s"] > 0
    assert all(is_positive(cost) for cost in found["cpu_us_per_event"].values())
    best = max(found["peers"].values())
    assert found["speedup"] == pytest.approx(found["events_per_s"] / best, rel=1e-2)


@pytest.mark.slow
def test_dashboard() -> None:
    """Every page is shown on a platform that has been in use, and what took too long is named."""
    found = report("dashboard")
    assert {
        "overview",
        "runs",
        "run",
        "checkpoints",
        "checkpoint",
        "usage",
        "invoice",
        "engines",
        "engine",
        "trainer",
        "health",
        "keys",
    } <= set(found["median_ms"])
    assert all(is_positive(value) for value in found["median_ms"].values())
    for page, value in found["median_ms"].items():
        assert value <= found["slowest_ms"][page]
    assert len(found["missed"]) == sum(
        value > found["goal_ms"]
        for page, value in found["median_ms"].items()
        if page not in ("run series", "usage csv")
    )
    assert found["pictures"] == 0


def test_routing() -> None:
    """Ours loads adapters less than half as often as others, answers sooner, and loses nothing when engines die."""
    found = report("routing")
    assert found["settings"]["engines"] == 64
    assert found["settings"]["adapters"] == 5000
    for load in found["loads"]:
        ways = load["ways"]
        assert set(ways) == {"river", "least_outstanding", "round_robin", "random"}
        ours = ways.pop("river")
        assert ours["lost"] == 0
        for theirs in ways.values():
            assert ours["cold_loads"] < 0.5 * theirs["cold_loads"]
            assert ours["prefix_hits"] > 1.5 * theirs["prefix_hits"]
            assert ours["p99_s"] < theirs["p99_s"]
            assert ours["first_token_p99_s"] < theirs["first_token_p99_s"]
    assert found["cold_loads_ratio"]["random"] < 0.5
    assert is_positive(found["choose_us"]["64"])


def test_every_benchmark_is_tested() -> None:
    """A benchmark that is added is added here too."""
    assert all(f"test_{name}" in globals() for name in BENCHMARKS)


def test_cases_take_turns() -> None:
    """Every round has every case once, and the order turns around each time."""
    order: list[str] = []

    def case(name: str, value: float) -> float:
        order.append(name)
        return value

    found = alternating({"a": lambda: case("a", 1.0), "b": lambda: case("b", 2.0)}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize(("percent", "expected"), [(1, 1.0), (50, 50.0), (99, 99.0), (100, 100.0)])
def test_percentile(percent: float, expected: float) -> None:
    """The value that so many do not exceed, which is one of those measured."""
    assert percentile([float(value) for value in range(100, 0, -1)], percent) == expected


def test_significant_digits() -> None:
    """Large and small numbers keep four digits."""
    assert significant(123456.0) == 123500.0
    assert significant(0.000123456) == 0.0001235


def test_gaps_are_within_a_stream() -> None:
    """A pause between two requests is no gap of either."""
    from river_ops.bench.hotload import gaps_of  # noqa: PLC0415 - its imports are slow

    arrivals = Arrivals(requests=[[1.0, 1.5, 3.0], [9.0], []])
    assert list(gaps_of(arrivals)) == [(1.0, 1.5), (1.5, 3.0)]
