"""A real engine and the trainer's model on the same tokens: who goes where, and what replay is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pytest
import torch

from river_engine.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from river_engine.protocol import AdapterRef, EngineSampleGroup
from river_trainer.adapter import Adapter, adapter_from, new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import find_loss
from river_trainer.packing import decode_sequence
from river_trainer.passes import Passes
from river_trainer.peft_files import import_adapter
from river_trainer.protocol import AdapterShape
from river_trainer.protocol import Sequence as TaskSequence
from river_trainer.routing import Flips
from river_trainer.strands import Job

from .conftest import RunningEngine, running_engine

PROMPTS = np.random.default_rng(5).integers(5, 500, (32, 24)).tolist()
"""Of random tokens: what comes after them is uncertain, so that rounding shows."""
NOTHING = AdapterShape(
    rank=1,
    alpha=1.0,
    seed=0,
    train_attn=True,
    train_mlp=False,
    train_unembed=False,
    expert_layout="per_expert",
)


@dataclass(frozen=True)
class Judgement:
    """Trainer less sampler, of every sampled token, and the tokens that went elsewhere."""

    differences: np.ndarray
    flips: Flips

    @property
    def largest(self) -> float:
        return float(np.abs(self.differences).max())


def judge(
    base: BaseModel, adapter: Adapter, groups: Sequence[EngineSampleGroup], *, replay: bool
) -> Judgement:
    """What the trainer says of an engine's samples."""
    samples = [(group.prompt_token_ids, sample) for group in groups for sample in group.samples]
    sequences = []
    for index, (prompt, sample) in enumerate(samples):
        assert sample.expert_routing is not None
        data = TaskSequence(
            input_ids=np.array(prompt + sample.tokens, "<i4").tobytes(),
            expert_routing=sample.expert_routing.data,
        )
        sequences.append(
            decode_sequence(
                data,
                index=index,
                vocab_size=base.vocab_size,
                context_length=base.context_length,
                routed_experts=base.routed_experts,
            )
        )
    loss = find_loss("cross_entropy", {})
    lanes = Lanes(1)
    try:
        passes = Passes(base, lanes, GradientPool(), tokens_max=4096, piece_tokens=1024)
        (output,) = passes.run([Job(adapter, sequences, loss, backward=False, replay=replay)])
    finally:
        lanes.close()
    differences = [
        logprobs.numpy()[len(prompt) - 1 : -1] - np.array(sample.logprobs)
        for (prompt, sample), logprobs in zip(samples, output.logprobs, strict=True)
    ]
    return Judgement(np.concatenate(differences), output.flips)


def trainer_adapter(base: BaseModel, ref: AdapterRef | None) -> Adapter:
    """The engine's adapter as the trainer has it; one that does nothing for the base model."""
    if ref is None:
        return new_adapter(base.sites, NOTHING).at(base.home)
    directory = Path(unquote(urlsplit(ref.location).path))
    files = {name: (directory / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    shape, tensors = import_adapter(files, base.sites, seed=0)
    return adapter_from(base.sites, shape, tensors).at(base.home)


def samples_of(engine: RunningEngine, adapter: AdapterRef | None) -> list[EngineSampleGroup]:
    return engine.sample(
        prompt_token_ids=PROMPTS,
        adapter=adapter,
        num_samples=4,
        max_tokens=64,
        seed=1,
        return_expert_routing=True,
    ).groups


@pytest.fixture(scope="module")
def rounded_engine(
    tiny_moe: Path, nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """One in bfloat16."""
    directory = tmp_path_factory.mktemp("rounded-engine")
    with running_engine(tiny_moe, nats_url, directory, RIVER_DTYPE="bfloat16") as running:
        yield running


@pytest.mark.parametrize("which", ["base", "everything", "attention and experts"])
def test_in_float32_trainer_and_engine_choose_the_same_experts(
    engine: RunningEngine, tiny_moe: Path, make_adapter: Callable[..., AdapterRef], which: str
) -> None:
    """No token of any layer flips, with several samples of prompts that share a beginning."""
    only = "layers" if which == "attention and experts" else ""
    ref = None if which == "base" else make_adapter(seed=51, std=0.05, only=only)
    groups = samples_of(engine, ref)
    base = BaseModel(tiny_moe)
    judgement = judge(base, trainer_adapter(base, ref), groups, replay=False)
    assert judgement.flips.compared > 20_000
    assert judgement.flips.different <= 1, "two experts may be nearer than float32 can tell"
    assert judgement.largest < 1e-3


@pytest.mark.parametrize("which", ["base", "adapters"])
def test_replay_takes_away_the_largest_differences_of_bfloat16(
    rounded_engine: RunningEngine,
    tiny_moe: Path,
    make_adapter: Callable[..., AdapterRef],
    which: str,
) -> None:
    """Sampler and trainer in bfloat16 differ at most a third as much when the trainer uses the sampler's experts.

    Of one adapter few tokens flip, and how much they matter is chance; four together tell.
    """
    base = BaseModel(tiny_moe, torch.bfloat16)
    plain, replayed = _Differences(), _Differences()
    for seed in (None,) if which == "base" else (52, 53, 54, 55):
        ref = None if seed is None else make_adapter(seed=seed, std=0.03)
        groups = samples_of(rounded_engine, ref)
        adapter = trainer_adapter(base, ref)
        without = judge(base, adapter, groups, replay=False)
        assert 0 < without.flips.different < without.flips.compared * 0.05
        with_replay = judge(base, adapter, groups, replay=True)
        # Where the router would have gone is counted in a replay too, though the tokens went elsewhere.
        assert with_replay.flips.compared == without.flips.compared
        assert 0 < with_replay.flips.different < with_replay.flips.compared * 0.05
        plain.add(without)
        replayed.add(with_replay)
    for share in (0.999, 1.0):
        assert plain.quantile(share) >= 3 * replayed.quantile(share)


class _Differences:
    """Absolute differences of log-probabilities over several judgements."""

    def __init__(self) -> None:
        self._found: list[npt.NDArray[np.float64]] = []

    def add(self, judgement: Judgement) -> None:
        self._found.append(np.abs(judgement.differences))

    def quantile(self, share: float) -> float:
        return float(np.quantile(np.concatenate(self._found), share))
