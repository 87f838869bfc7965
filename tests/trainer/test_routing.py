"""Replaying a sampler's experts, on the tiny model and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from river_trainer.adapter import Adapter, new_adapter
from river_trainer.base_model import BaseModel
from river_trainer.errors import InvalidTaskError
from river_trainer.gradients import GradientPool
from river_trainer.lanes import Lanes
from river_trainer.losses import find_loss
from river_trainer.packing import TrainingSequence, decode_sequence
from river_trainer.passes import JobOutput, Passes
from river_trainer.protocol import AdapterShape, Sequence
from river_trainer.routing import (
    Flips,
    RoutedExperts,
    gate_renormalises,
    gate_weights,
    pass_routing,
)
from river_trainer.strands import Job

SHAPE = AdapterShape(
    rank=4,
    alpha=32.0,
    seed=1,
    train_attn=True,
    train_mlp=True,
    train_unembed=True,
    expert_layout="shared_outer",
)
LAYERS, EXPERTS, PER_TOKEN = 4, 8, 2


@pytest.fixture(scope="module")
def base(tiny_moe: Path) -> BaseModel:
    return BaseModel(tiny_moe)


def moved_adapter(base: BaseModel, seed: int = 0) -> Adapter:
    """An adapter that changes every site."""
    adapter = new_adapter(base.sites, SHAPE)
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.tensors.values():
        tensor.normal_(0.0, 0.05, generator=generator)
    return adapter.at(base.home)


def random_routing(seed: int, tokens: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    order = generator.random((tokens, LAYERS, EXPERTS)).argsort(-1)
    return order[..., :PER_TOKEN].astype("u1")


def sequence_of(
    base: BaseModel, seed: int, tokens: int, routing: np.ndarray | None = None
) -> TrainingSequence:
    ids = np.random.default_rng(seed).integers(5, 500, tokens).astype("<i4")
    return decode_sequence(
        Sequence(
            input_ids=ids.tobytes(), expert_routing=None if routing is None else routing.tobytes()
        ),
        index=0,
        vocab_size=512,
        context_length=512,
        routed_experts=base.routed_experts,
    )


def run(base: BaseModel, jobs: list[Job]) -> list[JobOutput]:
    lanes = Lanes(2)
    try:
        return Passes(base, lanes, GradientPool(), tokens_max=4096, piece_tokens=64).run(jobs)
    finally:
        lanes.close()


def job(base: BaseModel, sequences: list[TrainingSequence], *, replay: bool, seed: int = 0) -> Job:
    loss = find_loss("cross_entropy", {})
    return Job(moved_adapter(base, seed), sequences, loss, backward=True, replay=replay)


def chosen(base: BaseModel, sequence: TrainingSequence, seed: int = 0) -> np.ndarray:
    """What the trainer's own routers choose, [T, layers, K]."""
    seen: list[torch.Tensor] = []
    routers = [m for m in base._model.modules() if hasattr(m, "top_k")]
    hooks = [r.register_forward_hook(lambda _m, _i, out: seen.append(out[2])) for r in routers]
    run(base, [job(base, [sequence], replay=False, seed=seed)])
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1).numpy().astype("u1")


def test_the_tiny_model_can_be_replayed(base: BaseModel) -> None:
    """Its facts are those of its configuration."""
    assert base.routed_experts == RoutedExperts(EXPERTS, LAYERS, PER_TOKEN)


def test_replaying_one_s_own_choice_changes_nothing(base: BaseModel) -> None:
    """Log-probabilities and gradients keep their bits, for the weights are computed by the gate's own rule."""
    sequences = [sequence_of(base, seed, 40 + seed) for seed in range(3)]
    routed = [sequence_of(base, i, s.tokens, chosen(base, s)) for i, s in enumerate(sequences)]
    (plain,) = run(base, [job(base, sequences, replay=False)])
    (compared,) = run(base, [job(base, routed, replay=False)])
    (replayed,) = run(base, [job(base, routed, replay=True)])
    assert plain.flips == Flips()
    assert compared.flips == Flips(0, 0, LAYERS * sum(s.tokens - 1 for s in sequences), PER_TOKEN)
    assert replayed.flips == compared.flips
    assert plain.gradient is not None
    for output in (compared, replayed):
        assert output.gradient is not None
        torch.testing.assert_close(output.gradient.flat, plain.gradient.flat, rtol=0, atol=0)
        for one, other in zip(output.logprobs, plain.logprobs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_given_experts_are_used(base: BaseModel) -> None:
    """With other experts than its own the model is that whose routers choose them, gradients included."""
    routing = random_routing(3, 50)
    sequence = sequence_of(base, 3, 50, routing)
    own = chosen(base, sequence)
    expected_flips = int((np.sort(own) != np.sort(routing))[:-1].any(-1).sum())
    missing = [
        len(set(given) - set(chose))
        for given, chose in zip(
            routing[:-1].reshape(-1, PER_TOKEN).tolist(),
            own[:-1].reshape(-1, PER_TOKEN).tolist(),
            strict=True,
        )
    ]
    (compared,) = run(base, [job(base, [sequence], replay=False)])
    assert compared.flips == Flips(expected_flips, sum(missing), LAYERS * 49, PER_TOKEN)
    metrics = compared.metrics(find_loss("cross_entropy", {}))
    assert metrics["expert_flip"] == pytest.approx(expected_flips / (LAYERS * 49))
    assert metrics["expert_slot_flip"] == pytest.approx(sum(missing) / (LAYERS * 49 * PER_TOKEN))
    (replayed,) = run(base, [job(base, [sequence], replay=True)])
    # The gate of the first layer has not seen yet what the replay changes.
    assert replayed.flips.different > 0
    assert replayed.flips.compared == compared.flips.compared

    def router(layer: int, module: Any) -> Any:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = hidden @ module.weight.T
            given = torch.from_numpy(routing[:, layer].astype(np.int64))
            share = logits.softmax(-1).gather(1, given)
            return logits, share / share.sum(-1, keepdim=True), given

        return forward

    routers = [m for m in base._model.modules() if hasattr(m, "top_k")]
    originals = [module.forward for module in routers]
    try:
        for layer, module in enumerate(routers):
            module.forward = router(layer, module)
        (expected,) = run(base, [job(base, [sequence], replay=False)])
    finally:
        for module, original in zip(routers, originals, strict=True):
            module.forward = original
    torch.testing.assert_close(replayed.logprobs[0], expected.logprobs[0], rtol=0, atol=1e-6)
    assert replayed.gradient is not None
    assert expected.gradient is not None
    difference = (replayed.gradient.flat - expected.gradient.flat).norm()
    assert difference < 1e-5 * expected.gradient.flat.norm()
    difference = (replayed.logprobs[0] - compared.logprobs[0]).abs().max()
    assert difference > 0.1, "the random experts changed nothing, so the test shows nothing"


def test_a_mixed_pass_gives_every_job_its_own(base: BaseModel) -> None:
    """Jobs that replay, that only compare and that know nothing get the bits they get alone."""
    jobs = [
        job(base, [sequence_of(base, 1, 30, random_routing(1, 30))], replay=True, seed=1),
        job(base, [sequence_of(base, 2, 40)], replay=False, seed=2),
        job(
            base,
            [sequence_of(base, 3, 20, random_routing(3, 20)), sequence_of(base, 4, 25)],
            replay=False,
            seed=3,
        ),
    ]
    together = run(base, jobs)
    for mixed, alone in zip(together, (run(base, [each])[0] for each in jobs), strict=True):
        assert mixed.flips == alone.flips
        assert mixed.gradient is not None
        assert alone.gradient is not None
        assert torch.equal(mixed.gradient.flat, alone.gradient.flat)
        for one, other in zip(mixed.logprobs, alone.logprobs, strict=True):
            assert torch.equal(one, other)
    assert [output.flips.compared for output in together] == [29 * LAYERS, 0, 19 * LAYERS]


def test_gradients_flow_through_replayed_gates() -> None:
    """The weights of given experts carry the gradient of the softmax over all experts."""
    logits = torch.randn(5, EXPERTS, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[3, 1]] * 5)
    upstream = torch.randn(5, 2)
    (gate_weights(logits, experts, renormalise=True) * upstream).sum().backward()
    got = logits.grad
    shares = logits.detach().clone().requires_grad_()
    chosen_exp = shares.exp()[:, [3, 1]]
    (chosen_exp / chosen_exp.sum(1, keepdim=True) * upstream).sum().backward()
    assert shares.grad is not None
    torch.testing.assert_close(got, shares.grad, rtol=1e-4, atol=1e-6)


class Router(torch.nn.Module):
    """A router of the usual kind, but for its rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, 16))
        self.rule = rule

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = hidden @ self.weight.T
        scores = logits.sigmoid() if self.rule == "sigmoid" else logits.softmax(-1)
        weights, experts = scores.topk(PER_TOKEN)
        if self.rule == "renormalised":
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts


@pytest.mark.parametrize(
    ("rule", "expected"), [("renormalised", True), ("plain", False), ("sigmoid", None)]
)
def test_a_gate_s_rule_is_found_out(rule: str, expected: bool | None) -> None:
    """A router whose weights follow another rule is not replayed by the wrong one."""
    assert gate_renormalises(Router(rule)) is expected


def test_the_last_token_goes_where_it_likes() -> None:
    """Its row is filler, and so are those of sequences that have no routing."""
    given = torch.tensor([[[3, 4]], [[5, 6]], [[0, 0]]], dtype=torch.uint8)
    routing = pass_routing([[given, None]], [[3, 2]], [True])
    assert routing is not None
    logits = torch.randn(5, EXPERTS)
    own = torch.tensor([[1, 2]] * 5)
    answer = (logits, torch.zeros(5, 2), own)
    _, weights, experts = routing.route(0, slice(0, 5), [True], answer, renormalise=False)
    assert experts.tolist() == [[3, 4], [5, 6], [1, 2], [1, 2], [1, 2]]
    assert torch.equal(weights, logits.softmax(-1).gather(1, experts))
    assert pass_routing([[None]], [[3]], [False]) is None


@pytest.mark.parametrize("rows", [49, 51])
def test_routing_of_another_length_is_refused(base: BaseModel, rows: int) -> None:
    """What the gateway should have refused is refused by name."""
    with pytest.raises(InvalidTaskError) as refused:
        sequence_of(base, 1, 50, random_routing(1, rows))
    assert refused.value.param == "data[0].expert_routing"
    outside = random_routing(1, 50)
    outside[7, 1, 0] = EXPERTS
    with pytest.raises(InvalidTaskError, match="outside 0 to 7"):
        sequence_of(base, 1, 50, outside)


def test_bfloat16_trains(tiny_moe: Path, base: BaseModel) -> None:
    """With a bfloat16 model adapters and gradients stay float32 and point the same way."""
    rounded = BaseModel(tiny_moe, torch.bfloat16)
    outputs: list[JobOutput] = []
    for model in (base, rounded):
        routing = chosen(base, sequence_of(base, 5, 60))
        (output,) = run(model, [job(model, [sequence_of(model, 5, 60, routing)], replay=True)])
        outputs.append(output)
    exact, approximate = (output.gradient for output in outputs)
    assert exact is not None
    assert approximate is not None
    assert approximate.flat.dtype == torch.float32
    cosine = torch.cosine_similarity(exact.flat, approximate.flat, dim=0)
    assert cosine > 0.99
    difference = (outputs[0].logprobs[0] - outputs[1].logprobs[0]).abs().max()
    assert 0 < difference < 1.0
