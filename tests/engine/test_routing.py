"""Which experts the engine says its tokens went to, against those of transformers and PEFT for the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from river_engine.main import EXIT_UNFIT
from river_engine.protocol import AdapterRef, EngineSampleGroup, EngineSequence

from .conftest import BASE_MODEL, TOKEN, RunningEngine, running_engine
from .reference import chosen_experts

MakeAdapter = Callable[..., AdapterRef]
LAYERS, EXPERTS_PER_TOKEN = 4, 2


def routing_of(sample: EngineSequence) -> np.ndarray:
    """[T, layers, K]; T counts the prompt's tokens and the sampled ones."""
    routing = sample.expert_routing
    assert routing is not None
    assert routing.dtype == "uint8"
    return np.frombuffer(routing.data, dtype=routing.dtype).reshape(routing.shape)


def different(path: Path, adapter: AdapterRef | None, group: EngineSampleGroup) -> tuple[int, int]:
    """How many (token, layer) of a group have other experts than transformers chooses, and how many there are."""
    flips, total = 0, 0
    for sample in group.samples:
        tokens = group.prompt_token_ids + sample.tokens
        routing = routing_of(sample)
        assert routing.shape == (len(tokens), LAYERS, EXPERTS_PER_TOKEN)
        assert not routing[-1].any(), "the model never ran over the last token"
        expected = np.sort(chosen_experts(path, adapter, tokens), axis=-1)[:-1]
        flips += int((np.sort(routing, axis=-1)[:-1] != expected).any(-1).sum())
        total += expected.shape[0] * expected.shape[1]
    return flips, total


def prompt_of(seed: int, tokens: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 500, tokens)]


@pytest.fixture(scope="session")
def adapters(make_adapter: MakeAdapter) -> list[AdapterRef | None]:
    """The base model, and adapters on everything, on experts alone and on attention alone."""
    return [
        None,
        make_adapter(seed=31),
        make_adapter(seed=32, only=".experts"),
        make_adapter(seed=33, only=".self_attn."),
    ]


@pytest.fixture(scope="module")
def small_engine(
    tiny_moe: Path, nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """One that can hold the keys of 1500 tokens."""
    directory = tmp_path_factory.mktemp("small-engine")
    with running_engine(tiny_moe, nats_url, directory, RIVER_KV_CACHE_MB="3") as running:
        yield running


@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "everything", "experts"])
def test_routing_is_that_of_transformers(
    engine: RunningEngine, tiny_moe: Path, adapters: list[AdapterRef | None], which: int
) -> None:
    """In float32 every token of every layer went where transformers sends it, for several samples of one prompt."""
    group = engine.sample(
        prompt_token_ids=[prompt_of(which, 70)],
        adapter=adapters[which],
        num_samples=3,
        max_tokens=20,
        return_expert_routing=True,
    ).groups[0]
    assert len({tuple(sample.tokens) for sample in group.samples}) > 1
    flips, total = different(tiny_moe, adapters[which], group)
    assert flips == 0, f"{flips} of {total}"


def test_cached_prefixes_keep_their_routing(engine: RunningEngine, tiny_moe: Path) -> None:
    """Blocks that another request computed bring their experts along, whoever computed those without asking."""
    prefix = prompt_of(7, 64)
    prompts = [[*prefix, *prompt_of(seed, 9)] for seed in (8, 9)]
    fields = {"max_tokens": 4, "return_expert_routing": True}
    # Somebody who does not ask leaves the same prefix in the cache, of which nothing is known.
    engine.sample(prompt_token_ids=prompts[:1], max_tokens=4)
    for number, prompt in enumerate(prompts):
        group = engine.sample(prompt_token_ids=[prompt], **fields).groups[0]
        assert group.cached_prompt_tokens == (64 if number else 0)
        assert different(tiny_moe, None, group)[0] == 0


def test_nobody_gets_what_was_not_asked_for(engine: RunningEngine) -> None:
    """Without the flag there is no routing, also while others ask."""

    def ask(number: int) -> list[bool]:
        groups = engine.sample(
            prompt_token_ids=[prompt_of(number, 30)],
            max_tokens=24,
            return_expert_routing=number % 2 == 0,
        ).groups
        return [sample.expert_routing is not None for sample in groups[0].samples]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [[True], [False]] * 4


@pytest.mark.parametrize("cache", ["large", "small"])
def test_mixed_batches_do_not_mix_up_their_routing(
    engine: RunningEngine,
    small_engine: RunningEngine,
    tiny_moe: Path,
    adapters: list[AdapterRef | None],
    cache: str,
) -> None:
    """Base and three adapters at once, of many lengths, also where the cache is too small and vLLM starts over."""
    asked = small_engine if cache == "small" else engine

    def ask(number: int) -> EngineSampleGroup:
        return asked.sample(
            prompt_token_ids=[prompt_of(100 + number, 20 + 61 * (number % 13))],
            adapter=adapters[number % len(adapters)],
            num_samples=2,
            max_tokens=24 + 16 * (number % 5),
            return_expert_routing=True,
        ).groups[0]

    with ThreadPoolExecutor(8) as pool:
        groups = list(pool.map(ask, range(32)))
    counts = [
        different(tiny_moe, adapters[number % len(adapters)], group)
        for number, group in enumerate(groups)
    ]
    flips, total = np.sum(counts, axis=0)
    assert total > 50_000
    # Two experts may be nearer to each other than float32 tells apart; mixed up rows would differ nearly everywhere.
    assert flips <= total * 1e-4, f"{flips} of {total}"
    assert (asked.preemptions() > 0) == (cache == "small")


def test_an_engine_that_cannot_record_does_not_start(tiny_moe: Path, tmp_path: Path) -> None:
    """Told to record as on a GPU where there is no second model runner, it gives vLLM's reason and is not restarted."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RIVER_BASE_MODEL": BASE_MODEL,
        "RIVER_MODEL_PATH": str(tiny_moe),
        "RIVER_ENGINE_TOKEN": TOKEN,
        "RIVER_DATA_DIR": str(tmp_path),
        "RIVER_PORT": "0",
        "RIVER_DEVICE": "gpu",
        "RIVER_EXPERT_ROUTING": "1",
    }
    command = [sys.executable, "-m", "river_engine.main"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == EXIT_UNFIT
    assert "RIVER_EXPERT_ROUTING is not possible here" in ended.stderr
    assert "requires Model Runner V2" in ended.stderr


def test_a_stop_string_ends_routing_with_the_text(engine: RunningEngine, tiny_moe: Path) -> None:
    """A sample that its text ends, which vLLM's core learns of afterwards, has the rows of its own tokens."""
    group = engine.sample(
        prompts=["12+30="],
        num_samples=8,
        max_tokens=60,
        stop=["1", "2", "e"],
        return_expert_routing=True,
    ).groups[0]
    assert {sample.stop_reason for sample in group.samples} >= {"stop"}
    assert different(tiny_moe, None, group)[0] == 0
